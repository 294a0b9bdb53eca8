"""CorDA and LoRA-GA where they turn: how badly C~ may be inverted, the last rank, a gradient of zero, what is drawn. PEFT runs live."""

from __future__ import annotations

import types
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft.tuners.lora import corda as peft_corda  # noqa: E402

from peft_ref.errors import UnsupportedLayerError  # noqa: E402
from peft_ref.layers import Linear  # noqa: E402
from peft_ref.methods import LoRA  # noqa: E402
from peft_ref.methods.corda_init import corda  # noqa: E402
from peft_ref.methods.lora_ga_init import LoraGA, lora_ga, spectrum  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
RNG = np.random.default_rng
LAYER = Linear(in_features=4, out_features=4)
W = RNG(0).normal(size=(4, 4))
PERCENT = 100 * np.eye(4)  # C; C~ is 101, 102, 104, 108 ... times the identity


# ---- CorDA


def off_by(real: Any, sizes: tuple[float, ...], stacked: Any) -> Any:
    """An inverse of d 1 whose product with d 1 is 1 but for one entry, of the next of `sizes`; when those are used up, the real one."""
    left = list(sizes)

    def inverse(M: Any) -> Any:
        if not left:
            return real(M)
        d, M = float(M[0, 0]), np.zeros((4, 4))
        M[0, 1] = left.pop(0)
        return stacked((np.eye(4) + M) / d)

    return inverse


@pytest.mark.parametrize("off", [(), (0.04,), (0.0499,), (0.05,), (0.06,), (0.9, 0.06), (2.0, 0.3, 0.049), (9.0, 0.05)])
def test_c_is_damped_twice_as_much_until_its_inverse_is_as_good_as_peft_asks_for(
    off: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of B's squares is that of the singular values of W C~ over s, and so says which C~ it was."""
    assert 101 * (0.05 / 101) == 102 * (0.05 / 102) == 0.05  # not by a rounding more or less
    singular = np.linalg.svd(W, compute_uv=False)
    monkeypatch.setattr(np.linalg, "inv", off_by(np.linalg.inv, off, np.asarray))
    B = corda(LoRA(r=4, lora_alpha=4), LAYER, W, PERCENT).params.B
    ours = np.sum(B * B) / np.sum(singular)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())
    ones, eye = torch.ones, torch.eye
    monkeypatch.setattr(torch, "ones", lambda *size: ones(*size, dtype=torch.float64))
    monkeypatch.setattr(torch, "eye", lambda n: eye(n, dtype=torch.float64))
    monkeypatch.setattr(torch.linalg, "inv", off_by(torch.linalg.inv, off, torch.from_numpy))
    layer = torch.nn.Linear(4, 4).double()
    layer.weight.data, layer.covariance_matrix = torch.from_numpy(W), torch.from_numpy(PERCENT)
    theirs = float(peft_corda.collect_eigens_for_layer(layer, None).S_WC.sum()) / np.sum(singular)
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert theirs == pytest.approx(100 + 2 ** sum(size >= 0.05 for size in off), rel=1e-12)


@pytest.mark.parametrize("out", [3, 4, 5])
def test_corda_takes_as_many_ranks_as_there_are_and_learns_the_task_unless_told_otherwise(out: int) -> None:
    layer, V = Linear(in_features=4, out_features=out), RNG(1).normal(size=(out, 4))
    C = np.diag([4.0, 3.0, 2.0, 1.0])
    full = corda(LoRA(r=min(out, 4), lora_alpha=3), layer, V, C)
    np.testing.assert_allclose(full.W, 0, atol=1e-12)
    with pytest.raises(UnsupportedLayerError):
        corda(LoRA(r=min(out, 4) + 1), layer, V, C)
    by_default, named = (corda(LoRA(r=2), layer, V, C, *word) for word in ((), ("ipm",)))  # type: ignore[arg-type]
    assert np.array_equal(by_default.W, named.W)


# ---- LoRA-GA


def test_the_keys_of_lora_ga_have_pefts_defaults() -> None:
    theirs = peft.LoraGAConfig()
    assert asdict(LoraGA()) == {name: getattr(theirs, name) for name in asdict(LoraGA())}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("r", [1, 2])
def test_by_the_weights_norm_of_a_gradient_that_has_none_b_is_what_it_is_in_peft(
    r: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient of zero, or of rank 1, whose first direction B takes (A2rBr): divided by the first singular value unless that is zero."""
    gradient = 3 * rank * np.outer([0.6, 0.0, 0.8, 0.0], [0.0, 1.0, 0.0, 0.0])
    base = torch.nn.Sequential(torch.nn.Linear(4, 4).double())
    base[0].weight.data = torch.from_numpy(W.copy())
    base[0]._peft_loraga_grad = torch.from_numpy(gradient)
    exact = torch.svd_lowrank
    monkeypatch.setattr(torch, "svd_lowrank", lambda G, q, niter: exact(G, q=min(G.shape), niter=niter))
    options: Any = {"direction": "A2rBr", "scale": "weight_svd"}
    config = peft.LoraConfig(
        r=r, lora_alpha=r, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(**options)
    )
    tuner = peft.get_peft_model(base, config, autocast_adapter_dtype=False).base_model.model[0]
    theirs = tuner.lora_B["default"].weight.detach().double().numpy()
    ours = lora_ga(LoRA(r=r, lora_alpha=r), LAYER, W, spectrum(gradient), LoraGA(**options)).params.B
    assert np.linalg.norm(theirs) == pytest.approx(rank * np.linalg.svd(W, compute_uv=False)[0], rel=1e-5)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=0), np.linalg.norm(theirs, axis=0), rtol=1e-5, atol=1e-12)


def test_what_is_drawn_is_among_the_first_two_ranks_worth_of_directions_and_each_of_them_is() -> None:
    big = Linear(in_features=9, out_features=9)
    G = np.diag(np.arange(9.0, 0, -1))
    config, found = LoraGA(direction="random", scale="unit"), set()
    for seed in range(40):
        p = lora_ga(LoRA(r=2), big, np.zeros((9, 9)), spectrum(G), config, RNG(seed)).params
        rows = np.argmax(np.abs(p.A), axis=1).tolist()
        assert rows == np.argmax(np.abs(p.B), axis=0).tolist()
        assert len({*rows}) == 2
        found |= {*rows}
    assert found == {0, 1, 2, 3}
    asked: list[int] = []
    rng: Any = types.SimpleNamespace(permutation=lambda n: asked.append(n) or np.arange(n)[::-1])
    p = lora_ga(LoRA(r=2), big, np.zeros((9, 9)), spectrum(G), config, rng).params
    assert (asked, np.argmax(np.abs(p.A), axis=1).tolist()) == ([4], [3, 2])
