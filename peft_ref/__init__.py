"""peft_ref: every parameter-efficient fine-tuning method of HF PEFT as readable mathematics, and a judge for other implementations.

    from peft_ref import Adapter, Linear, LoRA, forward

    layer = Linear(in_features=4, out_features=3)
    start = LoRA(r=2).init(layer, W, np.random.default_rng(0))
    y = forward(layer, start.W, None, [Adapter(LoRA(r=2), start.params)], x)

Names are loaded when they are first used (PEP 562): `import peft_ref` alone does not even load NumPy.
A method's class is a public name by its row in METHODS; nothing has to be written here for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # the one place; pyproject.toml reads it from here

if TYPE_CHECKING:
    from peft_ref.layers import Conv as Conv
    from peft_ref.layers import Embedding as Embedding
    from peft_ref.layers import Layer as Layer
    from peft_ref.layers import Linear as Linear
    from peft_ref.methods import *  # noqa: F403 - METHODS and every class in it
    from peft_ref.methods import method_class as method_class
    from peft_ref.methods import register_method as register_method
    from peft_ref.norms import Norm as Norm
    from peft_ref.registry import PeftType as PeftType
    from peft_ref.registry import TaskType as TaskType
    from peft_ref.stack import Adapter as Adapter
    from peft_ref.stack import BlockDropout as BlockDropout
    from peft_ref.stack import Dropout as Dropout
    from peft_ref.stack import RowDropout as RowDropout
    from peft_ref.stack import forward as forward
    from peft_ref.stack import forward_and_vjp as forward_and_vjp
    from peft_ref.stack import merge as merge
    from peft_ref.stack import unmerge as unmerge
    from peft_ref.stack import vjp as vjp

_HOME = {
    "METHODS": "peft_ref.methods",
    "method_class": "peft_ref.methods",
    "register_method": "peft_ref.methods",
    "PeftType": "peft_ref.registry",
    "TaskType": "peft_ref.registry",
    "Conv": "peft_ref.layers",
    "Embedding": "peft_ref.layers",
    "Layer": "peft_ref.layers",
    "Linear": "peft_ref.layers",
    "Norm": "peft_ref.norms",
    "Adapter": "peft_ref.stack",
    "Dropout": "peft_ref.stack",
    "BlockDropout": "peft_ref.stack",
    "RowDropout": "peft_ref.stack",
    "forward": "peft_ref.stack",
    "forward_and_vjp": "peft_ref.stack",
    "merge": "peft_ref.stack",
    "unmerge": "peft_ref.stack",
    "vjp": "peft_ref.stack",
}


def _load(name: str) -> Any:
    if name in _HOME:
        value = globals()[name] = getattr(import_module(_HOME[name]), name)
        return value
    if name == "__all__" or name[:1].isupper():  # a submodule's name is lower case: leave that to `import`
        from peft_ref.methods import METHODS

        if name == "__all__":  # for `from peft_ref import *`; a written list would be one more row for every method
            return [*_HOME, "__version__", *METHODS.class_names]
        if (cls := METHODS.class_called(name)) is not None:
            return cls  # not kept: a registered class may be taken out again
    raise AttributeError(f"module 'peft_ref' has no attribute {name!r}. Its public names: peft_ref.__all__.")


def __dir__() -> list[str]:
    return sorted({*_load("__all__"), *globals()})


if not TYPE_CHECKING:  # a type checker that saw it would take every misspelt name for a public one
    __getattr__ = _load
