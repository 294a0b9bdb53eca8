"""`match` sends an adapter where HF PEFT sends it, and refuses what PEFT refuses: a search over configurations, PEFT run live on each."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = pytest.mark.hf

import peft  # noqa: E402

from peft_ref.errors import PeftRefError  # noqa: E402
from peft_ref.graph import Matched, Targets, TorchGraph, match  # noqa: E402
from peft_ref.methods import METHODS  # noqa: E402

from . import models  # noqa: E402

CONFIGS = {"ADALORA": peft.AdaLoraConfig, "LORA": peft.LoraConfig, "LOHA": peft.LoHaConfig, "IA3": peft.IA3Config}
EACH = 45  # configurations per model
TRANSFORMERS = [name for name in models.BUILDERS if name not in ("traps", "convs")]


class Draw:
    """Configurations made of a model's own names, whole, cut, and slightly wrong."""

    def __init__(self, name: str, seed: int) -> None:
        self.rng = random.Random(f"{name} {seed}")
        self.names = [n for n, _ in models.model(name).named_modules() if n]
        self.layers = [n for n, m in models.model(name).named_modules() if n and not list(m.children())]
        self.linear = [n for n, m in models.model(name).named_modules() if type(m).__name__ in ("Linear", "Conv1D", "Conv2d")]
        self.tensors = [n for n, _ in models.model(name).named_parameters()]
        self.transformers = name in TRANSFORMERS

    def entry(self, among: list[str]) -> str:
        parts = self.rng.choice(among).split(".")
        text = ".".join(parts[-self.rng.randint(1, min(4, len(parts))) :])
        wrong = self.rng.random()
        if wrong < 0.06:
            text = text[1:] or "x"
        elif wrong < 0.1:
            text = text[:-1] or "x"
        elif wrong < 0.13:
            text = self.rng.choice(("", "0", "1", "layers", "nowhere", "weight", "proj"))
        elif wrong < 0.25:
            text = ".".join(parts)
        return text

    def among(self) -> list[str]:
        return self.linear if self.rng.random() < 0.85 else self.layers if self.rng.random() < 0.7 else self.names

    def entries(self, most: int = 4) -> list[str]:
        return [self.entry(self.among()) for _ in range(self.rng.randint(1, most))]

    def regex(self) -> str:
        last = re.escape(self.entry(self.linear))
        name = re.escape(self.rng.choice(self.linear))
        some = "|".join(re.escape(n.rpartition(".")[2]) for n in self.rng.sample(self.linear, min(3, len(self.linear))))
        number = self.rng.choice(("0", "1", "[02]", r"\d", r"\d+", "1.?"))
        choices = (rf".*{last}", rf".*\.{last}", name, name[:-1], rf".*\.({some})$", rf".*\.{number}\..*({some})", rf"(?i).*{last.upper()}")
        odd = (
            "(",
            "[",
            "a{e<=1}",
            "",
            "q_proj",
            r".*(?<!x)q_proj",
            r"(.*\.)?(?P<n>1)\.\w*proj",
            ".*[[:alpha:]]_proj",
            "|".join(self.entries()),
        )
        return self.rng.choice(choices if self.rng.random() < 0.85 else odd)

    def options(self, method: str) -> dict[str, Any]:
        r = self.rng.random
        options: dict[str, Any] = {}
        kind = r()
        if kind < 0.5:
            options["target_modules"] = self.entries()
        elif kind < 0.6:  # enough to be condensed
            options["target_modules"] = [self.rng.choice(self.linear) for _ in range(60)]
        elif kind < 0.8:
            options["target_modules"] = self.regex()
        elif kind < 0.9:
            options["target_modules"] = self.rng.choice(("all-linear", "ALL-Linear"))
        elif kind < 0.93:
            options["target_modules"] = self.rng.choice(([], "dummy-target-modules"))
        if r() < 0.25:
            options["exclude_modules"] = self.regex() if r() < 0.4 else self.entries()
        if method != "IA3" and r() < 0.35:
            options["layers_to_transform"] = self.rng.choice((0, 1, [0], [1, 2], [], [0, 1, 11], [99]))
        if method != "IA3" and r() < 0.25:
            patterns = ["layers", "h", "block", "layer", "experts", "h2", "l.*", "layers|h", "(", "encoder.layer", r"model\.layers", "", []]
            options["layers_pattern"] = self.rng.choice([*patterns, ["h", "layers"], ["block", "layer"], ["layers", "("]])
        if r() < 0.25:
            options["modules_to_save"] = [e for e in self.entries(2) if not inside_an_adapter(e)]
        if method == "LORA" and r() < 0.15:
            options["target_parameters"] = [self.entry(self.tensors) for _ in range(self.rng.randint(1, 2))]
        if self.transformers and r() < 0.2:
            options["task_type"] = self.rng.choice(("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"))
        return options


def inside_an_adapter(end: str) -> bool:
    """PEFT would also train a part of the adapter; what it calls those is not the model's affair."""
    parts = ("base_layer", "lora_dropout", "lora_A", "lora_B", "default", "weight", "ia3_l", "hada_t1", "hada_t2")
    return any(part.endswith(end) for part in (*parts, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))


def ask_us(name: str, method: str, options: dict[str, Any]) -> Matched:
    task = options.get("task_type")
    targets = Targets(**{key: value for key, value in options.items() if key not in ("task_type", "feedforward_modules")})
    return match(targets, TorchGraph(models.model(name)), peft_type=method, task_type=task, kinds=METHODS.weights[method.lower()].kinds)


def answers(name: str, method: str, options: dict[str, Any]) -> tuple[models.Answer | None, models.Answer | None, str]:
    given = {**options, "feedforward_modules": []} if method == "IA3" else options
    copied = {key: list(value) if isinstance(value, list) else value for key, value in given.items()}  # PEFT writes into them
    said = "PEFT was content"
    try:
        theirs = models.ask_peft(name, CONFIGS[method](**copied))
    except Exception as error:  # a refusal, whichever
        theirs, said = None, f"PEFT: {type(error).__name__}: {error}"
    try:
        found = ask_us(name, method, options)
        ours = models.Answer(frozenset(found.modules), frozenset(found.saved), frozenset(found.parameters))
    except PeftRefError as error:
        ours, said = None, f"{said}; we: {type(error).__name__}: {error}"
    return theirs, ours, said


@pytest.mark.parametrize("name", models.BUILDERS)
def test_the_same_modules_as_peft_or_both_refuse(name: str) -> None:
    differ, content = [], 0
    for seed in range(EACH):
        draw = Draw(name, seed)
        method = draw.rng.choice(("LORA", "LORA", "LOHA", "IA3"))
        options = draw.options(method)
        theirs, ours, said = answers(name, method, options)
        content += theirs is not None
        if theirs != ours:
            differ.append(
                f"{method} {options}\n   {said[:400]}\n   only PEFT {theirs and diff(theirs, ours)} only we {ours and diff(ours, theirs)}"
            )
    assert not differ, f"{len(differ)} of {EACH}:\n" + "\n".join(differ[:6])
    assert content >= EACH // 4, "nearly everything was refused: the search looks at nothing"


def diff(one: models.Answer, other: models.Answer | None) -> list[list[str]]:
    return [sorted(a - (b or frozenset()))[:4] for a, b in zip(one, other or ((), (), ()), strict=True)]


CORNERS = {
    "two levels below a saved module nothing is saved again": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["0", "mlp.up_proj"]},
    ),
    "one level below it is": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp", "down_proj"]}),
    "a saved name needs no dot before it": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["head"]}),
    "a full name is in no layer": ("llama", {"target_modules": ["model.layers.1.mlp.up_proj", "q_proj"], "layers_to_transform": [0]}),
    "the number of an expert is not the layer's": ("traps", {"target_modules": ["0"], "layers_to_transform": [3]}),
    "a layer needs two parts before its number": ("traps", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "unless layers_pattern says so": ("traps", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "the head of a token classifier cannot have both": ("bert-tokens", {"target_modules": "all-linear", "task_type": "TOKEN_CLS"}),
    "the head of a sequence classifier is only saved": ("bert-classifier", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "experts": ("traps", {"target_modules": [], "target_parameters": ["moe.gate_up", "down"]}),
    "a vector of the experts": ("traps", {"target_modules": [], "target_parameters": ["moe.bias"]}),
    "a parameter of a targeted module": ("traps", {"target_modules": ["lm_head"], "target_parameters": ["lm_head.weight"]}),
    "a parameter beside a Conv1D": ("traps", {"target_modules": ["head"], "target_parameters": ["moe.down"]}),
    "a parameter beside a Conv1D and then a Linear": (
        "gpt2",
        {"target_modules": ["c_attn", "lm_head"], "target_parameters": ["wpe.weight"]},
    ),
    "an empty name among few": ("llama", {"target_modules": ["", "q_proj"]}),
    "an adapter that goes nowhere": ("llama", {"target_modules": "dummy-target-modules"}),
    "a container": ("llama", {"target_modules": ["self_attn"]}),
    "a tied head": ("llama-tied", {"target_modules": ["lm_head", "embed_tokens"]}),
}


@pytest.mark.parametrize("corner", CORNERS)
def test_a_corner_is_decided_as_in_peft(corner: str) -> None:
    name, options = CORNERS[corner]
    theirs, ours, said = answers(name, "LORA", options)
    assert ours == theirs, said


def test_many_full_names_are_condensed_and_then_asked_for_their_layer() -> None:
    names = [n for n, m in TorchGraph(models.model("llama")).modules().items() if m.kind == "linear"]
    assert len(names) >= 20
    for many in (names, names[:19]):
        options = {"target_modules": many, "layers_to_transform": [1]}
        theirs, ours, said = answers("llama", "LORA", options)
        assert ours == theirs, said
    assert ours is not None
    assert ours.modules == frozenset(names[:19])  # few: full names, whatever their layer
