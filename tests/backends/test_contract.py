"""What the contract derives for every backend, and how a backend that is missing or broken says so."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from peft_ref.arrays import namespace, zeros_like
from peft_ref.backend import DTYPES, Backend, BackendBroken, BackendMissing, backends, compute_dtype, get_backend, round_to
from peft_ref.errors import ConfigError

ROOT = Path(__file__).parents[2]
TABLE: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["peft_ref.backends"]


@pytest.fixture(params=list(TABLE), scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    try:
        return get_backend(TABLE[request.param])
    except BackendMissing as missing:
        pytest.skip(missing.reason)


# Every backend


def test_a_backend_bears_the_name_it_is_registered_under() -> None:
    for name, path in TABLE.items():
        module, _, attribute = path.partition(":")
        source = (ROOT / "backends" / (module.replace(".", "/") + ".py")).read_text()
        assert f"class {attribute}(Backend)" in source
        assert f'name: ClassVar[str] = "{name}"' in source


def test_a_trip_there_and_back_only_rounds_to_the_dtype(backend: Backend) -> None:
    values = np.random.default_rng(0).normal(size=(3, 4)) * 10.0 ** np.arange(-2, 2)
    for dtype in backend.dtypes:
        back = backend.to_numpy(backend.from_numpy(values, dtype), dtype)
        assert back.dtype == np.float64
        np.testing.assert_array_equal(back, round_to(values, dtype))


def test_arrays_are_held_in_the_dtype_that_is_computed_in(backend: Backend) -> None:
    for dtype in backend.dtypes:
        assert backend.dtype_of(backend.from_numpy(np.ones(2), dtype)) == compute_dtype(dtype)


@pytest.mark.parametrize("array", [np.arange(3), np.arange(6, dtype=np.int32).reshape(2, 3), np.asarray([True, False])])
def test_integers_and_booleans_stay_what_they_are(backend: Backend, array: np.ndarray[Any, Any]) -> None:
    for dtype in backend.dtypes:
        back = backend.to_numpy(backend.from_numpy(array, dtype), dtype)
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (2, 1, 3)])
def test_shapes_survive_even_empty_ones(backend: Backend, shape: tuple[int, ...]) -> None:
    assert backend.to_numpy(backend.from_numpy(np.ones(shape), "float32"), "float32").shape == shape


def test_what_comes_in_is_a_copy(backend: Backend) -> None:
    for array in (np.ones(3), np.arange(3)):
        held = backend.from_numpy(array, "float32")
        before = backend.to_numpy(held, "float32").copy()
        array[0] = 7
        np.testing.assert_array_equal(backend.to_numpy(held, "float32"), before)


def test_float64_arithmetic_with_a_python_number_has_float64_bits(backend: Backend) -> None:
    if "float64" not in backend.held:
        pytest.skip(f"{backend} has no float64")
    values = np.random.default_rng(1).normal(size=50)
    with backend.scope():
        got = backend.from_numpy(values, "float64") * (1 / 3)
    np.testing.assert_array_equal(backend.to_numpy(got, "float64"), values * (1 / 3))


def test_float32_products_keep_24_bits(backend: Backend) -> None:
    """TensorFloat32 or bfloat16 passes would be off by 2^-11 and more."""
    rng = np.random.default_rng(2)
    a, b = (round_to(rng.normal(size=(64, 64)), "float32") for _ in range(2))
    with backend.scope():
        got = backend.from_numpy(a, "float32") @ backend.from_numpy(b, "float32")
    assert np.max(np.abs(backend.to_numpy(got, "float32") - a @ b)) < 64 * 2.0**-24 * np.max(np.abs(a) @ np.abs(b)) / 4


def test_the_namespace_creates_arrays_where_its_arrays_live(backend: Backend) -> None:
    with backend.scope():
        like = backend.from_numpy(np.ones(2), backend.dtypes[0])
        made = zeros_like((2, 3), like)
    assert namespace(made) is namespace(like)
    assert namespace(made) is backend.xp
    assert backend.dtype_of(made) == backend.dtypes[0]


def test_linalg_gives_the_reduced_svd_and_qr_where_it_is_claimed(backend: Backend) -> None:
    if "linalg" not in backend.extensions:
        pytest.skip(f"{backend} has no linalg")
    dtype = backend.dtypes[0]
    values = np.random.default_rng(3).normal(size=(5, 3))
    for host in (values, values.T.copy()):
        with backend.scope():
            W = backend.from_numpy(host, dtype)
            U, S, Vh = (backend.to_numpy(part, dtype) for part in backend.xp.linalg.svd(W, full_matrices=False))
            Q, R = (backend.to_numpy(part, dtype) for part in backend.xp.linalg.qr(W))
        assert (U.shape, S.shape, Vh.shape) == ((host.shape[0], 3), (3,), (3, host.shape[1]))
        np.testing.assert_allclose(U * S @ Vh, host, atol=1e-5 if dtype == "float32" else 1e-13)
        np.testing.assert_allclose(Q @ R, host, atol=1e-5 if dtype == "float32" else 1e-13)


def test_fft_computes_in_the_dtype_it_was_given_where_it_is_claimed(backend: Backend) -> None:
    if "fft" not in backend.extensions:
        pytest.skip(f"{backend} has no fft")
    values = np.random.default_rng(4).normal(size=6)
    for dtype in backend.held:
        with backend.scope():
            there = backend.xp.fft.rfft(backend.from_numpy(values, dtype))
            back = backend.xp.fft.irfft(there, n=6)
        assert backend.dtype_of(back) == dtype
        np.testing.assert_allclose(backend.to_numpy(back, dtype), values, atol=1e-6 if dtype == "float32" else 1e-14)


def test_a_dtype_it_has_not_is_refused_with_those_it_has(backend: Backend) -> None:
    with pytest.raises(ConfigError, match="float64"):
        backend.from_numpy(np.ones(1), "float8")


def test_two_libraries_in_one_expression_are_refused(backend: Backend) -> None:
    if backend.name == "numpy":
        return
    with pytest.raises(TypeError):
        namespace(backend.from_numpy(np.ones(1), "float32"), np.ones(1))


# Switches are local


def test_torchs_scope_raises_precision_stops_autograd_and_puts_both_back() -> None:
    torch = pytest.importorskip("torch")
    backend = get_backend(TABLE["torch"])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with backend.scope():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.is_grad_enabled()
    finally:
        torch.set_float32_matmul_precision(before)


def test_jax_keeps_its_own_default_outside_the_scope() -> None:
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
    backend = get_backend(TABLE["jax"])
    backend.from_numpy(np.ones(1), "float64")
    with backend.scope():
        assert jax.config.jax_enable_x64
        assert jax.config.jax_default_matmul_precision == "highest"
    assert (jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision) == before


def test_numpys_arrays_cannot_be_written_into() -> None:
    array = get_backend(TABLE["numpy"]).from_numpy(np.ones(2), "float64")
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 2


def test_importing_the_contract_imports_no_array_library() -> None:
    code = "import sys, peft_ref.backend, peft_ref_backends; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "jax", "mlx", "dask", "cupy", "array_api_strict", "array_api_compat", "ml_dtypes"} & set(done.stdout.split())


# Missing and broken


class Sketch(Backend):
    """NumPy, for tests that spoil one thing."""

    name = "sketch"
    library = "numpy"
    install = "pip install sketch"

    def hold(self, array: np.ndarray[Any, Any]) -> Any:
        return array

    def fetch(self, array: Any) -> np.ndarray[Any, Any]:
        return np.asarray(array)


class NoLibrary(Sketch):
    library = "peft_ref_no_such_library"


class Narrow(Sketch):
    held = ("float32",)


class Truncating(Sketch):
    """What JAX does without x64."""

    def hold(self, array: np.ndarray[Any, Any]) -> Any:
        return array.astype(np.float32) if array.dtype == np.float64 else array


class Wrong(Sketch):
    def fetch(self, array: Any) -> np.ndarray[Any, Any]:
        return np.asarray(array).T


class Raising(Sketch):
    def prepare(self) -> None:
        raise OSError("libfoo.so.1: cannot open shared object file")


class NoDevice(Sketch):
    def prepare(self) -> None:
        raise BackendMissing("backend 'sketch': no device")


class HalfInstalled(Sketch):
    def prepare(self) -> None:
        import peft_ref_no_such_dependency  # type: ignore[import-not-found]  # noqa: F401  # not there on purpose


def test_a_library_that_is_not_installed_is_missing_and_says_what_to_type() -> None:
    with pytest.raises(BackendMissing, match=r"no module named 'peft_ref_no_such_library'\. Install it: pip install sketch"):
        NoLibrary()


def test_a_device_that_is_not_there_is_missing() -> None:
    with pytest.raises(BackendMissing, match="no device"):
        NoDevice()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Raising, "OSError: libfoo.so.1"),
        (HalfInstalled, "No module named 'peft_ref_no_such_dependency'"),
        (Truncating, "in float64 is held in float32"),
        (Wrong, "a trip there and back in float64 gave"),
    ],
)
def test_a_library_that_does_not_do_its_work_is_broken_and_says_how(kind: type[Backend], reason: str) -> None:
    with pytest.raises(BackendBroken, match=reason):
        kind()


def test_a_backend_without_float64_offers_and_refuses_accordingly() -> None:
    backend = Narrow()
    assert backend.dtypes == ("float32", "float16", "bfloat16")
    with pytest.raises(ConfigError, match=r"no dtype 'float64'\.\n  It has float32, float16, bfloat16\."):
        backend.from_numpy(np.ones(1), "float64")


def test_a_backend_with_both_offers_every_dtype() -> None:
    assert Sketch().dtypes == DTYPES


# Discovery


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution that registers a good, a missing, a broken and a senseless backend."""
    (tmp_path / "sketchy.py").write_text(
        "import numpy as np\n"
        "from peft_ref.backend import Backend\n"
        "class Good(Backend):\n"
        "    name, library, install = 'good', 'numpy', ''\n"
        "    def hold(self, array): return array\n"
        "    def fetch(self, array): return np.asarray(array)\n"
        "class Missing(Good):\n"
        "    name, library = 'missing', 'peft_ref_no_such_library'\n"
        "class Broken(Good):\n"
        "    name = 'broken'\n"
        "    def prepare(self): raise RuntimeError('out of order')\n"
        "NOT_ONE = 3\n"
    )
    info = tmp_path / "sketchy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sketchy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[peft_ref.backends]\nsk-good = sketchy:Good\nsk-missing = sketchy:Missing\nsk-broken = sketchy:Broken\nsk-none = sketchy:NOT_ONE\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("sketchy", None)


@pytest.mark.usefixtures("installed")
def test_discovery_gives_each_backend_or_the_reason_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft_ref.backend as module

    every = module.installed
    monkeypatch.setattr(module, "installed", lambda: {name: point for name, point in every().items() if name.startswith("sk-")})
    found = backends()
    assert list(found) == ["sk-broken", "sk-good", "sk-missing", "sk-none"]
    assert isinstance(found["sk-good"], Backend)
    assert isinstance(found["sk-missing"], BackendMissing)
    assert isinstance(found["sk-broken"], BackendBroken)
    assert "out of order" in str(found["sk-broken"])
    assert "no subclass" in str(found["sk-none"])


@pytest.mark.usefixtures("installed")
def test_an_installed_backend_is_got_by_name_and_an_unknown_name_lists_them() -> None:
    assert get_backend("sk-good").name == "good"
    with pytest.raises(BackendMissing, match=r"no backend named 'nix'.\n  Installed: .*sk-broken, sk-good, sk-missing, sk-none"):
        get_backend("nix")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("path", "kind", "reason"),
    [
        ("nowhere:Backend", BackendMissing, "no module named 'nowhere'"),
        ("sketchy:Nothing", BackendBroken, "cannot give 'Nothing'"),
        ("sketchy:NOT_ONE", BackendBroken, "no subclass"),
        ("sketchy:Missing", BackendMissing, "peft_ref_no_such_library"),
    ],
)
def test_a_class_named_by_its_path_says_what_is_wrong_with_it(path: str, kind: type[Exception], reason: str) -> None:
    with pytest.raises(kind, match=reason):
        get_backend(path)


# CuPy, whose code must be right on machines that have no GPU to show it


def fake_cupy(count: int | None) -> ModuleType:
    """CuPy as far as the backend calls it, on NumPy; `count` devices, or None for a driver that is not there."""

    class CUDARuntimeError(RuntimeError):
        pass

    def get_device_count() -> int:
        if count is None:
            raise CUDARuntimeError("cudaErrorInsufficientDriver")
        return count

    module: Any = ModuleType("cupy")
    module.__version__ = "13"
    module.asarray, module.asnumpy = np.asarray, np.asarray
    module.cuda = ModuleType("cupy.cuda")
    module.cuda.runtime = ModuleType("cupy.cuda.runtime")
    module.cuda.runtime.CUDARuntimeError, module.cuda.runtime.getDeviceCount = CUDARuntimeError, get_device_count
    module.cuda.Device = type("Device", (), {"id": 0})
    return module


def test_cupy_without_a_device_is_missing_and_with_tensorfloat32_it_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUPY_TF32", raising=False)
    for count, reason in ((None, "cudaErrorInsufficientDriver"), (0, "no CUDA device")):
        monkeypatch.setitem(sys.modules, "cupy", fake_cupy(count))
        with pytest.raises(BackendMissing, match=reason):
            get_backend(TABLE["cupy"])
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(1))
    assert repr(get_backend(TABLE["cupy"])) == "<backend cupy: cupy 13 on cuda:0>"
    monkeypatch.setenv("CUPY_TF32", "1")
    with pytest.raises(BackendBroken, match="CUPY_TF32"):
        get_backend(TABLE["cupy"])
