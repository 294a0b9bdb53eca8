"""Targets with everything written out that depends on the model: defaults, "all-linear", tasks, long lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_ref.errors import TargetError
from peft_ref.graph.decide import Rules, suffixes
from peft_ref.graph.defaults import DEFAULT_TARGETS, FEEDFORWARD
from peft_ref.graph.patterns import SECONDS, SECONDS_PER_NAME, Matcher
from peft_ref.graph.protocol import Graph

if TYPE_CHECKING:
    from peft_ref.graph.targets import Targets

ALL_LINEAR = "all-linear"
SEQ_CLS_HEADS = ("score", "classifier")
# What a task adds to modules_to_save. Only for SEQ_CLS does PEFT add it before it matches, so only there it keeps the adapter away.
SAVED_BY_TASK = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
WITHOUT_SAVED = frozenset({"TRAINABLE_TOKENS"})  # whose configuration has no modules_to_save: PEFT leaves a task's head as it is
# The methods of PEFT that have no table of default targets, and what they go to.
WITHOUT_TARGETS = {
    **dict.fromkeys(
        ("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"),
        "it goes before the input or into the attention's cache, to no module",
    ),
    "TRAINABLE_TOKENS": "it goes to the model's input embedding, whatever the architecture",
    "XLORA": "it routes between LoRA adapters, which have targets of their own",
}
MANY = 20  # from so many target modules on, PEFT condenses the list


def default_targets(graph: Graph, peft_type: str) -> str | tuple[str, ...] | None:
    """PEFT's target_modules for this method and architecture; None where it has none."""
    return DEFAULT_TARGETS.get(peft_type, {}).get(graph.model_type)


def default_feedforward(graph: Graph) -> tuple[str, ...]:
    """PEFT's feedforward_modules of IA3 for this architecture."""
    if graph.model_type not in FEEDFORWARD:
        raise TargetError(f"IA3 has no default feedforward_modules for model_type {graph.model_type!r}.\n  Give feedforward_modules.")
    return FEEDFORWARD[graph.model_type]


def rules_for(targets: Targets, graph: Graph, peft_type: str, task_type: str | None) -> Rules:
    """`targets` with the defaults and "all-linear" written out."""
    chosen = targets.target_modules
    if chosen is None:
        chosen = default_targets(graph, peft_type)
        if chosen is None and peft_type == "OSF":
            chosen = ALL_LINEAR
        if chosen is None and not (targets.target_parameters and peft_type in ("LORA", "ADALORA")):
            raise TargetError(
                f"{peft_type} has no default target_modules: {WITHOUT_TARGETS[peft_type]}."
                if peft_type in WITHOUT_TARGETS
                else f"{peft_type} has no default target_modules for model_type {graph.model_type!r}.\n"
                "  Give target_modules, for example 'all-linear'."
            )
    if isinstance(chosen, str) and chosen.lower() == ALL_LINEAR:
        chosen = _all_linear(graph, task_type)
    if isinstance(chosen, tuple) and len(set(chosen)) >= MANY and peft_type != "IA3":
        chosen = _condensed(chosen, list(graph.modules()))
    guards = (*(targets.modules_to_save or ()), *(SAVED_BY_TASK["SEQ_CLS"] if task_type == "SEQ_CLS" else ()))
    transform, patterns = targets.layers_to_transform, targets.layers_pattern
    return Rules(
        target=chosen,
        exclude=targets.exclude_modules or (),
        guards=guards,
        layers=(transform,) if isinstance(transform, int) else transform or (),
        layer_patterns=(patterns,) if isinstance(patterns, str) and patterns else tuple(patterns or ()),
        matcher=Matcher(SECONDS + SECONDS_PER_NAME * len(graph.modules())),
    )


def _all_linear(graph: Graph, task_type: str | None) -> tuple[str, ...]:
    modules = graph.modules()
    head = graph.output_head
    if head is None and graph.pretrained and task_type == "SEQ_CLS":
        head = next((name for name in SEQ_CLS_HEADS if name in modules), None)
    return tuple(name for name, m in modules.items() if m.kind in ("linear", "transposed_linear") and name != head)


def _condensed(targets: tuple[str, ...], names: list[str]) -> tuple[str, ...]:
    """Fewer ends of names that match the same modules.

    PEFT does this to be quicker. It shows: a full name that was condensed is matched by its end, and then layers_to_transform counts.
    """
    if "" in targets:
        raise TargetError("target_modules holds an empty name (HF PEFT refuses it too).\n  Take it out.")
    wanted = set(targets)
    others = [name for name in names if wanted.isdisjoint((name, *suffixes(name)))]
    taken = {end for name in others for end in (name, *suffixes(name))}
    short: dict[str, None] = {}
    for ends in sorted([*reversed(list(suffixes(name))), name] for name in wanted):
        for end in ends:
            if end not in short and end not in taken and short.keys().isdisjoint(suffixes(ends[-1])):
                short[end] = None
                break
    return tuple(short) if short and len(short) < len(wanted) else targets
