"""The wheel: what is inside, and that it works away from the checkout. And what a plain install weighs."""

from __future__ import annotations

import configparser
import importlib.util
import sys
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

LIMIT = 100e6  # bytes, on disk, compiled files included

# Runs in a fresh interpreter with the wheel's folder in front and the checkout nowhere on the path.
AWAY = """\
import runpy, sys
from pathlib import Path

target, root, command = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
sys.path[:] = [str(target), *(p for p in sys.path if p and not Path(p).resolve() in (root, root / "backends"))]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
import peft_ref, peft_ref_backends
from peft_ref import *

assert target in Path(peft_ref.__file__).parents and target in Path(next(iter(peft_ref_backends.__path__))).parents
for name in peft_ref.__all__:
    eval(name)
if command:
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def wheel(root: Path, run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("build", "hatchling"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, root)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip")
    target = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def source_files(root: Path) -> Iterable[Path]:
    for top in (root / "peft_ref", root / "backends" / "peft_ref_backends"):
        yield from (p.relative_to(top.parent) for p in top.rglob("*") if p.is_file() and p.suffix != ".pyc")


def test_the_wheel_has_two_packages_and_nothing_else(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in names(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"peft_ref", "peft_ref_backends"}


def test_the_wheel_has_every_source_file(wheel: Path, root: Path) -> None:
    inside = {name for name in names(wheel) if ".dist-info/" not in name}
    assert inside == {p.as_posix() for p in source_files(root)}
    assert {"peft_ref/py.typed", "peft_ref_backends/py.typed"} <= inside


def test_the_wheel_is_typed_licensed_and_has_the_version_of_the_source(wheel: Path) -> None:
    import peft_ref

    assert wheel.name == f"peft_ref-{peft_ref.__version__}-py3-none-any.whl"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names(wheel))


def test_every_entry_point_is_in_the_wheel(wheel: Path) -> None:
    inside = names(wheel)
    points = configparser.ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        points.read_string(archive.read(next(name for name in inside if name.endswith("entry_points.txt"))).decode())
        assert set(points.sections()) == {"console_scripts", "peft_ref.backends"}
        for section in points.sections():
            for name, target in points[section].items():
                module, _, attribute = target.partition(":")
                path = module.replace(".", "/")
                files = [f for f in (f"{path}.py", f"{path}/__init__.py") if f in inside]
                assert files, f"{section} {name} = {target}: there is no {path}.py"
                source = archive.read(files[0]).decode()
                assert f"class {attribute}" in source or f"def {attribute}(" in source, f"{name}: no {attribute} in {files[0]}"


def test_the_wheel_works_away_from_the_checkout(installed: Path, root: Path, run: Any, tmp_path: Path) -> None:
    run(sys.executable, "-c", AWAY, installed, root, cwd=tmp_path, env={"PYTHONPATH": ""})


def test_the_command_line_works_away_from_the_checkout(installed: Path, root: Path, run: Any, tmp_path: Path) -> None:
    if not (root / "peft_ref" / "cli").is_dir():
        pytest.skip("there is no peft_ref/cli yet")
    shown = run(sys.executable, "-c", AWAY, installed, root, "peft_ref.cli", "--help", cwd=tmp_path, env={"PYTHONPATH": ""})
    assert "usage: peft-ref" in shown


def test_a_plain_install_stays_under_a_hundred_megabytes(installed: Path, root: Path) -> None:
    sizes = {name: installed_bytes(name) for name in closure(root)}
    sizes["peft-ref"] = sum(p.stat().st_size for p in installed.rglob("*") if p.is_file())
    table = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sorted(sizes.items(), key=lambda item: -item[1]))
    assert sizes["numpy"] > 20e6, f"NumPy alone is bigger than this, so the sizes are not what is on disk: {table}"
    assert sum(sizes.values()) < LIMIT, f"{sum(sizes.values()) / 1e6:.1f} MB: {table}"


def closure(root: Path) -> set[str]:
    """The distributions that `pip install .` brings, without extras, as this interpreter has them."""
    import tomllib

    requirements = pytest.importorskip("packaging.requirements", reason="packaging comes with pytest")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting, found = list(project["dependencies"]), set()
    while waiting:
        requirement = requirements.Requirement(waiting.pop())
        if requirement.name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(requirement.name)
            waiting += metadata.requires(requirement.name) or []
    return found


def installed_bytes(name: str) -> int:
    """What a distribution takes on disk by its own record, so a wheel compiled or not counts as it lies there."""
    files = metadata.files(name) or []
    return sum(path.stat().st_size for path in (Path(str(f.locate())) for f in files) if path.is_file())
