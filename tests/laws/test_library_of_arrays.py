"""What a method has beside its layers is computed in the library of its arrays too: tried on array-api-strict, which refuses NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_ref.contracts import Delta, Factors
from peft_ref.layers import Conv, Layer, Linear
from peft_ref.methods import (
    BOFT,
    CPT,
    OFT,
    PSOFT,
    AdaLoRA,
    DoRA,
    KaSA,
    LoHa,
    LoKr,
    LoRA,
    MonteCLoRA,
    MultitaskPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PVeRA,
    VeLoRA,
    lora,
)
from peft_ref.methods.adalora_allocator import State, after_step, sliced
from peft_ref.methods.monteclora import Noise
from peft_ref.methods.to_lora import to_lora
from peft_ref.prompts import SAVED, Context, Sources
from tests.laws.compare import assert_close

strict = pytest.importorskip("array_api_strict")


def sent(value: Any) -> Any:
    """NumPy's arrays as strict ones, within tuples and maps."""
    if isinstance(value, dict):
        return {name: sent(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return type(value)(*map(sent, value))
    return strict.asarray(value) if isinstance(value, np.ndarray) else value


def assert_alike(got: Any, expected: Any, what: str) -> None:
    """The same numbers in strict arrays, within tuples and maps."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
    if isinstance(expected, dict | tuple):
        for name in expected if isinstance(expected, dict) else range(len(expected)):
            assert_alike(got[name], expected[name], f"{what}, {name}")
    elif isinstance(expected, np.ndarray):
        assert type(got) is type(strict.asarray(0)), f"{what} is a {type(got)}"
        assert_close(np.from_dlpack(got).astype(float), expected.astype(float), what, rounding=1e-9)
    else:
        assert got == expected, what


def test_adaloras_allocator_computes_in_the_library_of_the_parameters() -> None:
    method = AdaLoRA(init_r=3, target_r=1, total_step=4, deltaT=1)
    layer, rng = Linear(in_features=5, out_features=4), np.random.default_rng(0)
    params, grads = ({n: method.init(layer, rng.normal(size=(4, 5)), rng).params for n in "ab"} for _ in range(2))
    params = {n: p._replace(E=rng.normal(size=(3, 1)), B=rng.normal(size=(4, 3))) for n, p in params.items()}
    grads = {n: p._replace(A=rng.normal(size=(3, 5)), E=rng.normal(size=(3, 1)), B=rng.normal(size=(4, 3))) for n, p in grads.items()}
    ours: Any = State(), params
    theirs: Any = State(), sent(params)
    for step in range(6):
        ours, theirs = after_step(method, *ours, grads, step), after_step(method, *theirs, sent(grads), step)
        assert_alike(theirs, ours, f"step {step}")
    kept = [True, False, True]
    assert_alike(sliced(method, sent(params["a"]), kept)[1], sliced(method, params["a"], kept)[1], "a slice")


def test_prompts_are_of_the_library_of_the_words_and_of_their_table() -> None:
    sizes, rng = {"num_virtual_tokens": 4, "token_dim": 3, "num_transformer_submodules": 1}, np.random.default_rng(0)
    words, method = rng.normal(size=(5, 3)), PromptTuning(**sizes, prompt_tuning_init="SAMPLE_VOCAB")
    for given in (words, sent(words)):
        rows = method.init(given, np.random.default_rng(1), Sources(given))["embedding.weight"]
        assert type(rows) is type(given)
    prefix, ctx = PrefixTuning(**sizes, num_layers=2, encoder_hidden_size=5, prefix_projection=True), Context(2)
    p = prefix.init(words, rng)
    table = prefix.table(p, ctx)
    assert_alike(prefix.table(sent(p), ctx), table, "the table")
    assert_alike(prefix.table_vjp(sent(p), ctx, sent(table)), prefix.table_vjp(p, ctx, table), "gradients")


@pytest.mark.parametrize("loss", ["none", "decay"])
def test_cpts_words_radii_and_weights_are_of_the_library_of_what_is_given(loss: str) -> None:
    method = CPT(cpt_token_ids=[3, 1, 4], cpt_tokens_type_mask=[1, 2, 4], token_dim=3, opt_weighted_loss_type=loss)
    words, ctx = np.random.default_rng(0).normal(size=(5, 3)), Context(2)
    p = {name: value + words[:3] for name, value in method.init(words, np.random.default_rng(1), Sources(words)).items()}
    start = method.init(sent(words), np.random.default_rng(1), Sources(sent(words)))
    assert_alike(start, method.init(words, np.random.default_rng(1), Sources(words)), "a start")
    assert_alike(method.projected(sent(p)), method.projected(p), "P(D)")
    assert_alike(method.prompt(sent(p), ctx), method.prompt(p, ctx), "the prompt")
    labels, types = np.asarray([[2, 0], [1, 4]]), np.asarray([[4, 8], [0, 4]])
    for given in (types, None):
        assert_alike(method.counted(sent(labels), sent(given), sent(words)), method.counted(labels, given, words), "labels and weights")


def test_a_prompt_of_tasks_is_of_the_library_of_its_tensors() -> None:
    sizes, rng = {"num_virtual_tokens": 4, "token_dim": 3, "num_transformer_submodules": 1, "num_ranks": 2}, np.random.default_rng(0)
    many, ctx = MultitaskPromptTuning(**sizes, num_tasks=3), Context(2, np.asarray([2, 0]))
    p, like = {name: rng.normal(size=shape) for name, shape in many.shapes().items()}, np.zeros(())
    prompt, there = many.prompt(p, ctx), ctx._replace(task_ids=sent(ctx.task_ids))
    assert_alike(many.prompt(sent(p), there), prompt, "the prompt")
    assert_alike(many.prompt_vjp(sent(p), there, sent(prompt)), many.prompt_vjp(p, ctx, prompt), "gradients")
    for start in ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"):
        one, file = MultitaskPromptTuning(**sizes, prompt_tuning_init=start), many.saved(p)
        assert SAVED in file
        expected = one.init(like, np.random.default_rng(1), Sources(tensors=file))
        assert_alike(one.init(sent(like), np.random.default_rng(1), Sources(tensors=sent(file))), expected, start)


def test_an_lstm_is_of_the_library_of_its_rows() -> None:
    method = PTuning(
        num_virtual_tokens=3,
        token_dim=4,
        num_transformer_submodules=1,
        encoder_hidden_size=2,
        encoder_reparameterization_type="LSTM",
        encoder_num_layers=2,
    )
    ctx, p = Context(2, dropout=(np.ones((3, 4)),)), method.init(np.zeros(()), np.random.default_rng(0))
    there, table = Context(2, dropout=(sent(ctx.dropout[0]),)), method.table(p, ctx)
    assert_alike(method.table(sent(p), there), table, "the table")
    assert_alike(method.table_vjp(sent(p), there, sent(table)), method.table_vjp(p, ctx, table), "gradients")


def test_adaloras_penalty_is_of_the_library_of_the_factors() -> None:
    method, rng = AdaLoRA(init_r=3, target_r=1, total_step=4), np.random.default_rng(0)
    params = {n: method.to_params(A=rng.normal(size=(3, 5)), E=rng.normal(size=(3, 1)), B=rng.normal(size=(4, 3))) for n in "ab"}
    assert_alike(method.orthogonality(sent(params)), method.orthogonality(params), "the penalty")
    assert_alike(method.orthogonality_vjp(sent(params), 0.5), method.orthogonality_vjp(params, 0.5), "its gradients")


def test_kasas_penalty_is_of_the_library_of_the_factors() -> None:
    method, rng = KaSA(r=2), np.random.default_rng(0)
    params = {"q": method.to_params(A=rng.normal(size=(2, 5)), B=rng.normal(size=(4, 2)), d=rng.normal(size=2))}
    assert_alike(method.penalty(sent(params)), np.asarray(method.penalty(params)), "the penalty")
    assert_alike(method.penalty_vjp(sent(params), 1.0), method.penalty_vjp(params, 1.0), "its gradients")


def test_montecloras_noise_acts_in_the_library_of_the_factors() -> None:
    method, rng = MonteCLoRA(r=2, monteclora_config={"num_samples": 3}), np.random.default_rng(0)  # type: ignore[arg-type]
    p = method.init(Linear(in_features=5, out_features=4), rng.normal(size=(4, 5)), rng).params
    noise = Noise(rng.normal(size=(3, 5, 2)), rng.uniform(1, 2, size=(2, 2)), rng.normal(size=3))
    acting = method.noisy(p, noise)
    assert_alike(method.noisy(sent(p), sent(noise)), acting, "what acts")
    assert_alike(method.noisy_vjp(sent(p), sent(noise), sent(acting)), method.noisy_vjp(p, noise, acting), "gradients")


def test_what_velora_keeps_of_an_input_is_of_the_inputs_library() -> None:
    method, x = VeLoRA(r=2, velora_config={"num_groups": 2}), np.random.default_rng(0).normal(size=(3, 5))  # type: ignore[arg-type]
    for seen in (x, 0 * x):
        assert_alike(method.projection(sent(seen)), method.projection(seen), "the direction")


def test_factors_of_a_tied_head_are_of_the_library_of_the_tables() -> None:
    p = lora.Params(A=np.ones((2, 5)), B=np.ones((4, 2)))
    assert_alike(lora.transposed(sent(p)), lora.transposed(p), "factors")


def test_ofts_blocks_are_of_the_library_of_its_numbers() -> None:
    layer, method = Linear(in_features=6, out_features=4), OFT(oft_block_size=3)
    p = method.to_params(R=np.random.default_rng(0).normal(size=(2, 3)))
    assert_alike(method.product(layer, sent(p)), method.product(layer, p), "blocks")


def test_pveras_noise_acts_in_the_library_of_the_input() -> None:
    layer, rng = Linear(in_features=5, out_features=4), np.random.default_rng(0)
    method = PVeRA(r=2, widest_in=6, widest_out=7)
    p = method.to_params(b=rng.normal(size=4), d=rng.normal(size=4), A=rng.normal(size=(4, 6)), B=rng.normal(size=(7, 2)))
    x, noise, dy = rng.normal(size=(3, 5)), rng.normal(size=(3, 2)), rng.normal(size=(3, 4))
    assert_alike(method.sampled(layer, sent(p), sent(x), sent(noise)), method.sampled(layer, p, x, noise), "y")
    got = method.sampled_vjp(layer, sent(p), sent(x), sent(noise), sent(dy))
    assert_alike(got, method.sampled_vjp(layer, p, x, noise, dy), "gradients")


def test_what_boft_leaves_out_is_of_the_library_of_its_blocks() -> None:
    method, keep = BOFT(boft_block_size=2), np.asarray([[1.0, 0.0, 1.0]])
    p = method.init(Linear(in_features=6, out_features=4), np.ones((4, 6)), np.random.default_rng(0)).params
    p = p._replace(R=np.random.default_rng(1).normal(size=p.R.shape))
    assert_alike(method.thinned(sent(p), sent(keep)), method.thinned(p, keep), "R")


@pytest.mark.parametrize("kernel_size", [(3,), (2, 3)])
def test_lokrs_core_is_computed_in_its_own_library(kernel_size: tuple[int, ...]) -> None:
    layer, rng = Conv(in_channels=6, out_channels=9, kernel_size=kernel_size), np.random.default_rng(0)
    method = LoKr(r=1, use_effective_conv2d=True, init_weights=False)
    p, W = method.init(layer, np.zeros(layer.shape), rng).params, rng.normal(size=layer.shape)
    assert p.t2 is not None
    assert_alike(method.delta(layer, sent(p)), method.delta(layer, p), "dW")
    assert_alike(method.delta_vjp(layer, sent(p), Delta(sent(W))), method.delta_vjp(layer, p, Delta(W)), "gradients")


GROUPS = Conv(in_channels=4, out_channels=6, kernel_size=(2,), groups=2)


PLAIN = Linear(in_features=6, out_features=5)


@pytest.mark.parametrize(("method", "layer"), [(LoRA(r=4), PLAIN), (LoRA(r=4), GROUPS), (LoHa(r=2), PLAIN), (DoRA(r=2), PLAIN)])
def test_what_becomes_a_lora_is_computed_in_the_library_of_the_parameters(method: Any, layer: Layer) -> None:
    """The strict arrays call NumPy's decompositions, so their signs are the same."""
    rng = np.random.default_rng(0)
    W = rng.normal(size=layer.shape)
    p = type(p := method.init(layer, W, rng).params)(*(None if v is None else rng.normal(size=v.shape) for v in p))
    for asked in ({}, {"rank": 2}, {"energy": 0.7}):
        got, want = to_lora(method, layer, sent(p), sent(W), **asked), to_lora(method, layer, p, W, **asked)
        assert got.method == want.method
        assert_alike(got.params, want.params, "factors")
        assert got.lost == pytest.approx(want.lost, abs=1e-15)


def test_what_falls_out_between_an_lstms_layers_is_of_the_library_of_the_prompt() -> None:
    sizes: dict[str, Any] = {"num_virtual_tokens": 4, "token_dim": 3, "num_transformer_submodules": 1, "encoder_hidden_size": 5}
    method, rng = PTuning(**sizes, encoder_reparameterization_type="LSTM", encoder_dropout=0.25), np.random.default_rng(0)
    p = method.init(np.zeros(1), rng)
    mask = rng.integers(0, 2, (4, 10))
    ours, theirs = (Context(1, dropout=(given,)) for given in (mask, sent(mask)))
    table = method.table(p, ours)
    assert_alike(method.table(sent(p), theirs), table, "the table")
    assert_alike(method.table_vjp(sent(p), theirs, sent(table)), method.table_vjp(p, ours, table), "gradients")


@pytest.mark.parametrize("word", ["psoft_init", "pissa_init"])
def test_psofts_parts_are_of_the_library_of_the_weight(word: str) -> None:
    method, W = PSOFT(r=3, ab_svd_init=word), np.random.default_rng(0).normal(size=(4, 5))
    assert_alike(method.parts(sent(W)), method.parts(W), "A and B")


@pytest.mark.parametrize("eps", [0.3, 0.99])
def test_a_shortened_rotation_is_of_the_library_of_its_numbers(eps: float) -> None:
    method, rng = PSOFT(r=3, use_cayley_neumann=True, cayley_neumann_eps=eps), np.random.default_rng(0)
    p = method.init(Linear(in_features=5, out_features=4), rng.normal(size=(4, 5)), rng).params._replace(q=np.asarray([0.3, -0.2, 0.4]))
    d = Factors(B=rng.normal(size=(4, 3)), A=rng.normal(size=(3, 5)))
    assert_alike(method.factors(sent(p)), method.factors(p), "factors")
    assert_alike(method.factors_vjp(sent(p), sent(d)), method.factors_vjp(p, d), "gradients")
