"""Wrong LSTM encoders of P-tuning. `Encoder()` is right; each of its fields is a place where ports go wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check import tape
from peft_ref.check.case import Case, NDArray
from peft_ref.check.encoder_family import other_gradient, relu, without
from peft_ref.check.mistake import Mistake, Replay, as_if, as_if_tensors, with_config
from peft_ref.check.prompt_family import other_prompt
from peft_ref.check.prompting import PromptProblem
from peft_ref.prompts import EMBEDDING


def _same(x: Array) -> Array:
    return x


@dataclass(frozen=True, kw_only=True)
class Encoder:
    squash: Callable[[Array], Array] = np.tanh  # of the gate g
    top: Callable[[Array], Array] = np.tanh  # of the state on its way out
    seen: Callable[[Array], Array] = _same  # what the next step sees of state and output
    kept: bool = False  # whether a direction starts where the layer before ended, and not at zero
    walks_back: bool = True  # whether the second direction walks from the last row to the first
    put_back: bool = True  # whether its outputs come in the order of the rows
    own_weights: bool = True  # whether it has weights of its own
    swapped: bool = False  # whether its outputs come first, side by side
    depth: int | None = None
    masked_from: int = 0  # the first layer after which the masks act

    def __call__(self, p: PromptProblem) -> Array:
        x, config = p.tensors[EMBEDDING], p.method
        factors = [mask / (1 - getattr(config, "encoder_dropout")) for mask in p.ctx.dropout]  # noqa: B009  # a field of P-tuning's alone
        ends: list[Any] = [None, None]
        for layer in range(self.depth or config.size("encoder_num_layers")):
            sides = []
            for k, direction in enumerate(("", "_reverse")):
                name = f"_l{layer}{direction if self.own_weights else ''}"
                rows = list(range(x.shape[0]))[:: -1 if k and self.walks_back else 1]
                outputs, end = self._walk(p, name, [x[t : t + 1] for t in rows], ends[k] if self.kept else None)
                ends[k] = end
                order = np.argsort(rows) if self.put_back else range(len(rows))
                sides.append(np.concatenate([outputs[t] for t in order], axis=0))
            x = np.concatenate(sides[:: -1 if self.swapped else 1], axis=1)
            if 0 <= layer - self.masked_from < len(factors):
                x = x * factors[layer - self.masked_from]
        t = p.tensors
        hidden = relu(x @ t["mlp_head.0.weight"].T + t["mlp_head.0.bias"])
        table = hidden @ t["mlp_head.2.weight"].T + t["mlp_head.2.bias"]
        return np.broadcast_to(table, (p.ctx.batch, *table.shape))

    def _walk(self, p: PromptProblem, name: str, rows: Sequence[Array], start: Any) -> tuple[list[Array], Any]:
        W, R, b, c = (p.tensors[f"lstm_head.{part}{name}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        hidden = R.shape[1]
        h, s = (np.zeros((1, hidden)), np.zeros((1, hidden))) if start is None else start
        outputs = []
        for x in rows:
            i, f, g, o = np.split(x @ W.T + h @ R.T + b + c, 4, axis=1)
            s = _sigmoid(f) * s + _sigmoid(i) * self.squash(g)
            h = _sigmoid(o) * self.top(s)
            outputs.append(h)
            h, s = self.seen(h), self.seen(s)
        return outputs, (h, s)


def _sigmoid(x: Array) -> Array:
    return (1 + np.tanh(x / 2)) / 2


def is_lstm(p: PromptProblem) -> bool:
    return "lstm_head.weight_ih_l0" in p.tensors


def _deep(p: PromptProblem) -> bool:
    return "lstm_head.weight_ih_l1" in p.tensors


def _drops(p: PromptProblem) -> bool:
    return bool(p.ctx.dropout)


def gates(order: str) -> Replay:
    """The four blocks of every LSTM tensor read in another order than i f g o."""
    blocks = ["ifgo".index(letter) for letter in order]

    def taken(value: NDArray, picks: Sequence[int]) -> NDArray:
        parts = np.split(value, 4, axis=0)
        return np.concatenate([parts[k] for k in picks], axis=0)

    # The gate `letter` is looked for where `order` has it.
    places = [order.index(letter) for letter in "ifgo"]
    return as_if_tensors(
        lambda key, v, config: taken(v, places) if key.startswith("lstm_head.") else v,
        lambda key, g, config: taken(g, blocks) if key.startswith("lstm_head.") else g,
    )


def _forget_more(key: str, v: NDArray, config: Any) -> NDArray:
    if not key.startswith("lstm_head.bias_ih"):
        return v
    return np.asarray(v + np.repeat([0.0, 1.0, 0.0, 0.0], v.shape[0] // 4))


def _other_masks(change: Callable[[list[NDArray]], list[NDArray]]) -> Replay:
    def changed(case: Case) -> Case | None:
        masks = case.question.get("dropout")
        if masks is None:
            return None
        wrong = change(list(masks))
        if len(wrong) == len(masks) and all(np.array_equal(a, b) for a, b in zip(wrong, masks, strict=True)):
            return None
        return replace(case, question={**case.question, "dropout": np.asarray(wrong)})

    return as_if(changed)


def _other_rate(rate: Callable[[float], float]) -> Replay:
    """The masks' factors made of another probability."""

    def changed(case: Case) -> Case | None:
        if "dropout" not in case.question:
            return None
        return with_config(case, lambda config: {**config, "encoder_dropout": rate(config["encoder_dropout"])})

    return as_if(changed)


def lstm_mistakes(*, gate: str, bias: str, walk: str, layers: str, dropout: str, gradient: str) -> tuple[Mistake, ...]:
    """The arguments are the clauses that the mistakes break."""
    return (
        Mistake(
            name="gates-i-f-o-g",
            clause=gate,
            sentence="the LSTM's four blocks are read as i f o g instead of i f g o",
            replay=gates("ifog"),
        ),
        Mistake(
            name="gates-i-o-f-g",
            clause=gate,
            sentence="the LSTM's four blocks are read as i o f g, as ONNX orders them, instead of i f g o",
            replay=gates("iofg"),
            links=("https://onnx.ai/onnx/operators/onnx__LSTM.html",),
        ),
        Mistake(
            name="gates-i-g-f-o",
            clause=gate,
            sentence="the LSTM's four blocks are read as i g f o, as TensorFlow 1 orders them, instead of i f g o",
            replay=gates("igfo"),
        ),
        Mistake(
            name="forget-bias-one",
            clause=gate,
            sentence="1 is added to the argument of the forget gate, which some libraries do unasked",
            replay=as_if_tensors(_forget_more, lambda key, g, config: g),
        ),
        Mistake(
            name="sigmoid-for-g",
            clause=gate,
            sentence="the LSTM's g is a sigmoid like the other three instead of a tanh",
            replay=other_prompt(Encoder(squash=_sigmoid), is_lstm),
        ),
        Mistake(
            name="state-without-tanh",
            clause=gate,
            sentence="the LSTM puts out o s instead of o tanh(s)",
            replay=other_prompt(Encoder(top=_same), is_lstm),
        ),
        Mistake(
            name="bias-hh-missing",
            clause=bias,
            sentence="the LSTM's bias_hh is left out",
            replay=without("bias_hh"),
        ),
        Mistake(
            name="bias-ih-missing",
            clause=bias,
            sentence="the LSTM's bias_ih is left out",
            replay=without("bias_ih"),
        ),
        Mistake(
            name="both-directions-forward",
            clause=walk,
            sentence="the LSTM's second direction walks from the first row to the last too",
            replay=other_prompt(Encoder(walks_back=False), is_lstm),
        ),
        Mistake(
            name="reverse-not-put-back",
            clause=walk,
            sentence="the second direction's outputs stay in the order in which it walked, so its first one is the last row's",
            replay=other_prompt(Encoder(put_back=False), is_lstm),
        ),
        Mistake(
            name="directions-share-weights",
            clause=walk,
            sentence="both directions of the LSTM use the first one's weights",
            replay=other_prompt(Encoder(own_weights=False), is_lstm),
        ),
        Mistake(
            name="directions-swapped",
            clause=walk,
            sentence="side by side, the second direction's outputs come before the first's",
            replay=other_prompt(Encoder(swapped=True), is_lstm),
        ),
        Mistake(
            name="one-lstm-layer",
            clause=layers,
            sentence="only the first layer of the LSTM is used, whatever encoder_num_layers says",
            replay=other_prompt(Encoder(depth=1), _deep),
        ),
        Mistake(
            name="state-kept-between-layers",
            clause=layers,
            sentence="a layer of the LSTM starts from where the layer below ended instead of from zero",
            replay=other_prompt(Encoder(kept=True), _deep),
        ),
        Mistake(
            name="dropout-missing",
            clause=dropout,
            sentence="the given masks of encoder_dropout are not used",
            replay=_other_masks(lambda masks: []),
        ),
        Mistake(
            name="dropout-not-rescaled",
            clause=dropout,
            sentence="what dropout keeps is not divided by 1 - p",
            replay=_other_rate(lambda rate: 0.0),
        ),
        Mistake(
            name="dropout-divided-by-p",
            clause=dropout,
            sentence="what dropout keeps is divided by p instead of 1 - p",
            replay=_other_rate(lambda rate: 1 - rate),
        ),
        Mistake(
            name="dropout-after-last",
            clause=dropout,
            sentence="dropout acts after every layer of the LSTM but the first instead of every layer but the last",
            replay=other_prompt(Encoder(masked_from=1), _drops),
        ),
        Mistake(
            name="dropout-first-mask-for-all",
            clause=dropout,
            sentence="every layer of the LSTM is dropped with the first one's mask",
            replay=_other_masks(lambda masks: masks[:1] * len(masks)),
        ),
        Mistake(
            name="gradient-of-one-step",
            clause=gradient,
            sentence="the LSTM's gradient does not go back in time: every step takes what came before it for constant",
            replay=other_gradient(Encoder(seen=tape.constant), is_lstm),
        ),
    )
