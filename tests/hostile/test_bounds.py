"""The bounds of spec/hostile.md, measured: how much memory the largest header takes, and what a file that changes gives."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from peft_ref.errors import LONGEST, FileFormatError, KeyMismatchError, PeftRefError, clean, naming
from peft_ref.files.safetensors import open_file, serialize
from peft_ref.graph import CheckpointGraph
from peft_ref.reading import documents, header
from tests.hostile.corpus import SINGLE, checkpoint, joined, lists, sharded

TENSORS_OF_671B = 91_000
MEASURE = """
import re, sys
from pathlib import Path
from peft_ref.errors import PeftRefError
from peft_ref.reading.header import read_header
from peft_ref.reading.documents import CONFIG, INDEX, read_object
def peak():  # ru_maxrss would begin at what the process had that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
try:
    if sys.argv[1] == "header":
        read_header(Path(sys.argv[2]))
    else:
        read_object(Path(sys.argv[2]), {"config": CONFIG, "index": INDEX}[sys.argv[1]])
except PeftRefError:
    pass
print(peak() - before)
"""


def megabytes(kind: str, path: Path) -> float:
    done = subprocess.run([sys.executable, "-c", MEASURE, kind, str(path)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def a_large_header() -> bytes:
    names = (f"model.layers.{i // 256}.mlp.experts.{i % 256}.down_proj.weight_scale_inv" for i in range(TENSORS_OF_671B))
    return json.dumps({name: {"dtype": "F8_E4M3", "shape": [0, 2048], "data_offsets": [0, 0]} for name in names}).encode()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_header_of_671_billion_parameters_in_one_file_takes_70_megabytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(joined(a_large_header(), b""))
    assert megabytes("header", tmp_path / "a") < 70
    assert len(open_file(tmp_path / "a").entries) == TENSORS_OF_671B


LIMITS = {"header": documents.Limit(header.MAX_HEADER, header.MAX_VALUES), "index": documents.INDEX, "config": documents.CONFIG}
BOUNDS = {"header": 512, "index": 320, "config": 160}  # megabytes
COSTLY: dict[str, Callable[[int, int], bytes]] = {
    "lists": lambda size, values: lists(3 * (values // 2 - 10)),
    "keys": lambda size, values: b"{" + b",".join(b'"%06x":1.5' % i for i in range(values - 10)) + b"}",
    "wide keys": lambda size, values: ("{" + ",".join(f'"{i:x}\U0001f600":1.5' for i in range(values - 10)) + "}").encode(),
    "one text": lambda size, values: b'{"a":"' + b"x" * (size - 10) + b'"}',
    "one wide text": lambda size, values: b'{"a":"' + b"x" * (size - 20) + "\U0001f600".encode() + b'"}',
}
QUICK = [("config", what) for what in COSTLY] + [("header", "lists"), ("index", "one wide text")]
SLOW = [pytest.param(kind, what, marks=pytest.mark.sweep) for kind in LIMITS for what in COSTLY if (kind, what) not in QUICK]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("kind", "what"), [*QUICK, *SLOW])
def test_the_costliest_json_that_is_read_is_bounded(kind: str, what: str, tmp_path: Path) -> None:
    text = COSTLY[what](*LIMITS[kind])
    (tmp_path / "a").write_bytes(joined(text, b"") if kind == "header" else text)
    assert 10 < megabytes(kind, tmp_path / "a") < BOUNDS[kind]  # it was parsed, not refused by its size


def test_a_file_that_changes_after_its_header_was_read_is_not_read_by_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for change in (
        lambda: path.write_bytes(serialize({"b": np.zeros(9)}, {})),
        lambda: os.truncate(path, path.stat().st_size - 8),
        lambda: (path.rename(tmp_path / "old"), path.write_bytes(serialize({"a": np.zeros(9)}, {}))),
    ):
        path.write_bytes(serialize({"a": np.ones(9)}, {}))
        file = open_file(path)
        assert file.read("a").sum() == 9
        change()
        for read in (file.read, file.raw):
            with pytest.raises(FileFormatError, match=r"a\.safetensors was changed since"):
                read("a")


def test_a_checkpoint_that_changes_is_not_read_by_its_old_header(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    graph = CheckpointGraph(tmp_path)
    assert graph.weight("model.norm.weight").shape == (8,)
    os.truncate(tmp_path / SINGLE, 600)
    with pytest.raises(FileFormatError, match=r"safetensors was changed since its header was read"):
        graph.weight("model.norm.weight")


def test_links_out_of_the_folder_are_followed_as_the_hub_s_cache_needs(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    sharded(snapshot)
    blobs.mkdir()
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(Path("..") / "blobs" / str(i))
    graph = CheckpointGraph(snapshot)
    assert len(graph.parameters()) == 21
    assert graph.weight("lm_head.weight").shape == (16, 8)


def test_a_message_neither_steers_a_terminal_nor_fills_it() -> None:
    for kind in (FileFormatError, KeyMismatchError, PeftRefError):
        text = str(kind("a\x1b[2Jb\u202ec\x00d\n  e"))
        assert text == "a\\x1b[2Jb\\u202ec\\x00d\n  e"
        assert len(str(kind("x" * 10**6))) < LONGEST + 10
    assert clean("ä\n\t€") == "ä\n\t€"


def test_an_error_says_its_place_once() -> None:
    for message in ("wrong", "some/place: wrong"):
        with pytest.raises(KeyMismatchError, match=re.escape("some/place: wrong")) as caught, naming("some/place"), naming("some/place"):
            raise KeyMismatchError(message)
        assert str(caught.value) == "some/place: wrong"
