"""What the pages say in passing: who is named in an error, what is taken at a tie or a bound, which words a list may come in."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from peft_ref.contracts import Delta
from peft_ref.errors import ConfigError, KeyMismatchError, ShapeError
from peft_ref.layers import Conv, Layer, Linear
from peft_ref.methods import (
    DEFT,
    METHODS,
    AdaLoRA,
    AdaMSS,
    AdaptionPrompt,
    BDLoRA,
    Cartridge,
    DoRA,
    FourierFT,
    LNTuning,
    LoHaEffective,
    LoRA,
    MonteCLoRA,
    SuperTuning,
    adamss,
    fourierft,
    lora,
    lora_parameter,
)
from peft_ref.methods.adamss_asa import State, after_step, trained
from peft_ref.methods.adaption_prompt import Params
from peft_ref.methods.bdlora import BdLoraConfig
from peft_ref.methods.cartridge import composed, rows_of_cache
from peft_ref.methods.eva_init import ROUNDS, Eva, _alike, _upright, directions, rescaled
from peft_ref.methods.monteclora import Noise
from peft_ref.methods.orthogonality import distance
from peft_ref.prompts import EMBEDDING
from tests.laws.compare import assert_close, assert_same_bits
from tests.methods import made

LAYER = Linear(in_features=6, out_features=4)


# ---- maps within a configuration

MAPS = [
    (name, f.name)
    for name, cls in METHODS.weights.items()
    for f in fields(cls)
    if f.name in ("use_bdlora", "kasa_config", "monteclora_config", "velora_config")
]  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "field"), MAPS)
def test_what_is_no_map_is_refused_by_the_name_of_its_key(name: str, field: str) -> None:
    for value in (3, "map", [1]):
        with pytest.raises(ConfigError, match=f"^{field}="):
            made(name, **{field: value})


@pytest.mark.parametrize(
    ("name", "field", "key", "taken", "refused"),
    [
        ("kasa", "kasa_config", "beta", (0.5, 1), ("half", None, True, [1])),
        ("velora", "velora_config", "num_groups", (3,), (True, False)),
        ("monteclora", "monteclora_config", "use_entropy", (True, False), (1, 0, "yes", None)),
    ],
)
def test_a_value_of_a_map_is_of_its_defaults_type(name: str, field: str, key: str, taken: Any, refused: Any) -> None:
    for value in taken:
        assert getattr(getattr(made(name, **{field: {key: value}}), field), key) == value
    for value in refused:
        with pytest.raises(ConfigError, match=f"^{field}: {key}="):
            made(name, **{field: {key: value}})


# ---- BD-LoRA

PATTERNS = {"target_modules_bd_a": ("q_proj", "up"), "target_modules_bd_b": ("o_proj", "down")}


@pytest.mark.parametrize(
    ("module", "factor"),
    [("model.q_proj", "A"), ("mlp.up.0", "A"), ("model.o_proj", "B"), ("mlp.down", "B"), ("model.k_proj", "")],
)
def test_a_pattern_anywhere_in_a_modules_name_says_which_factor_is_in_blocks(module: str, factor: str) -> None:
    assert BdLoraConfig(**PATTERNS, match_strict=False).diagonal_of(module) == factor
    assert BDLoRA(use_bdlora=BdLoraConfig(**PATTERNS, match_strict=False)).on_module(module).diagonal == factor
    if factor:
        assert BdLoraConfig(**PATTERNS).diagonal_of(module) == factor
        only = {key: names if key.endswith(factor.lower()) else None for key, names in PATTERNS.items()}
        assert BdLoraConfig(**only).diagonal_of(module) == factor
    else:
        with pytest.raises(ConfigError, match="matches neither"):
            BdLoraConfig(**PATTERNS).diagonal_of(module)
    with pytest.raises(ConfigError, match="target_modules_bd_a and target_modules_bd_b"):
        BdLoraConfig(**PATTERNS).diagonal_of("q_proj.down")


# ---- AdaMSS


def test_lists_of_clusters_and_ranks_are_taken_as_json_has_them() -> None:
    method = AdaMSS(clusters=[0, 1, 1], ranks=[1, 2], subspace_rank=3)  # type: ignore[arg-type]
    assert method == AdaMSS(clusters=(0, 1, 1), ranks=(1, 2), subspace_rank=3)
    assert isinstance(hash(method), int)
    assert {key: n for key, n in method.dims(LAYER_3).items() if key.startswith("rank")} == {"rank0": 1, "rank1": 2}


LAYER_3 = Linear(in_features=4, out_features=3)
MOST = tuple(range(adamss.MOST))


@pytest.mark.parametrize("clusters", [(), (0,), (0, 0), (1, 0), (0, 1, 2), MOST])
def test_clusters_are_numbered_from_zero_without_a_gap(clusters: tuple[int, ...]) -> None:
    assert AdaMSS(clusters=clusters).clusters == clusters
    for wrong in ((1, *(n + 1 for n in clusters)), (*clusters, len({*clusters}) + 1), (*MOST, adamss.MOST)):
        with pytest.raises(ConfigError, match=r"^clusters="):
            AdaMSS(clusters=wrong)


def test_a_schedule_ends_after_it_began() -> None:
    AdaMSS(use_asa=True, init_warmup=5, final_warmup=6)
    with pytest.raises(ConfigError, match="init_warmup=6"):
        AdaMSS(use_asa=True, init_warmup=6, final_warmup=6)


def test_a_row_whose_sum_is_zero_keeps_its_sign() -> None:
    rows = np.asarray([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-3.0, 1.0]])
    assert_same_bits(adamss._upright(rows), np.asarray([[1.0], [1.0], [1.0], [-1.0]]), "signs")


def test_the_last_of_those_that_may_stay_goes_as_in_peft_unless_all_are_asked_for() -> None:
    method = AdaMSS(r=3, num_subspaces=4, use_asa=True, init_warmup=0, final_warmup=2, asa_target_subspaces=2, mask_interval=1)
    rng = np.random.default_rng(0)
    params, grads = ({"m": replace_zero(method.init(LAYER, rng.normal(size=LAYER.shape), rng).params, rng)} for _ in range(2))
    left = {whole: len(trained(after_step(method, State(), params, grads, 2, whole=whole), params)["m"]) for whole in (True, False)}
    assert left == {True: 2, False: 1}
    assert len(trained(after_step(method, State(), params, grads, 2), params)["m"]) == 1


def replace_zero(p: Any, rng: np.random.Generator) -> Any:
    return type(p)(*(value if value is None else rng.normal(size=value.shape) for value in p))


# ---- AdaLoRA


def test_an_alpha_above_zero_is_divided_by_hfs_rank_and_no_other_is_read() -> None:
    for alpha, stands in ((1, 1.0), (0.25, 0.25), (8, 8.0), (0, 3.0), (-2, 3.0)):
        assert AdaLoRA(init_r=3, lora_alpha=alpha, total_step=9).scale == pytest.approx(stands / (3 + 1e-5), rel=1e-15)


def test_all_triplets_may_be_left_or_none() -> None:
    assert [AdaLoRA(init_r=3, live_r=n, total_step=9).r for n in (0, 2, 3, None)] == [0, 2, 3, 3]
    for n in (-1, 4):
        with pytest.raises(ConfigError, match=f"^live_r={n}: of init_r=3"):
            AdaLoRA(init_r=3, live_r=n, total_step=9)


# ---- AdaptionPrompt


def test_an_added_prompt_is_an_average_of_its_values_by_the_softmax_of_scores_over_the_root_of_their_length() -> None:
    rng = np.random.default_rng(2)
    q, k, v, dy = (rng.normal(size=size) for size in ((2, 4, 3, 9), (1, 2, 5, 9), (1, 2, 5, 9), (2, 4, 3, 9)))
    method, g = AdaptionPrompt(adapter_len=5, adapter_layers=1), np.asarray([0.7])
    want = np.zeros(dy.shape)
    for at in np.ndindex(2, 4, 3):
        scores = np.asarray([q[at] @ key for key in k[0, at[1] // 2]]) / 3
        want[at] = 0.7 * (np.exp(scores) / np.sum(np.exp(scores))) @ v[0, at[1] // 2]
    p = Params(None, g)  # type: ignore[arg-type]
    assert_close(method.added(p, q, k, v), want, "what is added")
    d, rows = method.added_vjp(p, q, k, v, dy), [rng.normal(size=part.shape) for part in (q, k, v)]
    step = 1e-5
    ahead, behind = (
        np.sum(dy * method.added(Params(None, g + h), *(part + h * row for part, row in zip((q, k, v), rows, strict=True))))  # type: ignore[arg-type]
        for h in (step, -step)
    )
    assert (d.k.shape, d.v.shape) == (k.shape, v.shape)
    along = float(d.params.g.sum()) + sum(float(np.sum(a * b)) for a, b in zip((d.q, d.k, d.v), rows, strict=True))
    assert along == pytest.approx((ahead - behind) / (2 * step), rel=1e-7)


# ---- Cartridge


def test_a_cartridge_without_frozen_rows_is_all_trained() -> None:
    sizes = {"num_virtual_tokens": 3, "num_layers": 2, "token_dim": 4, "num_attention_heads": 2}
    table = np.arange(48.0).reshape(3, 16)
    method = Cartridge(num_frozen_tokens=0, **sizes)  # type: ignore[arg-type]
    assert [(name, part.shape) for name, part in method.split(table).items()] == [("trainable_embedding", (3, 16))]
    assert Cartridge(**sizes).held == {"frozen_embedding"}  # type: ignore[arg-type]
    assert Cartridge(**sizes, inference_mode=True).held == {EMBEDDING}  # type: ignore[arg-type]
    assert composed(method, [table, table[:2]])[0].num_virtual_tokens == 5


def test_a_cache_of_just_as_many_tokens_is_enough() -> None:
    cache = np.arange(2 * 2 * 2 * 4 * 3.0).reshape(2, 2, 1, 2, 4, 3)
    assert rows_of_cache(cache, 4).shape == (4, 2 * 2 * 2 * 3)
    assert rows_of_cache(cache, 3).shape == (3, 2 * 2 * 2 * 3)
    with pytest.raises(ShapeError):
        rows_of_cache(cache, 5)


# ---- starts from data


def test_a_layer_that_keeps_its_rank_keeps_its_method() -> None:
    for method in (LoRA(r=4, lora_alpha=8), DoRA(r=4, lora_alpha=8)):
        assert rescaled(method, 4, Eva()) is method
        assert rescaled(method, 2, Eva()) == replace(method, r=2, lora_alpha=4)


def test_components_are_alike_up_to_the_very_bound_and_upright_at_a_tie() -> None:
    one = np.eye(3)
    assert _alike(one, one, 1.0) == [True, True, True]
    assert _alike(one[:2], one[[0, 2]], 1.0) == [True, False]
    assert _alike(one[:1], np.asarray([[0.6, 0.8, 0.0]]), 0.6) == [True]
    ties = np.asarray([[0.5, -0.5], [-0.5, 0.5], [0.6, -0.8], [0.8, -0.6]])
    assert_same_bits(_upright(ties), ties * np.asarray([[1], [1], [-1], [1]]), "upright")
    assert_same_bits(_upright(np.asarray([[-1.0]])), np.asarray([[1.0]]), "of one input")


def test_a_batch_of_too_few_rows_is_passed_over_and_the_other_layers_go_on() -> None:
    """The second layer is followed in every batch, the first where it has rows enough: as many as components, and no fewer."""
    rng = np.random.default_rng(0)
    spread = np.asarray([9.0, 1.0, 0.1])
    batches = [{"a": rng.normal(size=(n, 3)) * spread, "b": rng.normal(size=(40, 3)) * spread[::-1]} for n in (1, 2, 60, 60)]
    found = directions(batches, {"a": 2, "b": 2}, Eva(rho=1, tau=0.5))
    assert {name: V.shape[1] for name, V in found.items()} == {"a": 3, "b": 3}
    assert sum(V.shape[0] for V in found.values()) == 4
    exact = [{"a": rng.normal(size=(2, 3))}] * 2
    assert directions(exact, {"a": 2}, Eva(rho=1, tau=0.0))["a"].shape == (2, 3)
    with pytest.raises(ConfigError, match=r"^no end after 1000 rounds: a\."):
        directions([{"a": rng.normal(size=(1, 3))}], {"a": 2}, Eva(rho=1))
    assert ROUNDS == 1000


def test_eva_does_not_whiten_unless_it_is_asked_to() -> None:
    assert Eva() == Eva(rho=2.0, tau=0.99, whiten=False, adjust_scaling_factors=True)
    assert Eva().whiten is False


# ---- one by one


def test_where_there_is_no_r_there_is_no_gradient_of_it() -> None:
    method, rng = DEFT(r=2, para=True), np.random.default_rng(0)
    p = method.init(LAYER, rng.normal(size=LAYER.shape), rng).params
    assert p.R is None
    assert method.change_vjp(LAYER, p, rng.normal(size=LAYER.shape), None, Delta(rng.normal(size=LAYER.shape)))[0].R is None


def test_a_large_weight_in_numpy_is_transformed_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the very size on that counts as large. Which way it goes shows in no number but by a rounding."""
    method, called = FourierFT(n_frequency=3), list[str]()
    p = method.init(LAYER, np.zeros(LAYER.shape), np.random.default_rng(0)).params
    for name in ("waves", "waves_vjp"):
        real = getattr(fourierft, name)
        monkeypatch.setattr(fourierft, name, lambda *given, _real=real, _name=name: [called.append(_name), _real(*given)][1])
    want = method.delta(LAYER, p).W
    for least, dtype, through in ((24, float, True), (24, np.float32, True), (25, float, False), (24, np.float16, False)):
        called.clear()
        monkeypatch.setattr(fourierft.dense, "LEAST", least)
        given = p._replace(c=p.c.astype(dtype))
        assert_close(method.delta(LAYER, given).W.astype(float), want, "dW", rounding=1e-2 if dtype is np.float16 else 1e-5)
        method.delta_vjp(LAYER, given, Delta(want.astype(dtype)))
        assert called == (["waves", "waves_vjp"] if through else [])


def test_a_norm_or_layer_stored_in_sixteen_bits_computes_as_the_frozen_weight_does() -> None:
    layer = replace(LAYER, bias=True)
    W = np.random.default_rng(0).normal(size=layer.shape)
    p = LNTuning().init(layer, W.astype(np.float16), np.random.default_rng(0)).params
    for wide in (np.float32, np.float64):
        weight, bias = LNTuning().weight(layer, p, W.astype(wide), np.ones(4, wide), W.astype(wide))
        assert weight.dtype == wide
        assert bias is not None
        assert bias.dtype == wide
        assert_same_bits(weight, W.astype(np.float16).astype(wide), "W'")


def test_a_copied_bias_starts_as_the_frozen_one_where_both_are_there() -> None:
    rng, b = np.random.default_rng(0), np.arange(4.0)
    W = rng.normal(size=LAYER.shape)
    for bias in (True, False):
        layer = replace(LAYER, bias=bias)
        fresh = LNTuning().init(layer, W, rng).params
        assert fresh.c is None if not bias else fresh.c.shape == (4,) and not fresh.c.any()
        for given in (b, None):
            c = LNTuning().with_frozen_bias(fresh, given).c
            if not bias:
                assert c is None
            else:
                assert_same_bits(c, np.zeros(4) if given is None else b, "c")
        g = LNTuning().weight_vjp(layer, fresh, W, b if bias else None, W, W, b if bias else None)
        assert (g.params.c is None) == (not bias)
        assert LNTuning().weight_vjp(layer, fresh, W, b, W, W, b).params.c is (b if bias else None)


def test_the_factors_of_a_tied_head_give_the_transposed_product() -> None:
    rng = np.random.default_rng(0)
    p = lora.Params(A=rng.normal(size=(2, 5)), B=rng.normal(size=(4, 2)), c=None)
    turned = lora.transposed(p)
    assert_same_bits(turned.B @ turned.A, (p.B @ p.A).T, "the product")
    assert turned.c is None


def test_a_stack_is_as_stored_unless_it_says_that_it_is_transposed() -> None:
    for shape in ((4, 3), (2, 4, 3)):
        assert lora_parameter.stack_of(shape).transposed is False
        assert lora_parameter.stack_of(shape) == lora_parameter.stack_of(shape, False)
        assert lora_parameter.stack_of(shape).shape == shape
        assert (lora_parameter.stack_of(shape).in_features, lora_parameter.stack_of(shape).out_features) == (3, 4)
    assert lora_parameter.stack_of((2, 4, 3), True).in_features == 4


def test_what_a_stack_refuses_is_named() -> None:
    for options in ({"lora_dropout": 0.1}, {"lora_bias": True}):
        with pytest.raises(ConfigError, match=f"^{next(iter(options))}="):
            lora_parameter.check(LoRA(**options))  # type: ignore[arg-type]
    with pytest.raises(KeyMismatchError, match="LoRA at '':"):
        lora_parameter.unpack(LoRA(), lora_parameter.stack_of((4, 3)), {})


def test_a_parameter_of_the_model_itself_has_no_module_before_its_name() -> None:
    assert lora_parameter.keys({"": ["one", "two"], "m": ["up"]}) == {"two": "", "one": "base_layer", "m.up": "m"}


SAMPLES = MonteCLoRA(r=2, monteclora_config={"num_samples": 3})  # type: ignore[arg-type]


def sampler(sigma: Any, p: Any) -> Any:
    return SAMPLES.init(LAYER, np.zeros(LAYER.shape), np.random.default_rng(0)).params._replace(sigma=np.asarray(sigma), p=np.asarray(p))


def test_samples_of_very_large_weights_are_weighed_all_the_same() -> None:
    """e^800 is no number; w = softmax(... + log a - mean) is 1/3 each of equal ones, and all on the largest of unequal ones."""
    z = np.random.default_rng(0).normal(size=(3, 6, 2))
    noise = Noise(z, np.eye(2), np.zeros(3))
    for p, w in (([800.0] * 3, [1 / 3] * 3), ([800.0, 0.0, 0.0], [1.0, 0.0, 0.0])):
        assert_close(SAMPLES.noisy(sampler([0.0, 0.0], p), noise).w, np.asarray(w), "w")


@pytest.mark.parametrize("layer", [Linear(in_features=5, out_features=4), Conv(in_channels=2, out_channels=3, kernel_size=(2, 3))])
def test_a_lohas_delta_is_the_product_of_its_two_products(layer: Layer) -> None:
    method, rng = LoHaEffective(r=2, alpha=3), np.random.default_rng(0)
    p = replace_zero(method.init(layer, np.zeros(layer.shape), rng).params, rng)
    first, second = method.products(layer, p)
    assert_close(method.delta(layer, p).W, 1.5 * first * second, "dW")


def test_super_tuning_without_a_rank_has_no_low_rank_scale() -> None:
    assert [SuperTuning(r=r, lora_alpha=alpha).low_rank_scale for r, alpha in ((None, None), (2, None), (2, 3))] == [0, 2, 1.5]


def test_how_far_rows_are_from_orthonormal_is_one_number_of_two_axes() -> None:
    assert distance(np.eye(3)).shape == (1, 1)
    assert_close(distance(2 * np.eye(3)), np.asarray([[3 * np.sqrt(3.0)]]), "|4 - 1| sqrt 3")
