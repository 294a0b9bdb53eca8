"""Which attention blocks get an adapter: the last `layers` of those whose name ends in `.target`, in the model's own order.

HF      peft.tuners.adaption_prompt. The target is the last part of a name and no pattern; without one it is the architecture's. PEFT takes
        `blocks[-layers:]`, so that 0 layers are all of them and a negative number leaves some out in front; here both are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from peft_ref.attending import AttentionBlock, AttentionMethod
from peft_ref.errors import ConfigError, TargetError
from peft_ref.graph.protocol import Graph
from peft_ref.graph.targets import Targets

# What an attention block is called, by HF's model_type; PEFT knows no other.
DEFAULT_BLOCKS: Mapping[str, str] = MappingProxyType({"gpt2": "attn", "llama": "self_attn", "mistral": "self_attn"})


def attention_blocks(modules: Sequence[str], model_type: str | None, layers: int | None, target: str | None = None) -> tuple[str, ...]:
    """The names of the blocks that get an adapter; `modules` are all of the model's, in its order."""
    if model_type is None or model_type not in DEFAULT_BLOCKS:
        raise TargetError(
            f"model_type={model_type!r}: no attention block there takes an adapter (HF PEFT refuses it too).\n"
            f"  There are {', '.join(DEFAULT_BLOCKS)}."
        )
    if layers is None or layers <= 0:
        raise ConfigError(f"adapter_layers={layers}: how many blocks, counted from the top, must be said.\n  Give a positive number.")
    ending = f".{DEFAULT_BLOCKS[model_type] if target is None else target}"
    found = [name for name in modules if name.endswith(ending)]
    if len(found) < layers:
        raise TargetError(
            f"adapter_layers={layers}, and the model has {len(found)} blocks whose name ends in {ending!r} (HF PEFT refuses it too)."
        )
    return tuple(found[-layers:])


def blocks_of(method: AttentionMethod[Any], targets: Targets, graph: Graph) -> dict[str, AttentionBlock]:
    """The blocks of the graph that get the method's adapter, by name."""
    modules, target = graph.modules(), targets.target_modules
    if not isinstance(target, str | None):
        raise ConfigError(f"target_modules={target!r:.80} of {method.peft_type}: the last part of a name is needed, 'self_attn' say.")
    names = attention_blocks(list(modules), graph.model_type, method.adapter_layers, target)
    found = {name: block for name in names if (block := modules[name].block) is not None}
    if unknown := [name for name in names if name not in found]:
        raise TargetError(
            f"{unknown[0]!r} is not known as an attention block that takes an adapter.\n"
            "  Name the attention, and load the model with peft_ref.nn."
        )
    return found
