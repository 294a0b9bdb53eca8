"""Prefix tuning and P-tuning as somebody might write them from the spec alone, and the same with one mistake made.

Gradients are complex steps: f(v + ih) is f(v) + ih f'(v), with no difference that cancels. A place where a mistake goes is a method.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Json = dict[str, Any]
Host: TypeAlias = Any
STEP = 2.0**-100  # a power of two: where nothing rounds, the gradient has its exact bits


class Port:
    def __init__(self, dtype: Any = np.float64) -> None:
        self.dtype = dtype

    def answer(self, case: Json) -> Json | None:
        self.config = case["adapters"][0]["config"]
        self.masks = [self.array(m) for m in case.get("dropout", [])]
        return {"prompt": self.prompt, "prompt_backward": self.backward, "saved": self.saved, "splice": self.splice}[case["operation"]](
            case
        )

    def array(self, value: Any) -> Host:
        return np.asarray(value, dtype=self.dtype)

    def tensors(self, case: Json) -> dict[str, Host]:
        return {k: self.array(v) for k, v in case["adapters"][0]["tensors"].items()}

    def table(self, t: dict[str, Host]) -> Host:
        """(rows, columns)"""
        raise NotImplementedError

    def used(self, prompt: Host) -> Json:
        raise NotImplementedError

    def repeated(self, table: Host, batch: int) -> Host:
        return np.repeat(table[None], batch, axis=0)

    def prompt(self, case: Json) -> Json:
        return {k: v.tolist() for k, v in self.used(self.repeated(self.table(self.tensors(case)), case["batch"])).items()}

    def saved(self, case: Json) -> Json:
        return {"prompt_embeddings": self.table(self.tensors(case)).tolist()}

    def backward(self, case: Json) -> Json:
        wide = type(self)(np.clongdouble)
        wide.config, wide.masks = self.config, [wide.array(m) for m in self.masks]
        t, dy = wide.tensors(case), np.asarray(case["dy"])
        gradients = {}
        for key, value in t.items():
            gradient = np.empty(value.shape)
            for at in np.ndindex(value.shape):
                value[at] += STEP * 1j
                (out,) = wide.used(wide.repeated(wide.table(t), case["batch"])).values()
                gradient[at] = wide.reduced(out.imag * dy) / STEP
                value[at] -= STEP * 1j
            gradients[key] = gradient.tolist()
        return {"adapters": [gradients]}

    def reduced(self, terms: Host) -> Host:
        return np.sum(terms)

    def splice(self, case: Json) -> Json | None:
        raise NotImplementedError


def relu(x: Host) -> Host:
    return np.where(x.real > 0, x, 0)


def before(value: int, n: int, rows: Any) -> Any:
    return [[value] * n + list(row) for row in rows]


class PrefixTuning(Port):
    def bend(self, x: Host) -> Host:
        return np.tanh(x)

    def bias(self, t: dict[str, Host], layer: str) -> Host:
        return t[f"transform.{layer}.bias"]

    def table(self, t: dict[str, Host]) -> Host:
        E = t["embedding.weight"]
        if "transform.0.weight" not in t:
            return E
        hidden = self.bend(E @ t["transform.0.weight"].T + self.bias(t, "0"))
        return hidden @ t["transform.2.weight"].T + self.bias(t, "2")

    def slot(self, layer: int, half: int) -> int:
        layers = self.config["num_layers"]
        return (4 * layer + half) % (2 * layers) if self.config["num_transformer_submodules"] == 2 else 2 * layer + half

    def heads(self, slot: Host) -> Host:
        """(batch, heads, n, head_dim) of (batch, n, dim)"""
        batch, n, dim = slot.shape
        heads = self.config["num_attention_heads"]
        return np.moveaxis(slot.reshape(batch, n, heads, dim // heads), 1, 2)

    def used(self, prompt: Host) -> Json:
        dim = self.config["token_dim"]
        layers = []
        for layer in range(self.config["num_layers"]):
            slots = [self.slot(layer, half) for half in (0, 1)]
            layers.append([self.heads(prompt[:, :, k * dim : (k + 1) * dim]) for k in slots])
        return {"past_key_values": np.asarray(layers)}

    def moved(self, positions: Any, n: int) -> Any:
        return (np.asarray(positions) + n).tolist()

    def splice(self, case: Json) -> Json | None:
        task, inputs, n = case["task_type"], dict(case["inputs"]), self.config["num_virtual_tokens"]
        if task == "QUESTION_ANS":
            return None  # not built
        longer = "decoder_attention_mask" if task == "SEQ_2_SEQ_LM" else "attention_mask"
        if longer in inputs:
            inputs[longer] = before(1, n, inputs[longer])
        if "position_ids" in inputs:
            inputs["position_ids"] = self.moved(inputs["position_ids"], n)
        if task not in ("SEQ_CLS", "TOKEN_CLS"):
            inputs.pop("token_type_ids", None)
        return {**inputs, "past_key_values": self.used(self.array(case["prompt"]))["past_key_values"].tolist()}


class KeysAndValuesSwapped(PrefixTuning):
    def slot(self, layer: int, half: int) -> int:
        return super().slot(layer, 1 - half)


class KeysBeforeValues(PrefixTuning):
    """Slots 0 to layers - 1 are the keys; in an encoder-decoder they are dealt as ever and only then read in the other order."""

    def slot(self, layer: int, half: int) -> int:
        own, which = divmod(super().slot(layer, half), 2)
        return which * int(self.config["num_layers"]) + own


class LayersReversed(PrefixTuning):
    def slot(self, layer: int, half: int) -> int:
        return super().slot(self.config["num_layers"] - 1 - layer, half)


class HeadsInterleaved(PrefixTuning):
    def heads(self, slot: Host) -> Host:
        batch, n, dim = slot.shape
        heads = self.config["num_attention_heads"]
        return slot.reshape(batch, n, dim // heads, heads).transpose(0, 3, 1, 2)


class HeadsReshaped(PrefixTuning):
    def heads(self, slot: Host) -> Host:
        batch, n, dim = slot.shape
        heads = self.config["num_attention_heads"]
        return slot.reshape(batch, heads, n, dim // heads)


class OwnSlots(PrefixTuning):
    def slot(self, layer: int, half: int) -> int:
        return 2 * layer + half


class TanhMissing(PrefixTuning):
    def bend(self, x: Host) -> Host:
        return x


class ReluForTanh(PrefixTuning):
    def bend(self, x: Host) -> Host:
        return relu(x)


class FirstBiasMissing(PrefixTuning):
    def bias(self, t: dict[str, Host], layer: str) -> Host:
        return super().bias(t, layer) * (layer != "0")


class PositionsNotMoved(PrefixTuning):
    def moved(self, positions: Any, n: int) -> Any:
        return positions


class PrefixGradientAveraged(PrefixTuning):
    def reduced(self, terms: Host) -> Host:
        return np.sum(terms) / terms.shape[2]


PREFIX: dict[str, type[PrefixTuning]] = {
    "keys-and-values-swapped": KeysAndValuesSwapped,
    "keys-before-values": KeysBeforeValues,
    "layers-reversed": LayersReversed,
    "heads-interleaved": HeadsInterleaved,
    "heads-reshaped": HeadsReshaped,
    "own-slots": OwnSlots,
    "tanh-missing": TanhMissing,
    "relu-for-tanh": ReluForTanh,
    "first-bias-missing": FirstBiasMissing,
    "positions-not-moved": PositionsNotMoved,
    "gradient-averaged": PrefixGradientAveraged,
}


class PTuning(Port):
    order = "ifgo"
    walks_back, put_back, first_on_the_left, one_layer, shares = True, True, True, False, False

    def bend(self, x: Host) -> Host:
        return relu(x)

    def last(self, x: Host) -> Host:
        return x

    def squash(self, g: Host) -> Host:
        return np.tanh(g)

    def bias(self, b: Host, c: Host) -> Host:
        return b + c

    def factor(self, mask: Host) -> Host:
        return mask / self.dtype(1 - self.config["encoder_dropout"])

    def table(self, t: dict[str, Host]) -> Host:
        x = t["embedding.weight"]
        if self.config["inference_mode"]:
            return x
        if self.config["encoder_reparameterization_type"] == "LSTM":
            x = self.lstm(t, x)
        names = sorted({k.rpartition(".")[0] for k in t if k.startswith("mlp_head.")})
        for name in names:
            x = x @ t[f"{name}.weight"].T + t[f"{name}.bias"]
            x = self.last(x) if name == names[-1] else self.bend(x)
        return x

    def lstm(self, t: dict[str, Host], x: Host) -> Host:
        layers = 1 if self.one_layer else self.config["encoder_num_layers"]
        for layer in range(layers):
            forward = self.walk(t, f"l{layer}", x)
            again = self.walk(t, f"l{layer}" if self.shares else f"l{layer}_reverse", x[::-1] if self.walks_back else x)
            again = again[::-1] if self.walks_back and self.put_back else again
            x = np.hstack([forward, again] if self.first_on_the_left else [again, forward])
            if layer < len(self.masks):
                x = x * self.factor(self.masks[layer])
        return x

    def walk(self, t: dict[str, Host], name: str, x: Host) -> Host:
        W, R, b, c = (t[f"lstm_head.{part}_{name}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        h, s = np.zeros(R.shape[1], dtype=self.dtype), np.zeros(R.shape[1], dtype=self.dtype)
        out = []
        for row in x:
            gate = dict(zip(self.order, (W @ row + R @ h + self.bias(b, c)).reshape(4, -1), strict=True))
            i, f, o = (1 / (1 + np.exp(-gate[k])) for k in "ifo")
            s = f * s + i * self.squash(gate["g"])
            h = o * np.tanh(s)
            out.append(h)
        return np.asarray(out)

    def used(self, prompt: Host) -> Json:
        return {"prompt": prompt}

    def splice(self, case: Json) -> Json | None:
        task, inputs, n = case["task_type"], dict(case["inputs"]), self.config["num_virtual_tokens"]
        if task == "QUESTION_ANS":
            return None  # not built
        inputs["embeddings"] = [self.joined(p[:n], list(x)) for p, x in zip(case["prompt"], inputs["embeddings"], strict=True)]
        for name, value in (("attention_mask", 1), ("token_type_ids", 0), *([("labels", -100)] if task == "CAUSAL_LM" else [])):
            if name in inputs:
                inputs[name] = before(value, n, inputs[name])
        inputs.pop("position_ids", None)
        if task not in ("SEQ_CLS", "TOKEN_CLS"):
            inputs.pop("token_type_ids", None)
        return inputs

    def joined(self, prompt: list[Any], x: list[Any]) -> list[Any]:
        return prompt + x


class ReluMissing(PTuning):
    def bend(self, x: Host) -> Host:
        return x


class TanhForRelu(PTuning):
    def bend(self, x: Host) -> Host:
        return np.tanh(x)


class ReluAtEnd(PTuning):
    def last(self, x: Host) -> Host:
        return relu(x)


class GatesIFOG(PTuning):
    order = "ifog"


class GatesIOFG(PTuning):
    order = "iofg"


class SigmoidForG(PTuning):
    def squash(self, g: Host) -> Host:
        return 1 / (1 + np.exp(-g))


class BiasHHMissing(PTuning):
    def bias(self, b: Host, c: Host) -> Host:
        return b


class BothForward(PTuning):
    walks_back = False


class NotPutBack(PTuning):
    put_back = False


class DirectionsSwapped(PTuning):
    first_on_the_left = False


class DirectionsShare(PTuning):
    shares = True


class OneLayer(PTuning):
    one_layer = True


class NotRescaled(PTuning):
    def factor(self, mask: Host) -> Host:
        return mask


class PromptBehind(PTuning):
    def joined(self, prompt: list[Any], x: list[Any]) -> list[Any]:
        return x + prompt


class InputSaved(PTuning):
    def saved(self, case: Json) -> Json:
        return {"prompt_embeddings": case["adapters"][0]["tensors"]["embedding.weight"]}


P_TUNING: dict[str, type[PTuning]] = {
    "relu-missing": ReluMissing,
    "tanh-for-relu": TanhForRelu,
    "relu-at-end": ReluAtEnd,
    "gates-i-f-o-g": GatesIFOG,
    "gates-i-o-f-g": GatesIOFG,
    "sigmoid-for-g": SigmoidForG,
    "bias-hh-missing": BiasHHMissing,
    "both-directions-forward": BothForward,
    "reverse-not-put-back": NotPutBack,
    "directions-swapped": DirectionsSwapped,
    "directions-share-weights": DirectionsShare,
    "one-lstm-layer": OneLayer,
    "dropout-not-rescaled": NotRescaled,
    "prompt-behind": PromptBehind,
    "encoder-input-saved": InputSaved,
}
