"""Hostile files by name, each made by a few lines: adapter folders and checkpoint folders in which one thing is a lie, or a trap.

Every maker starts from a folder that is right (`adapter`, `checkpoint`) and spoils it. None of them takes more than 40 MB of disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from peft_ref.files.safetensors import serialize

Maker: TypeAlias = Callable[[Path], None]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WIDTH, LAYERS = 8, 2
MODULES = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(LAYERS))
RIGHT = {"peft_type": "LORA", "task_type": None, "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


# ---- what is right


def lora_tensors(rank: int = 2) -> dict[str, np.ndarray[Any, Any]]:
    rng, found = np.random.default_rng(0), {}
    for name in MODULES:
        found[f"base_model.model.{name}.lora_A.weight"] = rng.normal(size=(rank, WIDTH)).astype(np.float32)
        found[f"base_model.model.{name}.lora_B.weight"] = rng.normal(size=(WIDTH, rank)).astype(np.float32)
    return found


def llama_tensors() -> dict[str, np.ndarray[Any, Any]]:
    sizes = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (8, 8), "self_attn.v_proj": (8, 8), "self_attn.o_proj": (8, 8)}
    sizes |= {"mlp.gate_proj": (16, 8), "mlp.up_proj": (16, 8), "mlp.down_proj": (8, 16)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (16, 8), "lm_head": (16, 8), "model.norm": (8,)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in sizes.items()}
        shapes |= {f"model.layers.{i}.{name}": (8,) for name in ("input_layernorm", "post_attention_layernorm")}
    rng = np.random.default_rng(1)
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def adapter(folder: Path, tensors: Mapping[str, Any] | None = None, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({**RIGHT, **changes}))
    (folder / WEIGHTS).write_bytes(serialize(lora_tensors() if tensors is None else tensors, {"format": "pt"}))


def checkpoint(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    (folder / SINGLE).write_bytes(serialize(llama_tensors(), {"format": "pt"}))


def sharded(folder: Path, weight_map: Mapping[str, Any] | None = None) -> dict[str, str]:
    """A checkpoint in two shards; what its index says, or `weight_map` instead."""
    checkpoint(folder)
    (folder / SINGLE).unlink()
    tensors = llama_tensors()
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(shards.values()):
        (folder / file).write_bytes(serialize({n: t for n, t in tensors.items() if shards[n] == file}, {"format": "pt"}))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": shards if weight_map is None else weight_map}))
    return shards


# ---- a safetensors file, spoilt


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _first(header: dict[str, Any]) -> str:
    return next(name for name in sorted(header) if name != "__metadata__")


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """The file whose header `change` was let at: it edits it in place."""

    def spoil(data: bytes) -> bytes:
        header, rest = split(data)
        change(header)
        return joined(header, rest)

    return spoil


def claims(**changes: Any) -> Callable[[bytes], bytes]:
    """The file whose first tensor is described otherwise."""
    return edited(lambda header: header[_first(header)].update(changes))


def called(name: str) -> Callable[[bytes], bytes]:
    return edited(lambda header: header.update({name: header.pop(_first(header))}))


def header_only(text: bytes) -> Callable[[bytes], bytes]:
    return lambda data: joined(text, b"")


def shifted(by: int) -> Callable[[bytes], bytes]:
    def change(header: dict[str, Any]) -> None:
        claim = header[_first(header)]
        claim["data_offsets"] = [n + by for n in claim["data_offsets"]]

    return edited(change)


def lists(size: int) -> bytes:
    return b'{"a":[' + b"[]," * (size // 3) + b"[]]}"


TENSOR_FILES: Mapping[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "seven bytes": lambda data: data[:7],
    "cut in the header": lambda data: data[:40],
    "cut in a tensor": lambda data: data[:-3],
    "too long": lambda data: data + b"\0",
    "a header of 2^63 bytes": lambda data: (2**63).to_bytes(8, "little") + data[8:],
    "a header longer than the file": lambda data: (10**6).to_bytes(8, "little") + data[8:],
    "a header of no bytes": lambda data: (0).to_bytes(8, "little") + data[8:],
    "a header of 100 MB that is not there": lambda data: (10**8).to_bytes(8, "little") + data[8:],
    "a header of 33 MB": header_only(b'{"__metadata__":{"a":"' + b"x" * (33 * 2**20) + b'"}}'),
    "a header of empty lists": header_only(lists(30 * 2**20)),
    "a header of a million entries": header_only(b"{" + b",".join(b'"%07x":[0,0]' % i for i in range(10**6)) + b"}"),
    "as many values as are read": header_only(lists(3 * 590_000)),
    "not JSON": header_only(b"{nonsense"),
    "a header in UTF-16": lambda data: joined(json.dumps(split(data)[0]).encode("utf-16"), split(data)[1]),
    "a header with a byte-order mark": lambda data: joined(b"\xef\xbb\xbf" + json.dumps(split(data)[0]).encode(), split(data)[1]),
    "not UTF-8": header_only(b'{"\xff\xfe": 1}'),
    "half a surrogate": called("\ud800"),
    "100,000 deep": header_only(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "900 deep": header_only(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"),
    "a list": header_only(b"[]"),
    "one claim and no name": header_only(b'{"dtype":"F32","shape":[],"data_offsets":[0,4]}'),
    "a tensor twice": lambda data: joined(json.dumps(split(data)[0])[:-1].encode() + b', "x": 1, "x": 2}', split(data)[1]),
    "metadata that is a list": edited(lambda header: header.update(__metadata__=[])),
    "metadata that is a number": edited(lambda header: header.update(__metadata__={"format": 1})),
    "offsets that overlap": shifted(-4),
    "offsets past the end": shifted(10**6),
    "offsets of 2^70": claims(data_offsets=[2**70, 2**70 + 4]),
    "offsets that are negative": claims(data_offsets=[-4, 60]),
    "offsets the wrong way round": claims(data_offsets=[64, 0]),
    "offsets that are truth values": claims(data_offsets=[False, True]),
    "a number of 5,000 digits": edited(lambda header: header.update(x="NUMBER")),
    "NaN as an offset": claims(data_offsets=[float("nan"), 64]),
    "a shape that overflows": claims(shape=[2**32, 2**32, 2**32]),
    "a shape that overflows beside a zero": claims(shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
    "a shape of 100,000 axes": claims(shape=[2**62] * 100_000),
    "a shape of 65 axes": claims(shape=[1] * 65),
    "a negative size": claims(shape=[-2, 8]),
    "a fractional size": claims(shape=[2.0, 8]),
    "a size of a text": claims(shape="28"),
    "a dtype that is a list": claims(dtype=["F32"]),
    "a dtype of a megabyte": claims(dtype="F" * 2**20),
    "a dtype that steers a terminal": claims(dtype="\x1b[2J"),
    "a dtype NumPy lacks": claims(dtype="F6_E2M3", shape=[8, 64 // 6]),
    "a dtype of unknown width": claims(dtype="Q32"),
    "sub-byte numbers": claims(dtype="F4", shape=[16, 8]),
    "a name that steers a terminal": called("\x1b]0;owned\x07\x1b[31mq_proj"),
    "a name with NUL": called("a\0b"),
    "a name with a line end": called("a\nb"),
    "a name that turns the reading direction": called("a\u202eb"),
    "a name of a megabyte": called("a." * 2**19),
    "a name that leaves the folder": called("../../../../etc/passwd"),
    "an absolute name": called("/etc/passwd"),
    "a name of nothing": called(""),
    "a pickle": lambda data: b"\x80\x04\x95" + b"\0" * 100,
    "a zip": lambda data: b"PK\x03\x04" + b"\0" * 100,
}


def _number(data: bytes) -> bytes:
    header, rest = split(edited(lambda header: header.update(x="NUMBER"))(data))
    return joined(json.dumps(header).replace('"NUMBER"', "9" * 5000).encode(), rest)


TENSOR_FILES = {**TENSOR_FILES, "a number of 5,000 digits": _number}


def spoilt(file: str, spoil: Callable[[bytes], bytes], make: Maker) -> Maker:
    def maker(folder: Path) -> None:
        make(folder)
        (folder / file).write_bytes(spoil((folder / file).read_bytes()))

    return maker


def instead(file: str, put: Callable[[Path], Any], make: Maker) -> Maker:
    """The folder with something else in the place of a file."""

    def maker(folder: Path) -> None:
        make(folder)
        (folder / file).unlink(missing_ok=True)
        put(folder / file)

    return maker


THINGS: Mapping[str, Callable[[Path], Any]] = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to a pipe": lambda path: (os.mkfifo(path.with_suffix(".pipe")), path.symlink_to(path.with_suffix(".pipe"))),
    "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}
