"""The laws of prompts, over every method of them: gradients are adjoints, a batch is its examples, a file loses nothing, backends agree.

Splicing is linear in prompt and embeddings, so its adjoint is checked without a difference:  <d, splice(v)> = <splice_vjp(d), v>.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_ref.backend import Backend, compute_dtype
from peft_ref.methods import METHODS
from peft_ref.prompts import Context, Sources, TypedPrompt
from peft_ref.splice import InputGradients, Inputs, key_values, key_values_vjp, splice, splice_vjp
from tests.laws.compare import assert_close, assert_same_bits
from tests.laws.prompt_strategies import IN_CACHE, MANY, PROMPTS, Case, awkward, cases, sent, some_integers, tasks
from tests.laws.strategies import LAW
from tests.laws.test_on_backends import ROUNDINGS, UNIT

EVERY = pytest.mark.parametrize("name", PROMPTS)
STEP = 1e-5  # so short that a relu's corner is hardly ever inside it


def paired(a: Any, b: Any) -> float:
    """The sum over a and b, arrays or None, of their products."""
    return 0.0 if a is None or b is None else float(np.sum(a * b))


# ---- the prompt and its gradient


@EVERY
@given(data=st.data())
@LAW
def test_prompt_vjp_is_the_adjoint_for_every_tensor(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    p, ctx, dy = case.tensors(), case.ctx, case.dy
    grads = case.method.prompt_vjp(p, ctx, dy)
    assert {k: v.shape for k, v in grads.items()} == case.method.shapes()
    differentiated = case.method.differentiated(p, ctx)
    assert_close(differentiated(p), case.method.prompt(p, ctx), "what is differentiated")
    for key, v in case.tensors(6).items():
        above, below = (float(np.sum(dy * differentiated({**p, key: p[key] + t * v}))) for t in (STEP, -STEP))
        measured, promised = (above - below) / (2 * STEP), paired(grads[key], v)
        size = 1.0 + float(np.sum(np.abs(grads[key] * v))) + abs(measured)
        assert abs(promised - measured) <= 1e-6 * size, f"{key}: the gradient says {promised}, differences say {measured}"


@EVERY
@given(data=st.data())
@LAW
def test_a_batch_is_its_examples_and_its_gradient_their_sum(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    p, ctx, dy = case.tensors(), case.ctx, case.dy
    whole, total = case.method.prompt(p, ctx), case.method.prompt_vjp(p, ctx, dy)
    assert whole.shape == case.prompt_shape
    parts = []
    for n in range(case.batch):
        alone = ctx._replace(batch=1, task_ids=None if ctx.task_ids is None else ctx.task_ids[n : n + 1])
        assert_close(case.method.prompt(p, alone), whole[n : n + 1], f"example {n}")
        parts.append(case.method.prompt_vjp(p, alone, dy[n : n + 1]))
    for key, gradient in total.items():
        assert_close(sum(part[key] for part in parts), gradient, key, rounding=1e-11)


@EVERY
@given(data=st.data())
@LAW
def test_what_is_saved_and_loaded_gives_the_same_prompt(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    p, ctx = case.tensors(), case.ctx._replace(dropout=())
    file = case.method.saved(p)
    assert file.keys() == case.method.file_keys
    loaded, inference = case.method.loaded(file), case.method.in_inference()
    assert {k: tuple(v.shape) for k, v in loaded.items()} == inference.shapes()
    assert_same_bits(inference.prompt(loaded, ctx), case.method.prompt(p, ctx), "the prompt")
    again = inference.saved(loaded)
    assert again.keys() == file.keys()
    for key, value in file.items():
        assert_same_bits(again[key], value, key)


@EVERY
@given(data=st.data())
@LAW
def test_a_start_has_its_shapes_and_dtype_and_comes_again_from_the_same_seed(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    like = np.zeros((), dtype=data.draw(st.sampled_from((np.float64, np.float32))))
    first, again = (case.method.init(like, np.random.default_rng(case.seed), case.sources) for _ in range(2))
    assert case.method.check(first) is first
    assert {value.dtype for value in first.values()} == {like.dtype}
    for key, value in first.items():
        assert_same_bits(again[key], value, key)


def test_a_task_that_no_example_has_gets_no_gradient() -> None:
    case = Case(MANY, 2, 0)
    grads = MANY.prompt_vjp(case.tensors(), Context(2, np.asarray([2, 0])), case.dy)
    for name in ("prefix_task_cols", "prefix_task_rows"):
        assert not np.any(grads[name][1])
        assert np.all(np.any(grads[name][[0, 2]], axis=(1, 2)))


# ---- where it goes


def arrays(received: Inputs) -> tuple[Any, Any, Any]:
    """What a gradient comes back for."""
    return received.embeddings, received.decoder_embeddings, received.past_key_values


@EVERY
@given(data=st.data())
@LAW
def test_splice_vjp_is_the_adjoint(name: str, data: st.DataObject) -> None:
    case, task, given = data.draw(cases(name)), data.draw(tasks(name)), data.draw(some_integers())
    inputs, prompt = case.inputs(task, given), case.numbers(8, case.prompt_shape)
    received = splice(case.method, prompt, inputs, task)
    d = [None if a is None else case.numbers(9 + k, a.shape) for k, a in enumerate(arrays(received))]
    back = splice_vjp(case.method, prompt, inputs, task, Inputs(d[0], decoder_embeddings=d[1], past_key_values=d[2]))
    assert back.prompt.shape == prompt.shape
    assert back.embeddings.shape == inputs.embeddings.shape
    forth = sum(paired(a, b) for a, b in zip(arrays(received), d, strict=True))
    came = InputGradients(prompt, inputs.embeddings, inputs.decoder_embeddings)
    assert forth == pytest.approx(sum(paired(a, b) for a, b in zip(came, back, strict=True)), rel=1e-11, abs=1e-11)


@EVERY
@given(data=st.data())
@LAW
def test_a_spliced_batch_is_its_spliced_examples(name: str, data: st.DataObject) -> None:
    case, task, given = data.draw(cases(name)), data.draw(tasks(name)), data.draw(some_integers())
    inputs, prompt = case.inputs(task, given), case.numbers(8, case.prompt_shape)
    order = np.random.default_rng(case.seed).permutation(case.batch)
    whole = splice(case.method, prompt, inputs, task)
    shuffled = splice(case.method, prompt[order], Inputs(*(None if v is None else v[order] for v in inputs)), task)
    for field, one, other in zip(Inputs._fields, whole, shuffled, strict=True):
        assert (one is None) == (other is None), field
        if one is not None:
            axis = 2 if field == "past_key_values" else 0
            assert_same_bits(np.asarray(other), np.take(np.asarray(one), order, axis=axis), field)


@EVERY
@given(data=st.data())
@LAW
def test_the_input_comes_out_whole_behind_the_prompt_and_integers_stay_integers(name: str, data: st.DataObject) -> None:
    case, task, given = data.draw(cases(name)), data.draw(tasks(name)), data.draw(some_integers())
    inputs = case.inputs(task, given)
    received = splice(case.method, case.numbers(8, case.prompt_shape), inputs, task)
    for field, value in received._asdict().items():
        came = getattr(inputs, field)
        own = field == "labels" and isinstance(case.method, TypedPrompt)  # which of them count is said by their types
        if value is not None and came is not None and not own:
            tail = value[:, value.shape[1] - came.shape[1] :]
            moved = field == "position_ids"  # only those of a prefix pass, n further on
            assert_same_bits(tail, came + case.method.size("num_virtual_tokens") if moved else came, field)
    longer = received.embeddings.shape[1] - inputs.embeddings.shape[1]
    assert longer in ({0} if case.method.place == "cache" else {case.method.size("num_virtual_tokens"), case.method.table_shape[0]})


@pytest.mark.parametrize("name", IN_CACHE)
@given(data=st.data())
@LAW
def test_key_values_vjp_is_the_adjoint(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    prompt = case.numbers(8, case.prompt_shape)
    kv = key_values(case.method, prompt)
    d = case.numbers(9, kv.shape)
    assert paired(kv, d) == pytest.approx(paired(prompt, key_values_vjp(case.method, prompt, d)), rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("name", IN_CACHE)
@given(data=st.data())
@LAW
def test_of_one_submodule_keys_and_values_are_the_prompts_numbers_each_once(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, num_transformer_submodules=1))
    prompt = case.numbers(8, case.prompt_shape)
    kv = key_values(case.method, prompt)
    heads, width = case.method.size("num_attention_heads"), case.method.size("token_dim")
    shape = (case.method.size("num_layers"), 2, case.batch, heads, case.method.size("num_virtual_tokens"), width // heads)
    assert kv.shape == shape
    assert_same_bits(np.sort(kv.reshape(-1)), np.sort(prompt.reshape(-1)), "the numbers")
    assert_same_bits(kv[0, 0, 0, :, 0].reshape(-1), prompt[0, 0, :width], "the first layer's first key, head by head")


@given(case=cases("prompt_tuning"))
@LAW
def test_a_prompt_is_rounded_to_the_inputs_dtype(case: Case) -> None:
    prompt, inputs = case.numbers(8, case.prompt_shape), case.inputs("CAUSAL_LM")
    received = splice(case.method, prompt, inputs._replace(embeddings=inputs.embeddings.astype(np.float32)), "CAUSAL_LM")
    n = case.method.size("num_virtual_tokens")
    assert_same_bits(received.embeddings[:, :n], prompt[:, :n].astype(np.float32), "the prompt")


# ---- backends


def results(case: Case, task: str, given: dict[str, Any]) -> dict[str, Any]:
    """Every operation of a prompt on the arrays `given`, by name."""

    def under(start: str) -> dict[str, Any]:
        return {name.removeprefix(start): value for name, value in given.items() if name.startswith(start)}

    method, p = case.method, under("p.")
    ctx = Context(case.batch, given.get("task_ids"), tuple(under("dropout.").values()))
    inputs, prompt = Inputs(**under("inputs.")), method.prompt(p, ctx)
    received = splice(method, prompt, inputs, task)
    found = {"prompt": prompt, **{f"received {k}": v for k, v in received._asdict().items()}}
    found |= {f"d {k}": v for k, v in method.prompt_vjp(p, ctx, given["dy"]).items()}
    file = method.saved(p)
    found |= {f"saved {k}": v for k, v in file.items()} | {f"loaded {k}": v for k, v in method.loaded(file).items()}
    # The received arrays serve as their own gradient: any would do.
    back = splice_vjp(method, prompt, inputs, task, received)
    return {k: v for k, v in (found | {f"back {k}": v for k, v in back._asdict().items()}).items() if v is not None}


def on(backend: Backend, case: Case, task: str, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments on the backend, and the results."""
    with backend.scope():
        given = {name: backend.from_numpy(value, dtype) for name, value in sent(case.tensors(), case, task).items()}
        got = results(case, task, given)
        return given, dict(zip(got, backend.settle(list(got.values())), strict=True))


@EVERY
def test_a_backend_agrees_with_numpy_in_float64_keeps_dtypes_and_writes_into_no_argument(backend: Backend, name: str) -> None:
    only = METHODS.prompts[name].only_task
    asked = ("SEQ_2_SEQ_LM", "TOKEN_CLS") if only is None else (only, only)
    for case, task, dtype in zip(awkward(name) * 2, asked, (backend.held[-1], backend.dtypes[-1]), strict=False):
        given, got = on(backend, case, task, dtype)
        host = {name: backend.to_numpy(value, dtype) for name, value in given.items()}
        for what, value in sent(case.tensors(), case, task).items():
            assert_same_bits(host[what], backend.to_numpy(backend.from_numpy(value, dtype), dtype), f"the argument {what}")
        expected = results(case, task, host)
        assert got.keys() == expected.keys()
        for what, want in expected.items():
            if want.dtype.kind == "f":
                assert backend.dtype_of(got[what]) == compute_dtype(dtype), what
            back = backend.to_numpy(got[what], dtype)
            assert back.shape == want.shape, what
            size = max(1.0, float(np.max(np.abs(want), initial=0.0)))
            allowed = ROUNDINGS * UNIT[compute_dtype(dtype)] * size + (0.0 if dtype in backend.held else UNIT[dtype] * np.abs(want))
            assert np.all(np.abs(back - want) <= allowed), f"{what} in {dtype}: got {back}, expected {want}"


@EVERY
def test_on_a_backend_a_fresh_prompt_starts_from_numpys_bits(backend: Backend, name: str) -> None:
    dtype = backend.dtypes[0]
    for case in awkward(name):
        with backend.scope():
            like = backend.from_numpy(np.zeros((2, 2)), dtype)
            words = backend.from_numpy(case.sources.words, dtype)
            start = case.method.init(like, np.random.default_rng(5), Sources(words=words))
        expected = case.method.init(np.zeros(()), np.random.default_rng(5), case.sources)
        assert start.keys() == expected.keys()
        for key, value in start.items():
            assert_same_bits(backend.to_numpy(value, dtype), backend.to_numpy(backend.from_numpy(expected[key], dtype), dtype), key)
