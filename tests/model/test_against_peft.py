"""Every operation beside live HF PEFT: what each layer puts out, the statuses, the counts, the printed line, the state dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ref.errors import PeftRefError
from peft_ref.model.adapted import Adapted
from peft_ref.model.attaching import delete
from peft_ref.model.merging import merge, merge_and_unload, unload, unmerge
from peft_ref.model.running import forward
from peft_ref.model.status import COPIES, count, layer_status, model_status
from peft_ref.model.storing import state_dict
from peft_ref.model.switching import activate, disable, enable, rescaled, set_trainable
from tests.model.live import INPUTS, config_of, frozen_graph, inputs, layer_output, mirrored, net, peft, randomise, tensors_of

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
X = inputs()
EVERY = ["q", "up", "conv", "table"]
MATRICES = ["q", "up", "conv"]

CONFIGS: dict[str, Callable[[int], Any]] = {
    "lora": lambda i: peft.LoraConfig(r=2 + i, lora_alpha=5, target_modules=EVERY, use_rslora=bool(i)),
    "lora patterns": lambda i: peft.LoraConfig(r=2, rank_pattern={r"layers\.1\.q": 3}, alpha_pattern={"up": 7}, target_modules=MATRICES),
    "lora elsewhere": lambda i: peft.LoraConfig(r=2, target_modules=["q", "conv"] if i else ["q", "up"]),
    "lora_bias": lambda i: peft.LoraConfig(r=2, lora_bias=True, target_modules=["q", "conv"]),
    "copies": lambda i: peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"]),
    "all biases": lambda i: peft.LoraConfig(r=2, target_modules=["q"], bias="none" if i else "all"),
    "all biases and a copy": lambda i: peft.LoraConfig(
        r=2, target_modules=["q"], bias="none" if i else "all", modules_to_save=None if i else ["head"]
    ),
    "one copy": lambda i: peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=None if i else ["head"]),
    "lora_only": lambda i: peft.LoraConfig(r=2, target_modules=["q"], bias="none" if i else "lora_only"),
    "dora": lambda i: peft.LoraConfig(r=2 + i, use_dora=True, target_modules=EVERY),
    "dora and lora": lambda i: peft.LoraConfig(r=2 + i, use_dora=not i, target_modules=EVERY),
    "ia3": lambda i: peft.IA3Config(target_modules=MATRICES, feedforward_modules=["up"]),
    "loha": lambda i: peft.LoHaConfig(r=2 + 2 * i, alpha=4, target_modules=MATRICES),
    "adalora": lambda i: peft.AdaLoraConfig(
        init_r=3, target_r=2, lora_alpha=5, total_step=9, target_modules=MATRICES, inference_mode=bool(i)
    ),
}


def both(kind: str) -> tuple[Any, Adapted]:
    """PEFT's model and ours with the adapters "a" and "b", of which "a" is active."""
    model = net()
    graph = frozen_graph(model)
    theirs = peft.get_peft_model(model, CONFIGS[kind](0), adapter_name="a")
    theirs.add_adapter("b", CONFIGS[kind](1))
    for seed, name in enumerate(("a", "b")):
        randomise(theirs, name, seed)
    theirs.eval()
    for key, parameter in theirs.named_parameters():
        if "ranknum" in key:  # frozen, but on a float64 weight PEFT makes it anew, and forgets that
            parameter.requires_grad = False
    return theirs, mirrored(graph, theirs, ("a", "b"))


def compare(theirs: Any, ours: Adapted, when: str, rtol: float = 1e-10) -> None:
    for module in INPUTS:
        expected = layer_output(theirs, module, X[module])
        np.testing.assert_allclose(forward(ours, module, X[module]), expected, rtol=rtol, atol=rtol, err_msg=f"{module} {when}")
    statuses = [vars(status) for status in theirs.get_layer_status()]
    kept = [status for status in statuses if status["available_adapters"]]  # PEFT leaves empty layers behind
    assert [status._asdict() for status in layer_status(ours)] == kept, when
    if kept == statuses:
        assert model_status(ours)._asdict() | {"base_model_type": "Net"} == vars(theirs.get_model_status()), when


OPERATIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Adapted], Adapted]]] = {
    "nothing": (lambda m: None, lambda m: m),
    "activate b": (lambda m: m.base_model.set_adapter("b"), lambda m: activate(m, "b")),
    "activate a": (lambda m: m.base_model.set_adapter("a"), lambda m: activate(m, "a")),
    "activate b for inference": (lambda m: m.base_model.set_adapter("b", inference_mode=True), lambda m: activate(m, "b", inference=True)),
    "activate both": (lambda m: m.base_model.set_adapter(["b", "a"]), lambda m: activate(m, ["b", "a"])),
    "disable": (lambda m: m.base_model.disable_adapter_layers(), disable),
    "enable": (lambda m: m.base_model.enable_adapter_layers(), enable),
    "merge": (lambda m: m.merge_adapter(), merge),
    "merge safely": (lambda m: m.merge_adapter(safe_merge=True), lambda m: merge(m, safe=True)),
    "merge a": (lambda m: m.merge_adapter(["a"]), lambda m: merge(m, ["a"])),
    "merge b": (lambda m: m.merge_adapter(["b"]), lambda m: merge(m, ["b"])),
    "unmerge": (lambda m: m.unmerge_adapter(), unmerge),
    "freeze a": (lambda m: m.set_requires_grad("a", False), lambda m: set_trainable(m, "a", False)),
    "train b": (lambda m: m.set_requires_grad("b"), lambda m: set_trainable(m, "b")),
    "delete a": (lambda m: m.delete_adapter("a"), lambda m: delete(m, "a")),
    "delete b": (lambda m: m.delete_adapter("b"), lambda m: delete(m, "b")),
}
SCRIPTS = (
    ("nothing", "activate b", "merge", "unmerge", "freeze a", "train b", "disable", "enable", "activate a"),
    ("activate both", "merge a", "merge b", "unmerge", "merge safely", "activate b for inference", "delete b"),
    ("merge b", "merge", "activate b", "merge", "disable", "enable", "delete a"),
    ("disable", "activate b", "enable", "delete b", "merge", "unmerge"),
    ("activate both", "freeze a", "disable", "delete b", "enable"),
)


@pytest.mark.parametrize("script", SCRIPTS, ids=" ".join)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_operation_does_what_it_does_in_peft(kind: str, script: tuple[str, ...]) -> None:
    theirs, ours = both(kind)
    if kind == "copies":  # two copies of one module cannot both be active
        script = tuple(op for op in script if op != "activate both")
    if "copy" in kind:  # PEFT then activates "a" again, but not its copy
        script = tuple(op for op in script if op != "delete b")
    rtol = 1e-6 if kind == "ia3" else 1e-10  # PEFT divides by l + 1e-8 to unmerge
    for n, operation in enumerate(script):
        their_step, our_step = OPERATIONS[operation]
        their_step(theirs)
        ours = our_step(ours)
        compare(theirs, ours, f"after {', '.join(script[: n + 1])}", rtol)


@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(list(CONFIGS)), script=st.lists(st.sampled_from(list(OPERATIONS)), max_size=8))
def test_any_operations_in_any_order_do_what_they_do_in_peft(kind: str, script: list[str]) -> None:
    """Left out is what PEFT does module by module, or not before the next forward; the docstrings say what is done instead."""
    theirs, ours = both(kind)
    done = []
    for operation in script:
        named = {"a", "b"} if operation == "activate both" else {"a", "b"} & set(operation.split())
        deletes_apart = operation.startswith("delete") and (kind == "lora elsewhere" or "copy" in kind)
        if not named <= ours.adapters.keys() or deletes_apart or (operation.startswith("merge") and not ours.enabled):
            continue
        if kind == "copies" and operation == "activate both":
            continue
        trained_aside = any(a.trainable and a.saved and n not in ours.active_names for n, a in ours.adapters.items())
        if operation.startswith(("activate", "enable")) and trained_aside:
            continue
        if operation.startswith("delete") and operation[-1] in ours.merged.names:
            with pytest.raises(ValueError):
                OPERATIONS[operation][0](theirs)
            with pytest.raises(PeftRefError):
                OPERATIONS[operation][1](ours)
            continue
        OPERATIONS[operation][0](theirs)
        ours = OPERATIONS[operation][1](ours)
        done.append(operation)
        if not ours.adapters:
            break
        compare(theirs, ours, f"after {', '.join(done)}", 1e-5 if kind == "ia3" else 1e-9)


@pytest.mark.parametrize("last", ["activate a", "enable"])
def test_peft_leaves_a_copy_that_was_trained_aside_trainable(last: str) -> None:
    """What the test above leaves out, and `switching` does otherwise."""
    theirs, ours = both("copies")
    for operation in ("train b", last):
        OPERATIONS[operation][0](theirs)
        ours = OPERATIONS[operation][1](ours)
    copies = {name: module.weight.requires_grad for name, module in theirs.base_model.model.head.modules_to_save.items()}
    assert copies == {"a": True, "b": True}
    assert {name: adapter.trainable for name, adapter in ours.adapters.items()} == {"a": True, "b": False}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapters_state_dict_is_pefts(kind: str) -> None:
    theirs, ours = both(kind)
    for name in ("a", "b"):
        expected = tensors_of(theirs, name)
        repeated = {key for key in expected if ".original_module." in key or ".modules_to_save." in key}  # of bias="all", written down
        assert bool(repeated) == (kind == "all biases and a copy" and name == "a")
        found = state_dict(ours, name)
        assert found.keys() == expected.keys() - repeated
        for key, tensor in found.items():
            np.testing.assert_array_equal(tensor, expected[key], err_msg=key)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_printed_line_is_pefts(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = both(kind)
    theirs.print_trainable_parameters()
    assert str(count(ours)) == capsys.readouterr().out.strip()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_unloading_leaves_what_peft_leaves(kind: str, merged: bool) -> None:
    theirs, ours = both(kind)
    bare = theirs.merge_and_unload(adapter_names=["b", "a"]) if merged else theirs.unload()
    left = merge_and_unload(ours, ["b", "a"]) if merged else unload(ours)
    assert not left.adapters
    assert left.parameters().keys() == dict(bare.named_parameters()).keys()
    for name, parameter in bare.named_parameters():
        np.testing.assert_allclose(left.weight(name), parameter.detach().numpy(), rtol=1e-12, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "lora_bias"])
def test_rescaling_is_pefts_context(kind: str) -> None:
    theirs, ours = both(kind)
    with peft.helpers.rescale_adapter_scale(theirs, 0.25):
        compare(theirs, rescaled(ours, 0.25), "rescaled")
    compare(theirs, ours, "after")


def test_the_wrapper_of_a_copy_is_called_as_in_peft() -> None:
    theirs, ours = both("copies")
    assert {status.module_type for status in layer_status(ours)} == {"lora.Linear", COPIES}
    assert config_of(theirs.peft_config["a"]).targets.modules_to_save == ("head",)
