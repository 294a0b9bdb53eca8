"""The files that are mutated, by name: a method's by its own ("lora"), the mathematics that all methods stand on by its module's
("peft_ref.stack"). Each of the two has its own evidence: nearly every test runs the second, and would be asked anew whenever it changed.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
METHODS = ROOT / "peft_ref" / "methods"
CORE = ("arrays", "attending", "attention", "conditioned", "contracts", "dense", "large", "layers", "norms", "prompts", "splice", "stack")

# `__init__` is the table, which tests/registry is about
OF_METHODS = {path.stem: path for path in sorted(METHODS.glob("*.py")) if path.stem != "__init__"}
OF_CORE = {f"peft_ref.{stem}": ROOT / "peft_ref" / f"{stem}.py" for stem in CORE}
FILES = OF_METHODS | OF_CORE


def name_of(path: Path) -> str:
    return f"peft_ref.{path.stem}" if path in OF_CORE.values() else path.stem


def module_of(name: str) -> str:
    return name if name in OF_CORE else f"peft_ref.methods.{name}"
