"""What holds for a training without another implementation: micro-batches, masks, refusals, and the same numbers on every backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from peft_ref.backend import Backend
from peft_ref.errors import ConfigError, KeyMismatchError
from peft_ref.files.adapter import AdapterFile, all_tensors
from peft_ref.files.config import AdapterConfig, from_dict
from peft_ref.model import activate, adapt, add, rescaled
from peft_ref.nn import Inputs, Llama, ModelGraph
from peft_ref.nn.generate import Front, Sampling, generate, replayed
from peft_ref.nn.optim import SGD, AdamW
from peft_ref.nn.tree import leaves, mapped
from peft_ref.prompts import Context
from peft_ref.stack import Dropout
from peft_ref.train import Batch, Recipe, State, Training, begin, file_of, learner_of, put_back, start, step
from peft_ref.train.dropout import with_dropout

MODEL = Llama(
    vocab_size=11, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=2
)
SAID = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Q = ["q_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 2, "target_modules": Q, "lora_dropout": 0.4, "modules_to_save": ["lm_head"]},
    "dora": {"peft_type": "LORA", "use_dora": True, "r": 2, "target_modules": Q},
    "adalora": {"peft_type": "ADALORA", "init_r": 3, "target_r": 1, "total_step": 4, "tinit": 1, "target_modules": Q},
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2},
    "prompt and tables": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "modules_to_save": ["embed_tokens", "lm_head"]},
    "cpt": {
        "peft_type": "CPT",
        "cpt_token_ids": [3, 1, 4],
        "cpt_tokens_type_mask": [1, 4, 8],
        "opt_weighted_loss_type": "decay",
        "opt_loss_decay_factor": 0.5,
    },
    "cartridge": {"peft_type": "CARTRIDGE", "num_virtual_tokens": 3},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "token_dim": 4, "num_attention_heads": 2},
    "lstm": {
        "peft_type": "P_TUNING",
        "num_virtual_tokens": 2,
        "encoder_hidden_size": 3,
        "encoder_reparameterization_type": "LSTM",
        "encoder_dropout": 0.5,
    },
}
DETACHED = ("dora", "cpt", "cartridge")  # HF holds a norm constant, a projection, rows
IDS = np.random.default_rng(0).integers(0, 11, (4, 6))
LABELS = np.where(np.random.default_rng(1).random((4, 6)) < 0.3, -100, IDS)


def config(name: str) -> AdapterConfig:
    return from_dict({"task_type": "CAUSAL_LM", **CONFIGS[name]})


def weights() -> dict[str, Any]:
    rng = np.random.default_rng(2)
    return {name: 0.4 * rng.normal(size=shape) + (len(shape) == 1) for name, shape in MODEL.shapes().items()}


def graph(held: dict[str, Any]) -> ModelGraph:
    return ModelGraph(model=MODEL, weights=held, model_config=SAID)


def training(name: str, held: dict[str, Any] | None = None) -> Training:
    """Fresh, then scattered: an AdaLoRA whose E is zero has no gradient for its A and B."""
    made = start(MODEL, graph(weights()), config(name), np.random.default_rng(3))
    rng = np.random.default_rng(4)
    return replace(made, params=mapped(lambda p: p + 0.2 * rng.normal(size=p.shape), made.params))


def batch(rows: slice = slice(None), labels: Any = LABELS) -> Batch:
    return Batch(inputs=Inputs(input_ids=IDS[rows], labels=labels[rows]))


@pytest.mark.parametrize("name", CONFIGS)
def test_micro_batches_are_one_batch(name: str) -> None:
    made = training(name)
    if name == "lstm":
        made = replace(made, learner=replace(made.learner, prompt=replace(made.learner.prompt, encoder_dropout=0.0)))
    silent = replace(batch(slice(0, 1)), inputs=Inputs(input_ids=IDS[:1], labels=0 * IDS[:1] - 100))
    whole = made.learner.loss_vjp(made.params, [batch()])
    parts = made.learner.loss_vjp(made.params, [batch(slice(0, 1)), batch(slice(1, 4))] + ([silent] if made.learner.prompt is None else []))
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-13)
    for (where, got), (_, expected) in zip(leaves(parts.gradients), leaves(whole.gradients), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-13, err_msg=where)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in DETACHED])
def test_the_gradient_is_the_losss(name: str) -> None:
    """Along a random direction, dropout and penalty included."""
    made, rng = training(name), np.random.default_rng(5)
    given = [with_dropout(made.learner, batch(rows), rng, np.zeros(0)) for rows in (slice(0, 2), slice(2, 4))]
    if name in ("lora", "lstm"):
        masks = [m.mask for b in given for m in b.dropout.values()] + [m for b in given if b.context for m in b.context.dropout]
        assert len(masks) == (4 if name == "lora" else 2)
        assert all(set(np.unique(mask)) == {0.0, 1.0} for mask in masks)
    way = mapped(lambda p: rng.normal(size=p.shape), made.params)
    found = made.learner.loss_vjp(made.params, given)
    np.testing.assert_allclose(found.loss, made.learner.loss(made.params, given), rtol=1e-14)
    slope = sum(float(np.sum(g * w)) for (_, g), (_, w) in zip(leaves(found.gradients), leaves(way), strict=True))
    h = 1e-5
    ahead, behind = (float(made.learner.loss(mapped(lambda p, w, s=s: p + s * w, made.params, way), given)) for s in (h, -h))
    assert abs((ahead - behind) / (2 * h) - slope) < 1e-7 * max(1.0, abs(slope))


def test_a_dropped_input_reaches_no_adapter() -> None:
    made = training("lora")
    name = next(iter(made.learner.methods))
    n_in = made.learner.net.layers[name].shape[1]
    dropped = replace(batch(), dropout={name: Dropout(np.zeros((4, 6, n_in)), 0.4)})
    gradient = made.learner.loss_vjp(made.params, [dropped]).gradients.adapters[name]
    assert not np.any(gradient.A)
    with pytest.raises(KeyMismatchError, match="no adapter"):
        made.learner.net_at(made.params, {"nowhere": Dropout(np.ones(1), 0.5)})


def trained(made: Training, steps: int, given: Batch, optimizer: Any) -> tuple[State, list[float]]:
    recipe = Recipe(optimizer=optimizer, lr=0.1, max_grad_norm=1.0)
    state, losses = begin(recipe, made.params), []
    for _ in range(steps):
        state, loss, _ = step(made.learner, recipe, state, [given])
        losses.append(float(loss))
    return state, losses


def test_adalora_ends_with_its_target() -> None:
    made = training("adalora")
    state, _ = trained(made, 5, batch(), AdamW(eps=1e-3))
    file = file_of(made, state)
    ranks = [int(m.params.A.shape[0]) for m in file.modules.values()]
    assert sum(ranks) == 1 * len(ranks)
    assert {key: sum(kept) for key, kept in file.config.patterns.rank_pattern.items()} == {
        f"{name}.lora_E": rank for name, rank in zip(file.modules, ranks, strict=True)
    }


def test_what_is_trained_whole_goes_into_the_file_and_the_model() -> None:
    made = training("lora")
    state, _ = trained(made, 2, batch(), SGD())
    file = file_of(made, state)
    assert isinstance(file, AdapterFile)
    key = "base_model.model.lm_head.weight"
    assert np.array_equal(all_tensors(file)[key], state.params.weights["lm_head.weight"])  # type: ignore[arg-type]
    assert np.array_equal(put_back(made, state.params).weight("lm_head.weight"), state.params.weights["lm_head.weight"])
    assert not np.array_equal(all_tensors(file)[key], made.learner.net.weights["lm_head.weight"])  # type: ignore[arg-type]


def test_what_makes_no_sense_is_refused() -> None:
    made = training("lora")
    with pytest.raises(ConfigError, match="no label of the batch counts"):
        made.learner.loss_vjp(made.params, [batch(labels=0 * LABELS - 100)])
    with pytest.raises(ConfigError, match="at its own scale"):
        learner_of(MODEL, rescaled(adapt_both(), 2.0))
    with pytest.raises(ConfigError, match="active alone"):
        learner_of(MODEL, activate(adapt_both(), "other"))
    with pytest.raises(ConfigError, match="task_type=None"):
        start(MODEL, graph(weights()), from_dict(CONFIGS["prompt"]), np.random.default_rng(0))
    with pytest.raises(ConfigError, match="not negative"):
        Recipe(lr=-1.0)


def adapt_both() -> Any:
    rng = np.random.default_rng(0)
    plain = from_dict({**CONFIGS["dora"], "task_type": "CAUSAL_LM"})
    return add(add(adapt(graph(weights())), "default", plain, rng), "other", plain, rng)


BACKENDS = ("numpy", "strict", "torch", "jax")


@pytest.mark.parametrize("name", ["lora", "adalora", "lstm", "prefix"])
def test_a_backend_trains_with_numpys_numbers_and_the_loss_falls(backend: Backend, name: str) -> None:
    if backend.name not in BACKENDS:
        pytest.skip(f"{backend.name}: the layers are asked of it in tests/laws, a training would be slow")
    if backend.name == "jax" and name == "lstm":
        pytest.skip("jax compiles every operation of every shape, and the LSTM has many")
    dtype, steps = backend.dtypes[0], 4
    eps = 1e-3  # so that no rounding of a gradient near zero becomes a whole step
    made = training(name)
    given = with_dropout(made.learner, batch(), np.random.default_rng(6), np.zeros(0))
    expected, losses = trained(made, steps, given, AdamW(eps=eps))

    def send(a: Any) -> Any:
        return backend.from_numpy(np.asarray(a), dtype)

    with backend.scope():
        sent = replace(
            made,
            params=mapped(send, made.params),
            learner=replace(made.learner, net=replace(made.learner.net, weights=mapped(send, made.learner.net.weights))),
        )
        moved = Batch(
            inputs=Inputs(input_ids=send(IDS), labels=send(LABELS)),
            dropout=mapped_masks(send, given),
            context=None if given.context is None else given.context._replace(dropout=tuple(map(send, given.context.dropout))),
        )
        state, got = trained(sent, steps, moved, AdamW(eps=eps))
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(got, losses, rtol=1e-10)
    for (where, value), (_, wanted) in zip(leaves(state.params), leaves(expected.params), strict=True):
        np.testing.assert_allclose(backend.to_numpy(value, dtype), wanted, rtol=0, atol=1e-9, err_msg=where)


def mapped_masks(send: Any, given: Batch) -> dict[str, Dropout]:
    return {name: Dropout(send(mask), p) for name, (mask, p) in given.dropout.items()}


def test_a_backend_generates_numpys_tokens(backend: Backend) -> None:
    if backend.name not in BACKENDS:
        pytest.skip(f"{backend.name}: the layers are asked of it in tests/laws, a generation would be slow")
    made = training("prefix")
    assert made.learner.prompt is not None
    mask, uniforms = np.asarray([[0, 1, 1, 1, 1, 1]] + 3 * [[1] * 6]), np.random.default_rng(7).random((4, 4))
    rows = made.learner.prompt.prompt(made.params.prompt, Context(batch=4))
    sampling = Sampling(temperature=1.3, top_k=7, top_p=0.9)

    new = 2 if backend.name == "jax" else 4  # it compiles every length

    def said(send: Any) -> Any:
        net = replace(made.learner.net, weights=mapped(send, made.learner.net.weights))
        front = Front(made.learner.prompt, send(rows))  # type: ignore[arg-type]
        options: dict[str, Any] = {"new_tokens": new, "attention_mask": send(mask), "front": front, "eos": (3,)}
        return [generate(MODEL, net, send(IDS), **options), generate(MODEL, net, send(IDS), **options, choose=replayed(sampling, uniforms))]

    with backend.scope():
        got = said(lambda a: backend.from_numpy(np.asarray(a), backend.dtypes[0]))
    for mine, expected in zip(got, said(lambda a: a), strict=True):
        assert np.array_equal(backend.to_numpy(mine, backend.dtypes[0]), expected)
