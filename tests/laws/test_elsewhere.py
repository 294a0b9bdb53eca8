"""What is computed stays where its arguments are: in their library and on their device, in their dtype, with NumPy's numbers.

array-api-strict has devices that are one in name only, and it refuses to mix them with each other and with NumPy. On NumPy alone a zero
made in another library, or on the device that is nobody's, would not show.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ref.layers import Linear
from peft_ref.methods import AdaMSS, AdaptionPrompt, Cartridge
from peft_ref.methods.adamss_asa import State, after_step, scores
from peft_ref.methods.adaption_prompt import Params
from peft_ref.methods.cartridge import composed, rows_of_cache
from peft_ref.prompts import Context
from tests.laws.strategies import LAW_ON_BACKEND, PAIRS, cases
from tests.laws.test_on_backends import ROUNDINGS, UNIT, arguments, results
from tests.laws.test_starts_on_backends import ASKED, GIVEN
from tests.methods import facts


@pytest.fixture(scope="module")
def strict() -> ModuleType:
    return pytest.importorskip("array_api_strict")


def there(value: Any, strict: ModuleType) -> Any:
    """An array on a device that is not the default, the floating point ones in the dtype that is not the default either."""
    dtype = strict.float32 if value.dtype.kind == "f" else None
    return strict.asarray(value, dtype=dtype, device=strict.Device("device1"))


def back(value: Any, strict: ModuleType) -> Any:
    assert isinstance(value, strict.asarray(0).__class__), type(value)
    assert value.device == strict.Device("device1")
    assert value.dtype == strict.float32 or strict.isdtype(value.dtype, "integral"), value.dtype
    return np.asarray(strict.asarray(value, device=strict.Device("CPU_DEVICE")))


def assert_near(got: Any, want: Any, what: str) -> None:
    allowed = ROUNDINGS * UNIT["float32"] * max(1.0, float(np.max(np.abs(want), initial=0.0)))
    np.testing.assert_allclose(got, want, rtol=0, atol=allowed, err_msg=what)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@settings(LAW_ON_BACKEND, max_examples=3)
def test_all_that_is_computed_is_where_its_arguments_are(strict: ModuleType, name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind, few=True))
    sent = {what: there(value, strict) for what, value in arguments(case).items()}
    expected = results(case, {what: back(value, strict) for what, value in sent.items()})
    got = results(case, sent)
    assert got.keys() == expected.keys()
    for what, want in expected.items():
        assert_near(back(got[what], strict), want, what)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@settings(LAW_ON_BACKEND, max_examples=2)
def test_a_start_is_where_the_weight_is(strict: ModuleType, name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind, fresh=True, few=True))
    W = there(case.W, strict)
    start, expected = (case.method.init(case.layer, V, np.random.default_rng(7)) for V in (W, back(W, strict)))
    assert_near(back(start.W, strict), expected.W, "W")
    found, wanted = ({what: value for what, value in s.params._asdict().items() if value is not None} for s in (start, expected))
    assert found.keys() == wanted.keys()
    found = {what: back(value, strict) for what, value in found.items()}
    if getattr(case.method, "init_lora_weights", True) in ("pissa", "olora"):  # singular vectors have no sign of their own
        return
    if (free := facts(name).without_signs) is not None:
        found, wanted = dict(free(found)), dict(free(wanted))
    for what, want in wanted.items():
        assert_near(found[what], want, what)


def each(value: Any, strict: ModuleType, f: Any) -> Any:
    """`f` of every array, within tuples and maps."""
    if isinstance(value, dict):
        return {name: each(inner, strict, f) for name, inner in value.items()}
    if isinstance(value, tuple):
        parts = [each(inner, strict, f) for inner in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return f(value, strict) if hasattr(value, "dtype") else value


def compare(got: Any, want: Any, what: str) -> None:
    if isinstance(want, dict | tuple):
        assert len(got) == len(want), what
        for name in want if isinstance(want, dict) else range(len(want)):
            compare(got[name], want[name], f"{what}, {name}")
    elif isinstance(want, np.ndarray | np.generic):
        assert_near(got, want, what)
    else:
        assert got == want, what


RNG = np.random.default_rng(3)
HEADS = {
    name: RNG.normal(size=size) for name, size in {"q": (2, 4, 3, 5), "k": (1, 2, 6, 5), "v": (1, 2, 6, 5), "dy": (2, 4, 3, 5)}.items()
}
PROMPT, LAYER = AdaptionPrompt(adapter_len=6, adapter_layers=1), Linear(in_features=6, out_features=5)
CARTRIDGE = Cartridge(num_virtual_tokens=3, num_layers=2, token_dim=4, num_attention_heads=2)


def scored(params: Any, grads: Any) -> Any:
    method, state = AdaMSS(r=3, num_subspaces=2, use_asa=True, init_warmup=0, final_warmup=9, asa_target_subspaces=1), State()
    for step in (1, 2):
        state = after_step(method, state, params, grads, step)
    return scores(state), dict(state.importance), dict(state.uncertainty)


def tables(table: Any, cache: Any) -> Any:
    parts = CARTRIDGE.split(table)
    context = Context(batch=1)
    whole = CARTRIDGE.table(parts, context)
    return parts, whole, CARTRIDGE.table_vjp(parts, context, table), rows_of_cache(cache, 3), composed(CARTRIDGE, [table, table])[1]


BESIDE: dict[str, tuple[Any, tuple[Any, ...]]] = {
    **{f"a start from {name}": (ask, (GIVEN,)) for name, ask in ASKED.items()},
    "added": (lambda g, h: PROMPT.added(Params(None, g), h["q"], h["k"], h["v"]), (np.ones(1), HEADS)),
    "added, its gradients": (
        lambda g, h: tuple(PROMPT.added_vjp(Params(None, g), h["q"], h["k"], h["v"], h["dy"]))[1:],
        (np.ones(1), HEADS),
    ),
    "scores of subspaces": (
        scored,
        tuple({"a": AdaMSS(r=3, num_subspaces=2, init_weights=None).init(LAYER, RNG.normal(size=(5, 6)), RNG).params} for _ in range(2)),
    ),
    "cartridges": (tables, (RNG.normal(size=(3, 16)), RNG.normal(size=(2, 2, 1, 2, 4, 2)))),
}


@pytest.mark.parametrize("what", BESIDE)
def test_what_is_computed_beside_layers_is_there_too(strict: ModuleType, what: str) -> None:
    ask, given = BESIDE[what]
    sent = each(given, strict, there)
    compare(each(ask(*sent), strict, back), ask(*each(sent, strict, back)), what)
