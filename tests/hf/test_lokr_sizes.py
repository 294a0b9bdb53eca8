"""LoKr's two matrices: how PEFT cuts a layer into them, and which of them it keeps as factors."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft.tuners.lokr.layer import factorization  # noqa: E402

from peft_ref.layers import Conv, Layer, Linear  # noqa: E402
from peft_ref.methods import LoKr  # noqa: E402
from peft_ref.methods.lokr import factors  # noqa: E402
from tests.hf.peft_layers import own_facts  # noqa: E402
from tests.hf.test_drawn_starts import Model  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("factor", [-3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 16, 100])
def test_a_size_is_cut_in_two_as_in_peft(factor: int) -> None:
    for n in (*range(1, 130), 768, 1000, 1024):
        assert factors(n, factor) == factorization(n, factor)


KERNELS = [(), (1,), (2,), (3,), (1, 1), (2, 2), (1, 2), (3, 1)]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("core", [True, False])
def test_what_is_low_enough_a_rank_to_be_in_factors_is_so_in_peft(kernel: tuple[int, ...], core: bool) -> None:
    """Twice the rank below the larger size: at the bound, 2 r being 4 or 6, both sizes are tried."""
    layers: list[Layer] = [
        Conv(in_channels=n_in, out_channels=out, kernel_size=kernel) if kernel else Linear(in_features=n_in, out_features=out)
        for n_in, out in ((16, 9), (9, 16), (16, 16), (36, 9), (9, 36), (6, 35), (35, 6), (7, 5))
    ]
    for layer, r, both in product(layers, (1, 2, 3), (True, False)):
        method = LoKr(r=r, decompose_both=both, use_effective_conv2d=core)
        options: dict[str, Any] = {**own_facts(method).peft_options(method), "target_modules": ["target"]}
        tuner = peft.get_peft_model(Model(layer), peft.LoKrConfig(**options)).base_model.model.target
        theirs = {name: tuple(held["default"].shape) for name in tuner.adapter_layer_names if "default" in (held := getattr(tuner, name))}
        assert {s.key: s.stored_shape for s in method.spec(layer)} == theirs
