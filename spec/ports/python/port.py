"""A port in plain Python without packages: LoRA on linear layers. Copy it, and call your own library where the mathematics is.

    peft-ref check -- python spec/ports/python/port.py

It reads one JSON message per line and writes one per line; spec/protocol.md says what is in them. Below, a matrix is a list of rows.

    y = x W^T + b + sum over adapters of  s (drop(x) A^T) B^T        s = alpha / r,  or alpha / sqrt(r) with use_rslora
    W (out, in)    A (r, in)    B (out, r)
"""

# ruff: noqa: B905 - a plain zip reads better to those who know another language

import json
import math
import sys

INFO = {
    "name": "plain Python",
    "language": "Python",
    "version": "1",
    "dtype": "float64",
    "methods": ["lora"],
    "layers": ["linear"],
    "operations": ["forward", "backward", "delta", "merge", "unmerge"],
}


# ---- the mathematics


def scale_of(config):
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])


def factors(adapter):
    return scale_of(adapter["config"]), adapter["tensors"]["lora_A.weight"], adapter["tensors"]["lora_B.weight"]


def forward(case):
    layer, x = case["layer"], rows(case["x"])
    y = matmul(x, transpose(layer["weight"]))
    if layer["bias"] is not None:
        y = [[value + b for value, b in zip(row, layer["bias"])] for row in y]
    for adapter in case.get("adapters", []):
        s, A, B = factors(adapter)
        y = add(y, matmul(matmul(drop(adapter, x), transpose(A)), transpose(B)), s)
    return {"y": shaped_like(case["x"], y)}


def backward(case):
    """Gradients of sum(y * dy):  dx = dy W + s drop(dy B A)    dA = s (dy B)^T drop(x)    dB = s dy^T (drop(x) A^T)."""
    x, dy = rows(case["x"]), rows(case["dy"])
    dx, gradients = matmul(dy, case["layer"]["weight"]), []
    for adapter in case["adapters"]:
        s, A, B = factors(adapter)
        dropped, through_B = drop(adapter, x), matmul(dy, B)
        dA = times(s, matmul(transpose(through_B), dropped))
        dB = times(s, matmul(transpose(dy), matmul(dropped, transpose(A))))
        dx = add(dx, drop(adapter, matmul(through_B, A)), s)
        gradients.append({"lora_A.weight": dA, "lora_B.weight": dB})
    return {"x": shaped_like(case["x"], dx), "adapters": gradients}


def delta(case):
    s, A, B = factors(case["adapters"][0])
    return {"weight": times(s, matmul(B, A))}


def merge(case):
    return shifted(case["layer"], case["adapters"], 1)


def unmerge(case):
    return shifted(case["merged"], case["adapters"], -1)


def shifted(layer, adapters, sign):
    weight = layer["weight"]
    for adapter in adapters:
        s, A, B = factors(adapter)
        weight = add(weight, matmul(B, A), sign * s)
    return {"weight": weight, "bias": layer["bias"]}


OPERATIONS = {"forward": forward, "backward": backward, "delta": delta, "merge": merge, "unmerge": unmerge}


# ---- matrices as lists of rows


def transpose(a):
    return [list(column) for column in zip(*a)]


def matmul(a, b):
    return [[sum(x * y for x, y in zip(row, column)) for column in zip(*b)] for row in a]


def times(s, a):
    return [[s * value for value in row] for row in a]


def add(a, b, s):
    return [[x + s * y for x, y in zip(row, other)] for row, other in zip(a, b)]


def rows(x):
    """x (..., n) as a list of rows of n numbers."""
    return [row for part in x for row in rows(part)] if isinstance(x[0], list) else [x]


def shaped_like(x, flat):
    """Undoes `rows`: the rows `flat` nested as in x. `flat` may be an iterator, which the parts share."""
    remaining = iter(flat)
    return [shaped_like(part, remaining) for part in x] if isinstance(x[0], list) else next(remaining)


def drop(adapter, x):
    """x with the adapter's dropout: the mask is in the case (1 keeps), what is kept is divided by 1 - p."""
    if adapter["dropout"] is None:
        return x
    mask, p = rows(adapter["dropout"]["mask"]), adapter["dropout"]["p"]
    return [[keep * value / (1 - p) for keep, value in zip(kept, row)] for kept, row in zip(mask, x)]


# ---- the conversation


def answer(case):
    """The reply to a case: an answer, or the reason why there is none."""
    if case["operation"] not in OPERATIONS or case["layer"]["kind"] != "linear":
        return {"id": case["id"], "skipped": f"no {case['operation']} on this layer"}
    if any(adapter["config"]["lora_bias"] for adapter in case.get("adapters", [])):
        return {"id": case["id"], "skipped": "lora_bias is not built yet"}
    return {"id": case["id"], "answer": OPERATIONS[case["operation"]](case)}


def main():
    for line in sys.stdin:
        message = json.loads(line)
        if message["command"] == "stop":
            break
        reply = INFO if message["command"] == "start" else answer(message["case"])
        print(json.dumps(reply), flush=True)  # without the flush the judge waits for ever


if __name__ == "__main__":
    main()
