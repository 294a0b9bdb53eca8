"""What the laws of prompts are tried on: a method in any configuration, a batch, and a seed for the numbers.

Methods come from METHODS. Sizes and hyper-parameters are drawn from a method's own fields: sizes and booleans by type, the usual names from
BY_NAME; a method whose defaults fit no small model gets a row in BY_METHOD. Everything else keeps its default.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

import numpy as np
from hypothesis import strategies as st

from peft_ref.methods import METHODS, MultitaskPromptTuning
from peft_ref.prompts import Context, Prompt, Sources, Tensors, TypedPrompt
from peft_ref.splice import TASKS, Inputs
from tests.laws.strategies import Host

PROMPTS = sorted(METHODS.prompts)
IN_CACHE = [name for name in PROMPTS if METHODS.prompts[name].place == "cache"]
MANY = MultitaskPromptTuning(num_virtual_tokens=2, token_dim=3, num_transformer_submodules=1, num_tasks=3, num_ranks=2)
TOKENS, DECODER_TOKENS = 3, 2
INTEGERS = ("attention_mask", "labels", "position_ids", "token_type_ids", "decoder_attention_mask")
TYPES = "input_type_mask"

_SMALL = st.integers(1, 3)
BY_NAME: dict[str, st.SearchStrategy[Any]] = {
    "num_virtual_tokens": _SMALL,
    "token_dim": st.sampled_from((4, 2, 6)),
    "num_transformer_submodules": st.sampled_from((1, 2)),
    "num_attention_heads": st.sampled_from((2, 1)),
    "num_layers": st.sampled_from((2, 1, 3)),
    "encoder_hidden_size": st.sampled_from((3, 1)),
    "encoder_num_layers": st.sampled_from((2, 1, 3)),
    "num_tasks": st.sampled_from((3, 1)),
    "num_ranks": _SMALL,
}
BY_METHOD: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "p_tuning": {
        "encoder_reparameterization_type": st.sampled_from(("MLP", "LSTM")),
        "encoder_dropout": st.sampled_from((0.0, 0.25)),
    },
    "cartridge": {"num_frozen_tokens": st.sampled_from((1, 0))},
    "cpt": {
        "cpt_token_ids": st.just([4, 0, 2]),
        "cpt_tokens_type_mask": st.lists(st.integers(-1, 9), min_size=3, max_size=3),
        "opt_projection_epsilon": st.sampled_from((1.5, 100.0, 0.0)),  # smaller than most of the numbers, larger than all
        "opt_weighted_loss_type": st.sampled_from(("decay", "none")),
        "opt_loss_decay_factor": st.sampled_from((0.5, 0.9)),
    },
}
WORDS = np.random.default_rng(1).normal(size=(7, 6))


@dataclass(frozen=True)
class Case:
    """A method, a batch, and the numbers that `seed` stands for. Every array has a stream of its own."""

    method: Prompt
    batch: int
    seed: int

    def numbers(self, stream: int, shape: tuple[int, ...]) -> Host:
        return np.random.default_rng([self.seed, stream]).normal(size=shape)

    def integers(self, stream: int, below: int, shape: tuple[int, ...]) -> Host:
        return np.random.default_rng([self.seed, stream]).integers(0, below, shape)

    def tensors(self, stream: int = 5) -> dict[str, Host]:
        return {name: self.numbers(1000 * stream + k, shape) for k, (name, shape) in enumerate(sorted(self.method.shapes().items()))}

    @property
    def ctx(self) -> Context:
        """With a task for every example where the method has tasks, and masks where it has dropout."""
        tasks = getattr(self.method, "num_tasks", None)
        return Context(
            self.batch,
            None if tasks is None else self.integers(1, tasks, (self.batch,)),
            tuple(self.integers(20 + k, 2, shape) for k, shape in enumerate(self._between_layers())),
        )

    def _between_layers(self) -> list[tuple[int, int]]:
        if not getattr(self.method, "encoder_dropout", 0) or self.method.inference_mode or not getattr(self.method, "is_lstm", False):
            return []
        hidden, layers = self.method.size("encoder_hidden_size"), self.method.size("encoder_num_layers")
        return [(self.method.table_shape[0], 2 * hidden)] * (layers - 1)

    @property
    def sources(self) -> Sources:
        """What a start may need."""
        return Sources(words=WORDS[:, : self.method.size("token_dim")])

    @property
    def prompt_shape(self) -> tuple[int, int, int]:
        return self.batch, *self.method.table_shape

    @property
    def dy(self) -> Host:
        return self.numbers(2, self.prompt_shape)

    def inputs(self, task: str, given: tuple[str, ...] = (*INTEGERS, TYPES)) -> Inputs:
        """What a model of the task is asked with; `given` of what may stand beside the embeddings."""
        width, decoder = self.method.size("token_dim"), task == "SEQ_2_SEQ_LM"
        side = {"decoder_attention_mask": DECODER_TOKENS, "labels": DECODER_TOKENS if decoder else TOKENS}
        return Inputs(
            self.numbers(3, (self.batch, TOKENS, width)),
            decoder_embeddings=self.numbers(4, (self.batch, DECODER_TOKENS, width)) if decoder else None,
            **{
                name: self.integers(30 + k, 2, (self.batch, side.get(name, TOKENS)))
                for k, name in enumerate(INTEGERS)
                if name in given and (decoder or not name.startswith("decoder"))
            },
            input_type_mask=self.integers(40, 9, (self.batch, TOKENS)) if isinstance(self.method, TypedPrompt) and TYPES in given else None,
        )


@st.composite
def cases(draw: st.DrawFn, name: str, **fixed: Any) -> Case:
    cls = METHODS.prompts[name]
    hints, options = get_type_hints(cls), {}
    for f in fields(cls):  # type: ignore[arg-type]  # every method is a dataclass; the table's type cannot say so
        rows = {**BY_NAME, **BY_METHOD.get(name, {})}
        if f.name in rows:
            options[f.name] = draw(rows[f.name])
        elif hints[f.name] is bool:
            options[f.name] = draw(st.booleans())
    method = cls(**{**options, **fixed})
    return Case(method, draw(st.integers(1, 4)), draw(st.integers(0, 2**20)))


def tasks(name: str) -> st.SearchStrategy[str]:
    """Those that the method has a rule for."""
    only = METHODS.prompts[name].only_task
    return st.sampled_from(TASKS if only is None else (only,))


def some_integers() -> st.SearchStrategy[tuple[str, ...]]:
    return st.sets(st.sampled_from((*INTEGERS, TYPES))).map(lambda names: tuple(sorted(names)))


def awkward(name: str) -> list[Case]:
    """One case of every branch of a method, always the same: a backend that compiles for every shape has seen these before."""
    cls = METHODS.prompts[name]
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    sizes = {
        "num_virtual_tokens": 2,
        "token_dim": 4,
        "num_transformer_submodules": 2,
        "num_attention_heads": 2,
        "num_layers": 2,
        "encoder_hidden_size": 3,
        "num_tasks": 3,
        "num_ranks": 2,
    }
    plain = Case(cls(**{k: v for k, v in sizes.items() if k in names}), 3, 7)
    own: dict[str, list[dict[str, Any]]] = {
        "p_tuning": [{"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.25, "num_virtual_tokens": 1}],
        "prefix_tuning": [{"prefix_projection": True}],
        "cartridge": [{"num_frozen_tokens": 0}, {"inference_mode": True}],
        "cpt": [{"cpt_token_ids": [3, 1, 5, 2, 0], "cpt_tokens_type_mask": [1, 2, 3, 4, 0], "opt_weighted_loss_type": "decay"}],
    }
    return [plain, *(replace(plain, method=cls(**{**sizes_of(plain.method), **more})) for more in own.get(name, []))]


def sizes_of(method: Prompt) -> dict[str, Any]:
    """Its configuration, but for what follows from the rest of it."""
    return {f.name: getattr(method, f.name) for f in fields(method) if not f.name.startswith("cpt_")}


def sent(tensors: Tensors, case: Case, task: str) -> dict[str, Any]:
    """Every array that the operations of a prompt take, by name."""
    ctx = case.ctx
    inputs = {f"inputs.{name}": value for name, value in case.inputs(task)._asdict().items() if value is not None}
    ids = {} if ctx.task_ids is None else {"task_ids": ctx.task_ids}
    masks = {f"dropout.{k}": mask for k, mask in enumerate(ctx.dropout)}
    return {"dy": case.dy, **{f"p.{name}": value for name, value in tensors.items()}, **inputs, **ids, **masks}
