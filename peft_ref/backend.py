"""What an array library has to say of itself before the mathematics runs on it, and how one is found.

A backend wraps no operation: the array API is the operations. It says how a NumPy array comes in, how it comes out, in which dtypes and
on which device arithmetic is done there, and it sets the library's switches so that float64 means float64.

    rounding    16-bit floats are kept in float32 and computed in float32; a value is rounded once on its way in and once on its way out
    scope       `with backend.scope():` around everything computed holds the switches that a library cannot set for one array
    probing     constructing a backend imports its library and makes a trip there and back in every dtype

Backends are found through the entry-point group `peft_ref.backends`, or named "module:Class". How to write one: backends/README.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, TypeAlias, final

import numpy as np

from peft_ref.arrays import Array, Namespace, namespace
from peft_ref.errors import ConfigError, PeftRefError

GROUP = "peft_ref.backends"
DTYPES = ("float64", "float32", "float16", "bfloat16")

Host: TypeAlias = "np.ndarray[Any, Any]"


class BackendProblem(PeftRefError):
    """A backend that cannot be used here."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class BackendMissing(BackendProblem):
    """Its library, or the device it needs, is not here: a reason to skip."""


class BackendBroken(BackendProblem):
    """Its library is here and does not do what is asked of it: a reason to fail."""


class Backend(ABC):
    """One array library, ready to compute. A subclass names the library and writes `hold` and `fetch`."""

    name: ClassVar[str]
    library: ClassVar[str]  # the module to import
    install: ClassVar[str]  # what to type when it is missing
    held: ClassVar[tuple[str, ...]] = ("float64", "float32")  # the dtypes that arithmetic is done in
    extensions: ClassVar[frozenset[str]] = frozenset({"linalg", "fft"})

    @abstractmethod
    def hold(self, array: Host) -> Array:
        """A NumPy array of floats (of a dtype in `held`), integers or booleans as an array of the library, dtype kept."""

    @abstractmethod
    def fetch(self, array: Array) -> Host:
        """An array of the library as a NumPy array, dtype kept. A lazy one is computed now."""

    def prepare(self) -> None:  # noqa: B027 - optional, not forgotten
        """Set up the library once, after its import. Raise `BackendMissing` when what it runs on is not here."""

    def settle(self, arrays: Sequence[Array]) -> list[Array]:
        """The same arrays, lazy ones computed together, so that what they share is computed once. Optional: `fetch` computes too."""
        return list(arrays)

    def scope(self) -> AbstractContextManager[Any]:
        """Everything is computed inside this. The default changes nothing."""
        return nullcontext()

    @property
    def device(self) -> str:
        """Where its arrays live."""
        return "cpu"

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @final
    def __init__(self) -> None:
        try:
            self.module: Any = import_module(self.library)
            self.prepare()
            self._probe()
        except BackendProblem:
            raise
        except ModuleNotFoundError as e:
            if e.name is not None and f"{self.library}.".startswith(f"{e.name}."):
                raise BackendMissing(f"backend {self.name!r}: no module named {e.name!r}. Install it: {self.install}") from e
            raise self._broken(e) from e
        except Exception as e:
            raise self._broken(e) from e

    @final
    def __repr__(self) -> str:
        return f"<backend {self.name}: {self.library} {self.version} on {self.device}>"

    @property
    @final
    def dtypes(self) -> tuple[str, ...]:
        """The float dtypes that may be asked for: those computed in, and those rounded from them."""
        return tuple(dtype for dtype in DTYPES if compute_dtype(dtype) in self.held)

    @property
    @final
    def xp(self) -> Namespace:
        """The array API namespace of its arrays, as the mathematics sees it."""
        return namespace(self.from_numpy(np.zeros(1), self.dtypes[0]))

    @final
    def from_numpy(self, array: Host, dtype: str) -> Array:
        """`array` rounded to `dtype` and held in `compute_dtype(dtype)`; integers and booleans stay what they are."""
        self._check(dtype)
        with self.scope():
            if array.dtype.kind in "biu":
                return self.hold(array.copy())
            return self.hold(round_to(array, dtype).astype(compute_dtype(dtype)))

    @final
    def to_numpy(self, array: Array, dtype: str) -> Host:
        """`array` as float64 numbers that `dtype` can hold, rounded once; integers and booleans stay what they are."""
        self._check(dtype)
        host = self._host(array)
        return host if host.dtype.kind in "biu" else round_to(host, dtype)

    @final
    def dtype_of(self, array: Array) -> str:
        """The name of the dtype an array of the library has."""
        return str(self._host(array).dtype.name)

    @final
    def _host(self, array: Array) -> Host:
        with self.scope():
            return np.asarray(self.fetch(array))

    @final
    def _check(self, dtype: str) -> None:
        if dtype not in self.dtypes:
            raise ConfigError(f"backend {self.name!r} has no dtype {dtype!r}.\n  It has {', '.join(self.dtypes)}.")

    @final
    def _probe(self) -> None:
        sent = np.asarray([[1.5, -2.0], [0.25, 8.0]])
        for dtype in self.dtypes:
            with self.scope():
                x = self.from_numpy(sent, dtype)
                product = namespace(x).sum(x * x @ x, axis=0)
            for what, got, expected in (("a trip there and back", x, sent), ("x * x @ x", product, np.sum(sent * sent @ sent, axis=0))):
                if self.dtype_of(got) != compute_dtype(dtype):
                    raise BackendBroken(
                        f"backend {self.name!r}: {what} in {dtype} is held in {self.dtype_of(got)}, not {compute_dtype(dtype)}"
                    )
                if not np.array_equal(self.to_numpy(got, dtype), round_to(expected, dtype)):
                    raise BackendBroken(
                        f"backend {self.name!r}: {what} in {dtype} gave {self.to_numpy(got, dtype).tolist()}, expected {expected.tolist()}"
                    )

    @final
    def _broken(self, error: Exception) -> BackendBroken:
        return BackendBroken(f"backend {self.name!r}: {self.library} does not work here: {type(error).__name__}: {error}")


def compute_dtype(dtype: str) -> str:
    """The dtype that arithmetic on `dtype` is done in: 16-bit floats are computed in float32."""
    if dtype not in DTYPES:
        raise ConfigError(f"no float dtype {dtype!r}.\n  There are {', '.join(DTYPES)}.")
    return dtype if dtype in ("float64", "float32") else "float32"


def round_to(array: Host, dtype: str) -> Host:
    """`array` in float64, every value rounded once and to nearest even to one that `dtype` holds. What is too large becomes infinite."""
    if array.dtype.kind not in "fV":
        raise ConfigError(f"an array of {array.dtype} cannot be rounded to {dtype}.\n  Give real floating point numbers.")
    wide = array.astype(np.float64)
    if dtype == "float64":
        return wide
    with np.errstate(over="ignore"):
        if dtype == "bfloat16":
            import ml_dtypes

            return _odd_float32(wide).astype(ml_dtypes.bfloat16).astype(np.float64)
        return wide.astype(compute_dtype(dtype) if dtype == "float32" else np.float16).astype(np.float64)


def _odd_float32(wide: Host) -> Host:
    """float64 as float32, what is cut off kept as an odd last bit: ml_dtypes goes to bfloat16 through float32 and would round twice."""
    near = wide.astype(np.float32)
    cut = np.where(np.abs(near) > np.abs(wide), np.nextafter(near, np.float32(0)), near)
    odd: Host = cut.view(np.uint32) | (cut != wide).astype(np.uint32)
    return odd.view(np.float32)


def installed() -> dict[str, EntryPoint]:
    """The entry points of the group, by name. Empty in a checkout that was not installed."""
    return {point.name: point for point in sorted(entry_points(group=GROUP))}


def backends() -> dict[str, Backend | BackendProblem]:
    """Every installed backend, constructed, or the reason why it cannot be."""
    found: dict[str, Backend | BackendProblem] = {}
    for name, point in installed().items():
        try:
            found[name] = _construct(point.value)
        except BackendProblem as problem:
            found[name] = problem
    return found


def get_backend(name: str) -> Backend:
    """The backend of an installed name, or of "module:Class". Raises a `BackendProblem` when it cannot be had."""
    if ":" in name:
        return _construct(name)
    points = installed()
    if name not in points:
        known = ", ".join(points) or "none; a checkout that is not installed registers none (pip install -e .)"
        raise BackendMissing(
            f"no backend named {name!r}.\n  Installed: {known}.\n  Or name its class: 'peft_ref_backends.numpy:NumpyBackend'."
        )
    return _construct(points[name].value)


def _construct(path: str) -> Backend:
    module, _, attribute = path.partition(":")
    try:
        made = getattr(import_module(module), attribute)
    except ModuleNotFoundError as e:
        if e.name is not None and f"{module}.".startswith(f"{e.name}."):
            raise BackendMissing(f"backend {path!r}: no module named {e.name!r} on the import path.") from e
        raise BackendBroken(f"backend {path!r}: {module} cannot be imported: {e}") from e
    except Exception as e:
        raise BackendBroken(f"backend {path!r}: {module} cannot give {attribute!r}: {type(e).__name__}: {e}") from e
    if not (isinstance(made, type) and issubclass(made, Backend)):
        raise BackendBroken(f"backend {path!r} is no subclass of peft_ref.backend.Backend.")
    return made()
