"""CPT and Cartridge against HF PEFT run live in float64: prompt, gradients, what PEFT overwrites, files, starts, and CPT's loss."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_ref import CPT, Cartridge  # noqa: E402
from peft_ref.files.adapter import load_adapter, save_adapter  # noqa: E402
from peft_ref.methods.cartridge import FROZEN, TRAINED, composed, rows_of_cache  # noqa: E402
from peft_ref.methods.cpt import DELTA  # noqa: E402
from peft_ref.nn.loss import weighted_next_token_loss, weighted_next_token_loss_vjp  # noqa: E402
from peft_ref.prompts import EMBEDDING, SAVED, Context, Prompt, Sources  # noqa: E402
from peft_ref.splice import Inputs, key_values, key_values_vjp, splice, splice_vjp  # noqa: E402
from tests.hf.peft_prompts import Host, Pair, pair, prompted  # noqa: E402
from tests.hf.tiny_models import DIM, VOCABULARY, received, tiny  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
BATCH, TOKENS = 3, 5
# Radii of 1 and 4 that nothing rounds in: rows outside, and rows inside.
WORDS = CPT(
    cpt_token_ids=[7, 3, 10, 5, 2, 9, 4],
    cpt_tokens_type_mask=[1, 2, 3, 4, 0, -3, 8],
    opt_projection_epsilon=16.0,
    opt_projection_format_epsilon=64.0,
    opt_weighted_loss_type="decay",
    opt_loss_decay_factor=0.75,
)
CACHE = Cartridge(num_virtual_tokens=4, num_frozen_tokens=2)
IN_CACHE = pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
MASK = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
TYPES = np.array([[0, 2, 3, 4, 4], [1, 4, 4, 8, 8], [4, 12, 0, 8, 8]])


def close(got: Any, want: Any, rounding: float = 1e-12) -> None:
    got, want = (v.detach().numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for v in (got, want))
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=rounding * max(1.0, float(np.max(np.abs(want), initial=0.0))))


def cached(cache: Any) -> Any:
    layers = getattr(cache, "self_attention_cache", cache).layers
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in layers])


def used(here: Pair) -> tuple[Any, Any]:
    """Ours and PEFT's, in the shape in which a model takes it."""
    ours, theirs = here.method.prompt(here.tensors, Context(BATCH)), here.model.get_prompt(BATCH)
    return (key_values(here.method, ours), cached(theirs)) if here.method.place == "cache" else (ours, theirs)


EVERY = pytest.mark.parametrize(
    ("method", "task"),
    [(WORDS, "CAUSAL_LM"), (CACHE, "CAUSAL_LM"), (CACHE, "SEQ_2_SEQ_LM"), (replace(CACHE, num_frozen_tokens=0), "CAUSAL_LM")],
    ids=["cpt", "cartridge", "cartridge-t5", "nothing-frozen"],
)


@EVERY
def test_prompt_and_every_gradient_are_pefts(method: Prompt, task: str) -> None:
    rng = np.random.default_rng(1)
    here = pair(method, task, rng)
    ours, theirs = used(here)
    close(ours, theirs)
    dy = rng.normal(size=tuple(theirs.shape))
    theirs.backward(torch.tensor(dy))
    d = key_values_vjp(here.method, here.method.prompt(here.tensors, Context(BATCH)), dy) if here.method.place == "cache" else dy
    grads = here.method.prompt_vjp(here.tensors, Context(BATCH), d)
    assert grads.keys() == here.gradients.keys() == here.method.shapes().keys()
    for name, gradient in here.gradients.items():
        close(grads[name], gradient)
    trained = {name for name, p in here.encoder.named_parameters() if p.requires_grad}
    assert trained == {name for name in grads if np.any(grads[name])} == grads.keys() - here.method.held


@EVERY
def test_what_is_saved_is_what_peft_saves_and_loads_and_the_other_way_round(method: Prompt, task: str, tmp_path: Path) -> None:
    here = pair(method, task, np.random.default_rng(2))
    ours = here.method.saved(here.tensors)
    close(ours[SAVED], peft.get_peft_model_state_dict(here.model)[SAVED])
    here.model.save_pretrained(tmp_path / "peft")
    read = load_adapter(tmp_path / "peft")
    assert isinstance(read.config.method, type(method))
    close(read.prompt[EMBEDDING], ours[SAVED])
    save_adapter(tmp_path / "ours", read)
    for folder in ("peft", "ours"):
        torch.set_default_dtype(torch.float64)
        try:
            again = peft.PeftModel.from_pretrained(tiny(task), tmp_path / folder)
        finally:
            torch.set_default_dtype(torch.float32)
        prompt = again.get_prompt(BATCH)
        loaded = here.method.in_inference().prompt(here.method.loaded(ours), Context(BATCH))
        theirs = cached(prompt) if here.method.place == "cache" else prompt
        close(key_values(here.method, loaded) if here.method.place == "cache" else loaded, theirs)


@EVERY
def test_the_model_receives_what_it_receives_under_peft(method: Prompt, task: str) -> None:
    here, rng = pair(method, task, np.random.default_rng(3)), np.random.default_rng(4)
    given = Inputs(rng.normal(size=(BATCH, TOKENS, DIM)), MASK, rng.integers(3, VOCABULARY, (BATCH, TOKENS)))
    if task == "SEQ_2_SEQ_LM":
        given = given._replace(decoder_embeddings=rng.normal(size=(BATCH, TOKENS, DIM)), decoder_attention_mask=MASK[::-1].copy())
    types = {"input_type_mask": TYPES.copy()} if isinstance(method, CPT) else {}
    theirs = {"embeddings": "inputs_embeds", "decoder_embeddings": "decoder_inputs_embeds"}
    sent = {theirs.get(name, name): torch.tensor(value) for name, value in {**given._asdict(), **types}.items() if value is not None}
    note: dict[str, Any] = {}
    if types:  # PEFT works its loss out of what the model answers
        here.model.base_model.register_forward_pre_hook(lambda module, args, kwargs: note.update(kwargs), with_kwargs=True)
        here.model(**sent)
        seen = {name: value for name, value in note.items() if isinstance(value, torch.Tensor)}
    else:
        seen = received(here.model, **sent)
    ours = splice(here.method, here.method.prompt(here.tensors, Context(BATCH)), given._replace(**types), task)
    found = {theirs.get(name, name): value for name, value in ours._asdict().items() if value is not None}
    weights = found.pop("loss_weights", None)
    assert (weights is not None) == bool(types)
    if "past_key_values" in seen:
        seen["past_key_values"] = cached(seen["past_key_values"])
    assert found.keys() == {name for name in seen if name != "return_dict"}
    for name, value in found.items():
        close(value, seen[name])


# ---- CPT


def test_what_peft_overwrites_is_what_projected_returns() -> None:
    here = pair(WORDS, "CAUSAL_LM", np.random.default_rng(5))
    for _ in range(2):
        before = {name: p.detach().numpy().copy() for name, p in here.encoder.named_parameters()}
        here.model.get_prompt(1)
        after = {name: p.detach().numpy() for name, p in here.encoder.named_parameters()}
        ours = here.method.projected(before)  # type: ignore[attr-defined]
        for name in (EMBEDDING, DELTA):
            close(ours[name], after[name], 1e-15)
        assert np.all(np.linalg.norm(after[DELTA], axis=1) <= np.array([4, 1, 4, 1e-10, 1e-10, 1e-10, 1e-10]) * (1 + 1e-7))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"opt_weighted_loss_type": "none"},
        {"cpt_tokens_type_mask": [4, 4, 8, 12, 4, 16, 1]},
        {"cpt_tokens_type_mask": [1, 2, 3, 4, 0, -3, 7]},
    ],
    ids=str,
)
@pytest.mark.parametrize("typed", [True, False], ids=["types", "no-types"])
def test_loss_and_its_gradients_are_pefts(changes: dict[str, Any], typed: bool) -> None:
    """From the logits that PEFT's model answers; the gradient of the logits, and through the model that of every tensor."""
    rng = np.random.default_rng(6)
    here = pair(replace(WORDS, **changes), "CAUSAL_LM", rng)
    x, labels = rng.normal(size=(BATCH, TOKENS, DIM)), rng.integers(3, VOCABULARY, (BATCH, TOKENS))
    labels[1, 2] = labels[2, 3] = -100
    types = TYPES if typed else None
    seen: dict[str, Any] = {}

    def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        kwargs["inputs_embeds"].retain_grad()
        seen["x"] = kwargs["inputs_embeds"]

    def leave(module: Any, args: Any, out: Any) -> None:
        out.logits.retain_grad()
        seen["logits"] = out.logits

    here.model.base_model.register_forward_pre_hook(enter, with_kwargs=True)
    here.model.base_model.register_forward_hook(leave)
    sent = {"input_type_mask": torch.tensor(TYPES.copy())} if typed else {}
    loss = here.model(inputs_embeds=torch.tensor(x), labels=torch.tensor(labels), **sent).loss
    loss.backward()
    given = Inputs(x, labels=labels, input_type_mask=types)
    prompt = here.method.prompt(here.tensors, Context(BATCH))
    ours = splice(here.method, prompt, given, "CAUSAL_LM")
    logits = seen["logits"].detach().numpy()
    close(weighted_next_token_loss(logits, ours.labels, ours.loss_weights), loss)
    close(weighted_next_token_loss_vjp(logits, ours.labels, ours.loss_weights, 1.0), seen["logits"].grad)
    back = splice_vjp(here.method, prompt, given, "CAUSAL_LM", Inputs(seen["x"].grad.numpy()))
    grads = here.method.prompt_vjp(here.tensors, Context(BATCH), back.prompt)
    assert np.any(grads[DELTA])
    for name, gradient in here.gradients.items():
        close(grads[name], gradient)


def test_without_a_label_both_losses_are_no_number() -> None:
    here = pair(replace(WORDS, cpt_tokens_type_mask=[1] * 7), "CAUSAL_LM", np.random.default_rng(7))
    labels = np.full((BATCH, TOKENS), 4)
    assert here.model(inputs_embeds=torch.zeros(BATCH, TOKENS, DIM, dtype=torch.float64), labels=torch.tensor(labels)).loss.isnan()
    prompt = here.method.prompt(here.tensors, Context(BATCH))
    ours = splice(here.method, prompt, Inputs(np.zeros((BATCH, TOKENS, DIM)), labels=labels), "CAUSAL_LM")
    assert np.all(ours.labels == -100)
    assert np.isnan(weighted_next_token_loss(np.zeros((BATCH, 12, 11)), ours.labels, ours.loss_weights))


def test_a_start_is_the_words_as_they_are() -> None:
    made = prompted(WORDS, "CAUSAL_LM")
    words = made.get_base_model().get_input_embeddings().weight.detach().numpy()
    method = WORDS.sized(made.get_base_model().config.to_dict(), "CAUSAL_LM")
    ours = method.init(np.zeros((), dtype=np.float32), np.random.default_rng(0), Sources(words=words))
    for name, p in made.prompt_encoder["default"].named_parameters():
        assert np.array_equal(ours[name], p.detach().numpy()), name


# ---- Cartridge


def test_rows_of_a_cache_are_pefts_and_go_on_as_the_text_did() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        base = tiny("CAUSAL_LM")
        ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
        with torch.no_grad():
            out = base(input_ids=ids, use_cache=True)
        made = peft.get_peft_model(base, peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=2)).eval()
        of_text = copy.deepcopy(out.past_key_values)
        peft.tuners.cartridge.utils.initialize_kv_prefix_from_past_key_values(made, past_key_values=of_text)
        rest = made(input_ids=ids[:, 4:]).logits
    finally:
        torch.set_default_dtype(torch.float32)
    method = CACHE.sized(base.config.to_dict(), "CAUSAL_LM")
    ours = method.split(rows_of_cache(cached(out.past_key_values).numpy(), 4))
    for name in (FROZEN, TRAINED):
        assert np.array_equal(ours[name], made.prompt_encoder["default"].get_parameter(name).detach().numpy())
    close(rest, out.logits[:, 4:], 1e-6)  # rotary angles and norms are float32's


def test_several_are_composed_as_peft_composes_them(tmp_path: Path) -> None:
    pairs = [pair(method, "CAUSAL_LM", np.random.default_rng(k)) for k, method in enumerate((CACHE, replace(CACHE, num_virtual_tokens=3)))]
    tables: list[Host] = []
    for k, here in enumerate(pairs):
        here.model.save_pretrained(tmp_path / str(k))
        tables.append(here.method.saved(here.tensors)[SAVED])
    peft.compose_cartridge_adapters([tmp_path / "0", tmp_path / "1"], output_path=tmp_path / "both")
    read = load_adapter(tmp_path / "both")
    first = pairs[0].method
    assert isinstance(first, Cartridge)
    method, table = composed(first, tables)
    assert read.config.method == method.in_inference()
    assert np.array_equal(read.prompt[EMBEDDING], table)
