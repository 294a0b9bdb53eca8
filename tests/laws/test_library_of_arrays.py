"""What a method has beside its layers is computed in the library of its arrays too: tried on array-api-strict, which refuses NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_ref.contracts import Factors
from peft_ref.layers import Linear
from peft_ref.methods import PSOFT, AdaLoRA, KaSA, PrefixTuning, PromptTuning, PTuning, PVeRA
from peft_ref.methods.adalora_allocator import State, after_step, sliced
from peft_ref.prompts import Context, Sources
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


def test_what_falls_out_between_an_lstms_layers_is_of_the_library_of_the_prompt() -> None:
    sizes: dict[str, Any] = {"num_virtual_tokens": 4, "token_dim": 3, "num_transformer_submodules": 1, "encoder_hidden_size": 5}
    method, rng = PTuning(**sizes, encoder_reparameterization_type="LSTM", encoder_dropout=0.25), np.random.default_rng(0)
    p = method.init(np.zeros(1), rng)
    mask = rng.integers(0, 2, (4, 10))
    ours, theirs = (Context(1, dropout=(given,)) for given in (mask, sent(mask)))
    table = method.table(p, ours)
    assert_alike(method.table(sent(p), theirs), table, "the table")
    assert_alike(method.table_vjp(sent(p), theirs, sent(table)), method.table_vjp(p, ours, table), "gradients")


@pytest.mark.parametrize("eps", [0.3, 0.99])
def test_a_shortened_rotation_is_of_the_library_of_its_numbers(eps: float) -> None:
    method, rng = PSOFT(r=3, use_cayley_neumann=True, cayley_neumann_eps=eps), np.random.default_rng(0)
    p = method.init(Linear(in_features=5, out_features=4), rng.normal(size=(4, 5)), rng).params._replace(q=np.asarray([0.3, -0.2, 0.4]))
    d = Factors(B=rng.normal(size=(4, 3)), A=rng.normal(size=(3, 5)))
    assert_alike(method.factors(sent(p)), method.factors(p), "factors")
    assert_alike(method.factors_vjp(sent(p), sent(d)), method.factors_vjp(p, d), "gradients")
