"""The target of atheris, libFuzzer for Python:  python -m tests.hostile.atheris_target {tensors,config,index} -runs=400000

The bytes are the file, its length put right where they are a header; the seeds are files that are right.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["peft_ref.reading", "peft_ref.files", "peft_ref.graph"]):
    from peft_ref.files.safetensors import serialize
    from tests.hostile.corpus import lora_tensors, sharded  # noqa: F401
    from tests.hostile.fuzzing import a_config, an_index, check_config, check_index, check_tensor_file


def tensors(data: bytes) -> None:
    """The bytes are a header, as long as it is, before 64 bytes of numbers."""
    check_tensor_file(len(data).to_bytes(8, "little") + data + b"\0" * 64)


def main() -> None:
    name = sys.argv.pop(1)
    small = serialize({"a": lora_tensors()["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]}, {})
    seed, target = {
        "tensors": (small[8:-64], tensors),
        "config": (a_config(), check_config),
        "index": (an_index(), check_index),
    }[name]
    with tempfile.TemporaryDirectory() as corpus:
        (Path(corpus) / "right").write_bytes(seed)

        def once(data: bytes) -> None:
            target(data)

        atheris.Setup([sys.argv[0], *sys.argv[1:], corpus], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
