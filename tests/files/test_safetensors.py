"""Safetensors files: read as the library reads them, written as it writes them, and believed only when they add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from peft_ref.errors import FileFormatError, KeyMismatchError
from peft_ref.files.atomic import replace_file
from peft_ref.files.safetensors import BITS, RawTensor, _layout, dtypes, open_file, serialize


def tensors_of_all_dtypes(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    values = {name: rng.integers(0, 2, (3, 5)).astype(d) for name, d in dtypes().items()}
    floats = {n: rng.normal(size=(3, 5)).astype(d) for n, d in dtypes().items() if n[0] == "F" or n == "BF16"}
    return {**values, **floats, "empty": np.zeros((0, 4), np.float32), "scalar": np.array(3.5)}


def written(path: Path, header: Any, data: bytes = b"", *, text: bytes | None = None, length: int | None = None) -> Path:
    text = json.dumps(header).encode() if text is None else text
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def claim(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_every_dtype_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = tensors_of_all_dtypes()
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    file = open_file(tmp_path / "a.safetensors")
    assert file.entries.keys() == tensors.keys()
    for name, expected in tensors.items():
        got = file.read(name)
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert got.tobytes() == expected.tobytes()


def test_every_dtype_is_written_as_the_library_writes_it() -> None:
    tensors = tensors_of_all_dtypes(1)
    metadata = {"format": "pt"}
    assert serialize(tensors, metadata) == safetensors.numpy.save(tensors, metadata)


def test_our_layout_is_the_library_s_layout() -> None:
    tensors = tensors_of_all_dtypes(2)
    names = {d: n for n, d in dtypes().items()}
    raws = {k: RawTensor(names[v.dtype], v.shape, v.tobytes()) for k, v in tensors.items()}
    assert _layout(raws, {"format": "pt"}) == safetensors.numpy.save(tensors, {"format": "pt"})
    assert _layout(raws, {}) == safetensors.numpy.save(tensors)


def test_the_layout_of_dtypes_numpy_lacks_is_the_library_s_too() -> None:
    from safetensors import TensorSpec
    from safetensors import serialize as library

    data = np.arange(24, dtype=np.uint8)
    names = {"F8_E8M0": ("float8_e8m0fnu", [24]), "F4": ("float4_e2m1fn_x2", [24]), "C64": ("complex64", [3]), "F64": ("float64", [3])}
    names |= {"U8": ("uint8", [24]), "BF16": ("bfloat16", [12]), "I64": ("int64", [3]), "F32": ("float32", [6]), "BOOL": ("bool", [24])}
    spec = {k: TensorSpec(dtype=d, shape=s, data_ptr=data.ctypes.data, data_len=24) for k, (d, s) in names.items()}
    ours = {k: RawTensor(k, (48,) if k == "F4" else tuple(s), data.tobytes()) for k, (_, s) in names.items()}
    assert serialize(ours, {}) == bytes(library(spec, None))


def test_a_transposed_array_is_written_by_its_values(tmp_path: Path) -> None:
    a = np.arange(6.0).reshape(2, 3)
    replace_file(tmp_path / "a.safetensors", serialize({"a": a.T, "big": a.astype(">f4")}, {}))
    np.testing.assert_array_equal(open_file(tmp_path / "a.safetensors").read("a"), a.T)
    np.testing.assert_array_equal(open_file(tmp_path / "a.safetensors").read("big"), a)


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "F6_E2M3", "C64", "F2_FROM_THE_FUTURE"])
def test_a_dtype_numpy_lacks_is_named_and_survives_a_copy(tmp_path: Path, dtype: str) -> None:
    shape = (8 * 24 // BITS.get(dtype, 8),)
    header = {"__metadata__": {"format": "pt", "b": "2", "a": "1"}, "x": claim(dtype, shape, (0, 24))}
    path = written(tmp_path / "a.safetensors", header, bytes(range(24)))
    file = open_file(path)
    with pytest.raises(FileFormatError, match=rf"(?s)a\.safetensors.*'x' is {dtype}"):
        file.read("x")
    replace_file(tmp_path / "b.safetensors", serialize({"x": file.tensor("x"), "y": np.ones(2)}, file.metadata))
    copy = open_file(tmp_path / "b.safetensors")
    assert copy.raw("x") == RawTensor(dtype, shape, bytes(range(24)))
    assert list(copy.metadata.items()) == list(file.metadata.items())


def test_a_read_tensor_can_be_written_into_without_touching_the_file(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": np.zeros(2)}, tmp_path / "a.safetensors")
    file = open_file(tmp_path / "a.safetensors")
    file.read("a")[:] = 1
    assert not file.read("a").any()


def test_an_absent_tensor_is_named(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": np.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(KeyMismatchError, match="'b'"):
        open_file(tmp_path / "a.safetensors").read("b")


def test_a_dtype_safetensors_has_no_name_for_is_refused() -> None:
    with pytest.raises(FileFormatError, match="'x' is complex128"):
        serialize({"x": np.zeros(2, np.complex128)}, {})


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    whole = safetensors.numpy.save({"a": np.arange(9.0), "b": np.ones(3)})
    (tmp_path / "a.safetensors").write_bytes(whole[:keep])
    with pytest.raises(FileFormatError, match=r"a\.safetensors"):
        open_file(tmp_path / "a.safetensors")


LIES = {
    "a length beyond the file": ({"header": {}, "length": 10**6}, "header of 1000000"),
    "a huge header": ({"header": {}, "length": 2**63}, "at most 33554432"),
    "not JSON": ({"header": None, "text": b"{not json"}, "not JSON"),
    "not UTF-8": ({"header": None, "text": b'{"\xff": 1}'}, "not text in UTF-8"),
    "a lone surrogate": ({"header": None, "text": b'{"\\ud800": {"dtype":"F32","shape":[],"data_offsets":[0,0]}}'}, "not text in UTF-8"),
    "nested too deep": ({"header": None, "text": b'{"a":' + b"[" * 200_000}, "not JSON"),
    "no object": ({"header": [1]}, "expected an object"),
    "a name twice": ({"header": None, "text": b'{"a": 1, "a": 2}'}, "'a' twice"),
    "metadata that is no text": ({"header": {"__metadata__": {"a": 1}}}, "__metadata__"),
    "an entry that is no object": ({"header": {"x": 3}}, "'x' is described by 3"),
    "a missing field": ({"header": {"x": {"dtype": "F32", "shape": [2]}}}, "'x' is described"),
    "a dtype that is no name": ({"header": {"x": claim() | {"dtype": 3}}, "data": b"12345678"}, "'x' has the dtype"),
    "a negative size": ({"header": {"x": claim(shape=(-2,))}, "data": b"12345678"}, "'x' has the shape"),
    "a size that is no integer": ({"header": {"x": claim(shape=(2.0,))}, "data": b"12345678"}, "'x' has the shape"),
    "a size that is a truth value": ({"header": {"x": claim(shape=(True, 2))}, "data": b"12345678"}, "'x' has the shape"),
    "one offset": ({"header": {"x": claim(offsets=(0,))}, "data": b"12345678"}, "'x' has the offsets"),
    "a negative offset": ({"header": {"x": claim(offsets=(-8, 0))}, "data": b"12345678"}, "'x' has the offsets"),
    "offsets the wrong way round": ({"header": {"x": claim(offsets=(8, 0))}, "data": b"12345678"}, "'x' claims the bytes"),
    "offsets out of the file": ({"header": {"x": claim(shape=(4,), offsets=(0, 16))}, "data": b"12345678"}, "'x' claims the bytes"),
    "a wrong shape product": ({"header": {"x": claim(shape=(3,))}, "data": b"12345678"}, r"'x': F32 of shape \(3,\) takes 12 bytes"),
    "a shape that leaves bytes over": ({"header": {"x": claim(shape=(1,))}, "data": b"12345678"}, "'x': F32 .* takes 4 bytes"),
    "overlapping tensors": (
        {"header": {"x": claim(), "y": claim(offsets=(4, 12))}, "data": b"123456789012"},
        "tensor 'x' and tensor 'y' overlap",
    ),
    "a hole": ({"header": {"x": claim(), "y": claim(offsets=(9, 17))}, "data": b"x" * 17}, "'x' and tensor 'y' leave a hole"),
    "bytes of no tensor": ({"header": {"x": claim()}, "data": b"123456789"}, "1 bytes after tensor 'x'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_by_file_and_tensor(tmp_path: Path, lie: str) -> None:
    arguments, message = LIES[lie]
    path = written(tmp_path / "a.safetensors", **arguments)
    with pytest.raises(FileFormatError, match=message) as caught:
        open_file(path)
    assert str(path) in str(caught.value)
    with pytest.raises(safetensors.SafetensorError):  # the library refuses each of them too
        safetensors.safe_open(path, "np")


def test_a_header_must_begin_with_a_brace(tmp_path: Path) -> None:  # as the format says; the library takes spaces before it
    with pytest.raises(FileFormatError, match="expected an object"):
        open_file(written(tmp_path / "a.safetensors", None, text=b" {}"))


def test_a_pickle_under_the_name_of_a_safetensors_file_is_refused(tmp_path: Path) -> None:
    import pickle

    (tmp_path / "a.safetensors").write_bytes(pickle.dumps({"a": list(range(99))}))
    with pytest.raises(FileFormatError, match="pickle"):
        open_file(tmp_path / "a.safetensors")


def test_a_damaged_file_is_an_error_of_ours_or_reads_something(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    whole = serialize({"a": np.arange(9.0), "b": np.ones((2, 3), ml_dtypes.bfloat16)}, {"format": "pt"})
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole) - 80, 3):
            damaged[at] = rng.integers(0, 256)
        (tmp_path / "a.safetensors").write_bytes(damaged)
        try:
            file = open_file(tmp_path / "a.safetensors")
            [file.tensor(name) for name in file.entries]
        except FileFormatError:
            refused += 1
    assert refused > 200
