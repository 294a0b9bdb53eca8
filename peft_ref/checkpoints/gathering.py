"""What several adapters do to the tensors of a base, gathered tensor by tensor.

The order of what happens to one tensor is PEFT's, which loads all adapters before it merges them:

    load     what takes the place of a frozen weight (saved embeddings, trained biases), what an init takes off it; adapter by adapter
    merge    what the adapters add to it, module by module and there adapter by adapter, rounded to the stored dtype after each
    copies   what takes the place of the result: modules_to_save
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple, final

from peft_ref.checkpoints.base import Base
from peft_ref.checkpoints.changes import AddBias, AddLowRank, AddStack, Replace, Scale, Tokens
from peft_ref.checkpoints.layout import Changed, Wanted, becomes
from peft_ref.checkpoints.pieces import FLOATS, Piece, same
from peft_ref.checkpoints.plan import Change, Rounding
from peft_ref.checkpoints.remade import Home
from peft_ref.checkpoints.sources import Adapter, OnModule, OnParameter
from peft_ref.checkpoints.steps import Fresh, Frozen, Step
from peft_ref.checkpoints.ways import cuts, init_of, needs_bias, rounded_first, touches
from peft_ref.contracts import Additive, LowRank
from peft_ref.errors import ConfigError, KeyMismatchError, NotMergeableError, ShapeError
from peft_ref.files.safetensors import BITS
from peft_ref.files.tokens import TokensBeside, name_of
from peft_ref.methods.ia3 import IA3
from peft_ref.methods.trainable_tokens import TrainableTokens
from peft_ref.model.adapted import Adapted
from peft_ref.model.ties import Ties, changed_name, names_of
from peft_ref.model.tokens import check_tokens, check_tokens_alone, followed_everywhere, trains

HALF = ("F16", "BF16")


class Asked(NamedTuple):
    rounding: Rounding
    exact: bool
    dtype: str | None
    ties: Ties


@final
class Gathered:
    """Changes by the names of the live model's parameters; of a tied one by its first name, or by the one that it is parted under."""

    def __init__(self, model: Adapted, base: Base, prefix: str, asked: Asked) -> None:
        self._model, self._base, self._prefix, self._asked = model, base, prefix, asked
        self._frozen: dict[str, list[Change]] = {}
        self._merged: dict[str, list[Change]] = {}
        self._copies: dict[str, Replace] = {}
        self._rows: dict[str, int] = {}
        self._apart: set[str] = set()

    def load(self, adapter: Adapter) -> None:
        """What happens to the frozen weights."""
        for module, found in adapter.modules.items():
            self._check(adapter, found, f"{adapter.source.folder} at {module!r}")
            if cuts(found.method):
                what = f"{adapter.source.folder}: the init at {module!r}"
                key = self._kept(self._weight_of(module, what), what)
                self._frozen.setdefault(key, []).append(Fresh(adapter.source, module, found.method, found.layer))
        for name, tensor in adapter.frozen.items():
            key = self._kept(name, f"{adapter.source.folder}: {tensor.name}")
            for other in self._frozen.get(key, ()):
                if isinstance(other, Replace) and not same(other.tensor, tensor):
                    raise ConfigError(
                        f"{other.source.folder} and {adapter.source.folder} both bring {name}, and not the same (HF PEFT takes the last).\n"
                        "  Merge one of them."
                    )
            self._frozen.setdefault(key, []).append(self._replaced(adapter, key, tensor))

    def merge(self, adapters: Sequence[Adapter]) -> None:
        """What the adapters add, module by module as in PEFT: it shows where two modules have one weight."""
        for one, other in combinations([trains(str(a.source.folder), a.config, a.modules) for a in adapters], 2):
            check_tokens_alone(one, other)
            check_tokens(one, other, "merged")
        for module in self._model.modules():
            for adapter in adapters:
                if module in adapter.modules:
                    self._module(adapter, module, adapter.modules[module])
        for adapter in adapters:
            for name, on in adapter.parameters.items():
                self._parameter(adapter, name, on)

    def copies(self, adapter: Adapter) -> None:
        """The copies that it brings."""
        for name, tensor in adapter.copies.items():
            key = self._parted(name, adapter, tensor)
            if key in self._copies:
                raise ConfigError(
                    f"{self._copies[key].source.folder} and {adapter.source.folder} both hold a copy of {name}, and a merge can keep one.\n"
                    "  Merge one of them, or take the module out of its modules_to_save."
                )
            self._copies[key] = self._replaced(adapter, key, tensor)

    def wanted(self, max_shard_size: int | None) -> Wanted:
        changed = {}
        for key in {**self._frozen, **self._merged, **self._copies}:
            copy = self._copies.get(key)
            changes = [copy] if copy is not None else [*self._frozen.get(key, ()), *self._merged.get(key, ())]
            changed[self._stored(key)] = Changed(tuple(changes), self._rows.get(key))
        ties = self._model.tied()
        apart = {second: self._stored(ties[second]) for second in self._apart}
        return Wanted(changed, apart, self._asked.dtype, max_shard_size, self._prefix)

    def _module(self, adapter: Adapter, module: str, found: OnModule) -> None:
        what = f"{adapter.source.folder} at {module!r}"
        method = found.method
        weight = self._weight_of(module, what)
        together = self._asked.ties == "refuse" and followed_everywhere(adapter.following, module)
        if together and module in adapter.following:
            return  # its table's rows are in the weight that both have
        bias = self._model.modules()[module].bias
        if touches(method, "weight"):
            key = self._kept(weight, what, "share" if together else None)
            self._merged.setdefault(key, []).append(self._change(adapter, module, found, "weight", weight, bias, what))
        if touches(method, "bias"):
            if bias is not None:
                key = self._kept(bias, what)
                self._merged.setdefault(key, []).append(self._change(adapter, module, found, "bias", weight, bias, what))
            elif needs_bias(method):
                raise NotMergeableError(
                    f"{what}: {type(method).__name__} adds to the bias, and this layer has none (HF PEFT refuses it too).\n"
                    "  Keep the adapter beside the base, or give the layer a bias of zeros."
                )

    def _change(
        self, adapter: Adapter, module: str, found: OnModule, part: Literal["weight", "bias"], weight: str, bias: str | None, what: str
    ) -> Change:
        method, layer = found.method, found.layer
        dtype = self._work_dtype(weight, what)
        if isinstance(method, TokensBeside):  # rows, and no delta that could be rounded in one way or another
            rows = ((TrainableTokens.key, found.tensors[method.key]),)
            return Tokens(**self._dtypes(adapter, dtype), module=module, method=method.alone, layer=layer, tensors=rows)
        first = rounded_first(method, layer, self._asked.rounding)
        own: dict[str, Any] = {
            **self._dtypes(adapter, dtype),
            "module": module,
            "method": method,
            "layer": layer,
            "tensors": tuple(found.tensors.items()),
        }
        if isinstance(method, LowRank):
            if part == "weight":
                return AddLowRank(**own, first=dtype if first else None, exact=self._exact(dtype, what))
            return AddBias(**own, first=dtype if self._asked.rounding == "kept" else None)
        if isinstance(method, IA3):
            return Scale(**own, part=part)
        if isinstance(method, TrainableTokens) and layer.kind in ("embedding", "linear"):
            return Tokens(**own)
        key = self._kept(weight if part == "weight" or bias is None else bias, what)
        return Step(
            **own,
            part=part,
            first=first,
            exact=self._exact(dtype, what),
            weight=self._as_frozen(weight, what),
            bias=None if bias is None else self._as_frozen(bias, what),
            alone=key not in self._merged,
            shared=tuple(found.shared.items()),
            absent=found.absent,
            home=Home(self._base.folder, self._prefix) if found.absent else None,
        )

    def _parameter(self, adapter: Adapter, name: str, on: OnParameter) -> None:
        """PEFT's wrapper rounds the delta to the parameter's dtype in every merge."""
        what = f"{adapter.source.folder} at {name!r}"
        key, dtype = self._kept(name, what), self._work_dtype(name, what)
        own, exact = self._dtypes(adapter, dtype), self._exact(dtype, what)
        self._merged.setdefault(key, []).append(AddStack(**own, name=name, **on._asdict(), first=dtype, exact=exact))
        if len(on.stack.shape) == 3:
            self._rows[key] = on.stack.shape[0] * on.stack.shape[1]

    def _check(self, adapter: Adapter, found: OnModule, what: str) -> None:
        """Raise where the method has no place in this weight, or not so."""
        method, name = found.method, name_of(found.method)
        if isinstance(method, LowRank) and found.layer.groups > 1:
            raise NotMergeableError(
                f"{what}: a convolution in groups has no place for the delta (HF PEFT refuses it too).\n  Keep the adapter beside the base."
            )
        if isinstance(method, LowRank) and found.absent:
            raise NotMergeableError(
                f"{what}: {name}'s file leaves out {', '.join(found.absent)}, whose signs whoever worked them out has chosen.\n"
                "  Merge it with HF PEFT on the machine that trained it."
            )
        if init_of(method).startswith("corda"):
            raise NotMergeableError(
                f"{what}: init_lora_weights={init_of(method)!r} took a part off the frozen weight that only its data tell.\n"
                "  HF PEFT refuses it too. Make a plain LoRA of it first: peft-ref convert --initial."
            )
        if adapter.source.weight != 1 and not isinstance(method, LowRank | Additive):
            called = f"the {name} of its {adapter.config.method.peft_type}" if isinstance(method, TokensBeside) else name
            raise ConfigError(
                f"{adapter.source.folder}: weight {adapter.source.weight} with {called}: there is no delta that could be scaled.\n"
                "  Use weight 1."
            )

    def _dtypes(self, adapter: Adapter, weight: str) -> dict[str, Any]:
        wide = "F64" if weight == "F64" else "F32"
        held = weight if self._asked.rounding == "kept" and weight in HALF else wide
        return {"source": adapter.source, "held": held, "computed": wide}

    def _exact(self, dtype: str, what: str) -> bool:
        if self._asked.exact and dtype == "F64":
            raise ConfigError(f"{what}: exact bits are those of float32 arithmetic, and the weight is float64.\n  Leave `exact` out.")
        return self._asked.exact

    def _as_frozen(self, name: str, what: str) -> Frozen:
        return Frozen(self._piece(name), self._work_dtype(name, what), tuple(self._frozen.get(self._kept(name, what), ())))

    def _weight_of(self, module: str, what: str) -> str:
        weight = self._model.modules()[module].weight
        if weight is None:
            raise NotMergeableError(f"{what}: the module has no parameter called weight, which an adapter could change.")
        return weight

    def _kept(self, name: str, what: str, ties: Ties | None = None) -> str:
        """Under which name a change of the parameter `name` is kept."""
        if name not in self._model.parameters() and name not in self._model.tied():
            raise KeyMismatchError(f"{what}: the base has no tensor {name!r}.\n  The adapter was made for another model.")
        kept, apart = changed_name(self._model.base, name, ties or self._asked.ties, what)
        self._apart |= apart
        return kept

    def _parted(self, name: str, adapter: Adapter, copy: Piece) -> str:
        """Under which name a copy is kept. It is its module's alone; other names of a tied weight keep theirs, as in PEFT."""
        if name not in self._model.parameters() and name not in self._model.tied():
            raise KeyMismatchError(f"{adapter.source.folder}: {copy.name} is a copy of what the base has not.\n  Another model's adapter?")
        first, *others = names_of(self._model.base, name)
        if any(second not in adapter.tied for second in others):
            self._apart |= set(others)
            return name
        return first

    def _stored(self, key: str) -> str:
        """The name of a parameter in the base's files; of one that gets a tensor of its own, its new one."""
        return key if key in self._apart else key.removeprefix(self._prefix)

    def _piece(self, key: str) -> Piece:
        return self._base.tensors[self._model.base.resolve(key).removeprefix(self._prefix)]

    def _work_dtype(self, key: str, what: str) -> str:
        """The dtype in which a tensor is changed: the wider of the one it has and the one it gets."""
        piece = self._piece(key)
        if piece.dtype not in FLOATS:
            raise NotMergeableError(
                f"{what}: {key} is stored as {piece.dtype}: a quantised base.\n  Merge into the base as it was before, in 16 or 32 bits."
            )
        out = becomes(piece, self._asked.dtype)
        return out if BITS[out] > BITS[piece.dtype] else piece.dtype

    def _replaced(self, adapter: Adapter, key: str, tensor: Piece) -> Replace:
        piece = self._piece(key)
        if tensor.shape != piece.shape:
            raise ShapeError(
                f"{adapter.source.folder}: {tensor.name} is {tensor.shape}, and the base's {piece.name} {piece.shape}.\n"
                "  Another model's adapter; or its embeddings were resized: resize the base's in the same way first."
            )
        return Replace(adapter.source, tensor, piece.shape[0] if piece.shape else 1)
