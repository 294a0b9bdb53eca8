"""Prompts as an honest port may make them, written from the papers' formulas and torch's documentation of its LSTM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from peft_ref.check.case import Answer, Case
from tests.check.honest.arithmetic import Arithmetic, Host

Gradients = dict[str, Host]
IN_CACHE = ("CARTRIDGE", "PREFIX_TUNING")


def answer(case: Case, a: Arithmetic) -> Answer:
    return HonestPrompt(case, a).answer()


class Dense(NamedTuple):
    """x W^T + b"""

    W: Host
    b: Host

    def __call__(self, a: Arithmetic, x: Host) -> Host:
        if a.pick(True, False):
            return a.matmul(x, self.W.T, start=self.b)
        return a.add(a.matmul(x, self.W.T), self.b)

    def backward(self, a: Arithmetic, name: str, x: Host, d: Host) -> tuple[Host, Gradients]:
        return a.matmul(d, self.W), {f"{name}.weight": a.matmul(d.T, x), f"{name}.bias": a.sum(d)}


def tanh(a: Arithmetic, x: Host) -> Host:
    """A library's, up to six units in the last place off."""
    off = a.pick(0.0, 0.0, 12.0, -12.0) * np.finfo(np.float64).eps * 2.0 ** (53 - _bits(a))
    return (np.tanh(x.astype(a.wider)) * a.wider(1 + off / 2)).astype(a.dtype)


def _bits(a: Arithmetic) -> int:
    return {8: 53, 4: 24}.get(np.dtype(a.dtype).itemsize, 11 if a.dtype is np.float16 else 8)


def sigmoid(a: Arithmetic, x: Host) -> Host:
    how = a.pick("tanh", "exp", "wide")
    if how == "tanh":
        return a.number(0.5) * (a.number(1.0) + tanh(a, a.number(0.5) * x))
    if how == "exp":
        with np.errstate(over="ignore"):  # 1 over infinity is the right limit
            return a.over(a.number(1.0) + 0 * x, a.number(1.0) + np.exp(-x.astype(a.wider)).astype(a.dtype))
    return (1 / (1 + np.exp(-x.astype(a.wider)))).astype(a.dtype)


class HonestPrompt:
    """One case in one arithmetic."""

    def __init__(self, case: Case, a: Arithmetic) -> None:
        self.case, self.a, self.config = case, a, case.adapters[0].config
        self.t = {name: a.array(value) for name, value in case.adapters[0].tensors.items()}
        self.E: Host = self.t.get("embedding.weight")

    def answer(self) -> Answer:
        operation = self.case.operation
        if operation == "splice":
            return self.splice()
        if operation == "saved":
            own = {k: v for k, v in self.t.items() if k.startswith("prefix_task")}
            return {"prompt_embeddings": self.E if own else self.table()[0], **own}
        if operation == "prompt":
            return self.in_place(self.prompt())
        return {f"0.{name}": value for name, value in self.backward().items()}

    # ---- the table, and the gradient of every tensor given that of the table

    def table(self) -> tuple[Host, Callable[[Host], Gradients]]:
        E, config = self.E, self.config
        if "trainable_embedding" in self.t:
            return self.cartridge()
        assert E is not None
        if "delta_embedding.weight" in self.t:
            return self.moved_words(E)
        if config["inference_mode"] or not any(k.startswith(("transform", "mlp_head")) for k in self.t):
            return E, lambda d: {"embedding.weight": d}
        return self.projected(E) if config["peft_type"] == "PREFIX_TUNING" else self.encoded(E)

    def cartridge(self) -> tuple[Host, Callable[[Host], Gradients]]:
        rows = [self.t[name] for name in ("frozen_embedding", "trainable_embedding") if name in self.t]
        n = len(rows[0]) if len(rows) == 2 else 0

        def backward(d: Host) -> Gradients:
            return {"trainable_embedding": d[n:], **({"frozen_embedding": 0 * d[:n]} if n else {})}

        return np.concatenate(rows), backward

    def moved_words(self, E: Host) -> tuple[Host, Callable[[Host], Gradients]]:
        a, config, D = self.a, self.config, self.t["delta_embedding.weight"]
        e = [self.radius(m, config) for m in config["cpt_tokens_type_mask"]]
        rows = []
        for row, radius, length in zip(D, e, a.norm(D), strict=True):
            if length <= radius:
                rows.append(row)
            elif a.pick(True, False):
                rows.append(row * a.over(radius, length))
            else:
                rows.append(a.over(row * radius, length))
        moves = np.asarray([[m % 4 != 0] for m in config["cpt_tokens_type_mask"]])

        def backward(d: Host) -> Gradients:
            return {"embedding.weight": 0 * d, "delta_embedding.weight": np.where(moves, d, 0 * d)}

        return a.add(E, np.stack(rows)), backward

    def radius(self, m: int, config: Mapping[str, Any]) -> Any:
        a = self.a
        if m <= 0 or m % 4 == 0:
            return a.number(1e-10)
        epsilon = a.number(config["opt_projection_epsilon" if m % 4 == 2 else "opt_projection_format_epsilon"])
        return epsilon * np.sqrt(a.over(a.number(config["token_dim"]), a.number(2048.0)))

    def dense(self, name: str) -> Dense:
        return Dense(self.t[f"{name}.weight"], self.t[f"{name}.bias"])

    def projected(self, E: Host) -> tuple[Host, Callable[[Host], Gradients]]:
        a, first, second = self.a, self.dense("transform.0"), self.dense("transform.2")
        H = tanh(a, first(a, E))

        def backward(d: Host) -> Gradients:
            dH, grads = second.backward(a, "transform.2", H, d)
            dE, more = first.backward(a, "transform.0", E, dH * slope(a, H))
            return {"embedding.weight": dE, **grads, **more}

        return second(a, H), backward

    def encoded(self, E: Host) -> tuple[Host, Callable[[Host], Gradients]]:
        a, lstm = self.a, self.config["encoder_reparameterization_type"] == "LSTM"
        names = [f"mlp_head.{k}" for k in ((0, 2) if lstm else (0, 2, 4))]
        x, through_lstm = self.lstm(E) if lstm else (E, lambda d: (d, {}))
        entering = [x]
        for name in names[:-1]:
            y = self.dense(name)(a, entering[-1])
            entering.append(np.where(y > 0, y, a.number(0.0)))

        def backward(d: Host) -> Gradients:
            grads: Gradients = {}
            for k in reversed(range(len(names))):
                d, own = self.dense(names[k]).backward(a, names[k], entering[k], d)
                d = np.where(entering[k] > 0, d, a.number(0.0)) if k else d
                grads |= own
            d, own = through_lstm(d)
            return {"embedding.weight": d, **grads, **own}

        return self.dense(names[-1])(a, entering[-1]), backward

    def lstm(self, x: Host) -> tuple[Host, Callable[[Host], tuple[Host, Gradients]]]:
        a, layers, walks = self.a, self.config["encoder_num_layers"], []
        for layer in range(layers):
            sides = [Walk(a, self.t, f"l{layer}{suffix}", x, bool(suffix)) for suffix in ("", "_reverse")]
            x = np.concatenate([side.h for side in sides], axis=1)
            walks.append(sides)
            if layer + 1 < layers:
                x = self.dropped(layer, x)

        def backward(d: Host) -> tuple[Host, Gradients]:
            grads: Gradients = {}
            for layer in reversed(range(layers)):
                d = d if layer + 1 == layers else self.dropped(layer, d)
                halves = np.split(d, 2, axis=1)
                both = [walk.backward(half) for walk, half in zip(walks[layer], halves, strict=True)]
                d = a.add(both[0][0], both[1][0])
                grads |= {**both[0][1], **both[1][1]}
            return d, grads

        return x, backward

    def dropped(self, layer: int, x: Host) -> Host:
        masks = self.case.question.get("dropout")
        if masks is None:
            return x
        a, kept, rest = self.a, self.a.array(masks[layer]), 1.0 - self.config["encoder_dropout"]
        return a.over(x * kept, a.number(rest)) if a.pick(True, False) else x * a.over(kept, a.number(rest))

    # ---- the prompt

    def tasks(self) -> tuple[Host, Host, Host]:
        ids = self.case.question["task_ids"]
        return ids, self.t["prefix_task_cols"][ids], self.t["prefix_task_rows"][ids]

    def prompt(self) -> Host:
        a, batch = self.a, self.case.question["batch"]
        if "prefix_task_cols" not in self.t:
            table = self.table()[0]
            return np.broadcast_to(table, (batch, *table.shape))
        _, U, V = self.tasks()
        return np.stack([self.E * a.matmul(u, v) for u, v in zip(U, V, strict=True)])

    def backward(self) -> Gradients:
        a, dy = self.a, self.a.array(self.case.dy)
        d = self.out_of_place(dy) if dy.ndim == 6 else dy
        if "prefix_task_cols" in self.t:
            return self.backward_of_tasks(d)
        _, backward = self.table()
        if self.E is None or self.E.shape == d.shape[1:] or a.pick(True, False):
            return backward(a.sum(d))
        each = [backward(one) for one in d]  # every example through the encoder by itself, and then added up
        return {name: a.sum(np.stack([grads[name] for grads in each])) for name in each[0]}

    def backward_of_tasks(self, d: Host) -> Gradients:
        a, (ids, U, V) = self.a, self.tasks()
        dP = a.sum(np.stack([g * a.matmul(u, v) for g, u, v in zip(d, U, V, strict=True)]))
        H = d * self.E
        grads: Gradients = {"embedding.weight": dP}
        for name, parts in (
            ("prefix_task_cols", [a.matmul(h, v.T) for h, v in zip(H, V, strict=True)]),
            ("prefix_task_rows", [a.matmul(u.T, h) for u, h in zip(U, H, strict=True)]),
        ):
            of_tasks = [
                np.stack([p for i, p in zip(ids, parts, strict=True) if i == t] or [0 * parts[0]]) for t in range(len(self.t[name]))
            ]
            grads[name] = np.stack([a.sum(own) for own in of_tasks])
        return grads

    # ---- where a prefix goes: layer l's key and value are the slots 2l and 2l + 1, with two submodules 4l and 4l + 1 counted round

    def slots(self) -> list[tuple[int, int]]:
        layers, wide = self.config["num_layers"], 2 * self.config["num_transformer_submodules"]
        return [(wide * layer % (2 * layers), (wide * layer + 1) % (2 * layers)) for layer in range(layers)]

    def in_place(self, prompt: Host) -> Answer:
        if self.config["peft_type"] not in IN_CACHE:
            return {"prompt": prompt}
        batch, n, columns = prompt.shape
        heads, layers = self.config["num_attention_heads"], self.config["num_layers"]
        head_dim = columns // (2 * layers * heads)
        out = np.empty((layers, 2, batch, heads, n, head_dim), dtype=prompt.dtype)
        for layer, pair in enumerate(self.slots()):
            for half, slot in enumerate(pair):
                for head in range(heads):
                    at = (slot * heads + head) * head_dim
                    out[layer, half, :, head] = prompt[:, :, at : at + head_dim]
        return {"past_key_values": out}

    def out_of_place(self, d: Host) -> Host:
        layers, _, batch, heads, n, head_dim = d.shape
        parts: list[list[Host]] = [[] for _ in range(2 * layers)]
        for layer, pair in enumerate(self.slots()):
            for half, slot in enumerate(pair):
                parts[slot].append(d[layer, half])
        columns = [self.a.sum(np.stack(p or [np.zeros_like(d[0, 0])])) for p in parts]  # (batch, heads, n, head_dim) each
        return np.concatenate([np.moveaxis(c, 1, 2).reshape(batch, n, heads * head_dim) for c in columns], axis=2)

    def splice(self) -> Answer:
        """From the tables of the specification. Nothing is computed: numbers are copied and put side by side."""
        question, task, kind = self.case.question, self.case.question["task_type"], self.config["peft_type"]
        prompt, n = self.a.array(question["prompt"]), self.config["num_virtual_tokens"]
        out = {k: self.a.array(v) if k.endswith("embeddings") else v for k, v in question["inputs"].items()}
        decoder, cache, both = task == "SEQ_2_SEQ_LM", kind in IN_CACHE, kind == "MULTITASK_PROMPT_TUNING"

        def before(name: str, value: int) -> None:
            if name in out:
                out[name] = np.concatenate([np.full((len(out[name]), n), value), out[name]], axis=1)

        if task not in ("SEQ_CLS", "TOKEN_CLS"):
            out.pop("token_type_ids", None)
        if not cache or task == "QUESTION_ANS":
            out.pop("position_ids", None)
        if cache:
            if "position_ids" in out:
                out["position_ids"] = out["position_ids"] + n
            before("decoder_attention_mask" if decoder else "attention_mask", 1)
            return {**out, **self.in_place(prompt)}
        before("attention_mask", 1)
        before("token_type_ids", 0)
        out["embeddings"] = np.concatenate([prompt[:, :n] if decoder else prompt, out["embeddings"]], axis=1)
        types = out.pop("input_type_mask", None)
        if kind == "CPT" and "labels" in out:
            out |= self.counted(out["labels"], types)
        elif task == "CAUSAL_LM" or (decoder and both):
            before("labels", -100)
        if decoder and both:
            before("decoder_attention_mask", 1)
            out["decoder_embeddings"] = np.concatenate([prompt[:, n:], out["decoder_embeddings"]], axis=1)
        return out

    def counted(self, labels: Host, types: Host | None) -> Answer:
        """Label by label, after the clauses of CPT. The factors of a decay one after the other, and the mean in either order."""
        a, config = self.a, self.config
        own, ids = config["cpt_tokens_type_mask"], config["cpt_token_ids"]
        given = np.full_like(labels, 4) if types is None else types
        m = [[*own, *(t + max(own) if t > 0 else t for t in row)] for row in given.tolist()]
        full = [
            [label if t > 0 and t % 4 == 0 else -100 for t, label in zip(row, [*ids, *said], strict=True)]
            for row, said in zip(m, labels.tolist(), strict=True)
        ]
        n = sum(label != -100 for row in full for label in row[1:])
        weights = np.zeros(np.shape(full), dtype=a.dtype)
        for b, (row, said) in enumerate(zip(m, full, strict=True)):
            answers = sorted({t for t in row[1:] if t > 0 and t % 4 == 0}, reverse=True)
            for t in range(1, len(row)):
                weight = a.number(1.0)
                if config["opt_weighted_loss_type"] == "decay" and row[t] in answers:
                    for _ in range(answers.index(row[t])):
                        weight = weight * a.number(config["opt_loss_decay_factor"])
                share = a.over(weight, a.number(float(n))) if a.pick(True, False) else weight * a.over(a.number(1.0), a.number(float(n)))
                weights[b, t] = share if said[t] != -100 else a.number(0.0)
        return {"labels": np.asarray(full), "loss_weights": weights}


def slope(a: Arithmetic, t: Host) -> Host:
    """1 - t^2, or (1 - t)(1 + t)."""
    one = a.number(1.0)
    return one - t * t if a.pick(True, False) else (one - t) * (one + t)


class Walk:
    """One direction of one layer of an LSTM: gates i, f, g, o; s = f s + i g; h = o tanh(s)."""

    def __init__(self, a: Arithmetic, t: dict[str, Host], place: str, x: Host, backwards: bool) -> None:
        self.a, self.x, self.place = a, x, place
        self.W, self.R, b, c = (t[f"lstm_head.{name}_{place}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        self.order = list(range(len(x)))[::-1] if backwards else list(range(len(x)))
        hidden = self.R.shape[1]
        h = s = a.array(np.zeros((1, hidden)))
        self.steps: dict[int, tuple[Host, ...]] = {}
        self.before: dict[int, Host] = {}
        for t_ in self.order:
            terms = [a.matmul(x[t_ : t_ + 1], self.W.T), a.matmul(h, self.R.T), b[None, :], c[None, :]]
            gates = np.split(a.add(*terms), 4, axis=1)
            i, f, o = (sigmoid(a, gates[k]) for k in (0, 1, 3))
            g = tanh(a, gates[2])
            self.before[t_] = h
            s_before, s = s, a.add(f * s, i * g)
            top = tanh(a, s)
            h = o * top
            self.steps[t_] = (i, f, g, o, s_before, top, h)
        self.h = np.concatenate([self.steps[k][-1] for k in range(len(x))])

    def backward(self, d: Host) -> tuple[Host, Gradients]:
        a, one = self.a, self.a.number(1.0)
        dh = ds = a.array(np.zeros_like(self.before[0]))
        da: dict[int, Host] = {}
        for k in reversed(self.order):
            i, f, g, o, s_before, top, _ = self.steps[k]
            dh = a.add(dh, d[k : k + 1])
            ds = a.add(ds, dh * o * slope(a, top))
            parts = (ds * g * (i * (one - i)), ds * s_before * (f * (one - f)), ds * i * slope(a, g), dh * top * (o * (one - o)))
            da[k] = np.concatenate(parts, axis=1)
            dh, ds = a.matmul(da[k], self.R), ds * f
        rows = np.concatenate([da[k] for k in range(len(self.x))])
        before = np.concatenate([self.before[k] for k in range(len(self.x))])
        names = {name: f"lstm_head.{name}_{self.place}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        return a.matmul(rows, self.W), {
            names["weight_ih"]: a.matmul(rows.T, self.x),
            names["weight_hh"]: a.matmul(rows.T, before),
            names["bias_ih"]: a.sum(rows),
            names["bias_hh"]: a.sum(rows),
        }
