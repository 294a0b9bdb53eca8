"""Adapters merged into the weights, and taken out again.

    W_0 frozen,   (W_k, b_k) = T_k(W_{k-1}, b_{k-1}) for the k-th merged adapter,   the module then runs W_n, b_n alone

merge              the active adapters, or those named, after what is merged already: all from the frozen weight on, in the order in which
                   they act. Nothing happens where one cannot be merged
unmerge            the frozen weights again: the very same ones
unload             the weights as they are now, without adapters; a copy of an active adapter stays in its module's place, as in HF
merge_and_unload   both

HF      merges only where it is asked to, and lets a merged layer run its weight alone: with one of two active adapters merged the other no
        longer acts. `safe` refuses what is not finite. HF's merge of adapters that are off is undone by the next forward: refused here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from peft_ref.arrays import Array
from peft_ref.contracts import WeightMethod
from peft_ref.errors import ConfigError, NotMergeableError
from peft_ref.model.adapted import Adapted, Merged
from peft_ref.model.attaching import overlaid, weight_name
from peft_ref.model.numbers import as_stored, is_finite, wide
from peft_ref.model.switching import refuse_together, refuse_tokens
from peft_ref.model.ties import Ties, changed_name, check_ties
from peft_ref.model.tokens import followed_everywhere
from peft_ref.stack import Adapter, step


def merge(model: Adapted, names: Sequence[str] | None = None, *, safe: bool = False, ties: Ties = "refuse") -> Adapted:
    """`model` with these adapters merged, or the active ones. `ties` says what a merge into a tied weight does."""
    check_ties(ties)
    model.refuse_attention("merge")
    if isinstance(names, str):
        raise ConfigError(f"names={names!r} is one name (HF PEFT refuses it too).\n  Give a list of names.")
    if not model.enabled:
        raise ConfigError("the adapters are disabled, and HF's next forward would unmerge them.\n  Enable them first.")
    wanted = model.active_names if names is None else tuple(names)
    for name in wanted:
        model.attached(name)
    if len(set(wanted)) < len(wanted):
        raise ConfigError(f"adapters {', '.join(wanted)}: one is there twice, and would be merged twice.\n  Name each once.")
    refuse_together(model, wanted, "merged")
    before = () if any(_replaces_all(model, name) for name in wanted) else model.merged.names
    every = (*before, *(name for name in wanted if name not in before))
    refuse_tokens(model, every, "merged")
    ties = model.merged.ties if ties == "refuse" else ties
    weights: dict[str, Array] = {}
    untied = frozenset[str]()
    for module in model.modules():
        for name in model.order(module, every):
            untied |= _merge_at(model, module, name, weights, safe, ties)
    return replace(model, merged=Merged(every, weights, untied, ties))


def unmerge(model: Adapted) -> Adapted:
    """`model` with nothing merged."""
    model.refuse_attention("unmerge")
    return replace(model, merged=Merged())


def unload(model: Adapted) -> Adapted:
    """The model without adapters, its weights as they are now. The pristine ones are still in `base`."""
    model.refuse_attention("unload")
    copies: Mapping[str, Array] = {k: v for n in model.active_names for k, v in model.adapters[n].saved.items() if _known(model, k)}
    bare = overlaid(model, model.merged.weights, model.merged.untied)
    ties = model.base.tied()
    kept = {s for n in model.active_names for s in model.adapters[n].tied}
    apart = frozenset(s for s, first in ties.items() if (s in copies or first in copies) and s not in kept)
    bare = overlaid(bare, copies, apart)
    return Adapted(base=bare.base, changed=bare.changed, untied=bare.untied, mixed=bare.mixed)


def merge_and_unload(model: Adapted, names: Sequence[str] | None = None, *, safe: bool = False, ties: Ties = "refuse") -> Adapted:
    """The model without adapters, with what these, or the active ones, do in its weights."""
    return unload(merge(model, names, safe=safe, ties=ties))


def _replaces_all(model: Adapted, name: str) -> bool:
    """Whether an adapter is merged in the place of what is merged already, which PEFT unmerges."""
    method = model.adapters[name].config.method
    return isinstance(method, WeightMethod) and method.swaps


def _merge_at(model: Adapted, module: str, name: str, weights: dict[str, Array], safe: bool, ties: Ties) -> frozenset[str]:
    """Merges one adapter at one module into `weights`; returns the second names that this parts."""
    layer, key, bias = model.layer(module), weight_name(model, module), model.modules()[module].bias
    method, params, _ = model.adapters[name].adapter(module)
    what = f"merging {name!r} at {module!r}"
    if ties == "refuse" and followed_everywhere(model.adapters[name].following, module):
        ties = "share"
    kept, untied = changed_name(model.base, key, ties, what)
    frozen = model.frozen(key)
    stored = weights.get(kept, frozen)
    stored_bias = None if bias is None else weights.get(bias, weights.get(model.base.resolve(bias), model.frozen(bias)))
    b = None if stored_bias is None else wide(stored_bias)
    b0 = None if bias is None else wide(model.frozen(bias))
    W_new, b_new = step(layer, Adapter(method, params), wide(layer.fold(stored)), b, wide(layer.fold(frozen)), b0)
    if safe and not (is_finite(W_new) and is_finite(b_new)):
        raise NotMergeableError(f"{what}: the merged weight is not finite (HF PEFT refuses it too).\n  The adapter is broken.")
    weights[kept] = as_stored(layer.unfold(W_new), stored)
    if bias is not None and b_new is not None and b_new is not b:
        bias_kept, apart = changed_name(model.base, bias, ties, what)
        weights[bias_kept] = as_stored(b_new, stored_bias)
        untied |= apart
    return untied


def _known(model: Adapted, name: str) -> bool:
    return name in model.base.parameters() or name in model.base.tied() or name in model.base.buffers()
