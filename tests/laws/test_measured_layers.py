"""The layer that the sizes of stored tensors tell, where those are not plainly the layer's: the smallest with tensors of these sizes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from peft_ref.contracts import WeightMethod
from peft_ref.layers import Conv, Embedding, Layer, Linear
from peft_ref.methods import BOFT, OFT, FourierFT, LoKr, RandLoRA, SHiRA, SuperTuning, WaveFT


def linear(n_in: int, out: int = 1) -> Linear:
    return Linear(in_features=n_in, out_features=out)


def shapes(method: WeightMethod[Any], layer: Layer) -> dict[str, tuple[int, ...]]:
    return {s.key: s.stored_shape for s in method.spec(layer)}


POINT = Conv(in_channels=12, out_channels=7, kernel_size=(1, 1))  # of a kernel only how many numbers a filter has is told
TABLE = Embedding(num_embeddings=9, embedding_dim=12)
TOLD: list[tuple[Any, Layer, Layer]] = [
    *((OFT(oft_block_size=b), linear(12, 7), linear(12)) for b in range(1, 13)),
    *((OFT(oft_block_size=0, r=r), linear(12, 7), linear(12)) for r in (1, 2, 3, 4, 6, 12)),
    *((OFT(oft_block_size=0, r=r, block_share=True), linear(24, 7), linear(24)) for r in (1, 2, 3, 24)),
    (OFT(oft_block_size=4, block_share=True), linear(12, 7), linear(4)),  # how many blocks share the numbers, none of them says
    (OFT(oft_block_size=4), TABLE, Embedding(num_embeddings=1, embedding_dim=12)),
    *((SuperTuning(sparsity=0.75), linear(n), linear(n - n % 4)) for n in (4, 5, 8, 57, 131)),
    *((SuperTuning(sparsity=0.0), linear(n), linear(n)) for n in (1, 2, 9)),
    *((BOFT(boft_block_size=b), linear(12, 7), linear(12, 7)) for b in (2, 3, 12)),
    (BOFT(boft_block_size=2, boft_n_butterfly_factor=2), linear(12, 7), linear(12, 7)),
    *((BOFT(boft_block_size=b), Conv(in_channels=3, out_channels=7, kernel_size=(2, 2)), POINT) for b in (2, 3, 12)),
    *((SHiRA(r=r), linear(*size), linear(5, 4)) for r in (1, 2) for size in ((3, 6), (6, 3), (4, 5))),
    *((RandLoRA(r=2, widest_in=5, widest_out=5), linear(*size), linear(3, 3)) for size in ((3, 5), (5, 3), (3, 3))),
    *((method(n_frequency=n), linear(6, 7), linear(n)) for n in (1, 2, 9) for method in (FourierFT, WaveFT)),
]


@pytest.mark.parametrize(("method", "layer", "told"), TOLD)
def test_the_smallest_layer_with_tensors_of_these_sizes_is_told(method: Any, layer: Layer, told: Layer) -> None:
    given = shapes(method, layer)
    assert method.measured(given) == told
    assert shapes(method, told) == given


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.6, 0.75, 0.9, 0.99, 48 / 49, 0.999])
def test_of_super_tunings_places_the_least_number_of_entries_is_told(sparsity: float) -> None:
    method = SuperTuning(sparsity=sparsity)
    for n in (*range(1, 60), 1000, 10**6, 123_456_789):
        entries = method.measured({"supertuning_values": (n,)}).in_features  # type: ignore[union-attr]
        assert (method.count(entries), method.count(entries - 1)) == (n, n - 1)


LOKR = [
    LoKr(r=r, decompose_both=both, decompose_factor=factor, use_effective_conv2d=core)
    for r, both, factor, core in product((1, 2), (True, False), (-1, 3), (True, False))
]


@pytest.mark.parametrize("method", LOKR, ids=str)
def test_a_layer_is_told_that_has_lokrs_tensors(method: LoKr) -> None:
    """Of every layer, whichever of its two matrices are factors; what the kernel of a flattened one was, its tensors do not tell."""
    for n_in, out in product(range(1, 13), (1, 4, 6, 10)):
        line = [Conv(in_channels=n_in, out_channels=out, kernel_size=k) for k in ((1,), (2,), (3,), (5,), (2, 2), (3, 1), (1, 2), (1, 1))]
        for layer in (linear(n_in, out), *line):
            given = shapes(method, layer)
            told = method.measured(given)
            assert told is not None
            assert shapes(method, told) == given
            assert told.shape[0] == out
            for key in given.keys() - {"lokr_t2"}:  # without a core the same factors may be a flattened kernel's
                assert method.measured({k: v for k, v in given.items() if k != key}) is None


SILENT = [OFT(), SuperTuning(), SuperTuning(sparsity=0.0), FourierFT(), WaveFT(), SHiRA(), SHiRA(r=1), RandLoRA(), BOFT(), LoKr()]


@pytest.mark.parametrize("method", SILENT)
def test_without_such_a_tensor_nothing_is_told(method: Any) -> None:
    assert method.measured({}) is None


def test_with_a_low_rank_part_the_places_tell_nothing() -> None:
    assert SuperTuning(r=2).measured(shapes(SuperTuning(r=2), linear(30, 10))) is None


@pytest.mark.parametrize("r", [1, 3])
def test_a_weight_has_an_input_and_an_output(r: int) -> None:
    """SHiRA's count is r times their sum: of less than two it is nobody's."""
    told = [SHiRA(r=r).measured({"shira_weight": (r * both,)}) for both in range(4)]
    assert told == [None, None, linear(1, 1), linear(2, 1)]
