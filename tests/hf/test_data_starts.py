"""The starts that are made of data, beside PEFT's: CorDA, LoRA-GA and EVA."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.lora import corda as peft_corda  # noqa: E402
from peft.utils import incremental_pca  # noqa: E402

from peft_ref.errors import ConfigError, KeyMismatchError, UnsupportedLayerError  # noqa: E402
from peft_ref.files.config import from_dict  # noqa: E402
from peft_ref.graph import TorchGraph  # noqa: E402
from peft_ref.layers import Embedding, Linear  # noqa: E402
from peft_ref.methods import DoRA, LoRA  # noqa: E402
from peft_ref.methods.corda_init import corda, covariance  # noqa: E402
from peft_ref.methods.dora import with_magnitudes  # noqa: E402
from peft_ref.methods.eva_init import Components, Eva, deal, directions, eva, rescaled, seen  # noqa: E402
from peft_ref.methods.lora_ga_init import DIRECTIONS, SCALES, LoraGA, Spectrum, lora_ga, spectrum  # noqa: E402
from peft_ref.model import adapt, adapter_file, add  # noqa: E402
from peft_ref.model.converting import plain  # noqa: E402
from peft_ref.model.running import forward  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
nn = torch.nn
Conv1D = transformers.pytorch_utils.Conv1D
SIZES = {"q": (8, 6), "k": (8, 6), "v": (8, 4), "o": (6, 5), "c": (5, 7)}  # (in, out); c is a Conv1D
LAYERS = {name: Linear(in_features=n, out_features=m, transposed=name == "c") for name, (n, m) in SIZES.items()}


class Net(nn.Module):  # type: ignore[misc]  # torch has no types here
    """Three layers with the same inputs, and two after them."""

    def __init__(self) -> None:
        super().__init__()
        for name, (n_in, out) in SIZES.items():
            setattr(self, name, Conv1D(out, n_in) if name == "c" else nn.Linear(n_in, out))
        self.c.weight.data = torch.randn(5, 7)

    def forward(self, x: Any) -> Any:
        return self.c(torch.tanh(self.o(torch.tanh(self.q(x) + self.k(x))))) + nn.functional.pad(torch.tanh(self.v(x)), (0, 3))


def net(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Net()


def batches(seed: int, rows: int = 20, n: int = 3) -> list[dict[str, Any]]:
    torch.manual_seed(seed + 100)
    mix = torch.randn(8, 8) * torch.linspace(0.2, 2, 8)
    return [{"x": torch.randn(rows, 8) @ mix} for _ in range(n)]


def inputs_of(model: Any, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What every layer sees in every call."""
    calls = []
    for batch in data:
        here: dict[str, Any] = {}
        hooks = [
            getattr(model, name).register_forward_hook(
                lambda _module, x, _y, name=name, here=here: here.__setitem__(name, x[0].detach().double().numpy())
            )
            for name in SIZES
        ]
        with torch.no_grad():
            model(**batch)
        for hook in hooks:
            hook.remove()
        calls.append(here)
    return calls


def matrix(model: Any, name: str) -> Any:
    """The frozen weight as (out, in)."""
    module = getattr(model, name, None) if not hasattr(model, "base_model") else model.base_model.model.get_submodule(name).base_layer
    return LAYERS[name].fold(module.weight.detach().double().numpy())


def factors(model: Any, name: str) -> tuple[Any, Any]:
    tuner = model.base_model.model.get_submodule(name)
    return tuple(getattr(tuner, f"lora_{f}")["default"].weight.detach().double().numpy() for f in "AB")  # type: ignore[return-value]


def magnitudes(model: Any, name: str) -> Any:
    return model.base_model.model.get_submodule(name).lora_magnitude_vector["default"].weight.detach().double().numpy()


# ---- CorDA


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_takes_the_part_that_peft_takes(mode: Any, dora: bool) -> None:
    model, data = net(), batches(1, rows=40, n=4)
    before = {name: matrix(model, name) for name in SIZES}
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        rank_pattern={"o": 3},
        target_modules=list(SIZES),
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=mode),
        use_dora=dora,
    )
    calls = inputs_of(model, data)
    peft_corda.preprocess_corda(model, config, lambda: [model(**batch) for batch in data])
    theirs = peft.get_peft_model(model, config)
    for name, W in before.items():
        method = LoRA(r=3 if name == "o" else 2, lora_alpha=5)
        start = corda(method, LAYERS[name], W, covariance([call[name] for call in calls]), mode)
        A, B = factors(theirs, name)
        np.testing.assert_allclose(start.params.B @ start.params.A, B @ A, rtol=1e-3, atol=2e-5)
        np.testing.assert_allclose(start.W, matrix(theirs, name), rtol=1e-4, atol=5e-5)
        np.testing.assert_allclose(start.W + method.scale * start.params.B @ start.params.A, W, rtol=0, atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(start.params.A, axis=1), np.linalg.norm(A, axis=1), rtol=1e-3)
        if dora:
            m = with_magnitudes(DoRA(r=method.r, lora_alpha=5), start).params.m
            np.testing.assert_allclose(m, magnitudes(theirs, name), rtol=1e-4)


def test_cordas_part_in_float64_is_that_of_pefts_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())
    rng = np.random.default_rng(0)
    W, x = rng.normal(size=(5, 6)), rng.normal(size=(30, 6))
    C = covariance([x])
    layer = nn.Linear(6, 5).double()
    layer.weight.data, layer.covariance_matrix = torch.from_numpy(W), torch.from_numpy(C)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size: ones(*size, dtype=torch.float64))
    monkeypatch.setattr(torch, "eye", lambda n, eye=torch.eye: eye(n, dtype=torch.float64))
    eigens = peft_corda.collect_eigens_for_layer(layer, None)
    for r in (1, 2, 4):
        expected = (eigens.U_WC[:, :r] * eigens.S_WC[:r]) @ eigens.V_WC[:, :r].T
        start = corda(LoRA(r=r, lora_alpha=3 * r), Linear(in_features=6, out_features=5), W, C)
        np.testing.assert_allclose(3 * start.params.B @ start.params.A, expected.numpy(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_cordas_part_is_the_weight_on_the_left_singular_vectors_of_the_weight_times_the_covariance(mode: Any) -> None:
    rng = np.random.default_rng(3)
    W, x = rng.normal(size=(5, 7)), rng.normal(size=(40, 7))
    C = covariance([x[:20], x[20:]])
    start = corda(LoRA(r=2, lora_alpha=3), Linear(in_features=7, out_features=5), W, C, mode)
    damped = C + 0.01 * np.mean(np.diag(C)) * np.eye(7)
    U = np.linalg.svd(W @ damped)[0][:, :2] if mode == "ipm" else np.linalg.svd(W @ damped)[0][:, 3:5]
    np.testing.assert_allclose(1.5 * start.params.B @ start.params.A, U @ U.T @ W, rtol=1e-9, atol=1e-10)


def test_what_corda_cannot_start_from_is_refused() -> None:
    layer, W = Linear(in_features=3, out_features=2), np.ones((2, 3))
    for kind, ask in {
        "there are none": lambda: covariance([]),
        "not finite": lambda: covariance([np.zeros((2, 3))]),
        "corda_method='x'": lambda: corda(LoRA(r=1), layer, W, np.eye(3), "x"),  # type: ignore[arg-type]
        r"expected \(3, 3\)": lambda: corda(LoRA(r=1), layer, W, np.eye(2)),
        "has 2 ranks": lambda: corda(LoRA(r=3), layer, W, np.eye(3)),
        "cannot be inverted": lambda: corda(LoRA(r=1), layer, W, np.zeros((3, 3))),
        "embedding": lambda: corda(LoRA(r=1), Embedding(num_embeddings=3, embedding_dim=2), W, np.eye(3)),
    }.items():
        with pytest.raises((ConfigError, UnsupportedLayerError), match=kind):
            ask()


# ---- LoRA-GA


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lora_ga_starts_where_peft_starts_given_its_singular_vectors(
    direction: Any, scale: Any, dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = net(), batches(2)
    before = {name: matrix(model, name) for name in SIZES}
    options = peft.LoraGAConfig(direction=direction, scale=scale, stable_gamma=9)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=list(SIZES),
        init_lora_weights="lora_ga",
        lora_ga_config=options,
        fan_in_fan_out=False,
        use_dora=dora,
    )
    seen_by_peft: list[Any] = []
    real, permuted = torch.svd_lowrank, torch.randperm
    drawn: list[Any] = []

    def recorded(G: Any, q: int, niter: int) -> Any:
        if q == 2:  # the weight's norm, by a randomised SVD too small to tell four digits
            return real(G, q=min(G.shape), niter=niter)
        seen_by_peft.append(real(G, q=q, niter=niter))
        return seen_by_peft[-1]

    monkeypatch.setattr(torch, "svd_lowrank", recorded)
    monkeypatch.setattr(torch, "randperm", lambda n: drawn.append(permuted(n)) or drawn[-1])

    def step() -> None:
        for batch in data:
            model(**batch).square().mean().backward()

    peft.preprocess_loraga(model, config, step)
    gradients = {name: getattr(model, name)._peft_loraga_grad for name in SIZES}
    theirs = peft.get_peft_model(model, config)
    assert len(seen_by_peft) == len(SIZES)
    order = [name for name, _ in theirs.base_model.model.named_children()]
    for i, name in enumerate(order):
        U, S, V = (x.double().numpy() for x in seen_by_peft[i])
        G = LAYERS[name].fold(gradients[name].double().numpy())
        np.testing.assert_allclose(S[:4], spectrum(G).S[:4], rtol=1e-4, atol=1e-6)  # theirs, of four vectors more, is the gradient's own
        method = LoRA(r=2, lora_alpha=5)
        rng: Any = types.SimpleNamespace(permutation=lambda n, i=i: drawn[i].numpy()) if direction == "random" else None
        start = lora_ga(
            method, LAYERS[name], before[name], Spectrum(U, S, V.T), LoraGA(direction=direction, scale=scale, stable_gamma=9), rng
        )
        A, B = factors(theirs, name)
        np.testing.assert_allclose(start.params.A, A, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(start.params.B, B, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(start.W, matrix(theirs, name), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(start.W + 2.5 * start.params.B @ start.params.A, before[name], atol=1e-12)
        if dora:
            m = with_magnitudes(DoRA(r=2, lora_alpha=5), start).params.m
            np.testing.assert_allclose(m, magnitudes(theirs, name), rtol=1e-5)


def test_lora_ga_refuses_what_it_has_no_directions_for() -> None:
    G = np.random.default_rng(0).normal(size=(4, 6))
    layer = Linear(in_features=6, out_features=4)
    with pytest.raises(UnsupportedLayerError, match="takes 6 directions of a gradient that has 4"):
        lora_ga(LoRA(r=3), layer, G, spectrum(G), LoraGA())
    with pytest.raises(ConfigError, match="give `rng`"):
        lora_ga(LoRA(r=2), layer, G, spectrum(G), LoraGA(direction="random"))
    drawn = lora_ga(LoRA(r=2), layer, G, spectrum(G), LoraGA(direction="random", scale="unit"), np.random.default_rng(0)).params
    np.testing.assert_allclose(drawn.A @ drawn.A.T, np.eye(2), atol=1e-12)
    with pytest.raises(UnsupportedLayerError, match="embedding"):
        lora_ga(LoRA(r=1), Embedding(num_embeddings=6, embedding_dim=4), G, spectrum(G), LoraGA())
    for wrong in ({"direction": "x"}, {"scale": "x"}, {"stable_gamma": 0}):
        with pytest.raises(ConfigError):
            LoraGA(**wrong)  # type: ignore[arg-type]


# ---- EVA


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_eva_finds_pefts_directions_and_deals_its_ranks(whiten: bool, rho: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = net(seed), batches(seed)
    options = peft.EvaConfig(rho=rho, tau=0.9, whiten=whiten)
    config = peft.LoraConfig(r=2, target_modules=list(SIZES), init_lora_weights="eva", eva_config=options, rank_pattern={"o": 3})
    exact = incremental_pca.IncrementalPCA._svd_fn_full  # instead of a randomised one
    monkeypatch.setattr(incremental_pca.IncrementalPCA, "_svd_fn_lowrank", exact)
    ask = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    expected = peft.tuners.lora.eva.get_eva_state_dict(model, data, config, **ask)
    ranks = {name: 3 if name == "o" else 2 for name in SIZES}
    found = directions(inputs_of(model, data), ranks, Eva(rho=rho, tau=0.9, whiten=whiten))
    alike = ("q", "k", "v")  # torch's sort deals out what is equal in another order
    assert sorted(found[n].shape[0] for n in alike) == sorted(expected[n].shape[0] for n in alike)
    assert sum(V.shape[0] for V in found.values()) == sum(ranks.values())
    compared = 0
    for name, V in found.items():
        assert name in alike or V.shape[0] == expected[name].shape[0]
        rows = min(V.shape[0], expected[name].shape[0])
        compared += rows
        if not (whiten and name in alike):
            np.testing.assert_allclose(V[:rows], expected[name].numpy()[:rows], rtol=1e-3, atol=2e-5)
    assert compared >= 8
    if whiten and rho == 1:  # no ties there
        for name in alike:
            np.testing.assert_allclose(found[name], expected[name].numpy(), rtol=1e-3, atol=2e-5)


def test_components_followed_batch_by_batch_are_those_of_all_rows_where_none_are_cut_off() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)) + 3
    found: Components | None = None
    for part in (rows[:20], rows[20:25], rows[25:]):
        found = seen(found, part, 5)
    assert found is not None
    centred = rows - rows.mean(axis=0)
    _, S, Vh = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(found.S, S, rtol=1e-10)
    np.testing.assert_allclose(np.abs(found.Vh @ Vh.T), np.eye(5), atol=1e-9)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(np.sum(found.shares), 1, rtol=1e-10)
    assert np.all(np.max(found.Vh, axis=1) == np.max(np.abs(found.Vh), axis=1))


def test_a_layer_that_sees_too_few_rows_is_passed_over_and_the_next_is_not() -> None:
    """ "many" is settled by the first two calls, in which "few" has too few rows; what both see later points elsewhere."""
    rng, config = np.random.default_rng(0), Eva(rho=1.0, tau=0.5)
    many = [rng.normal(size=(50, 5)) * np.geomspace(99, 1, 5) for _ in range(2)]
    later = [rng.normal(size=(50, 5)) * np.geomspace(1, 99, 5) for _ in range(2)]
    calls = [{"few": y[:1, :4], "many": y} for y in many] + [{"few": y[:, :4], "many": y} for y in later]
    found = directions(calls, {"few": 2, "many": 2}, config)["many"]
    alone = directions([{"many": y} for y in many], {"many": 2}, config)["many"]
    assert found.shape[0] >= 1
    np.testing.assert_allclose(found[:2], alone[: len(found)], rtol=1e-12)


def test_ranks_go_to_the_largest_shares_and_the_first_of_equals_keeps_the_most() -> None:
    shares = {"a": np.array([0.5, 0.1]), "b": np.array([0.9, 0.4]), "c": np.array([0.9, 0.4])}
    assert deal(shares, {"c": "b"}, 3) == {"a": 1, "b": 1, "c": 1}
    assert deal(shares, {"c": "b"}, 5) == {"a": 1, "b": 2, "c": 2}
    assert deal({"c": shares["c"], "a": shares["a"], "b": shares["b"]}, {"c": "b"}, 1) == {"a": 0, "b": 1, "c": 0}


def test_an_eva_start_reads_its_directions_and_changes_nothing() -> None:
    layer, W = Linear(in_features=3, out_features=2), np.ones((2, 3))
    V = np.eye(3)[:2]
    start = eva(LoRA(r=2), layer, W, V)
    assert start.W is W
    assert not start.params.B.any()
    assert (start.params.A == V).all()
    with pytest.raises(ConfigError, match="Change the rank"):
        eva(LoRA(r=1), layer, W, V)
    assert rescaled(LoRA(r=2, lora_alpha=3), 4, Eva()) == LoRA(r=4, lora_alpha=6)
    assert rescaled(LoRA(r=2, lora_alpha=3), 4, Eva(adjust_scaling_factors=False)) == LoRA(r=4, lora_alpha=3)
    with pytest.raises(ConfigError, match="no batches"):
        directions([], {"q": 1}, Eva())
    with pytest.raises(ConfigError, match="4 components of 3 inputs"):
        directions([{"q": np.ones((9, 3))}], {"q": 2}, Eva())
    with pytest.raises(ConfigError, match="no end"):
        directions([{"q": np.ones((1, 3))}], {"q": 1}, Eva())


def test_an_eva_start_of_a_dora_has_the_lengths_of_the_frozen_rows() -> None:
    model, data = net().double(), [{"x": b["x"].double()} for b in batches(1)]
    W = {name: matrix(model, name) for name in SIZES}
    config = peft.LoraConfig(r=2, target_modules=list(SIZES), init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0), use_dora=True)
    theirs = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    ask = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    peft.initialize_lora_eva_weights(theirs, data, **ask)
    compared = 0
    for name, layer in LAYERS.items():
        tuner = theirs.base_model.model.get_submodule(name)
        if not hasattr(tuner, "lora_A"):
            continue  # it was dealt no rank
        A, compared = factors(theirs, name)[0], compared + 1
        start = with_magnitudes(DoRA(r=A.shape[0], lora_alpha=5), eva(DoRA(r=A.shape[0]), layer, W[name], A))
        np.testing.assert_allclose(start.params.m, magnitudes(theirs, name), rtol=1e-6)
        np.testing.assert_allclose(start.params.m, np.linalg.norm(W[name], axis=1), rtol=1e-12)
    assert compared >= 2


# ---- on a model


def on_torch(start: Any) -> Any:
    return type(start)(type(start.params)(*(p if p is None else torch.from_numpy(p) for p in start.params)), torch.from_numpy(start.W))


def test_a_start_from_data_of_a_dora_goes_onto_a_model() -> None:
    graph = TorchGraph(net().double())
    said = {"peft_type": "LORA", "use_dora": True, "r": 2, "lora_alpha": 5, "init_lora_weights": "corda", "target_modules": ["q"]}
    W = graph.weight("q.weight").numpy()
    start = corda(DoRA(r=2, lora_alpha=5), LAYERS["q"], W, covariance([c["x"].double().numpy() for c in batches(1)]))
    model = add(adapt(graph), "a", from_dict(said), np.random.default_rng(0), starts={"q": on_torch(start)})
    x = torch.randn(3, 8, dtype=torch.float64)
    np.testing.assert_allclose(forward(model, "q", x), forward(adapt(graph), "q", x), atol=1e-10)
    np.testing.assert_allclose(model.adapters["a"].modules["q"].params.m, np.linalg.norm(W, axis=1), rtol=1e-12)


def test_a_start_from_data_goes_onto_a_model_and_comes_off_as_a_plain_lora() -> None:
    graph = TorchGraph(net().double())
    config = from_dict({"peft_type": "LORA", "r": 2, "lora_alpha": 5, "init_lora_weights": "corda", "target_modules": ["q", "o"]})
    with pytest.raises(ConfigError, match="corda_init"):
        add(adapt(graph), "a", config, np.random.default_rng(0))
    calls = inputs_of(net().double(), [{"x": b["x"].double()} for b in batches(1)])
    as_numbers = {n: LAYERS[n].fold(graph.weight(f"{n}.weight").numpy()) for n in ("q", "o")}
    starts = {n: corda(LoRA(r=2, lora_alpha=5), LAYERS[n], W, covariance([c[n] for c in calls])) for n, W in as_numbers.items()}
    model = add(adapt(graph), "a", config, np.random.default_rng(0), starts={n: on_torch(start) for n, start in starts.items()})
    x = calls[0]["q"]
    np.testing.assert_allclose(forward(model, "q", torch.from_numpy(x)), forward(adapt(graph), "q", torch.from_numpy(x)), atol=1e-10)
    assert not np.allclose(model.weight("q.weight"), as_numbers["q"])
    file = adapter_file(model, "a")
    undone = plain(file, file)
    assert undone.config.method == LoRA(r=4, lora_alpha=10)
    with pytest.raises(KeyMismatchError, match="a start for 'v'"):
        add(adapt(graph), "a", config, np.random.default_rng(0), starts={**starts, "v": starts["q"]})
