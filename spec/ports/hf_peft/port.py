"""HF PEFT as a port: its own layers answer the cases, so that the reference is judged by what it refers to.

    peft-ref check -- python spec/ports/hf_peft/port.py [--dtype float32]

Needs the extra `hf` (torch, peft, transformers). What PEFT refuses, or crashes on, is skipped with the reason; nothing here computes
anything that PEFT computes. `model.py` builds the layer and puts the adapters on it, `text.py` answers the operations about names,
`prompts.py` everything about prompts, `attention.py` everything about attention, `training.py` those about a whole training.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a judge must not wait for a server
warnings.filterwarnings("ignore")

import attention  # noqa: E402
import peft  # noqa: E402
import prompts  # noqa: E402
import torch  # noqa: E402
from model import DTYPES, NotInPeft, adapted, array, float32_meaning, fresh, gradients, nested  # noqa: E402
from text import TEXT_OPERATIONS  # noqa: E402
from training import TRAINING_OPERATIONS  # noqa: E402

Json = dict[str, Any]


def forward(case: Json, dtype: torch.dtype) -> Json:
    with torch.no_grad():
        return {"y": nested(adapted(case, dtype).layer(input_of(case, dtype)))}


def backward(case: Json, dtype: torch.dtype) -> Json:
    model, layer = adapted(case, dtype)
    x = input_of(case, dtype)
    x.requires_grad_(x.is_floating_point())
    layer(x).backward(array(case["dy"], dtype))
    answer: Json = {"adapters": gradients(model, case)}
    return answer if x.grad is None else {"x": nested(x.grad), **answer}


def delta(case: Json, dtype: torch.dtype) -> Json:
    layer = adapted(case, dtype).layer
    if case["method"] in ("miss", "miss_mini"):  # a function of the whole weight there
        return {"weight": nested(layer.get_delta_weight_miss(layer.active_adapters[0], torch.zeros_like(layer.base_layer.weight)))}
    own = {"bdlora": "_get_bdlora_delta_weight", "kasa": "_get_delta_weight"}.get(case["method"])  # LoRA's does not know of these
    if own is not None:
        adapter = layer.active_adapters[0]
        return {"weight": nested(getattr(layer.lora_variant[adapter], own)(layer, adapter))}
    found = layer.get_delta_weight(layer.active_adapters[0])
    found = found.to_dense() if found.is_sparse else found
    if case["method"] in ("fourierft", "waveft") and case["layer"]["kind"] == "transposed_linear":
        found = found.T  # PEFT turns it when it uses it
    return {"weight": nested(found)}


def merge(case: Json, dtype: torch.dtype) -> Json:
    layer = adapted(case, dtype).layer
    layer.merge()
    return base_of(layer, case["layer"])


def unmerge(case: Json, dtype: torch.dtype) -> Json:
    """Merges first, so that PEFT keeps what it needs (DoRA's norm), and then unmerges another weight than the merged one."""
    layer = adapted(case, dtype).layer
    layer.merge()
    base = layer.get_base_layer()
    base.weight.data = array(case["merged"]["weight"], dtype)
    if case["merged"]["bias"] is not None:
        base.bias.data = array(case["merged"]["bias"], dtype)
    layer.unmerge()
    return base_of(layer, case["layer"])


def input_of(case: Json, dtype: torch.dtype) -> torch.Tensor:
    x = array(case["x"], dtype)
    return x.long() if case["layer"]["kind"] == "embedding" else x


def base_of(layer: Any, asked: Json) -> Json:
    base = layer.get_base_layer()
    return {"weight": nested(base.weight), "bias": None if asked["bias"] is None else nested(base.bias)}


def init(case: Json, dtype: torch.dtype) -> Json:
    return {"draws": [fresh(case, dtype) for _ in range(case["draws"])]}


OPERATIONS = {
    "forward": forward,
    "backward": backward,
    "delta": delta,
    "merge": merge,
    "unmerge": unmerge,
    "init": init,
    **TRAINING_OPERATIONS,
}


def reply(case: Json, dtype: torch.dtype) -> Json:
    operation = case["operation"]
    text, arrays = TEXT_OPERATIONS, OPERATIONS
    if case["method"] in prompts.CONFIGS:
        text, arrays = prompts.TEXT_OPERATIONS, prompts.OPERATIONS
    elif case["method"] in attention.METHODS:
        text, arrays = attention.TEXT_OPERATIONS, attention.OPERATIONS
    try:
        if operation in text:
            return {"id": case["id"], "answer": text[operation](case)}
        if operation not in arrays:
            return {"id": case["id"], "skipped": f"this port does not know the operation {operation}"}
        with float32_meaning(dtype, case["method"]):
            return {"id": case["id"], "answer": arrays[operation](case, dtype)}
    except NotInPeft as reason:
        return {"id": case["id"], "skipped": str(reason)}
    except Exception as error:  # whatever PEFT raises costs this case, and is told
        return {"id": case["id"], "error": f"{type(error).__name__}: {error}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="float64")
    name = parser.parse_args().dtype
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64 if name == "float64" else torch.float32)  # what adapters are drawn in
    out, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not talk to the judge
    info = {
        "name": "HF PEFT",
        "language": "Python",
        "version": f"{peft.__version__}, torch {torch.__version__}",
        "homepage": "https://github.com/huggingface/peft",
        "dtype": name,
    }
    for line in sys.stdin:
        message = json.loads(line)
        if message["command"] == "stop":
            break
        answer = info if message["command"] == "start" else reply(message["case"], DTYPES[name])
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
