"""A tree of arrays: nested mappings, tuples and NamedTuples, with arrays at their ends, or None where there is nothing.

What is trained is one, its gradients are another of the same form, and so is what an optimiser remembers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

from peft_ref.errors import KeyMismatchError

T = TypeVar("T")


def mapped(f: Callable[..., Any], tree: T, *others: Any) -> T:
    """`f` of every array of `tree`, and of what the others have in its place, which may be None from some branch on. None stays None."""
    return cast(T, _mapped(f, tree, others, ""))


def _mapped(f: Callable[..., Any], tree: Any, others: tuple[Any, ...], where: str) -> Any:
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        if wrong := next((o for o in others if o is not None and (not isinstance(o, Mapping) or o.keys() != tree.keys())), None):
            came = sorted(set(tree) ^ set(wrong)) if isinstance(wrong, Mapping) else type(wrong).__name__
            raise KeyMismatchError(f"trees differ at {where or 'the root'}: {came}.\n  Parameters and gradients need the same names.")
        return {name: _mapped(f, part, _inside(others, name), f"{where}/{name}") for name, part in tree.items()}
    if isinstance(tree, tuple):
        parts = [_mapped(f, part, _inside(others, n), f"{where}/{n}") for n, part in enumerate(tree)]
        return tuple(parts) if type(tree) is tuple else type(tree)(*parts)  # a NamedTuple takes its fields apart
    return f(tree, *others)


def _inside(trees: tuple[Any, ...], name: Any) -> tuple[Any, ...]:
    return tuple(None if tree is None else tree[name] for tree in trees)


def leaves(tree: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every array of the tree with its place in it: "adapters/layers.0.q/A"."""
    if tree is None:
        return
    if isinstance(tree, Mapping):
        parts = list(tree.items())
    elif isinstance(tree, tuple):
        parts = list(zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True))
    else:
        yield where, tree
        return
    for name, part in parts:
        yield from leaves(part, f"{where}/{name}" if where else str(name))
