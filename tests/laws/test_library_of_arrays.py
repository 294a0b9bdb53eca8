"""What a method has beside its layers is computed in the library of its arrays too: tried on array-api-strict, which refuses NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_ref.layers import Linear
from peft_ref.methods import CPT, AdaLoRA, KaSA, MultitaskPromptTuning, PrefixTuning, PromptTuning, PTuning, PVeRA
from peft_ref.methods.adalora_allocator import State, after_step, sliced
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


def test_pveras_noise_acts_in_the_library_of_the_input() -> None:
    layer, rng = Linear(in_features=5, out_features=4), np.random.default_rng(0)
    method = PVeRA(r=2, widest_in=6, widest_out=7)
    p = method.to_params(b=rng.normal(size=4), d=rng.normal(size=4), A=rng.normal(size=(4, 6)), B=rng.normal(size=(7, 2)))
    x, noise, dy = rng.normal(size=(3, 5)), rng.normal(size=(3, 2)), rng.normal(size=(3, 4))
    assert_alike(method.sampled(layer, sent(p), sent(x), sent(noise)), method.sampled(layer, p, x, noise), "y")
    got = method.sampled_vjp(layer, sent(p), sent(x), sent(noise), sent(dy))
    assert_alike(got, method.sampled_vjp(layer, p, x, noise, dy), "gradients")
