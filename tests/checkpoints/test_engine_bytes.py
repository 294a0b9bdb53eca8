"""What the engine writes: untouched bytes as they were, changed rows as the change says, whatever the blocks and however many workers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from peft_ref.checkpoints import work
from peft_ref.checkpoints.engine import execute
from peft_ref.checkpoints.plan import Plan, Planned, Shard
from peft_ref.checkpoints.todo import Progress
from peft_ref.checkpoints.work import BLOCK, Bench, Range, Task, finite, pieces, start, tasks
from peft_ref.files.safetensors import dtypes, open_file
from tests.checkpoints.engine_made import BF16, adapter, beside, bytes_of, checkpoint, expected, merged, numbers, planned, small

Patch = pytest.MonkeyPatch


def tasks_of(shard: Shard, begin: int) -> list[Task]:
    return [task for piece in pieces(shard, begin) for task in tasks(piece)]


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.astype(np.float64), wanted[name], err_msg=name)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("block", [1, 300, BLOCK])
def test_every_row_is_changed_once_whatever_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, block: int) -> None:
    monkeypatch.setattr(work.tasks, "__defaults__", (block,))
    base, one, two = small(tmp_path / "base"), adapter(tmp_path / "one", 2), adapter(tmp_path / "two", 1)
    execute(planned(base, [one, two]), tmp_path / "out", threads=threads)
    assert_same(merged(tmp_path / "out"), expected(base, [2, 1]))
    assert not beside(tmp_path / "out")


def test_untouched_bytes_and_headers_are_those_of_the_base(tmp_path: Path) -> None:
    base = small(tmp_path / "base")
    plan = planned(base, [adapter(tmp_path / "adapter")])
    execute(plan, tmp_path / "out")
    found, was = bytes_of(tmp_path / "out"), bytes_of(base)
    assert found.keys() == was.keys() | {"model.safetensors.index.json"}
    assert found["config.json"] == was["config.json"]
    assert found["model.safetensors.index.json"] == plan.written[0][1]
    for shard in plan.shards:
        touched = [range(t.begin, t.end) for t in shard.tensors if t.changes]
        outside = np.ones(len(was[shard.name]), bool)
        for span in touched:
            outside[span.start : span.stop] = False
        new, old = (np.frombuffer(files[shard.name], np.uint8) for files in (found, was))
        assert len(new) == len(old)
        np.testing.assert_array_equal(new[outside], old[outside])
        assert not touched or (new[~outside] != old[~outside]).any()


def test_an_untouched_shard_is_one_range_and_neighbours_are_copied_together(tmp_path: Path) -> None:
    plan = planned(small(tmp_path / "base"), [adapter(tmp_path / "adapter")])
    kinds = [[type(task).__name__ for task in tasks_of(shard, int(start(shard)))] for shard in plan.shards]
    assert kinds == [["Range", "Block", "Range"], ["Range", "Block", "Range"], ["Range"]]
    whole = tasks_of(plan.shards[-1], int(start(plan.shards[-1])))[0]
    path = plan.shards[-1].tensors[0].path
    assert whole == Range(path, 0, 0, path.stat().st_size)


def test_a_long_range_is_cut_at_multiples_and_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "RANGE", 64)
    path = Path("base")
    tensor = Planned("w", "U8", (1000,), path, "U8", 100, 1100)
    found = [task for task in tasks_of(Shard("s", (tensor,), path), 100) if isinstance(task, Range)]
    assert sum(task.length for task in found) == 1100
    assert all(a.begin + a.length == b.begin == b.at for a, b in itertools.pairwise(found))
    assert {task.begin % 64 for task in found} == {0}


@pytest.mark.parametrize(
    ("stored", "dtype"), [("BF16", "F32"), ("F32", "BF16"), ("F32", "F16"), ("BF16", "F16"), ("F16", "F32"), ("F8_E4M3", "BF16")]
)
def test_another_dtype_rounds_once_in_the_wider_of_the_two(tmp_path: Path, monkeypatch: Patch, stored: str, dtype: str) -> None:
    monkeypatch.setattr(work.tasks, "__defaults__", (1000,))
    values = np.random.default_rng(0).normal(size=(40, 30)).astype(dtypes()[stored])
    base = checkpoint(tmp_path / "base", [{"plain": values, "touched": values}])
    execute(planned(base, [adapter(tmp_path / "adapter", 0.25)], dtype=dtype), tmp_path / "out")
    found = merged(tmp_path / "out")
    wider = max(dtypes()[stored], dtypes()[dtype], key=lambda d: d.itemsize)
    added = values.astype(np.float32) + (np.arange(40, dtype=np.float32)[:, None] + np.float32(0.25))
    np.testing.assert_array_equal(found["plain"], values.astype(dtypes()[dtype]))
    np.testing.assert_array_equal(found["touched"], added.astype(wider).astype(dtypes()[dtype]))


def test_a_header_of_our_own_is_the_librarys(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", [{"b": numbers(3, 4), "a.touched": numbers(5, 6), "c": numbers(2, 2, dtype=np.float32)}])
    execute(planned(base, [adapter(tmp_path / "adapter")], own=True), tmp_path / "out")
    save_file(merged(tmp_path / "out"), tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "out" / "model-1.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_from_several_files_come_together_in_one(tmp_path: Path) -> None:
    base = small(tmp_path / "base")
    apart = planned(base, [adapter(tmp_path / "adapter", 5)])
    together = Shard("model.safetensors", tuple(t for shard in apart.shards for t in shard.tensors), None)
    execute(Plan(base, apart.sources, (together,)), tmp_path / "out")
    assert_same(merged(tmp_path / "out"), expected(base, [5]))
    assert open_file(tmp_path / "out" / "model.safetensors").metadata == {"format": "pt"}


def test_tensors_in_another_order_and_with_others_left_out(tmp_path: Path) -> None:
    base = small(tmp_path / "base")
    apart = planned(base, [adapter(tmp_path / "adapter", 5)])
    some = [t for shard in reversed(apart.shards) for t in reversed(shard.tensors) if not t.name.startswith("1.b")]
    left_out = {name for name in merged(base) if name.startswith("1.b")}
    execute(Plan(base, apart.sources, (Shard("model.safetensors", tuple(some), None),)), tmp_path / "out")
    assert len(left_out) == 1
    assert_same(merged(tmp_path / "out"), {name: t for name, t in expected(base, [5]).items() if name not in left_out})


def test_a_change_that_needs_all_rows_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work.tasks, "__defaults__", (100,))
    base = small(tmp_path / "base")
    execute(planned(base, [adapter(tmp_path / "adapter", 1)], whole=True), tmp_path / "out")
    assert_same(merged(tmp_path / "out"), expected(base, [1]))


def test_vectors_scalars_experts_and_nothing_are_matrices_of_rows(tmp_path: Path) -> None:
    shapes = {"vector": (9,), "scalar": (), "experts": (3, 4, 5), "none": (0, 4), "narrow": (4, 0)}
    base = checkpoint(tmp_path / "base", [{f"{name}.touched": numbers(*shape) for name, shape in shapes.items()}])
    execute(planned(base, [adapter(tmp_path / "adapter", 1)]), tmp_path / "out")
    was, found = merged(base), merged(tmp_path / "out")
    for name, shape in shapes.items():
        rows = shape[0] if shape else 1
        index = np.arange(rows).reshape((rows, *[1] * (len(shape) - 1)) if shape else ())
        np.testing.assert_array_equal(found[f"{name}.touched"], was[f"{name}.touched"].astype(np.float64) + 1 + index)


def test_without_the_kernels_copy_the_bytes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = small(tmp_path / "base")
    plan = planned(base, [adapter(tmp_path / "adapter")])
    execute(plan, tmp_path / "out")
    calls = []

    def refuses(*arguments: Any) -> int:
        calls.append(arguments)
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.copy_file_range", refuses, raising=False)
    execute(plan, tmp_path / "refused")
    assert calls
    monkeypatch.setattr("os.copy_file_range", lambda *arguments: 0)
    execute(plan, tmp_path / "nothing")
    monkeypatch.delattr("os.copy_file_range")
    execute(plan, tmp_path / "missing")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "refused") == bytes_of(tmp_path / "nothing") == bytes_of(tmp_path / "missing")


def test_a_kernel_that_moves_a_few_bytes_at_a_time_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    base = small(tmp_path / "base", rows=20, columns=30)
    plan = planned(base, [adapter(tmp_path / "adapter")])
    execute(plan, tmp_path / "out")
    ranges, reads, writes = os.copy_file_range, os.preadv, os.pwrite
    monkeypatch.setattr("os.copy_file_range", lambda a, b, n, i, j: ranges(a, b, min(n, 100), i, j))
    monkeypatch.setattr("os.preadv", lambda f, buffers, at: reads(f, [buffers[0][:101]], at))
    monkeypatch.setattr("os.pwrite", lambda f, data, at: writes(f, data[:99], at))
    execute(plan, tmp_path / "slow")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "slow")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, BF16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_what_is_no_number_is_found_and_nothing_else_is(dtype: Any) -> None:
    limits = ml_dtypes.finfo(dtype)
    assert finite(np.array([0, -0.0, 1, -1, limits.max, limits.min, limits.smallest_subnormal], dtype))
    assert finite(np.zeros((0, 3), dtype))
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        assert not finite(np.array([[1, 2], [3, value]], dtype))
    assert finite(np.arange(3, dtype=np.int16) - 5)


def test_a_change_that_returns_other_rows_is_refused(tmp_path: Path) -> None:
    plan = planned(checkpoint(tmp_path / "base", [{"w": numbers(4, 4)}]))
    tensor = plan.shards[0].tensors[0]

    class Less:
        whole = False

        def __call__(self, rows: Any, first: int) -> Any:
            return rows[1:]

    with tensor.path.open("rb") as file, pytest.raises(ValueError, match="rows and columns stay"):
        Bench().made(work.Block(work.Opened(tensor, (Less(),), 0), 0, 4), file.fileno())  # type: ignore[arg-type]


def test_progress_ends_with_all_of_it(tmp_path: Path) -> None:
    told: list[Progress] = []
    base = small(tmp_path / "base")
    done = execute(planned(base, [adapter(tmp_path / "adapter")]), tmp_path / "out", tell=told.append)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert (told[-1].written, told[-1].total, told[-1].shards, told[-1].of) == (size, size, 3, 3)
    assert (done.written, done.kept) == (size, ())
