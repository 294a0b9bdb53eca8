"""Writes peft_ref/graph/defaults.py from the installed PEFT:  python tests/graph/write_defaults.py

A table that differs from LoRA's in a few rows is written as those rows. test_defaults.py holds the file against PEFT.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from peft.utils import constants

TARGET = Path(__file__).resolve().parents[2] / "peft_ref/graph/defaults.py"


def default_targets() -> dict[str, dict[str, Any]]:
    """The table that each of PEFT's tuners looks its default targets up in."""
    tables = {k.value: t.target_module_mapping for k, t in PEFT_TYPE_TO_TUNER_MAPPING.items() if hasattr(t, "target_module_mapping")}
    tables["IA3"] = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    tables["ADAPTION_PROMPT"] = {model: [known.target_modules] for model, known in TRANSFORMERS_MODEL_CONFIG.items()}
    return {name: frozen(table) for name, table in sorted(tables.items())}


def feedforward() -> dict[str, Any]:
    return frozen(constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING)


def projections() -> dict[str, Any]:
    """What adaption prompts need of an attention: the names of its projections of keys and values, and of its output."""
    return {m: (known.k_proj_layer, known.v_proj_layer, known.o_proj_layer) for m, known in TRANSFORMERS_MODEL_CONFIG.items()}


def postprocessed() -> set[str]:
    """The architectures whose prefixes PEFT puts into another order; a newer transformers leaves the table empty, so its source is read."""
    return set(re.findall(r'PREFIX_TUNING_POSTPROCESS_MAPPING\["(\w+)"\] =', inspect.getsource(constants)))


def frozen(table: dict[str, Any]) -> dict[str, Any]:
    return {model: names if isinstance(names, str) else tuple(names) for model, names in table.items()}


def refusals() -> dict[str, set[str]]:
    """Which methods' configurations refuse what, by trying. ADAMSS wants scikit-learn before it looks, and refuses none of these."""
    wrong = {
        "TRANSFORM_WITH_REGEX_REFUSED": ({"target_modules": "x", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used"),
        "PATTERN_WITH_REGEX_REFUSED": ({"target_modules": "x", "layers_pattern": "h"}, "`layers_pattern` cannot be used"),
        "ALONE_REFUSED": ({"target_modules": ["x"], "layers_pattern": "h"}, "`layers_to_transform` must also be specified"),
    }
    found: dict[str, set[str]] = {name: set() for name in wrong}
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if not any(f.name == "layers_pattern" for f in dataclasses.fields(config)):
            continue
        extra = {"total_step": 10} if kind.value == "ADALORA" else {}
        for name, (arguments, message) in wrong.items():
            try:
                config(**arguments, **extra)
            except (ValueError, ImportError) as error:
                if message in str(error):
                    found[name].add(kind.value)
    return found


def source() -> str:
    tables = default_targets()
    lora = tables["LORA"]
    lines = [
        f'"""PEFT {peft.__version__}\'s default targets per method and architecture, and what its configurations refuse.',
        "",
        "Written by tests/graph/write_defaults.py from PEFT itself: change that, not this.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        "from collections.abc import Mapping",
        "from typing import TypeAlias",
        "",
        "Table: TypeAlias = Mapping[str, str | tuple[str, ...]]",
        "",
        f"_LORA: Table = {code(lora)}",
    ]
    rows = []
    named: dict[str, str] = {json.dumps(lora): "_LORA"}
    for method, table in tables.items():
        key = json.dumps(table)
        if key not in named:
            named[key] = f"_{method}"
            if lora.keys() <= table.keys():
                changed = {model: names for model, names in table.items() if lora.get(model) != names}
                lines.append(f"_{method}: Table = {{**_LORA, {code(changed)[1:]}")
            else:
                lines.append(f"_{method}: Table = {code(table)}")
        rows.append(f'"{method}": {named[key]},')
    lines += ["DEFAULT_TARGETS: Mapping[str, Table] = {", *rows, "}"]
    lines.append(f"FEEDFORWARD: Mapping[str, tuple[str, ...]] = {code(feedforward())}")
    lines += ["", "# Keys, values and output of the attention that an adaption prompt joins; None where one layer makes several."]
    lines.append(f"ADAPTION_PROJECTIONS: Mapping[str, tuple[str | None, ...]] = {code(projections())}")
    lines += [
        "",
        "# Whose prefixes PEFT puts into another order, where transformers is so old that it needs that (4.53 for gpt_bigcode).",
    ]
    lines.append(f"PREFIX_POSTPROCESSED = frozenset({{{', '.join(json.dumps(m) for m in sorted(postprocessed()))}}})")
    for name, methods in refusals().items():
        lines.append(f"{name} = frozenset({{{', '.join(json.dumps(m) for m in sorted(methods))}}})")
    return "\n".join(lines) + "\n"


def code(table: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{json.dumps(m)}: {names!r}" for m, names in table.items()) + "}"


if __name__ == "__main__":
    TARGET.write_text(source(), encoding="utf-8")
    subprocess.run(["ruff", "format", "--quiet", str(TARGET)], check=True)
    print(TARGET, len(TARGET.read_text("utf-8").splitlines()), "lines")
