"""Combinations beside live HF PEFT: every type, density, sign rule and weight; what it does with them; and the exact sum by algebra."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from peft_ref.errors import ConfigError, PeftRefError
from peft_ref.files.config import AdapterConfig
from peft_ref.graph import MappingGraph
from peft_ref.graph.targets import Targets
from peft_ref.layers import Conv
from peft_ref.methods import LoHa, LoRA
from peft_ref.model.adapted import Adapted, adapt
from peft_ref.model.attaching import add, update
from peft_ref.model.combine import TYPES, add_weighted, bernoulli, factorised
from peft_ref.model.combine_ia3 import add_weighted_ia3
from peft_ref.model.exact import add_exact, deviations
from peft_ref.model.pruning import quantile
from peft_ref.model.running import forward
from peft_ref.model.storing import load, save
from peft_ref.model.switching import activate
from tests.model.live import INPUTS, config_of, frozen_graph, inputs, layer_output, net, peft, randomise, torch

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
X = inputs()
NAMES = ("a", "b", "0")
CONFIGS: dict[str, Callable[[int], Any]] = {
    # scales 1/4, 1 and 4: times a dyadic weight their roots are exact in the float32 that PEFT keeps weights in
    "lora": lambda i: peft.LoraConfig(r=2, lora_alpha=(0.5, 2, 8)[i], target_modules=["q", "up", "conv", "table"]),
    "elsewhere": lambda i: peft.LoraConfig(r=2, lora_alpha=2, target_modules=[["q", "up"], ["q", "conv"], ["conv", "up"]][i]),
    "regex": lambda i: peft.LoraConfig(r=2, lora_alpha=2, target_modules=[r"layers\.\d\.q", r".*\.up", "conv"][i]),
    "rslora": lambda i: peft.LoraConfig(r=4, lora_alpha=(2, 8, 0.5)[i], use_rslora=True, target_modules=["q", "up"]),
    "patterns": lambda i: peft.LoraConfig(
        r=3, rank_pattern={"q": 2}, lora_alpha=3, alpha_pattern={"q": (2, 8, 0.5)[i]}, target_modules=["q", "up"]
    ),
    "dora": lambda i: peft.LoraConfig(r=2, lora_alpha=2, use_dora=True, target_modules=["q", "up", "table"]),
    "lora_bias": lambda i: peft.LoraConfig(r=2, lora_alpha=2, lora_bias=True, target_modules=["q"]),
}
WEIGHTS = [0.25, -1.0, 4.0]


def both(kind: str, configs: dict[str, Callable[[int], Any]] = CONFIGS) -> tuple[Any, Adapted]:
    model = net()
    graph = frozen_graph(model)
    theirs = peft.get_peft_model(model, configs[kind](0), adapter_name="a")
    for i, name in enumerate(NAMES[1:], 1):
        theirs.add_adapter(name, configs[kind](i))
    for seed, name in enumerate(NAMES):
        randomise(theirs, name, seed)
    ours = adapt(graph)
    for name in NAMES:
        ours = mirrored_one(ours, theirs, name)
    return theirs.eval(), ours


def mirrored_one(ours: Adapted, theirs: Any, name: str) -> Adapted:
    """One adapter more. PEFT's own state dict loses keys beside an adapter called "0", so the parameters are read off the layers."""
    ours = add(ours, name, config_of(theirs.peft_config[name]), np.random.default_rng(0))
    values = dict(theirs.base_model.model.named_parameters())
    params = {}
    for module, (method, layer, _) in ours.adapters[name].modules.items():
        tensors = {}
        for spec in method.spec(layer):
            path, _, last = spec.key.rpartition(".")
            keys = [f"{module}.{path}.{name}.{last}", f"{module}.{spec.key}.{name}", f"{module}.{spec.key}.{name}.weight"]
            tensors[spec.key] = next(values[key] for key in keys if key in values).detach().numpy().copy()
        params[module] = method.unpack(layer, tensors)
    return update(ours, name, params)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every mask that torch draws, in order."""
    drawn: list[Any] = []
    real = torch.bernoulli

    def bernoulli(*args: Any, **options: Any) -> Any:
        mask = real(*args, **options)
        drawn.append(mask.numpy().copy())
        return mask

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    return drawn


def replay(masks: list[Any]) -> Callable[[tuple[int, ...]], Any]:
    """PEFT's masks, one after the other, as matrices: it draws them in the layout of the weight, in which a table is transposed."""
    queue = iter(masks)

    def draw(shape: tuple[int, ...]) -> Any:
        mask = next(queue)
        matrix = mask.reshape(mask.shape[0], -1)
        return matrix if matrix.shape == shape else matrix.T

    return draw


def agree(theirs: Any, ours: Adapted, name: str, rtol: float = 1e-10) -> None:
    theirs.base_model.set_adapter(name)
    ours = activate(ours, name)
    for module in INPUTS:
        expected = layer_output(theirs, module, X[module])
        np.testing.assert_allclose(forward(ours, module, X[module]), expected, rtol=rtol, atol=rtol, err_msg=module)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("combination", TYPES)
def test_a_combination_is_pefts(kind: str, combination: str, masks: list[Any]) -> None:
    theirs, ours = both(kind)
    options = {} if combination in ("linear", "cat", "svd") else {"density": 0.6}
    for method in ("total", "frequency") if "ties" in combination else ("total",):
        masks.clear()
        theirs.add_weighted_adapter(list(NAMES), WEIGHTS, method, combination, majority_sign_method=method, **options)
        draw = replay(masks)
        ours = add_weighted(ours, NAMES, WEIGHTS, method, combination, majority_sign_method=method, draw=draw, **options)  # type: ignore[arg-type]
        agree(theirs, ours, method)
        assert ours.adapters[method].config.targets.target_modules == config_of(theirs.peft_config[method]).targets.target_modules
        assert not ours.adapters[method].trainable
        their_sizes = {key: p.numel() for key, p in theirs.base_model.model.named_parameters() if f".{method}" in key and "lora_" in key}
        found = [p for made in ours.adapters[method].modules.values() for p in made.params if p is not None]
        assert sorted(their_sizes.values()) == sorted(p.size for p in found)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("combination", ["ties", "magnitude_prune", "ties_svd"])
def test_a_density_is_pefts(combination: str, density: float) -> None:
    theirs, ours = both("lora")
    theirs.add_weighted_adapter(list(NAMES), WEIGHTS, "c", combination, density=density)
    agree(theirs, add_weighted(ours, NAMES, WEIGHTS, "c", combination, density=density), "c")


@pytest.mark.parametrize("weights", [[0.7, -0.3], [-1.3, -0.1], [0.0, 2.1]])
@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "ties"])
def test_any_weight_is_pefts_to_the_float32_it_keeps_them_in(combination: str, weights: list[float]) -> None:
    theirs, ours = both("lora")
    theirs.add_weighted_adapter(["b", "0"], weights, "c", combination, density=0.5)
    agree(theirs, add_weighted(ours, ["b", "0"], weights, "c", combination, density=0.5), "c", rtol=3e-6)


@pytest.mark.parametrize(("rank", "clamp"), [(1, None), (3, None), (2, 0.9), (None, 0.5)])
def test_svd_options_are_pefts(rank: int | None, clamp: float | None) -> None:
    theirs, ours = both("lora")
    theirs.add_weighted_adapter(list(NAMES), WEIGHTS, "c", "svd", svd_rank=rank, svd_clamp=clamp)
    ours = add_weighted(ours, NAMES, WEIGHTS, "c", "svd", svd_rank=rank, svd_clamp=clamp)
    if clamp is None:
        agree(theirs, ours, "c")
        return
    # The quantile of signed entries depends on the signs that an SVD happens to give, so ours is taken of PEFT's factors before its clamp.
    theirs.add_weighted_adapter(list(NAMES), WEIGHTS, "whole", "svd", svd_rank=rank)
    for module in ("layers.0.q", "layers.1.up"):
        layer = theirs.base_model.model.get_submodule(module)
        (A, B), (cut_A, cut_B) = ([getattr(layer, key)[n].weight.detach().numpy() for key in ("lora_A", "lora_B")] for n in ("whole", "c"))
        high = float(quantile(np.concatenate([B.ravel(), A.ravel()]), clamp))
        np.testing.assert_allclose(np.clip(A, -high, high), cut_A, rtol=1e-12)
        np.testing.assert_allclose(np.clip(B, -high, high), cut_B, rtol=1e-12)


@pytest.mark.parametrize("clamp", [0.0, 0.35, 0.9, 1.0])
def test_a_clamp_cuts_the_factors_at_a_quantile_of_their_entries(clamp: float) -> None:
    delta = np.random.default_rng(0).normal(size=(5, 7))
    U, S, Vh = np.linalg.svd(delta)
    B, A = U[:, :3] * S[:3], Vh[:3]
    high = np.quantile(np.concatenate([B.ravel(), A.ravel()]), clamp)
    for found, whole in zip(factorised(delta, 3, clamp), (A, B), strict=True):
        np.testing.assert_allclose(found, np.minimum(np.maximum(whole, -high), high), rtol=1e-12)


def test_one_adapter_is_always_linear() -> None:
    theirs, ours = both("lora")
    theirs.add_weighted_adapter(["0"], [-0.25], "c", "cat")
    agree(theirs, add_weighted(ours, ["0"], [-0.25], "c", "cat"), "c")


IA3 = {
    "ia3": lambda i: peft.IA3Config(target_modules=["q", "up", "conv"], feedforward_modules=["up"]),
    "ia3 elsewhere": lambda i: peft.IA3Config(
        target_modules=[["q", "up"], ["q"], ["conv", "up"]][i], feedforward_modules=[["up"], [], ["up"]][i]
    ),
}


@pytest.mark.parametrize("kind", IA3)
def test_ia3s_combination_is_pefts(kind: str) -> None:
    theirs, ours = both(kind, IA3)
    theirs.add_weighted_adapter(list(NAMES), WEIGHTS, "c")
    ours = add_weighted_ia3(ours, NAMES, WEIGHTS, "c")
    agree(theirs, ours, "c")
    assert ours.adapters["c"].config.patterns.feedforward_modules == tuple(sorted(theirs.peft_config["c"].feedforward_modules))


@pytest.mark.parametrize(
    ("kind", "names", "weights", "options"),
    [
        ("lora", ["a", "x"], [1, 1], {}),
        ("lora", [], [], {}),
        ("lora", ["a", "b"], [1, 1], {"combination_type": "sum"}),
        ("lora", ["a", "b"], [1, 1], {"combination_type": "ties"}),
        ("lora", ["a", "b"], [1, 1], {"combination_type": "ties", "density": -0.5}),
        ("lora", ["a", "b"], [1, 1], {"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"}),
        ("lora", ["a", "b"], [1, 1], {"combination_type": "svd", "svd_rank": 6}),
        ("ranks", ["a", "b"], [1, 1], {"combination_type": "linear"}),
        ("mixed targets", ["a", "b"], [1, 1], {"combination_type": "linear"}),
        ("copies", ["a", "b"], [1, 1], {"combination_type": "cat"}),
        ("biases", ["a", "b"], [1, 1], {"combination_type": "linear"}),
    ],
)
def test_what_peft_refuses_is_refused_and_changes_nothing(
    kind: str, names: list[str], weights: list[float], options: dict[str, Any]
) -> None:
    configs = {
        "lora": CONFIGS["lora"],
        "ranks": lambda i: peft.LoraConfig(r=2 + i, target_modules=["q"]),
        "mixed targets": lambda i: peft.LoraConfig(r=2, target_modules="head" if i else ["q"]),
        "copies": lambda i: peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"]),
        "biases": lambda i: peft.LoraConfig(r=2, target_modules=["q"], bias="none" if i else "all"),
    }
    theirs, ours = both(kind, configs)

    def ask() -> None:
        theirs.add_weighted_adapter(names, weights, "c", **options)
        theirs.base_model.set_adapter("c")  # where the rank is more than the delta has, the parts do not fit together
        layer_output(theirs, "layers.0.q", X["layers.0.q"])

    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
        ask()
    before = dict(ours.adapters)
    with pytest.raises(PeftRefError):
        add_weighted(ours, names, weights, "c", **options)
    assert dict(ours.adapters) == before


@pytest.mark.parametrize("names", [["a", "b"], ["a"]])
def test_what_peft_lets_pass_and_should_not_is_refused(names: list[str]) -> None:
    _, ours = both("lora")
    with pytest.raises(ConfigError):
        add_weighted(ours, names, [1.0, 2.0, 3.0], "c", "linear")
    with pytest.raises(ConfigError):
        add_weighted(ours, ["a", "b"], [1.0, 2.0], "a", "linear")


def test_a_combination_of_patterns_can_be_saved_and_loaded(tmp_path: Any) -> None:
    """PEFT's configuration forgets the patterns while the tensors follow them."""
    _, ours = both("patterns")
    ours = add_weighted(ours, NAMES, WEIGHTS, "c", "linear")
    save(ours, tmp_path, "c")
    again = load(adapt(ours.base), tmp_path, "c", subfolder="c")
    for module in ("layers.0.q", "layers.1.up"):
        np.testing.assert_array_equal(forward(again, module, X[module]), forward(activate(ours, "c"), module, X[module]))


# The exact sum, by algebra: what a layer adds under it is the weighted sum of what it adds under each.


def lone(kind: str) -> Adapted:
    """Adapters of several methods on a grouped convolution and a linear layer."""
    rng = np.random.default_rng(3)
    conv = Conv(in_channels=4, out_channels=6, kernel_size=(2, 2), groups=2)
    arrays = {"c.weight": rng.normal(size=conv.weight_shape), "q.weight": rng.normal(size=(5, 6)), "q.bias": rng.normal(size=5)}
    model = adapt(MappingGraph(arrays=arrays, layers={"c": conv}), mixed=True)
    targets = ("q",) if kind == "loha" else ("c", "q")
    for i, name in enumerate(NAMES):
        method: Any = (
            LoHa(r=2) if kind == "loha" and i else LoRA(r=2 + 2 * i, lora_alpha=3 + i, lora_bias=kind == "bias", use_rslora=i == 1)
        )
        model = add(model, name, AdapterConfig(method=method, targets=Targets(target_modules=targets)), rng)
        params = {
            m: type(p)(*(None if v is None else rng.normal(size=v.shape) for v in p))
            for m, (_, _, p) in model.adapters[name].modules.items()
        }
        model = update(model, name, params)
    return model


@pytest.mark.parametrize(("kind", "rank"), [("lora", None), ("bias", None), ("loha", 5)])
def test_what_the_exact_sum_adds_is_the_sum_of_what_each_adds(kind: str, rank: int | None) -> None:
    model = lone(kind)
    model = add_exact(model, NAMES, WEIGHTS, "sum", rank=rank)
    rng = np.random.default_rng(5)
    for module in model.adapters["sum"].modules:
        x = rng.normal(size=(3, 6) if module == "q" else (2, 4, 5, 5))
        base = forward(activate(model, []), module, x)
        each = [forward(activate(model, name), module, x) - base for name in NAMES]
        wanted = sum(w * y for w, y in zip(WEIGHTS, each, strict=True))
        np.testing.assert_allclose(forward(activate(model, "sum"), module, x) - base, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["patterns", "elsewhere", "rslora"])
def test_peft_loads_an_exact_sum(kind: str, tmp_path: Any) -> None:
    _, ours = both(kind)
    ours = add_exact(ours, NAMES, WEIGHTS, "default")
    save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path)
    for module in INPUTS:
        expected = forward(activate(ours, "default"), module, X[module])
        np.testing.assert_allclose(layer_output(theirs, module, X[module]), expected, rtol=1e-10, atol=1e-10, err_msg=module)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_an_exact_sum_of_lower_rank_is_as_near_as_the_singular_values_let_it(rank: int) -> None:
    model = lone("loha")
    whole, part = add_exact(model, NAMES, WEIGHTS, "sum", rank=5), add_exact(model, NAMES, WEIGHTS, "sum", rank=rank)
    p = whole.adapters["sum"].modules["q"].params
    values = np.linalg.svd(p.B @ p.A, compute_uv=False)
    error = deviations(part, "sum", NAMES, WEIGHTS)["q"].error
    assert error == pytest.approx(math.sqrt(np.sum(values[rank:] ** 2)), rel=1e-9)


def test_the_deviation_of_linear_is_its_cross_terms_and_cat_has_none() -> None:
    _, ours = both("lora")
    ours = add_weighted(ours, ["a", "b"], [1.0, -1.0], "linear", "linear")
    ours = add_weighted(ours, ["a", "b"], [1.0, -1.0], "cat", "cat")
    pa, pb = (ours.adapters[name].modules["layers.0.q"].params for name in ("a", "b"))
    cross = 0.5 * (-pa.B @ pb.A + pb.B @ pa.A)  # scales 1/4 and 1, roots 1/2 and 1
    found = deviations(ours, "linear", ["a", "b"], [1.0, -1.0])["layers.0.q"]
    assert found.error == pytest.approx(float(np.linalg.norm(cross)), rel=1e-12)
    wanted = np.linalg.norm(0.25 * pa.B @ pa.A - pb.B @ pb.A)
    assert found.relative == pytest.approx(found.error / wanted, rel=1e-12)
    assert all(d.error < 1e-12 for d in deviations(ours, "cat", ["a", "b"], [1.0, -1.0]).values())


def test_an_rslora_combination_is_too_large_by_the_root_of_its_rank() -> None:
    _, ours = both("rslora")
    ours = add_weighted(ours, ["a", "b"], [1.0, 1.0], "c", "cat")
    for found in deviations(ours, "c", ["a", "b"], [1.0, 1.0]).values():
        assert found.relative == pytest.approx(math.sqrt(8) - 1, rel=1e-9)


def test_masks_are_drawn_at_the_density() -> None:
    mask = bernoulli(np.random.default_rng(0), 0.3)((200, 100))
    assert set(np.unique(mask)) == {0.0, 1.0}
    assert abs(mask.mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 20_000)
