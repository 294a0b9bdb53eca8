"""Prompt and multitask prompt tuning against HF PEFT run live in float64: prompt, gradients, files, starts, and what a model receives."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft_ref import MultitaskPromptTuning, PromptTuning  # noqa: E402
from peft_ref.errors import ConfigError, ShapeError  # noqa: E402
from peft_ref.prompts import EMBEDDING, Context, Prompt, Sources  # noqa: E402
from peft_ref.splice import TASKS, Inputs, splice, splice_vjp  # noqa: E402
from tests.hf.peft_prompts import Host, Pair, pair, prompted  # noqa: E402
from tests.hf.tiny_models import DIM, VOCABULARY, received, tiny  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]

N, BATCH, TOKENS, DECODER_TOKENS = 3, 3, 4, 2
IDS = np.array([2, 0, 2])
ONE = PromptTuning(num_virtual_tokens=N)
MANY = MultitaskPromptTuning(num_virtual_tokens=N, num_tasks=4, num_ranks=2)
OF_BOTH = pytest.mark.parametrize("method", [ONE, MANY], ids=lambda method: type(method).__name__)
# PEFT hands no task ids on in the other tasks: MULTITASKPROMPTTUNING-Q1.
WITH_IDS = tuple(task for task in TASKS if task not in ("QUESTION_ANS", "FEATURE_EXTRACTION"))
TRIED = [(ONE, task, task) for task in TASKS] + [(MANY, task, task) for task in WITH_IDS] + [(ONE, "CAUSAL_LM", "gpt2")]
EVERY_SPLICE = pytest.mark.parametrize(("method", "task", "model"), TRIED, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
THEIRS = {"embeddings": "inputs_embeds", "decoder_embeddings": "decoder_inputs_embeds"}


def context(method: Prompt) -> Context:
    return Context(BATCH, IDS if isinstance(method, MultitaskPromptTuning) else None)


def task_ids(method: Prompt) -> dict[str, Any]:
    return {"task_ids": torch.tensor(IDS)} if isinstance(method, MultitaskPromptTuning) else {}


def close(got: Any, want: Any, rounding: float = 1e-13) -> None:
    got, want = (v.detach().numpy() if isinstance(v, torch.Tensor) else v for v in (got, want))
    np.testing.assert_allclose(got, want, rtol=0, atol=rounding * max(1.0, float(np.max(np.abs(want)))))


# ---- the prompt


@OF_BOTH
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_prompt_and_every_gradient_are_pefts(method: Prompt, task: str) -> None:
    rng = np.random.default_rng(1)
    here = pair(method, task, rng)
    ctx = context(method)
    theirs = here.model.get_prompt(BATCH, **task_ids(method))
    close(here.method.prompt(here.tensors, ctx), theirs)
    dy = rng.normal(size=tuple(theirs.shape))
    theirs.backward(torch.tensor(dy))
    grads = here.method.prompt_vjp(here.tensors, ctx, dy)
    assert grads.keys() == here.gradients.keys()
    for name, gradient in here.gradients.items():
        close(grads[name], gradient)


@OF_BOTH
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_what_is_saved_is_what_peft_saves_and_loads(method: Prompt, task: str, tmp_path: Path) -> None:
    here = pair(method, task, np.random.default_rng(2))
    file = peft.get_peft_model_state_dict(here.model)
    ours = here.method.saved(here.tensors)
    assert ours.keys() == file.keys() == here.method.file_keys
    for name, value in file.items():
        assert np.array_equal(ours[name], value.detach().numpy())
    here.model.save_pretrained(tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        again = peft.PeftModel.from_pretrained(tiny(task), tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    inference = here.method.in_inference()
    assert again.active_peft_config.inference_mode
    with torch.no_grad():
        close(inference.prompt(here.method.loaded(ours), context(method)), again.get_prompt(BATCH, **task_ids(method)))


# ---- where it goes


def inputs(task: str, rng: np.random.Generator, bare: bool = False) -> Inputs:
    mask = np.array([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    x = rng.normal(size=(BATCH, TOKENS, DIM))
    decoder: dict[str, Any] = {}
    if task == "SEQ_2_SEQ_LM":
        decoder = {"decoder_embeddings": rng.normal(size=(BATCH, DECODER_TOKENS, DIM))}
    if bare:
        return Inputs(x, **decoder)
    if decoder:
        decoder["decoder_attention_mask"] = np.array([[1, 1], [1, 0], [1, 1]])
    labels: dict[str, Any] = {
        "CAUSAL_LM": rng.integers(3, VOCABULARY, (BATCH, TOKENS)),
        "SEQ_2_SEQ_LM": rng.integers(3, VOCABULARY, (BATCH, DECODER_TOKENS)),
        "SEQ_CLS": np.array([0, 1, 1]),
        "TOKEN_CLS": rng.integers(0, 2, (BATCH, TOKENS)),
    }
    return Inputs(x, mask, labels.get(task), np.tile(np.arange(TOKENS), (BATCH, 1)), 1 - mask, **decoder)


def as_torch(given: Inputs) -> dict[str, Any]:
    return {THEIRS.get(name, name): torch.tensor(value) for name, value in given._asdict().items() if value is not None}


@EVERY_SPLICE
@pytest.mark.parametrize("bare", [False, True], ids=["all", "bare"])
def test_the_model_receives_what_it_receives_under_peft(method: Prompt, task: str, model: str, bare: bool) -> None:
    rng = np.random.default_rng(3)
    here, given = pair(method, task, rng, model), inputs(task, np.random.default_rng(4), bare)
    seen = received(here.model, **as_torch(given), **task_ids(method))
    seen.pop("return_dict", None)
    ours = splice(here.method, here.method.prompt(here.tensors, context(method)), given, task)
    ours_by_name = {THEIRS.get(name, name): value for name, value in ours._asdict().items() if value is not None}
    assert ours_by_name.keys() == seen.keys()
    for name, value in ours_by_name.items():
        close(value, seen[name])


def test_one_submodule_of_an_encoder_decoder_is_its_encoder() -> None:
    method = PromptTuning(num_virtual_tokens=N, num_transformer_submodules=1)
    here, given = pair(method, "SEQ_2_SEQ_LM", np.random.default_rng(5)), inputs("SEQ_2_SEQ_LM", np.random.default_rng(6))
    seen = received(here.model, **as_torch(given))
    ours = splice(here.method, here.method.prompt(here.tensors, context(method)), given, "SEQ_2_SEQ_LM")
    for name in ("embeddings", "attention_mask", "labels", "decoder_embeddings", "decoder_attention_mask"):
        close(getattr(ours, name), seen[THEIRS.get(name, name)])


@EVERY_SPLICE
def test_a_models_gradient_comes_back_to_every_tensor_and_to_the_inputs(method: Prompt, task: str, model: str) -> None:
    """From what the base model was given, by autograd, and from there on by `splice_vjp` and `prompt_vjp`, against autograd all the way."""
    rng = np.random.default_rng(7)
    here, given = pair(method, task, rng, model), inputs(task, np.random.default_rng(8))
    if task == "TOKEN_CLS":
        given = given._replace(labels=None)  # PROMPTTUNING-Q4
    sent = as_torch(given)
    leaves = [sent[name].requires_grad_() for name in ("inputs_embeds", "decoder_inputs_embeds") if name in sent]
    entered: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        for name in ("inputs_embeds", "decoder_inputs_embeds"):
            if kwargs.get(name) is not None:
                kwargs[name].retain_grad()
                entered[name] = kwargs[name]

    here.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    out = here.model(**sent, **task_ids(method))
    first = out.logits if "logits" in out else out.start_logits if "start_logits" in out else out.last_hidden_state
    (first * torch.tensor(rng.normal(size=tuple(first.shape)))).sum().backward()
    prompt = here.method.prompt(here.tensors, context(method))
    D = Inputs(**{ours: entered[theirs].grad.numpy() for ours, theirs in THEIRS.items() if theirs in entered})
    back = splice_vjp(here.method, prompt, given, task, D)
    for leaf, ours in zip(leaves, (back.embeddings, back.decoder_embeddings), strict=False):
        close(ours, leaf.grad)
    grads = here.method.prompt_vjp(here.tensors, context(method), back.prompt)
    assert any(np.any(value) for value in grads.values())
    for name, gradient in here.gradients.items():
        close(grads[name], gradient, 1e-12)


# ---- how it starts


def words_of(model: Any) -> Host:
    """A model's word embeddings, rounded to float32 there too, as PEFT rounds what it takes."""
    weight = model.get_input_embeddings().weight
    weight.data = weight.data.float().double()
    return np.asarray(weight.detach().numpy())


class Base:
    """A tiny model whose words are float32 numbers, handed out again to every method that is put onto it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, task: str = "CAUSAL_LM") -> None:
        torch.set_default_dtype(torch.float64)
        try:
            self.model = tiny(task)
        finally:
            torch.set_default_dtype(torch.float32)
        self.words = words_of(self.model)
        monkeypatch.setattr("tests.hf.peft_prompts.tiny", lambda name: self.model)

    def sized(self, method: Prompt, task: str = "CAUSAL_LM") -> Prompt:
        return method.sized(self.model.config.to_dict(), task)


LIKE = np.zeros(())


def test_random_rows_are_standard_normal_and_u_and_v_are_fifty_times_smaller() -> None:
    method = MultitaskPromptTuning(num_virtual_tokens=4000, num_tasks=50, num_ranks=7)
    made = prompted(method, "CAUSAL_LM")
    theirs = {name: p.detach().numpy() for name, p in made.prompt_encoder["default"].named_parameters()}
    sized = method.sized(made.get_base_model().config.to_dict(), "CAUSAL_LM")
    ours = sized.init(LIKE, np.random.default_rng(9))
    for name, deviation in ((EMBEDDING, 1.0), ("prefix_task_cols", 0.02), ("prefix_task_rows", 0.02)):
        for drawn in (theirs[name], ours[name]):
            assert drawn.shape == sized.shapes()[name]
            assert abs(np.std(drawn) / deviation - 1) < 5 / np.sqrt(2 * drawn.size)  # five deviations of a sample's own
            assert np.max(np.abs(drawn)) > 1.8 * deviation  # where no uniform of that deviation ends


@OF_BOTH
def test_sampled_rows_are_rows_of_the_models_words(method: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base(monkeypatch)
    sampling = type(method)(**{**vars(method), "num_virtual_tokens": 60, "prompt_tuning_init": "SAMPLE_VOCAB"})
    theirs = prompted(sampling, "CAUSAL_LM").prompt_encoder["default"].embedding.weight.detach().numpy()
    ours = base.sized(sampling).init(LIKE, np.random.default_rng(10), Sources(words=base.words))[EMBEDDING]
    for rows in (theirs, ours):
        which = [np.flatnonzero((base.words == row).all(axis=1)).tolist() for row in rows]
        assert all(len(found) == 1 for found in which)
        assert len({found[0] for found in which}) > VOCABULARY / 2


class Tokenizer:
    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def __call__(self, text: str) -> Any:
        return {"input_ids": list(self.ids)}


@OF_BOTH
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("ids", [[7], [4, 9, 3], [5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8]], ids=len)
def test_a_texts_rows_are_cut_or_repeated_as_peft_does(method: Prompt, task: str, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base(monkeypatch, task)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Tokenizer(ids))
    started = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "some words", "tokenizer_name_or_path": "a stub"}
    text = type(method)(**{**vars(method), **started})
    theirs = prompted(text, task).prompt_encoder["default"].embedding.weight.detach().numpy()
    ours = base.sized(text, task).init(LIKE, np.random.default_rng(0), Sources(words=base.words, tokenize=lambda text: ids))
    assert np.array_equal(ours[EMBEDDING], theirs)


@pytest.mark.parametrize("task", [0, 2, 3, -1, -4])
@pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_a_start_from_a_source_takes_what_peft_takes(init: str, task: int, tmp_path: Path) -> None:
    source = saved_source(tmp_path)
    own = {"prompt_tuning_init": init, "prompt_tuning_init_task": task, "prompt_tuning_init_state_dict_path": source.path}
    method = MultitaskPromptTuning(num_virtual_tokens=N, num_ranks=2, **own)
    made = prompted(method, "CAUSAL_LM")
    theirs = {name: p.detach().numpy() for name, p in made.prompt_encoder["default"].named_parameters()}
    sized = method.sized(made.get_base_model().config.to_dict(), "CAUSAL_LM")
    ours = sized.init(LIKE, np.random.default_rng(0), Sources(tensors=source.tensors))
    assert ours.keys() == theirs.keys()
    for name in (EMBEDDING,) if init == "ONLY_SOURCE_SHARED" else theirs:
        close(ours[name], theirs[name], 1e-15)
    if init == "ONLY_SOURCE_SHARED":
        assert all(np.std(values[name]) < 0.05 for values in (ours, theirs) for name in ("prefix_task_cols", "prefix_task_rows"))


@pytest.mark.parametrize(
    ("own", "theirs", "ours"),
    [
        ({"prompt_tuning_init": "AVERAGE_SOURCE_TASKS", "num_tasks": 2}, RuntimeError, ShapeError),
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK", "num_tasks": 2}, RuntimeError, ShapeError),
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_task": 4}, IndexError, ConfigError),
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_task": None}, RuntimeError, ConfigError),
        ({"prompt_tuning_init": "ONLY_SOURCE_SHARED", "num_virtual_tokens": N + 1}, RuntimeError, ShapeError),
    ],
)
def test_a_source_that_does_not_fit_is_refused_by_both(own: dict[str, Any], theirs: Any, ours: Any, tmp_path: Path) -> None:
    source = saved_source(tmp_path)
    sizes = {"num_virtual_tokens": N, "num_ranks": 2, "prompt_tuning_init_state_dict_path": source.path}
    method = MultitaskPromptTuning(**{**sizes, **own})
    with pytest.raises(theirs):
        prompted(method, "CAUSAL_LM")
    sized = method.sized(tiny("CAUSAL_LM").config.to_dict(), "CAUSAL_LM")
    with pytest.raises(ours):
        sized.init(LIKE, np.random.default_rng(0), Sources(tensors=source.tensors))


class Source:
    def __init__(self, path: Path, saved: Pair) -> None:
        self.path = str(path / "adapter_model.safetensors")
        self.tensors = {name: value.detach().numpy() for name, value in peft.get_peft_model_state_dict(saved.model).items()}


def saved_source(folder: Path) -> Source:
    """An adapter of four tasks that PEFT saved."""
    here = pair(MANY, "CAUSAL_LM", np.random.default_rng(11))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        here.model.save_pretrained(folder)
    return Source(folder, here)
