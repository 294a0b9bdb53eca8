"""The plan of a merge: which tensors of the base change by what, and how the output is laid out. It reads headers and configurations only.

The order of what happens to one tensor is PEFT's, which loads all adapters before it merges them:

    what takes the place of a frozen weight (saved embeddings, trained biases), adapter by adapter
    what the adapters add to it, adapter by adapter, rounded to the stored dtype after each
    what takes the place of the result: modules_to_save
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from peft_ref.checkpoints.base import Base
from peft_ref.checkpoints.changes import AddBias, AddLowRank, Replace
from peft_ref.checkpoints.layout import Changed, Wanted, becomes, dtype_of, laid_out
from peft_ref.checkpoints.pieces import FLOATS, Piece
from peft_ref.checkpoints.plan import Change, Plan, Rounding, Source
from peft_ref.checkpoints.sources import Adapter, OnModule, config_of, modules_in, read
from peft_ref.checkpoints.ways import rounded_first
from peft_ref.contracts import LowRank
from peft_ref.errors import ConfigError, NotMergeableError, ShapeError
from peft_ref.files.safetensors import BITS
from peft_ref.graph import under_live_names
from peft_ref.model.adapted import Adapted, adapt
from peft_ref.model.ties import Ties, changed_name, check_ties

ROUNDINGS = ("default", "safe", "kept")
HALF = ("F16", "BF16")


def plan(
    base: Path,
    adapters: Sequence[Source],
    *,
    rounding: Rounding = "default",
    exact: bool = False,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    ties: Ties = "refuse",
) -> Plan:
    """What is to be written for `base` with these adapters in it, one after the other."""
    check_ties(ties)
    if rounding not in ROUNDINGS:
        raise ConfigError(f"rounding={rounding!r}: there are {', '.join(ROUNDINGS)}.")
    if not adapters:
        raise ConfigError("no adapter was given: there is nothing to merge.")
    sources = [Source(Path(source.folder), float(source.weight)) for source in adapters]
    checkpoint, configs = Base(Path(base)), [config_of(source) for source in sources]
    checkpoint.files  # noqa: B018  # what is wrong with them is said before anything else
    names = [name for source in sources for name in modules_in(source)]
    graph = under_live_names(base, names)
    work = _Work(adapt(graph), checkpoint, graph.prefix, rounding=rounding, exact=exact, dtype=dtype_of(dtype), ties=ties)
    for adapter in [read(work.model, source, config) for source, config in zip(sources, configs, strict=True)]:
        work.take(adapter)
    return laid_out(checkpoint, sources, work.wanted(max_shard_size))


@final
class _Work:
    """The changes that have come together so far, by the stored names of the tensors."""

    def __init__(self, model: Adapted, base: Base, prefix: str, *, rounding: Rounding, exact: bool, dtype: str | None, ties: Ties) -> None:
        self.model = model
        self._base, self._prefix = base, prefix
        self._rounding, self._exact, self._dtype, self._ties = rounding, exact, dtype, ties
        self._frozen: dict[str, list[Replace]] = {}
        self._merged: dict[str, list[Change]] = {}
        self._copies: dict[str, Replace] = {}
        self._apart: set[str] = set()

    def take(self, adapter: Adapter) -> None:
        who = str(adapter.source.folder)
        for name, tensor in adapter.frozen.items():
            key = self._kept(name, f"{who}: {tensor.name}")
            self._frozen.setdefault(key, []).append(self._replaced(adapter, key, tensor))
        for module, found in adapter.modules.items():
            self._module(adapter, module, found)
        for name, tensor in adapter.copies.items():
            key = self._kept(name, f"{who}: {tensor.name} of modules_to_save")
            if key in self._copies:
                raise ConfigError(
                    f"{who} and {self._copies[key].source.folder} both hold a copy of {name}, and a merge can keep one.\n"
                    "  Merge one of them, or take the module out of its modules_to_save."
                )
            self._copies[key] = self._replaced(adapter, key, tensor)

    def wanted(self, max_shard_size: int | None) -> Wanted:
        changed = {}
        for key in {**self._frozen, **self._merged, **self._copies}:
            copy = self._copies.get(key)
            changes = [copy] if copy is not None else [*self._frozen.get(key, ()), *self._merged.get(key, ())]
            changed[self._stored(key)] = Changed(tuple(changes))
        ties = self.model.tied()
        apart = {second: self._stored(ties[second]) for second in self._apart}
        return Wanted(changed, apart, self._dtype, max_shard_size, self._prefix)

    def _module(self, adapter: Adapter, module: str, found: OnModule) -> None:
        known = self.model.modules()[module]
        what = f"{adapter.source.folder} at {module!r}"
        if known.weight is None:
            raise NotMergeableError(f"{what}: the module has no parameter called weight, which an adapter could change.")
        key = self._kept(known.weight, what)
        weight = self._work_dtype(known.weight, what)
        first = rounded_first(found.method, found.layer, self._rounding, weight)
        common: dict[str, Any] = {
            "source": adapter.source,
            "module": module,
            "method": found.method,
            "layer": found.layer,
            "tensors": tuple(found.tensors.items()),
            "held": weight if self._rounding == "kept" and weight in HALF else ("F64" if weight == "F64" else "F32"),
            "computed": "F64" if weight == "F64" else "F32",
        }
        if not isinstance(found.method, LowRank):
            raise NotMergeableError(f"{what}: {type(found.method).__name__} is not merged here yet.")
        if found.layer.groups > 1:
            raise NotMergeableError(f"{what}: a convolution in groups has no place for the delta (HF PEFT refuses it too).")
        self._merged.setdefault(key, []).append(AddLowRank(**common, first=first, exact=self._exact))
        if getattr(found.method, "lora_bias", False):
            if known.bias is None:
                raise NotMergeableError(
                    f"{what}: lora_bias, and the layer has no bias (HF PEFT refuses it too).\n  Keep the adapter beside it."
                )
            bias = self._kept(known.bias, what)
            kept = weight if self._rounding == "kept" else None
            self._merged.setdefault(bias, []).append(AddBias(**common, first=kept))

    def _kept(self, name: str, what: str) -> str:
        """Under which name a change of the parameter `name` is kept."""
        if name not in self.model.parameters() and name not in self.model.tied():
            raise ShapeError(f"{what}: the base has no tensor {name!r}.\n  The adapter was made for another model.")
        kept, apart = changed_name(self.model.base, name, self._ties, what)
        self._apart |= apart
        return kept

    def _stored(self, key: str) -> str:
        """The name of a parameter in the base's files; of one that gets a tensor of its own, its new one."""
        return key if key in self._apart else key.removeprefix(self._prefix)

    def _piece(self, key: str) -> Piece:
        return self._base.tensors[self.model.base.resolve(key).removeprefix(self._prefix)]

    def _work_dtype(self, key: str, what: str) -> str:
        """The dtype in which a tensor is changed: the wider of the one it has and the one it gets."""
        piece = self._piece(key)
        if piece.dtype not in FLOATS:
            raise NotMergeableError(
                f"{what}: {key} is stored as {piece.dtype}: a quantised base.\n  Merge into the base as it was before, in 16 or 32 bits."
            )
        out = becomes(piece, self._dtype)
        return out if BITS[out] > BITS[piece.dtype] else piece.dtype

    def _replaced(self, adapter: Adapter, key: str, tensor: Piece) -> Replace:
        piece = self._piece(key)
        if tensor.shape != piece.shape:
            raise ShapeError(
                f"{adapter.source.folder}: {tensor.name} is {tensor.shape}, and the base's {piece.name} {piece.shape}.\n"
                "  Another model's adapter; or its embeddings were resized: resize the base's in the same way first."
            )
        return Replace(adapter.source, tensor, piece.shape[0] if piece.shape else 1)
