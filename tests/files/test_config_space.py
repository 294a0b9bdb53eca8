"""What PEFT refuses we refuse, what it accepts we accept, and alike: over every word of a configuration and over random ones, live.

PEFT is asked by making the configuration object and `get_peft_model` on a small model; we by reading the configuration, matching its
targets on that model, and checking each layer. Where the two differ on purpose, DIFFERENCES says why.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_ref.errors import PeftRefError  # noqa: E402
from peft_ref.files.adapter import spanned  # noqa: E402
from peft_ref.files.config import flatten, from_dict, parse, render  # noqa: E402
from peft_ref.graph import TorchGraph, match  # noqa: E402
from tests.files.config_space import MADE, OWN, STARTS, every_single_change, explained, looked_at_by_none, random_config  # noqa: E402
from tests.files.peft_models import Net, layer_of, tuned  # noqa: E402
from tests.methods.facts import Difference  # noqa: E402

pytestmark = pytest.mark.hf
RANDOM = 1000


class Model(Net):
    """With what PEFT asks of a model that generates."""

    def prepare_inputs_for_generation(self) -> None: ...
    def _prepare_encoder_decoder_kwargs_for_generation(self) -> None: ...


# spec/configs.md tells it to readers.
UNSEEN = "PEFT checks a value when a module asks for it, and here none did; a file is wrong all the same"
DIFFERENCES = (
    Difference(
        "we",
        r"(use_rslora|lora_bias|apply_GS|coft|block_share|use_cayley_neumann|init_\w*weights)=('|\[).* expected bool",
        "a text or list as a switch: PEFT takes 'no' for true",
    ),
    Difference("we", r"(lora_alpha|alpha|\w+_dropout)=True is of type bool", "a truth value as a number: PEFT computes with 1"),
    Difference("we", r"(target|feedforward)_modules=\{.*\} is (not understood|no list)", "a map as a list of names: PEFT reads its keys"),
    Difference("we", r"exclude_modules=(3|\(1,\)) is not understood", "a number among names: PEFT writes it out as text, or none asks"),
    Difference("we", r"modules_to_save='head' is not understood", "a text as a list: PEFT takes every letter for a name"),
    Difference("we", r"(rank|alpha)_pattern (of '|is a)", UNSEEN),
    Difference("we", r"\br=.*(is of type|a positive number)", UNSEEN),
    Difference("we", r"(alpha|\w+_dropout|eps)=('|None|\[).* is of type", UNSEEN),
    Difference("we", r"layers_(to_transform|pattern)=.* is not understood", UNSEEN),
    Difference("PEFT", "No layers types compatible with", "it looks for the widest layer, and there is none"),
    *(difference for own in OWN.values() for difference in own.differences),
)


@pytest.fixture(scope="module")
def base() -> Any:
    return Model()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def theirs(data: dict[str, Any], base: Any) -> dict[str, Any] | str:
    """The adapted modules, or why PEFT refuses."""
    try:
        config = peft.PeftConfig.from_peft_type(**copy.deepcopy(data))
        model = peft.get_peft_model(copy.deepcopy(base), config)
    except Exception as error:  # PEFT raises whatever the wrong value leads to
        return f"{type(error).__name__}: {error}"
    return tuned(model)


def ours(data: dict[str, Any], base: Any) -> dict[str, Any] | str:
    """The method of every adapted module, or why we refuse. Anything but our own errors is a bug."""
    try:
        config = from_dict(data)
        graph, kinds = TorchGraph(base), type(config.method).kinds
        found = match(config.targets, graph, peft_type=data["peft_type"], task_type=data.get("task_type"), kinds=kinds)
        config = spanned(config, {name: layer_of(base.get_submodule(name)) for name in found.modules}, {})
        methods = {name: config.method_for(name) for name in found.modules}
        for name, method in methods.items():
            method.check_layer(layer_of(base.get_submodule(name)), name)
    except PeftRefError as error:
        return f"{type(error).__name__}: {error}"
    return methods


Seen = tuple[Counter[tuple[str, str, bool]], set[Difference]]


def compared(configs: Iterable[dict[str, Any]], base: Any) -> Seen:
    """How often who refused, and the differences on purpose that were met."""
    outcomes: Counter[tuple[str, str, bool]] = Counter()
    used: set[Difference] = set()
    for data in configs:
        peft_says, we_say = theirs(data, base), ours(data, base)
        if isinstance(peft_says, str) != isinstance(we_say, str):
            used.add(explained(DIFFERENCES, data, peft_says, we_say))
        elif isinstance(we_say, dict):
            assert list(peft_says) == list(we_say), data
            for name, method in we_say.items():
                assert MADE[data["peft_type"]](peft_says[name], method), (data, name, method)  # type: ignore[index]
        outcomes[data["peft_type"], "refused" if isinstance(peft_says, str) else "accepted", isinstance(we_say, str)] += 1
    return outcomes, used


@cache
def of_one_word(kind: str) -> Seen:
    return compared(every_single_change(kind), Model())


@pytest.mark.parametrize("kind", STARTS)
def test_both_refuse_the_same_of_every_value_of_every_word(kind: str) -> None:
    outcomes, _ = of_one_word(kind)
    assert outcomes[kind, "refused", True] > 0
    assert outcomes[kind, "accepted", False] > 0


def test_both_refuse_the_same_and_accept_the_same_and_mean_the_same(base: Any) -> None:
    rng = np.random.default_rng(17)
    several, used = compared([*looked_at_by_none(), *(random_config(rng) for _ in range(RANDOM))], base)
    outcomes = sum((of_one_word(kind)[0] for kind in STARTS), several)
    used = used.union(*(of_one_word(kind)[1] for kind in STARTS))
    for kind in STARTS:
        assert outcomes[kind, "refused", True] > 30, "the space must hold what both refuse"
        assert outcomes[kind, "accepted", False] > 30, "and what both accept"
    assert sum(n for (_, _, refused), n in outcomes.items() if refused) < 0.5 * outcomes.total()
    assert used == set(DIFFERENCES), f"no longer seen: {set(DIFFERENCES) - used}"


def test_what_is_accepted_is_written_back_as_it_was(base: Any) -> None:
    rng = np.random.default_rng(18)
    kept = 0
    for _ in range(400):
        data = random_config(rng)
        try:
            config = from_dict(data)
        except PeftRefError:
            continue
        kept += 1
        assert flatten(config) == data
        assert parse(render(config)) == config
    assert kept > 150
