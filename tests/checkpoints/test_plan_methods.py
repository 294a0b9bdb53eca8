"""Every method in a plan, beside PEFT's merge: the bits, or what arithmetic in another order leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.checkpoints.plan import Rounding, Source
from peft_ref.checkpoints.planning import plan
from peft_ref.errors import ConfigError
from peft_ref.methods import METHODS

pytest.importorskip("peft", reason="the extra `hf` is not installed")

from tests.checkpoints import method_cases
from tests.checkpoints.beside_peft import array_of, carried_out, differing, merged_by_peft, saved_adapter, steps
from tests.checkpoints.method_cases import BITS, FINER, MORE_PART, MORE_PLACES, OFTEN, PART, PLACES, SELDOM, UNMERGED, folders

pytestmark = pytest.mark.usefixtures("quiet")
CASES = method_cases.cases()
FIRST = {
    method: next(label for label, case in CASES.items() if case[0] == method) for method in dict.fromkeys(c[0] for c in CASES.values())
}
METHODS_OF = {cls.__name__: cls for cls in METHODS.weights.values()}
SHARED = {"FRoD"}  # test_plan_shared.py has it, and those that count layers on models whose order is known


def check(tmp_path: Path, label: str, dtype: str, rounding: Rounding) -> None:
    method = CASES[label][0]
    model, base, adapter = folders(tmp_path, label, dtype)
    if METHODS_OF[method].counts_layers and not hasattr(model, "config"):
        with pytest.raises(ConfigError, match="place in the live model"):
            plan(base, [Source(adapter)])
        return
    before = {name: array_of(tensor) for name, tensor in model.state_dict().items()}
    ours = carried_out(plan(base, [Source(adapter)], rounding=rounding, exact=True, ties="share"))
    theirs = {name: x for name, x in merged_by_peft(model, [adapter], rounding).items() if name in ours}
    found = differing(theirs, ours)
    if method in BITS:
        assert not found, label
    changed = sum(theirs[name].size for name in ours if (theirs[name] != before[name]).any())
    for name in found:
        if dtype == "F32":
            a, b = theirs[name], ours[name]
            assert abs(a - b).max() <= MORE_PART.get(method, PART) * abs(a).max(), name
        else:
            assert steps(theirs[name], ours[name], before[name]) <= MORE_PLACES.get(method, PLACES), name
    if dtype != "F32":
        assert sum(found.values()) <= OFTEN.get(method, SELDOM) * FINER[dtype] * changed


def test_every_method_on_weights_is_here_or_is_said_to_be_unmerged() -> None:
    assert {c[0] for c in CASES.values()} | UNMERGED.keys() | SHARED == METHODS_OF.keys()


@pytest.mark.parametrize("label", [*FIRST.values(), "IA3 gpt2 Conv1D", "vera from its seed", "supra"])
@pytest.mark.parametrize(("dtype", "rounding"), [("BF16", "default"), ("BF16", "safe"), ("F32", "default")])
def test_the_merge_is_pefts(tmp_path: Path, label: str, dtype: str, rounding: Rounding) -> None:
    check(tmp_path, label, dtype, rounding)


@pytest.mark.parametrize("label", ["DoRA", "DoRA gpt2 Conv1D", "hira", "gpt2 Conv1D hira"])
def test_what_reads_the_frozen_weight_reads_it_as_it_was_under_all_adapters(tmp_path: Path, label: str) -> None:
    """In float32: in 16 bits PEFT takes the first adapter out of what it had rounded, and DoRA's norm is of what is left."""
    model, base, first = folders(tmp_path, label, "F32")
    second = saved_adapter(model, method_cases.plain(CASES[label][2]()), tmp_path / "second", seed=5)
    theirs, ours = merged_by_peft(model, [first, second]), carried_out(plan(base, [Source(first), Source(second)], ties="share"))
    for name, x in ours.items():
        assert abs(x - theirs[name]).max() <= PART * abs(x).max(), name


@pytest.mark.sweep
@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("rounding", ["default", "safe"])
def test_the_merge_is_pefts_on_every_layer(tmp_path: Path, label: str, dtype: str, rounding: Rounding) -> None:
    check(tmp_path, label, dtype, rounding)


@pytest.mark.parametrize("label", ["DoRA", "hira", "LoHa", "IA3", "TrainableTokens"])
def test_rows_need_not_come_all_at_once(tmp_path: Path, label: str) -> None:
    """However the rows of a layer whose method is a map of rows are cut, the same becomes of them."""
    _, base, adapter = folders(tmp_path, label, "BF16")
    made: Any = plan(base, [Source(adapter)])
    one, two = carried_out(made, block=5), carried_out(made, block=10**6)
    for name in differing(one, two):  # a product of fewer rows may be summed in another order
        assert steps(one[name], two[name], np.zeros_like(one[name])) <= 1
    assert any(not change.whole() for shard in made.shards for t in shard.tensors for change in t.changes)
