"""The README's table of methods is what the code says.   python tests/spec/test_readme.py   writes it."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.attending import AttentionMethod
from peft_ref.check.corpus import corpus
from peft_ref.check.mistakes import SUITES
from peft_ref.contracts import WeightMethod
from peft_ref.files.safetensors import serialize
from peft_ref.methods import METHODS
from peft_ref.nn import model_of
from tests.spec import dialect_table
from tests.spec.method_table import with_table
from tests.spec.pages import SPEC

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- methods: written by tests/spec/test_readme.py, do not edit -->", "<!-- end of methods -->"
SHORT = {"transposed_linear": "Conv1D", "embedding": "embedding", "linear": "linear"}


def table() -> str:
    rows = ["| method | contract | layers | cases | known mistakes |", "|---|---|---|---|---|"]
    for name, cls in METHODS.items():
        if issubclass(cls, AttentionMethod):
            counts = f"{len(corpus(name))} | {len(SUITES[name].mistakes)}"
            rows.append(f"| [{cls.__name__}](spec/methods/{name}.md) | AttentionMethod | behind attention | {counts} |")
            continue
        if not issubclass(cls, WeightMethod):
            layers = "before the inputs" if cls.place == "embeddings" else "before the keys and values"
            rows.append(
                f"| [{cls.__name__}](spec/methods/{name}.md) | Prompt | {layers} | {len(corpus(name))} | {len(SUITES[name].mistakes)} |"
            )
            continue
        spatial = [k[4] for k in sorted(cls.kinds) if k.startswith("conv")]
        layers = [SHORT[k] for k in ("linear", "transposed_linear", "embedding") if k in cls.kinds]
        layers += [f"convolution {', '.join(spatial)}d"] if spatial else []
        layers += ["norm"] if "norm" in cls.kinds else []
        rows.append(
            f"| [{cls.__name__}](spec/methods/{name}.md) | {cls.__base__.__name__} | {', '.join(layers)}"  # type: ignore[union-attr]
            f" | {len(corpus(name))} | {len(SUITES[name].mistakes)} |"
        )
    return "\n".join(rows)


def test_the_table_of_methods_is_what_the_code_says() -> None:
    text = README.read_text(encoding="utf-8")
    written = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert written == table(), "run: python tests/spec/test_readme.py"


def test_the_table_of_the_spec_is_what_the_code_says() -> None:
    text = (SPEC / "README.md").read_text(encoding="utf-8")
    assert with_table(text) == text, "run: python -m tests.spec.method_table"


def test_the_table_of_dialects_is_what_the_code_says() -> None:
    """And tests/ports/test_hf_port.py that the code says what PEFT does."""
    text = (SPEC / "README.md").read_text(encoding="utf-8")
    assert dialect_table.with_table(text) == text, "run: python -m tests.spec.dialect_table"


def test_every_row_of_the_table_is_a_dialect_that_some_case_shows() -> None:
    for dialect in dialect_table.dialects():
        assert dialect.mistake.dialect, dialect.mistake.name
        assert any(dialect.cases.values()), dialect.mistake.name


def test_whoever_knows_peft_goes_on_as_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"vocab_size": 7, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes}
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape) for name, shape in model_of(config).shapes().items()}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "model.safetensors").write_bytes(serialize(weights, {"format": "pt"}))
    monkeypatch.chdir(tmp_path)
    section = README.read_text(encoding="utf-8").partition("## If you know PEFT")[2].partition("\n## ")[0]
    code = textwrap.dedent("\n".join(line for line in section.splitlines() if line.startswith("    ")))
    scope: dict[str, Any] = {"np": np}
    exec(code, scope)
    assert scope["logits"].shape == (1, 3, 7)
    total = sum(w.size for w in weights.values())
    trained = 2 * 8 * (8 + 8)  # two layers, rank 8, from 8 to 8
    share = 100 * trained / (total + trained)
    assert capsys.readouterr().out == f"trainable params: {trained} || all params: {total + trained:,} || trainable%: {share:.4f}\n"


if __name__ == "__main__":
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
