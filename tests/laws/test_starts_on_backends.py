"""The starts from data, and LoRA on parameters, give NumPy's numbers on every backend: products, where singular vectors have no sign."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from peft_ref.backend import Backend
from peft_ref.layers import Linear
from peft_ref.methods import LoRA
from peft_ref.methods.corda_init import corda, covariance
from peft_ref.methods.eva_init import Eva, directions
from peft_ref.methods.loftq_init import LoftQ, loftq
from peft_ref.methods.lora import Params
from peft_ref.methods.lora_ga_init import LoraGA, Spectrum, lora_ga
from peft_ref.methods.lora_parameter import Stack, delta, delta_vjp

LAYER, METHOD = Linear(in_features=6, out_features=5), LoRA(r=2, lora_alpha=3)
STACK = Stack(in_features=6, out_features=5, experts=2, transposed=True)
RNG = np.random.default_rng(0)
U, S, Vh = np.linalg.svd(RNG.normal(size=(5, 6)), full_matrices=False)
GIVEN: dict[str, np.ndarray[Any, Any]] = {
    "W": RNG.normal(size=(5, 6)),
    "x": RNG.normal(size=(20, 6)) * np.arange(1, 7),
    "y": RNG.normal(size=(20, 6)) * np.arange(1, 7),
    "U": U,
    "S": S,
    "Vh": Vh,
    "A": RNG.normal(size=(4, 6)),
    "B": RNG.normal(size=(5, 4)),
    "G": RNG.normal(size=(2, 6, 5)),
}


def product(start: Any) -> dict[str, Any]:
    return {"B A": start.params.B @ start.params.A, "W": start.W}


ASKED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "corda": lambda g: product(corda(METHOD, LAYER, g["W"], covariance([g["x"], g["y"]]))),
    "kpm": lambda g: product(corda(METHOD, LAYER, g["W"], covariance([g["x"], g["y"]]), "kpm")),
    "loftq": lambda g: product(loftq(METHOD, LAYER, g["W"], LoftQ(loftq_iter=2))),
    "loftq in eight bits": lambda g: product(loftq(METHOD, LAYER, g["W"], LoftQ(loftq_bits=8, loftq_iter=2))),
    "lora_ga": lambda g: product(lora_ga(METHOD, LAYER, g["W"], Spectrum(g["U"], g["S"], g["Vh"]), LoraGA(scale="weight_svd"))),
    "eva": lambda g: directions([{"q": g["x"], "k": g["x"]}, {"q": g["y"], "k": g["y"]}], {"q": 2, "k": 1}, Eva(whiten=True, tau=0.5)),
    "delta": lambda g: {"dW": delta(METHOD, STACK, Params(g["A"], g["B"]))},
    "delta_vjp": lambda g: dict(zip("AB", delta_vjp(METHOD, STACK, Params(g["A"], g["B"]), g["G"]), strict=False)),
}


@pytest.mark.parametrize("what", ASKED)
def test_a_backend_gives_numpys_numbers(backend: Backend, what: str) -> None:
    if not backend.extensions >= {"linalg"}:
        pytest.skip(f"{backend.name} has no linalg")
    dtype = backend.dtypes[0]
    expected = ASKED[what](GIVEN)
    try:
        with backend.scope():
            got = ASKED[what]({name: backend.from_numpy(value, dtype) for name, value in GIVEN.items()})
            found = {name: backend.to_numpy(value, dtype) for name, value in got.items()}
    except NotImplementedError as error:
        pytest.skip(f"{backend.name} has not: {error!s:.80}")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=(1e-9 if dtype == "float64" else 1e-3), err_msg=name)
