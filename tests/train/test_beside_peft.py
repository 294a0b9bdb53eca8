"""Twenty steps of training beside transformers, PEFT and torch's AdamW, in float64: losses and what is saved stay together."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.hf

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from peft_ref.errors import ConfigError  # noqa: E402
from peft_ref.files.adapter import all_tensors, load_config  # noqa: E402
from peft_ref.files.config import from_dict  # noqa: E402
from peft_ref.methods import METHODS  # noqa: E402
from peft_ref.model import adapt, load  # noqa: E402
from peft_ref.nn import Inputs  # noqa: E402
from peft_ref.nn.optim import AdamW  # noqa: E402
from peft_ref.nn.schedules import linear  # noqa: E402
from peft_ref.nn.tree import leaves  # noqa: E402
from peft_ref.prompts import Context, Prompt  # noqa: E402
from peft_ref.train import Batch, Recipe, State, Training, begin, file_of, learner_of, start, step  # noqa: E402
from peft_ref.train.dropout import row_drops, with_dropout  # noqa: E402
from tests.nn.beside_hf import all_close, close, float64, pair, scatter, share_again, to_torch  # noqa: E402
from tests.train.beside_methods import APART, BESIDE  # noqa: E402

STEPS, CLOSE = 20, 1e-8
LLAMA = {
    "vocab_size": 17,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "pad_token_id": None,
}
GPT2 = {"vocab_size": 17, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 31, "pad_token_id": None}
BERT = {
    "vocab_size": 17,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 9,
    "pad_token_id": None,
    "num_labels": 3,
}
T5 = {
    "vocab_size": 17,
    "d_model": 12,
    "d_kv": 4,
    "d_ff": 10,
    "num_layers": 2,
    "num_heads": 3,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
}
SIZES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "tied llama": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "bert": ("BertForSequenceClassification", BERT),
    "t5": ("T5ForConditionalGeneration", T5),
}
CAUSAL, N = "CAUSAL_LM", {"num_virtual_tokens": 3}
CPT = {
    "cpt_token_ids": [7, 3, 10, 5, 2, 9],
    "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 8],
    "opt_projection_epsilon": 2.0,
    "opt_projection_format_epsilon": 8.0,
}
Q, R = ["q_proj", "v_proj", "down_proj"], {"r": 3, "lora_alpha": 7}


class Case(NamedTuple):
    config: Any
    options: dict[str, Any]
    model: str = "llama"
    steps: int = STEPS
    accumulate: int = 1  # micro-batches of a step
    task: str = CAUSAL


CASES: Mapping[str, Case] = {
    "lora": Case(peft.LoraConfig, {**R, "target_modules": Q}),
    "dora": Case(peft.LoraConfig, {**R, "target_modules": Q, "use_dora": True}),
    "loha": Case(peft.LoHaConfig, {"r": 2, "alpha": 3, "target_modules": Q}),
    "lokr": Case(peft.LoKrConfig, {"r": 2, "alpha": 3, "decompose_factor": 3, "target_modules": Q}),
    "hira": Case(peft.HiraConfig, {"r": 3, "target_modules": Q}),
    "gralora": Case(peft.GraloraConfig, {"r": 4, "alpha": 6, "hybrid_r": 2, "target_modules": Q}),
    "miss": Case(peft.MissConfig, {"r": 5, "target_modules": Q}),
    "miss mini": Case(peft.MissConfig, {"r": 5, "mini_r": 2, "init_weights": "mini", "target_modules": Q}),
    "miss bat": Case(peft.MissConfig, {"r": 2, "init_weights": "bat", "target_modules": Q}),
    "ia3": Case(peft.IA3Config, {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "adalora": Case(
        peft.AdaLoraConfig,
        {"init_r": 4, "target_r": 2, "tinit": 3, "tfinal": 5, "deltaT": 2, "total_step": STEPS, "target_modules": Q},
    ),
    "whole modules and biases": Case(
        peft.LoraConfig, {**R, "target_modules": Q, "bias": "all", "modules_to_save": ["lm_head", "norm"]}, accumulate=2
    ),
    "ln tuning": Case(peft.LNTuningConfig, {"modules_to_save": ["lm_head"]}, accumulate=2),
    "ln tuning of gpt2": Case(peft.LNTuningConfig, {}, "gpt2"),
    "prompt tuning": Case(peft.PromptTuningConfig, N, accumulate=2),
    "prefix tuning": Case(peft.PrefixTuningConfig, {**N, "num_attention_heads": 2, "token_dim": 4}),
    "prefix projection": Case(
        peft.PrefixTuningConfig, {**N, "num_attention_heads": 2, "token_dim": 4, "prefix_projection": True, "encoder_hidden_size": 5}
    ),
    "p-tuning": Case(peft.PromptEncoderConfig, {**N, "encoder_hidden_size": 5}),
    "p-tuning, lstm": Case(
        peft.PromptEncoderConfig,
        {**N, "encoder_hidden_size": 5, "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2, "encoder_dropout": 0.0},
    ),
    "multitask": Case(peft.MultitaskPromptTuningConfig, {**N, "num_tasks": 2, "num_ranks": 2}),
    "cpt": Case(peft.CPTConfig, {**CPT, "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.75}, accumulate=2),
    "cpt without decay": Case(peft.CPTConfig, CPT),
    "cartridge": Case(peft.CartridgeConfig, {**N, "num_frozen_tokens": 1}),
    "cartridge, none frozen": Case(peft.CartridgeConfig, {**N, "num_frozen_tokens": 0}, accumulate=2),
    "adaption prompt": Case(peft.AdaptionPromptConfig, {"adapter_len": 3, "adapter_layers": 2}),
    "adaption prompt on gpt2": Case(peft.AdaptionPromptConfig, {"adapter_len": 4, "adapter_layers": 1}, "gpt2", accumulate=2),
    "a table and its head, tied": Case(
        peft.LoraConfig, {**R, "target_modules": Q, "modules_to_save": ["lm_head"], "ensure_weight_tying": True}, "tied llama"
    ),
    "factors of a table and its head, tied": Case(
        peft.LoraConfig, {**R, "target_modules": [*Q, "lm_head"], "ensure_weight_tying": True}, "tied llama"
    ),
    "tokens beside lora": Case(
        peft.LoraConfig,
        {**R, "target_modules": Q, "trainable_token_indices": {"embed_tokens": [9, 3, 1], "lm_head": [3, 2]}},
        "llama",
        4,
        2,
    ),
    "tokens beside lora, tied": Case(peft.LoraConfig, {**R, "target_modules": Q, "trainable_token_indices": [9, 3, 1]}, "tied llama", 4, 2),
    "tokens beside adalora, tied": Case(
        peft.AdaLoraConfig,
        {"init_r": 4, "target_r": 2, "tfinal": 2, "total_step": 4, "target_modules": Q, "trainable_token_indices": [9, 3, 1]},
        "tied llama",
        4,
    ),
    "lora on gpt2": Case(peft.LoraConfig, {**R, "target_modules": ["c_attn", "c_fc", "wte"]}, "gpt2", 5, 2),
    "lora on a classifier": Case(peft.LoraConfig, {**R, "target_modules": ["query", "value"]}, "bert", 5, 1, "SEQ_CLS"),
    "prompt on a classifier": Case(peft.PromptTuningConfig, N, "bert", 5, 1, "SEQ_CLS"),
    "lora on t5": Case(peft.LoraConfig, {**R, "target_modules": ["q", "v", "wo"]}, "t5", 5, 2, "SEQ_2_SEQ_LM"),
    "prefix on t5": Case(peft.PrefixTuningConfig, N, "t5", 5, 1, "SEQ_2_SEQ_LM"),
    **{name: Case(getattr(peft, asked.config), asked.words, asked.model) for name, asked in BESIDE.items()},
}


class Both(NamedTuple):
    live: Any
    ours: Training


def both(case: Case, folder: Path) -> Both:
    """PEFT's fresh adapter, its numbers moved away from their special start, and ours with the same numbers."""
    cls, sizes = SIZES[case.model]
    base = pair(getattr(transformers, cls), **sizes)
    with float64(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.get_peft_model(base.live, case.config(task_type=case.task, **case.options)).eval()  # without the base's dropout
        scatter(live.prompt_encoder if hasattr(live, "prompt_encoder") else live, 2)
        share_again(live)
        live.save_pretrained(folder, save_embedding_layers=False)
    config = load_config(folder)
    if not isinstance(config.method, Prompt):
        return Both(live, learner_of(base.model, load(adapt(base.graph), folder, trainable=True)))
    raw = {key: value for key, value in case.options.items() if key != "encoder_dropout"}
    fresh = replace(config, method=replace(config.method, inference_mode=False, **raw), text=None)
    training = start(base.model, base.graph, fresh, np.random.default_rng(0))
    numbers = {name: p.detach().numpy().copy() for name, p in live.prompt_encoder["default"].named_parameters()}
    assert training.learner.prompt is not None
    held = {name.replace(".modules_to_save.default", ""): p for name, p in live.base_model.named_parameters()}
    copies = {name: held[name].detach().numpy().copy() for name in training.params.weights}
    return Both(live, replace(training, params=training.params._replace(prompt=training.learner.prompt.check(numbers), weights=copies)))


def example(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    """Padded on the left, on the right and not at all, some labels not counted."""
    ids, mask = rng.integers(1, 17, (3, 6)), np.ones((3, 6), dtype=int)
    mask[0, :2] = mask[1, 4:] = 0
    if case.model == "bert":
        return {"input_ids": ids, "attention_mask": mask, "labels": rng.integers(0, 3, 3)}
    labels = rng.integers(1, 17, (3, 5)) if case.model == "t5" else ids
    labels = np.where(rng.random(labels.shape) < 0.3, -100, labels)
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if case.config is peft.CPTConfig:  # of the example before the input, and the answers of two
        return {**given, "input_type_mask": rng.choice([0, 1, 2, 3, 4, 4, 8, 8], (3, 6))}
    return given | ({"task_ids": np.asarray([1, 0, 1])} if case.config is peft.MultitaskPromptTuningConfig else {})


def batch(given: dict[str, Any]) -> Batch:
    tasks = given.get("task_ids")
    inputs = Inputs(**{name: value for name, value in given.items() if name != "task_ids"})
    return Batch(inputs=inputs, context=None if tasks is None else Context(batch=len(tasks), task_ids=tasks))


def joined(examples: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.concatenate([e[name] for e in examples]) for name in examples[0]}


def live_loss(live: Any, case: Case, given: list[dict[str, Any]]) -> Any:
    """Of micro-batches as transformers' Trainer has it: their sums, over the number of labels. Elsewhere they are given as one batch."""
    if case.config is not peft.LoraConfig or case.task != CAUSAL:
        return live(**to_torch(joined(given))).loss
    n = sum(int(np.sum(g["labels"][:, 1:] != -100)) for g in given)
    return sum(live(**to_torch(g), num_items_in_batch=torch.tensor(n)).loss for g in given)


def test_every_method_on_weights_is_trained_beside_peft_or_says_why_not() -> None:
    trained = {name.replace(" ", "_") for name in CASES}
    assert APART.keys() | (trained & METHODS.weights.keys()) == METHODS.weights.keys()
    assert not APART.keys() & trained


@pytest.mark.parametrize("name", CASES)
def test_a_training_stays_beside_pefts(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    live, training = both(case, tmp_path)
    lr, most, rng = 0.03, 0.3 if name == "adalora" else 2.0, np.random.default_rng(5)
    optimiser = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    schedule = transformers.get_linear_schedule_with_warmup(optimiser, 2, case.steps + 3)
    recipe = Recipe(
        optimizer=AdamW(weight_decay=0.1), lr=lr, factor=lambda t: linear(t, warmup=2, total=case.steps + 3), max_grad_norm=most
    )
    state, losses = begin(recipe, training.params), []
    for number in range(case.steps):
        given = [example(case, rng) for _ in range(case.accumulate)]
        with float64(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = live_loss(live, case, given)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_([p for p in live.parameters() if p.requires_grad], most)
            optimiser.step()
            schedule.step()
            if case.config is peft.AdaLoraConfig:
                live.base_model.update_and_allocate(number + 1)
            optimiser.zero_grad()
        state, ours, our_norm = step(training.learner, recipe, state, [batch(g) for g in given])
        close(ours, loss.detach(), f"loss {number}", CLOSE)
        close(our_norm, norm.detach(), f"norm {number}", CLOSE)
        losses.append(float(ours))
        if state.allocation.sensitivity is not None:
            for where, p in leaves(state.allocation.sensitivity):
                module, _, letter = where.rpartition("/")
                theirs = live.base_model.rankallocator.exp_avg_ipt[f"{module}.lora_{letter}.default"]
                close(p, theirs, f"sensitivity of {where} at {number}", CLOSE)
    assert losses[-1] != losses[0]
    compare(live, training, state)


def compare(live: Any, training: Training, state: State, near: float = CLOSE) -> None:
    if training.learner.prompt is not None:
        theirs = {name: p.detach().numpy() for name, p in live.prompt_encoder["default"].named_parameters()}
        all_close(dict(state.params.prompt), theirs, near)
    with float64(), warnings.catch_warnings():  # saving projects CPT's once more
        warnings.simplefilter("ignore")
        saved = peft.get_peft_model_state_dict(live, save_embedding_layers=False)
    got = {key: np.asarray(value) for key, value in all_tensors(file_of(training, state)).items()}
    all_close(got, {key: value.detach().numpy() for key, value in saved.items()}, near)


@pytest.mark.parametrize("dora", [False, True])
def test_given_dropout_masks_do_what_pefts_dropout_does(dora: bool, tmp_path: Path) -> None:
    case = Case(peft.LoraConfig, {**R, "target_modules": Q, "lora_dropout": 0.25, "use_dora": dora})
    live, training = both(case, tmp_path)
    live.train()  # else PEFT's DoRA does not ask its dropout; this Llama has none of its own
    rng = np.random.default_rng(6)
    given = example(case, rng)
    drawn = with_dropout(training.learner, batch(given), rng, np.zeros(0))
    for name, module in live.base_model.model.named_modules():
        if name in drawn.dropout:
            module.lora_dropout["default"] = Masked(drawn.dropout[name].mask / 0.75)
    with float64():
        loss = live(**to_torch(given)).loss
        loss.backward()
    found = training.learner.loss_vjp(training.params, [drawn])
    close(found.loss, loss.detach(), "loss", 1e-12)
    for name, params in found.gradients.adapters.items():
        module = live.base_model.model.get_submodule(name)
        close(params.A, module.lora_A["default"].weight.grad, f"{name} A")
        close(params.B, module.lora_B["default"].weight.grad, f"{name} B")
    assert abs(float(found.loss) - float(training.learner.loss(training.params, [batch(given)]))) > 1e-6


def test_rows_drop_out_of_deltas_as_with_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"r": 2, "target_modules": Q, "rank_dropout": 0.3, "module_dropout": 0.4, "rank_dropout_scale": True}
    live, training = both(Case(peft.LoKrConfig, options), tmp_path)
    assert training.learner.row_drops == (0.3, 0.4, True)
    rng = np.random.default_rng(6)
    given = example(Case(peft.LoKrConfig, options), rng)
    drawn = with_dropout(training.learner, batch(given), rng, np.zeros(0))
    factors = {name: drop.factors for name, drop in drawn.dropout.items()}
    assert factors.keys() == training.learner.methods.keys()
    assert {bool(v.any()) for v in factors.values()} == {False, True}, "some whole deltas are to drop out, and not all"
    draws = []
    for v in (factors[name] for name, _ in live.base_model.model.named_modules() if name in factors):  # in the order of the forward pass
        draws += [torch.tensor([float(v.any())]), *([torch.tensor(v > 0).double()] if v.any() else [])]
    live.train()
    monkeypatch.setattr(torch, "rand", lambda *shape: draws.pop(0).reshape(shape))
    with float64():
        loss = live(**to_torch(given)).loss
    assert not draws
    close(training.learner.loss(training.params, [drawn]), loss.detach(), "loss", 1e-6)  # PEFT's mask is a float32


@pytest.mark.parametrize("p", [1.0, -0.1, None, "0.1", True])
def test_a_row_dropout_that_is_no_probability_is_refused_in_training(p: Any) -> None:
    config = from_dict({"peft_type": "LOHA", "target_modules": Q, "rank_dropout": p})
    with pytest.raises(ConfigError, match="rank_dropout="):
        row_drops(config)


class Masked(torch.nn.Module):  # type: ignore[misc]  # torch has no types here
    def __init__(self, factors: Any) -> None:
        super().__init__()
        self.factors = torch.tensor(factors)

    def forward(self, x: Any) -> Any:
        return x * self.factors
