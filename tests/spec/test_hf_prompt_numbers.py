"""The numbers that the pages of prompts work out by hand, against HF PEFT's own encoders run live: prompt, every gradient, file."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING  # noqa: E402

from peft_ref import METHODS  # noqa: E402
from peft_ref.prompts import Context, Prompt  # noqa: E402
from tests.hf.peft_prompts import config  # noqa: E402
from tests.spec.pages import METHOD_PAGES, run  # noqa: E402

pytestmark = pytest.mark.hf


class Worked(NamedTuple):
    """The names that a block with a prompt's gradient leaves behind."""

    method: Prompt
    p: dict[str, Any]
    ctx: Context
    dy: Any
    grads: dict[str, Any]


def worked() -> list[Any]:
    found = []
    for name in METHODS.prompts:
        for ran in run(METHOD_PAGES[name]) if name in METHOD_PAGES else ():
            if "grads = method.prompt_vjp(p, ctx, dy)" in ran.block.source:
                values = Worked(*(ran.names[field] for field in Worked._fields))
                found.append(pytest.param(values, id=f"{name}-line{ran.block.line}"))
    return found


def encoder(w: Worked) -> Any:
    """PEFT's encoder with the example's numbers, in float64."""
    made: Any = PEFT_TYPE_TO_TUNER_MAPPING[w.method.peft_type]
    own = config(w.method, "CAUSAL_LM")
    own.token_dim = w.method.token_dim  # CPT's configuration leaves it to the model
    words = torch.nn.Embedding(9, w.method.size("token_dim")) if w.method.peft_type == "CPT" else None
    module = made(own, words) if w.method.peft_type.endswith(("PROMPT_TUNING", "CPT")) else made(own)
    module.double().load_state_dict({name: torch.tensor(value) for name, value in w.p.items()}, strict=True)
    return module


def test_the_pages_have_gradients_to_compare() -> None:
    assert {p.id.partition("-")[0] for p in worked()} >= {"prompt_tuning", "multitask_prompt_tuning"}


@pytest.mark.parametrize("w", worked())
def test_prompt_and_gradients_are_those_of_hf(w: Worked) -> None:
    module = encoder(w)
    rows = torch.arange(w.method.table_shape[0]).expand(w.ctx.batch, -1)
    ids = () if w.ctx.task_ids is None else (torch.tensor(w.ctx.task_ids),)
    prompt = module(rows, *ids)
    alike(prompt, w.method.prompt(w.p, w.ctx), w)
    prompt.backward(torch.tensor(w.dy))
    assert {name for name, _ in module.named_parameters()} == w.grads.keys()
    for name, p in module.named_parameters():
        alike(torch.zeros_like(p) if p.grad is None else p.grad, w.grads[name], w)


def alike(theirs: Any, ours: Any, w: Worked) -> None:
    """To the bit; a tangent is not the same bits in every library."""
    if "LSTM" in repr(w.method) or "prefix_projection=True" in repr(w.method):
        np.testing.assert_allclose(theirs.detach(), ours, rtol=1e-14, atol=1e-14)
    else:
        assert theirs.tolist() == ours.tolist()
