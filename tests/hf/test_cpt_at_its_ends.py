"""CPT where its numbers end, beside live PEFT: a radius of zero or less, a batch with one label or with an answer everywhere, its sizes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft.tuners.cpt.model import CPTEmbedding  # noqa: E402

from peft_ref import CPT  # noqa: E402
from peft_ref.methods.cpt import DELTA  # noqa: E402
from peft_ref.nn.loss import weighted_next_token_loss  # noqa: E402
from peft_ref.prompts import EMBEDDING, Context  # noqa: E402
from tests.hf.peft_prompts import Pair, pair, prompted  # noqa: E402
from tests.hf.tiny_models import DIM  # noqa: E402
from tests.laws.compare import assert_close  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
TYPES = [1, 1, 2, 2, 3, 3, 4, 0, -3]
STILL = {0, 3}  # rows of D that are zero
# sqrt(8 / 2048) = 1/16, so these are radii of 1, 4 and other powers of 2, which float32 has too
RADII = [(-16.0, -64.0), (-16.0, 64.0), (0.0, -1.0), (0.0, 0.0), (-(2.0**-10), 0.0)]


def placed(radius: float, of_templates: float) -> Pair:
    """Random tensors on both sides, but for the rows of D that are zero."""
    method = CPT(
        cpt_token_ids=[*range(len(TYPES))],
        cpt_tokens_type_mask=TYPES,
        opt_projection_epsilon=radius,
        opt_projection_format_epsilon=of_templates,
    )
    here = pair(method, "CAUSAL_LM", np.random.default_rng(0))
    here.tensors[DELTA][sorted(STILL)] = 0
    with torch.no_grad():
        here.encoder.get_parameter(DELTA).copy_(torch.tensor(here.tensors[DELTA]))
    return here


@pytest.mark.parametrize(("radius", "of_templates"), RADII)
def test_a_radius_below_zero_turns_a_vector_round_and_one_of_zero_ends_it_as_in_peft(radius: float, of_templates: float) -> None:
    """However long it was. PEFT writes it back, so the next prompt turns it again."""
    assert DIM == 8
    here = placed(radius, of_templates)
    tensors = here.tensors
    for _ in range(3):
        theirs = here.model.get_prompt(2)
        assert_close(here.method.prompt(tensors, Context(2)), theirs.detach().numpy(), "prompt", rounding=1e-15)
        moved = here.method.projected(tensors)  # type: ignore[attr-defined]
        for name in (EMBEDDING, DELTA):
            assert_close(moved[name], here.encoder.get_parameter(name).detach().numpy(), name, rounding=1e-15)
        for row, kind in enumerate(TYPES):
            e = {2: radius, 1: of_templates, 3: of_templates}.get(kind, 1e-10) / 16
            D, P = tensors[DELTA][row], moved[DELTA][row]
            if e < 0 and row not in STILL:
                assert_close(P, e * D / np.linalg.norm(D), "P(D)", rounding=1e-15)
            elif e == 0 or row in STILL:
                assert not P.any()
        tensors = moved
    dy = np.random.default_rng(1).normal(size=tuple(theirs.shape))
    theirs.backward(torch.tensor(dy))
    grads = here.method.prompt_vjp(tensors, Context(2), dy)
    for name, gradient in here.gradients.items():
        assert_close(grads[name], gradient, f"gradient of {name}", rounding=1e-14)


ANSWERS = [4 * k for k in range(1, 7)]
# the prompt's types, those of the input (two examples; what is above 0 goes on from the prompt's largest), decay
BATCHES: dict[str, tuple[list[int], list[list[int]], float]] = {
    "one label": ([1, 2, 3], [[2, 2], [2, 1]], 0.5),
    "an answer everywhere": (ANSWERS, [[4, 8, 12], [12, 8, 4]], 0.5),
    "none": ([1, 2, 3], [[2, 2], [2, 3]], 0.5),
    "a word that becomes an answer": ([3, 3, 3], [[1, 1], [5, 4]], 0.5),
    "no input": ([1, 4, 8], [[], []], 0.5),
    "powers above every number": ([1, 4, 8], [[4] * 1100, [8] * 1100], 2.0),
}


@pytest.mark.parametrize("loss", ["decay", "none"])
@pytest.mark.parametrize("name", BATCHES)
def test_a_loss_is_that_of_pefts_own_function(name: str, loss: str) -> None:
    kinds, given, factor = BATCHES[name]
    rng, types = np.random.default_rng(0), np.asarray(given, dtype=np.int64).reshape(2, -1)
    ids = rng.integers(0, 5, len(kinds)).tolist()
    method = CPT(cpt_token_ids=ids, cpt_tokens_type_mask=kinds, opt_weighted_loss_type=loss, opt_loss_decay_factor=factor)
    labels = rng.integers(0, 5, types.shape)
    logits = rng.normal(size=(2, len(kinds) + types.shape[1], 5))
    every = np.concatenate([np.tile(kinds, (2, 1)), np.where(types > 0, types + max(kinds), types)], axis=1)
    judged = np.where((every > 0) & (every % 4 == 0), np.concatenate([np.tile(ids, (2, 1)), labels], axis=1), -100)
    options: Any = SimpleNamespace(opt_weighted_loss_type=loss, opt_loss_decay_factor=factor)
    answer = SimpleNamespace(logits=torch.tensor(logits))
    theirs = float(CPTEmbedding.calculate_loss(answer, torch.tensor(judged), torch.tensor(every), options).loss)
    with np.errstate(divide="raise", invalid="raise"):  # 0/0 is said without a warning
        counted = method.counted(labels, types, np.zeros(()))
    assert np.array_equal(counted.labels, judged)
    ours = float(weighted_next_token_loss(logits, counted.labels, counted.weights))
    assert (ours == pytest.approx(theirs, rel=1e-6)) if np.isfinite(theirs) else np.isnan(ours) and np.isnan(theirs)
    assert np.isnan(theirs) == (name == "none")
    if name == "one label":
        assert sorted(counted.weights.ravel())[-2:] == [0, 1]


def test_sizes_are_the_models_whatever_a_configuration_says() -> None:
    given = {"token_dim": 4, "num_attention_heads": 2, "num_layers": 7, "num_virtual_tokens": 5, "num_transformer_submodules": 2}
    method = CPT(cpt_token_ids=[1, 2], **given)  # type: ignore[arg-type]
    made = prompted(method, "CAUSAL_LM")
    model, theirs = made.get_base_model().config.to_dict(), made.peft_config["default"]
    ours = method.sized(model, "CAUSAL_LM")
    assert {name: getattr(ours, name) for name in given} == {name: getattr(theirs, name) for name in given}
    assert ours == replace(ours, **{name: getattr(theirs, name) for name in given})
