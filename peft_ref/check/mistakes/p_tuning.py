"""P-tuning: what is asked, and what ports get wrong. The LSTM's mistakes are in check/lstm_mistakes.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check.case import Answer, Case
from peft_ref.check.encoder_family import relu, without
from peft_ref.check.lstm_mistakes import is_lstm, lstm_mistakes
from peft_ref.check.mistake import Mistake, Suite, as_if_tensors, only, reread
from peft_ref.check.oracle import answer
from peft_ref.check.prompt_family import batch_mistakes, other_prompt, splice_mistakes, splice_variants
from peft_ref.check.prompting import PromptProblem, PromptVariant
from peft_ref.methods.lstm import lstm
from peft_ref.prompts import EMBEDDING, SAVED

SIZES = {"num_transformer_submodules": 1, "num_attention_heads": 1, "num_layers": 2}
MLP = {**SIZES, "num_virtual_tokens": 3, "token_dim": 5, "encoder_hidden_size": 4}
LSTM = {**SIZES, "num_virtual_tokens": 3, "token_dim": 5, "encoder_hidden_size": 2, "encoder_reparameterization_type": "LSTM"}
DROPPED = {**LSTM, "encoder_dropout": 0.75}
GRADIENT = ("prompt", "prompt_backward")

VARIANTS = (
    PromptVariant(name="mlp", clause="PTUNING-C2", config=MLP),
    PromptVariant(name="mlp-two-sides", clause="PTUNING-C1", config={**MLP, "num_transformer_submodules": 2}, operations=("prompt",)),
    PromptVariant(name="mlp-five-layers", clause="PTUNING-C3", config={**MLP, "encoder_num_layers": 5}, operations=("prompt",)),
    PromptVariant(name="lstm", clause="PTUNING-C5", config={**LSTM, "encoder_num_layers": 1}),
    PromptVariant(name="lstm-two-layers", clause="PTUNING-C8", config=LSTM),
    PromptVariant(
        name="lstm-two-sides",
        clause="PTUNING-C1",
        config={**LSTM, "encoder_num_layers": 1, "num_transformer_submodules": 2},
        operations=("prompt",),
    ),
    PromptVariant(name="lstm-two-layers-dropout", clause="PTUNING-C10", config=DROPPED, operations=GRADIENT, dropout=True),
    PromptVariant(
        name="lstm-three-layers-dropout",
        clause="PTUNING-C10",
        config={**DROPPED, "encoder_num_layers": 3, "encoder_dropout": 0.25},
        operations=GRADIENT,
        dropout=True,
    ),
    # One row, walked in both directions alike; p = 1/2, which is 1 - p.
    PromptVariant(
        name="lstm-one-row",
        clause="PTUNING-C5",
        config={**LSTM, "num_virtual_tokens": 1, "encoder_num_layers": 1},
        operations=GRADIENT,
        batch=1,
    ),
    PromptVariant(name="lstm-half", clause="PTUNING-C10", config={**LSTM, "encoder_dropout": 0.5}, operations=("prompt",), dropout=True),
    PromptVariant(name="inference", clause="PTUNING-C12", config={**MLP, "inference_mode": True}),
    *splice_variants(MLP, "PROMPTTUNING-C6"),
)


def _dense(
    activation: Callable[[Array], Array], at_end: Callable[[Array], Array] = lambda x: x, skipped: int | None = None
) -> Callable[[PromptProblem], Array]:
    """The encoder with another activation, one more, or a dense layer less."""

    def prompt(p: PromptProblem) -> Array:
        x, t = p.tensors[EMBEDDING], p.tensors
        if is_lstm(p):
            scale = 1 - getattr(p.method, "encoder_dropout")  # noqa: B009  # a field of P-tuning's alone
            x = lstm(t, x, p.method.size("encoder_num_layers"), [mask / scale for mask in p.ctx.dropout])
        layers = [k for k in (0, 2, 4) if f"mlp_head.{k}.weight" in t and k != skipped]
        for k in layers:
            x = x @ t[f"mlp_head.{k}.weight"].T + t[f"mlp_head.{k}.bias"]
            x = at_end(x) if k == layers[-1] else activation(x)
        return np.broadcast_to(x, (p.ctx.batch, *x.shape))

    return prompt


def _encodes(p: PromptProblem) -> bool:
    return "mlp_head.0.weight" in p.tensors


def _has_three(p: PromptProblem) -> bool:
    return "mlp_head.4.weight" in p.tensors


def _own_table(case: Case) -> Answer | None:
    E = case.adapters[0].tensors[EMBEDDING]
    return {**answer(case), SAVED: E}


SUITE = Suite(
    variants=(),
    prompts=VARIANTS,
    mistakes=(
        Mistake(
            name="relu-missing",
            clause="PTUNING-C4",
            sentence="there is nothing between the dense layers",
            replay=other_prompt(_dense(lambda x: x), _encodes),
        ),
        Mistake(
            name="tanh-for-relu",
            clause="PTUNING-C4",
            sentence="tanh stands between the dense layers, as in a prefix's projection, instead of relu",
            replay=other_prompt(_dense(np.tanh), _encodes),
        ),
        Mistake(
            name="relu-at-end",
            clause="PTUNING-C4",
            sentence="relu comes after the last dense layer too, so no entry of the prompt is negative",
            replay=other_prompt(_dense(relu, relu), _encodes),
        ),
        Mistake(
            name="middle-layer-missing",
            clause="PTUNING-C3",
            sentence="the MLP has two dense layers, mlp_head.0 and mlp_head.4, because encoder_num_layers is 2 or for another reason",
            replay=other_prompt(_dense(relu, skipped=2), _has_three),
        ),
        Mistake(
            name="dense-biases-missing",
            clause="PTUNING-C2",
            sentence="the dense layers have no bias",
            replay=without(*(f"mlp_head.{k}.bias" for k in (0, 2, 4))),
        ),
        Mistake(
            name="first-bias-missing",
            clause="PTUNING-C2",
            sentence="the first dense layer has no bias",
            replay=without("mlp_head.0.bias"),
        ),
        Mistake(
            name="weights-transposed",
            clause="PTUNING-C2",
            sentence="the numbers of the dense layers' weights are read as (in, out) instead of (out, in)",
            replay=reread("mlp_head"),
        ),
        Mistake(
            name="square-weight-transposed",
            clause="PTUNING-C2",
            sentence="the one dense layer whose weight is square multiplies by its transpose; the others' shapes would have complained",
            replay=as_if_tensors(lambda key, v, config: v.T if "mlp_head" in key and v.ndim == 2 and v.shape[0] == v.shape[1] else v),
        ),
        *lstm_mistakes(
            gate="PTUNING-C5", bias="PTUNING-C6", walk="PTUNING-C7", layers="PTUNING-C8", dropout="PTUNING-C10", gradient="PTUNING-C16"
        ),
        Mistake(
            name="encoder-input-saved",
            clause="PTUNING-C13",
            sentence="a file gets what enters the encoder instead of the prompt that comes out",
            replay=only(saved=_own_table),
        ),
        *batch_mistakes("PTUNING-C17"),
        *splice_mistakes(
            {"embeddings": "PROMPTTUNING-C6", "mask": "PROMPTTUNING-C8", "labels": "PROMPTTUNING-C9", "types": "PROMPTTUNING-C11"}
        ),
    ),
)
