"""The numbers of an adapter, one module at a time: norms, NaNs, and the singular values of what it adds to each weight.

    low rank      dW = B A:  B = Q R,  A^T = P T,  and the singular values of dW are those of the small R T^T. dW is never formed
    any other     dW (out, in), of one module at a time; of a method that changes the weight by what it is, W' - W, for which W is needed

    energy(k)         sum_{i<=k} s_i^2 / sum_i s_i^2
    effective rank    exp(-sum_i p_i ln p_i),  p_i = s_i^2 / sum_j s_j^2:   k if k of them are equal and the others zero

Everything is computed in float64, whatever the file's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np

from peft_ref.checkpoints.fitting import Fit, Renaming
from peft_ref.checkpoints.inspecting import ODD, WRONG, Finding, Inspection, gathered
from peft_ref.contracts import Additive, LowRank, WeightMethod
from peft_ref.errors import ConfigError, PeftRefError
from peft_ref.files.keys import PREFIX
from peft_ref.files.safetensors import NDArray, RawTensor
from peft_ref.layers import Layer
from peft_ref.model import adapt, load

NEEDS_BASE = "what it adds depends on the frozen weight: give the base"
NEEDS_SIZES = "what it adds depends on sizes of the layer that its tensors do not tell: give the base"
NEEDS_SHARED = "what its layers share is not in the file: give the base"
UNTRAINED = "Nothing is added to any weight: the adapter is as it started, and was not trained."


BROKEN = "it has a NaN or an infinity"

Found: TypeAlias = tuple[WeightMethod[Any], Layer, Any]
Read: TypeAlias = Callable[[str], Found]


class TensorNumbers(NamedTuple):
    norm: float
    largest: float
    astray: int  # elements that are NaN or infinite
    places: bool = False  # integers, which are no numbers to be trained


@dataclass(frozen=True, kw_only=True)
class DeltaNumbers:
    norm: float | None = None  # Frobenius, of what is added to the weight
    relative: float | None = None  # the same over the weight's own
    singular: tuple[float, ...] | None = None
    why_not: str = ""  # it could not be told

    @property
    def effective_rank(self) -> float | None:
        return None if self.singular is None else effective_rank(self.singular)

    def rank_of_energy(self, share: float) -> int | None:
        return None if self.singular is None else rank_of_energy(self.singular, share)


@dataclass(frozen=True, kw_only=True)
class Measured:
    tensors: Mapping[str, TensorNumbers]  # by key, every tensor of the file
    deltas: Mapping[str, DeltaNumbers]  # by module
    findings: tuple[Finding, ...] = ()


def effective_rank(singular: tuple[float, ...]) -> float:
    """How many equal singular values would spread the energy as these do."""
    squares = np.square(np.asarray(singular) / max(max(singular, default=0.0), np.finfo(float).tiny))
    if not (total := float(np.sum(squares))):
        return 0.0
    p = squares[squares > 0] / total
    return float(np.exp(-np.sum(p * np.log(p))))


def rank_of_energy(singular: tuple[float, ...], share: float) -> int:
    """How many of the largest hold that share of the sum of squares."""
    squares = np.square(np.asarray(singular) / max(max(singular, default=0.0), np.finfo(float).tiny))
    total = float(np.sum(squares))
    return int(np.searchsorted(np.cumsum(squares), share * total * (1 - 1e-12)) + 1) if total else 0


def singular_values(method: WeightMethod[Any], layer: Layer, params: Any, W: NDArray | None = None, b: NDArray | None = None) -> NDArray:
    """Those of what the adapter adds to the weight matrix (out, in), largest first. Of a low-rank delta as many as its rank."""
    if isinstance(method, LowRank):
        return cast(NDArray, np.linalg.svd(_core(method, layer, params), compute_uv=False))
    return cast(NDArray, np.linalg.svd(_delta(method, layer, params, W, b), compute_uv=False))


def delta_norm(method: WeightMethod[Any], layer: Layer, params: Any, W: NDArray | None = None, b: NDArray | None = None) -> float:
    delta = _core(method, layer, params) if isinstance(method, LowRank) else _delta(method, layer, params, W, b)
    return float(np.linalg.norm(delta))


def _core(method: LowRank[Any], layer: Layer, params: Any) -> NDArray:
    """A small matrix with the singular values of B A. In a grouped convolution every group of B reads its own rows of A."""
    f = method.factors(params)
    B, A, g = np.asarray(f.B), np.asarray(f.A), layer.groups
    if g > 1:
        rows, own = B.shape[0] // g, B.shape[1]
        whole = np.zeros((B.shape[0], g * own))
        for i in range(g):
            whole[i * rows : (i + 1) * rows, i * own : (i + 1) * own] = B[i * rows : (i + 1) * rows]
        B = whole
    R, T = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (B, A.T))
    return cast(NDArray, R @ T.T)


def _delta(method: WeightMethod[Any], layer: Layer, params: Any, W: NDArray | None, b: NDArray | None) -> NDArray:
    if isinstance(method, Additive):
        return np.asarray(method.delta(layer, params).W)
    assert W is not None
    return np.asarray(method.weight(layer, params, W, b, W)[0]) - W


# ---- reading


def measured(
    inspection: Inspection, fit: Fit | None, *, spectrum: bool, step: Callable[[int, int, str], None] = lambda n, total, name: None
) -> Measured:
    """Every tensor's numbers, and every module's; with `spectrum` the singular values too."""
    tensors, astray = dict[str, TensorNumbers](), dict[str, str]()
    for key in inspection.file.entries:
        tensor = inspection.file.tensor(key)
        if isinstance(tensor, RawTensor):
            continue
        tensors[key] = numbers = _numbers(tensor)
        if numbers.astray:
            astray[key] = f"{key} has {numbers.astray} elements of {tensor.size} that are NaN or infinite."
    names, read = _reader(inspection, fit)
    broken = {name for name, m in inspection.modules.items() for key in m.tensors if _key(inspection, name, key) in astray}
    deltas = {}
    for n, name in enumerate(names):
        step(n, len(names), name)
        deltas[name] = DeltaNumbers(why_not=BROKEN) if name in broken else _of_module(inspection, fit, name, read, spectrum)
    return Measured(tensors=tensors, deltas=deltas, findings=(*gathered(WRONG, astray), *_idle(inspection, tensors, deltas)))


def _numbers(tensor: NDArray) -> TensorNumbers:
    if tensor.dtype.kind in "iub":
        return TensorNumbers(0.0, float(np.max(np.abs(tensor.astype(np.int64)), initial=0)), 0, places=True)
    wide = tensor.astype(np.float64)
    finite = np.isfinite(wide)
    astray = int(tensor.size - np.count_nonzero(finite))
    return TensorNumbers(float(np.linalg.norm(wide.reshape(-1))), float(np.max(np.abs(wide[finite]), initial=0.0)), astray)


def _idle(inspection: Inspection, tensors: Mapping[str, TensorNumbers], deltas: Mapping[str, DeltaNumbers]) -> Iterator[Finding]:
    """What was not trained."""
    idle = {name: f"{name}: nothing is added to the weight." for name, delta in deltas.items() if delta.norm == 0}
    if idle and len(idle) == len(deltas):
        yield Finding(WRONG, UNTRAINED)
        return
    yield from gathered(ODD, idle)
    zero = [key for key, numbers in tensors.items() if not numbers.largest and not numbers.astray and not numbers.places]
    told = tuple(f"{PREFIX}{name}." for name in idle)
    yield from gathered(ODD, {key: f"{key} is all zeros." for key in zero if not key.startswith(told)})


def _of_module(inspection: Inspection, fit: Fit | None, name: str, read: Read, spectrum: bool) -> DeltaNumbers:
    try:
        method, layer, p = read(name)
        W, b = _frozen(fit, name, layer)
        if W is None and not isinstance(method, LowRank | Additive):
            return DeltaNumbers(why_not=NEEDS_BASE)
        if W is None and isinstance(method, Additive) and not all(inspection.modules[name].told):
            return DeltaNumbers(why_not=NEEDS_SIZES)
        singular = singular_values(method, layer, p, W, b) if spectrum else None
        norm = delta_norm(method, layer, p, W, b) if singular is None else float(np.linalg.norm(singular))
    except PeftRefError as error:
        return DeltaNumbers(why_not=str(error).splitlines()[0])
    own = None if W is None else float(np.linalg.norm(W))
    return DeltaNumbers(
        norm=norm, relative=norm / own if own else None, singular=None if singular is None else tuple(float(s) for s in singular)
    )


def _frozen(fit: Fit | None, name: str, layer: Layer) -> tuple[NDArray | None, NDArray | None]:
    """The base's weight as a matrix and its bias, in float64."""
    module = None if fit is None else fit.graph.modules().get(fit.renamed(name))
    if fit is None or module is None or module.weight is None:
        return None, None
    W = layer.fold(np.asarray(fit.graph.weight(module.weight)).astype(np.float64))
    return W, None if module.bias is None else np.asarray(fit.graph.weight(module.bias)).astype(np.float64)


def _reader(inspection: Inspection, fit: Fit | None) -> tuple[tuple[str, ...], Read]:
    """The modules' names, and a function that reads one of them: its method, layer and parameters in float64."""
    known = {name: m for name, m in inspection.modules.items() if m.layer is not None}
    layers = {name: (fit.layers if fit is not None else {}).get(name) or cast(Layer, m.layer) for name, m in known.items()}
    specs = [spec for name, module in known.items() for spec in module.method.spec(layers[name])]
    if inspection.found.shared or any(spec.shared or not spec.saved for spec in specs):
        return _reader_on_base(inspection, fit)

    def read(name: str) -> Found:
        if name not in known:
            raise PeftRefError("its tensors fit no layer")
        method, layer = known[name].method, layers[name]
        own = {key: inspection.file.read(_key(inspection, name, key)) for key in known[name].tensors}
        return method, layer, _wide(method.unpack(layer, own, where=PREFIX + name, own=True))

    return tuple(inspection.modules), read


def _reader_on_base(inspection: Inspection, fit: Fit | None) -> tuple[tuple[str, ...], Read]:
    """What layers share, or a seed makes again: it takes the model to tell which of them, and how large."""
    if fit is None or fit.renamed != Renaming() or any(finding.level == WRONG for finding in fit.findings):
        return tuple(inspection.modules), _refusing(NEEDS_SHARED)
    try:
        modules = load(adapt(fit.graph), inspection.folder, "inspected", lazy=True).adapters["inspected"].modules
    except ConfigError as error:
        return tuple(inspection.modules), _refusing(str(error))

    def read(name: str) -> Found:
        method, layer, params = modules[name]
        return method, layer, _wide(params)

    return tuple(modules), read


def _refusing(why: str) -> Read:
    def refuse(name: str) -> Found:
        raise PeftRefError(why)

    return refuse


def _key(inspection: Inspection, name: str, key: str) -> str:
    """The key in the file, which of an older PEFT's is spelled otherwise."""
    own = f"{PREFIX}{name}.{key}"
    if own in inspection.file.entries:
        return own
    wanted = inspection.modules[name].tensors[key]
    return next(k for k, entry in inspection.file.entries.items() if entry == wanted)  # where it lies is its own


def _wide(params: Any) -> Any:
    """Numbers in float64; places in a weight stay integers."""
    arrays = [None if p is None else np.asarray(p) for p in params]
    return type(params)(*(a if a is None or a.dtype.kind in "iub" else a.astype(np.float64) for a in arrays))
