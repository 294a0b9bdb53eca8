"""The table of all methods in spec/README.md, out of the code and of what it computes.   python -m tests.spec.method_table   writes it.

Nothing in it is remembered: parameters are the shapes that a method declares, and the rest is measured on a layer of 24 inputs and 16
outputs (a convolution where it takes no linear one), with numbers drawn around a fresh adapter. A method that draws no layer so small has
its own sizes in tests/methods.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import numpy as np

from peft_ref import stack
from peft_ref.attending import AttentionMethod
from peft_ref.contracts import EVERY_KIND, KINDS, WeightMethod, declared
from peft_ref.errors import PeftRefError
from peft_ref.layers import CONV_KINDS, Conv, Embedding, Layer, Linear
from peft_ref.methods import METHODS
from peft_ref.stack import Adapter
from tests.methods import facts
from tests.spec.pages import SPEC

BEGIN, END = "<!-- methods: written by tests/spec/method_table.py, do not edit -->", "<!-- end of methods -->"
LAYERS: tuple[Layer, ...] = (
    Linear(in_features=24, out_features=16),
    Embedding(num_embeddings=24, embedding_dim=16),
    *(Conv(in_channels=24, out_channels=16, kernel_size=(1,) * n) for n in (1, 2, 3)),
)
MOST = 5  # parameters in a cell
SEEN = 1e-9  # a singular value, beside the largest; and how far a product may be from the identity
Host = np.ndarray[Any, Any]


def small(name: str) -> WeightMethod[Any]:
    own = facts(name)
    return METHODS.weights[name](**{**own.required, **own.small})


def measured(name: str) -> dict[str, str]:
    """Rank of W' - W, whether W' keeps the lengths of W's rows or columns, whether it can be merged and taken out again."""
    method = small(name)
    for layer in LAYERS:
        try:
            method.check_layer(layer)
            rng = np.random.default_rng(5)
            W, b = rng.normal(size=layer.shape), rng.normal(size=layer.shape[0])
            start = method.init(layer, W, rng)
        except PeftRefError:
            continue
        moved = [_moved(v, rng) for v in start.params]
        adapter = Adapter(method, type(start.params)(*moved))
        merged, bias = stack.merge(layer, start.W, b, [adapter])
        try:
            back, _ = stack.unmerge(layer, merged, bias, [adapter], start.W, b)
            unmerged = "yes" if np.allclose(back, start.W, rtol=0, atol=1e-6) else "no"
        except PeftRefError:
            unmerged = "no"
        return {"rank": f"{_rank(merged - start.W)} of 16", "orthogonal": _kept(start.W, merged), "unmerged": unmerged}
    return {"rank": "", "orthogonal": "", "unmerged": ""}


def _moved(value: Any, rng: np.random.Generator) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return value
    return value + rng.normal(size=value.shape) / 4


def _rank(matrix: Host) -> int:
    S = np.linalg.svd(matrix, compute_uv=False)
    return int(np.sum(SEEN * max(S[0], 1.0) < S))


def _kept(W: Host, merged: Host) -> str:
    """A rotation on one side keeps W W^T or W^T W."""
    for one, other in ((W @ W.T, merged @ merged.T), (W.T @ W, merged.T @ merged)):
        if np.allclose(one, other, rtol=0, atol=1e-6):
            return "yes"
    return ""


def parameters(cls: type[WeightMethod[Any]]) -> str:
    """The sizes of what is trained on a layer that is no convolution, if it goes to any."""
    found = []
    for shape, keys in declared(cls.params_type).values():
        key = next((k for k in keys if k.kinds & cls.kinds - CONV_KINDS), keys[0])
        if key.trained:
            found.append(f"{' '.join(shape.split())}{f' ({key.when})' if key.when else ''}")
    shown = found if len(found) <= MOST else [*found[: MOST - 1], f"{len(found) - MOST + 1} more"]
    return ", ".join(f"`{size}`" if not size.endswith(" more") else size for size in shown)


def needs(name: str) -> str:
    """The extensions of the array API that the method's own file calls."""
    source = Path(str(sys.modules[METHODS[name].__module__].__file__)).read_text("utf-8")
    called = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    called |= {"linalg"} if "thin_svd" in source else set()  # of `arrays`
    return ", ".join(sorted(called & {"linalg", "fft"}))


def kinds(cls: type[WeightMethod[Any]]) -> str:
    if cls.kinds in (KINDS, EVERY_KIND):
        return "all" if cls.kinds == EVERY_KIND else "all but norms"
    plain = [k.replace("transposed_linear", "Conv1D") for k in ("linear", "transposed_linear", "embedding") if k in cls.kinds]
    spatial = [k[4] for k in sorted(cls.kinds & CONV_KINDS)]
    return ", ".join([*plain, *([f"convolution {'/'.join(spatial)}d"] if spatial else [])])


def table() -> str:
    head = ["method", "contract", "what is trained", "rank of the change", "orthogonal", "unmerges", "layers", "needs"]
    rows = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, cls in METHODS.items():
        link = f"[{cls.__name__}](methods/{name}.md)"
        if not issubclass(cls, WeightMethod):
            contract = "AttentionMethod" if issubclass(cls, AttentionMethod) else "Prompt"
            where = "behind attention" if issubclass(cls, AttentionMethod) else "before the inputs, or their keys and values"
            rows.append(f"| {link} | {contract} | its page says | | | | {where} | |")
            continue
        m, base = measured(name), cls.__base__
        assert base is not None
        cells = [link, base.__name__, parameters(cls), m["rank"], m["orthogonal"], m["unmerged"], kinds(cls), needs(name)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    page = SPEC / "README.md"
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
