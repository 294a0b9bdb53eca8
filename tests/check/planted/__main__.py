"""A planted port as a program:   python -m tests.check.planted METHOD MISTAKE [DTYPE]     MISTAKE may be "none"."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from tests.check.planted.adalora import PLANTED as ADALORA
from tests.check.planted.adalora import AdaLoRA
from tests.check.planted.dora import PLANTED as DORA
from tests.check.planted.dora import DoRA
from tests.check.planted.lora import PLANTED as LORA
from tests.check.planted.right import LoRA

KINDS = ["linear", "transposed_linear", "embedding"]
ON_LAYERS = ("forward", "backward", "delta", "merge", "unmerge")


def main(method: str, mistake: str, dtype: str = "float64") -> None:
    made: Any = {"lora": {"none": LoRA, **LORA}, "dora": {"none": DoRA, **DORA}, "adalora": {"none": AdaLoRA, **ADALORA}}[method][mistake]
    port = made(np.dtype(dtype).type)
    for line in sys.stdin:
        message = json.loads(line)
        if message["command"] == "stop":
            return
        if message["command"] == "start":
            reply = {"name": mistake, "dtype": dtype, "methods": [method], "layers": KINDS}
        else:
            case = message["case"]
            asked = case["method"] == method and case["operation"] in (AdaLoRA.operations if method == "adalora" else ON_LAYERS)
            answer = port.answer(case) if asked else None
            reply = {"id": case["id"], **({"skipped": "not built"} if answer is None else {"answer": answer})}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
