"""Fresh adapters of attention, where they go, and under which keys they are saved.

init         attention.hidden_size                          -> draws of tensors
config       adapter_config, model_config, modules          -> {"modules": {name: {"adapter_len": ...}}}, those that get one and no other
state_dict   adapter_config, adapter_name, modules          -> {"tensors": {key: array}}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from peft_ref.attending import AttentionAdapter, AttentionMethod
from peft_ref.check.case import Case, CaseAdapter, NDArray, build_attention, config_of, decode, encode
from peft_ref.check.distributions import Law, constant, normal
from peft_ref.check.variants import dyadic, generator
from peft_ref.errors import TargetError
from peft_ref.files.adapter import attention_state_dict
from peft_ref.files.config import from_dict
from peft_ref.graph.blocks import DEFAULT_BLOCKS, attention_blocks

DRAWS = 48


def attention_laws(case: Case) -> dict[str, Law]:
    return {"adaption_prompt": normal(1.0), "adaption_gate": constant(0.0, "init-gate-open")}


def attention_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a fresh adapter, by its key."""
    return {s.key: s.shape for s in build_attention(case.method, case.adapters[0].config).spec(case.question["attention"]["hidden_size"])}


def right_blocks(case: Case) -> dict[str, Any]:
    question = case.question
    method, target = from_dict(question["adapter_config"]).method, question["adapter_config"].get("target_modules")
    assert isinstance(method, AttentionMethod)
    try:
        names = attention_blocks(question["modules"], question["model_config"]["model_type"], method.adapter_layers, target)
    except TargetError as error:
        return {"error": str(error)}
    return {"modules": {name: {"adapter_len": method.dims()["n"]} for name in names}}


def grade_blocks(case: Case, answer: Mapping[str, Any]) -> str:
    right, got = right_blocks(case), answer.get("modules")
    if "error" in right:
        return "" if "error" in answer else "this must be refused with an error; the answer has none"
    if "error" in answer:
        return f"the port refuses what must be accepted: {str(answer['error'])[:200]}"
    want = right["modules"]
    if not isinstance(got, Mapping):
        return 'the answer must hold "modules", an object of what each block has'
    if got.keys() == want.keys():
        return next((f"{name} has {got[name]}, expected {what}" for name, what in want.items() if got[name] != what), "")
    for name, (sentence, wrong) in BLOCK_MISTAKES.items():
        if set(got) == wrong(case.question):
            return f"{name}: {sentence}"
    missing, extra = sorted(want.keys() - got.keys()), sorted(got.keys() - want.keys())
    return "; ".join(f"{what}: {', '.join(names[:6])}" for what, names in (("missing", missing), ("too many", extra)) if names)


def _ending(question: Mapping[str, Any], dot: str = ".") -> list[str]:
    target = question["adapter_config"].get("target_modules") or DEFAULT_BLOCKS[question["model_config"]["model_type"]]
    return [name for name in question["modules"] if name.endswith(f"{dot}{target}")]


def _layers(question: Mapping[str, Any]) -> int:
    return int(question["adapter_config"]["adapter_layers"])


BLOCK_MISTAKES: dict[str, tuple[str, Callable[[Mapping[str, Any]], set[str]]]] = {
    "blocks-from-the-bottom": ("adapter_layers counts the first blocks instead of the last", lambda q: set(_ending(q)[: _layers(q)])),
    "every-block": ("adapter_layers is not read", lambda q: set(_ending(q))),
    "blocks-sorted-by-name": (
        "blocks are taken in the order of their names, 10 before 2",
        lambda q: set(sorted(_ending(q))[-_layers(q) :]),
    ),
    "suffix-without-dot": (
        "target_modules matches any ending, not only a whole last part",
        lambda q: set(_ending(q, "")[-_layers(q) :]),
    ),
}


def right_added(question: Mapping[str, Any]) -> dict[str, Any]:
    method = from_dict(question["adapter_config"]).method
    assert isinstance(method, AttentionMethod)
    blocks = {}
    for module in question["modules"]:
        tensors = {key: np.asarray(decode(value), dtype=np.float64) for key, value in module["tensors"].items()}
        blocks[module["name"]] = AttentionAdapter(method, method.unpack(module["attention"]["hidden_size"], tensors, module["name"]))
    return {"tensors": {key: encode(value) for key, value in attention_state_dict(blocks).items()}}


# ---- what is asked

CONFIG = {"peft_type": "ADAPTION_PROMPT", "adapter_len": 4, "adapter_layers": 2}
PARTS = ("self_attn", "self_attn.q_proj", "cross_self_attn", "mlp")
LLAMA: Sequence[str] = ("model", *(f"model.layers.{i}{part}" for i in (0, 1, 2, 10) for part in ("", *(f".{p}" for p in PARTS))))
GPT2: Sequence[str] = ("transformer", *(name for i in range(3) for name in (f"transformer.h.{i}.attn", f"transformer.h.{i}.attn.c_attn")))
PLACED: dict[str, tuple[str, Mapping[str, Any]]] = {
    "top": ("llama", {}),
    "one": ("mistral", {"adapter_layers": 1, "adapter_len": 7}),
    "three": ("llama", {"adapter_layers": 3}),
    "all": ("llama", {"adapter_layers": 4}),
    "too-many": ("llama", {"adapter_layers": 5}),
    "other-target": ("llama", {"target_modules": "cross_self_attn"}),
    "gpt2": ("gpt2", {}),
    "no-such-architecture": ("bert", {}),
}


def attention_text_cases(name: str) -> Iterator[Case]:
    for length in (3, 5):
        method = build_attention(name, {"adapter_len": length, "adapter_layers": 2})
        yield Case(
            id=f"{name}.init-{length}.init",
            method=name,
            operation="init",
            clause="ADAPTIONPROMPT-C11",
            adapters=(CaseAdapter(config=config_of(method), tensors={}),),
            question={"draws": DRAWS, "attention": {"hidden_size": 6}},
        )
    for label, (model_type, config) in PLACED.items():
        modules = GPT2 if model_type == "gpt2" else LLAMA
        question = {"adapter_config": {**CONFIG, **config}, "model_config": {"model_type": model_type}, "modules": list(modules)}
        yield Case(id=f"{name}.config.{label}", method=name, operation="config", clause="ADAPTIONPROMPT-C12", question=question)
    for adapter_name in ("default", "0"):
        yield _state_dict(name, adapter_name)


def _state_dict(name: str, adapter_name: str) -> Case:
    where, width = f"{name}.state-dict.{adapter_name}", 6
    rng, method = generator(where), build_attention(name, CONFIG)

    def tensors() -> dict[str, Any]:
        drawn: dict[str, NDArray] = {s.key: abs(dyadic(rng, s.shape)) for s in method.spec(width)}
        return {key: encode(value) for key, value in drawn.items()}

    modules = [{"name": f"model.layers.{i}.self_attn", "attention": {"hidden_size": width}, "tensors": tensors()} for i in (0, 1)]
    question = {"adapter_config": CONFIG, "adapter_name": adapter_name, "modules": modules}
    return Case(id=where, method=name, operation="state_dict", clause="ADAPTIONPROMPT-C13", question=question)
