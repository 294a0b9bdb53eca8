"""`peft-ref inspect` on folders made here: what it reads, what it finds odd or wrong, what it says and how it exits."""

from __future__ import annotations

import json
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.checkpoints.elsewhere import PROGRAMS, verdicts
from peft_ref.checkpoints.inspecting import inspect
from peft_ref.checkpoints.spectrum import effective_rank, rank_of_energy
from peft_ref.cli import main
from peft_ref.files.adapter import WEIGHTS, save_tensors
from peft_ref.files.config import from_dict
from peft_ref.files.safetensors import serialize

Capture = pytest.CaptureFixture[str]
LAYERS, WIDTH, RANK = 3, 12, 4
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "up_proj"],
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "somebody/something",
    "peft_version": "0.21.2",
}
SIZES = {"self_attn.q_proj": (WIDTH, WIDTH), "mlp.up_proj": (20, WIDTH)}


def names(layers: int = LAYERS) -> dict[str, tuple[int, int]]:
    return {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in SIZES.items()}


def tensors(r: int = RANK) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    found = {}
    for name, (out, n_in) in names().items():
        found[f"base_model.model.{name}.lora_A.weight"] = rng.normal(size=(r, n_in)).astype("f4")
        found[f"base_model.model.{name}.lora_B.weight"] = rng.normal(size=(out, r)).astype("f4")
    return found


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def written(folder: Path, config: dict[str, Any] | None = None, held: dict[str, Any] | None = None) -> str:
    save_tensors(folder, from_dict({**CONFIG, **(config or {})}), tensors() if held is None else held, {"format": "pt"})
    return str(folder)


def base(folder: Path, layers: int = LAYERS, width: int = WIDTH, head: str = "") -> str:
    """A checkpoint in two files, of one number for every parameter's name."""
    folder.mkdir()
    rng = np.random.default_rng(2)
    shapes = {f"{name}.weight": tuple(width if n == WIDTH else n for n in shape) for name, shape in names(layers).items()}
    shapes["model.embed_tokens.weight"] = (30, width)
    found = {name.removeprefix(head): rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    parts = {"model-00001-of-00002.safetensors": sorted(found)[::2], "model-00002-of-00002.safetensors": sorted(found)[1::2]}
    for file, own in parts.items():
        (folder / file).write_bytes(serialize({name: found[name] for name in own}, {"format": "pt"}))
    total = sum(value.nbytes for value in found.values())
    index = {"metadata": {"total_size": total}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return str(folder)


def said(capsys: Capture, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["inspect", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


# ---- what is read


def sparse(folder: Path, gigabytes: int) -> int:
    """An adapter of one enormous module, of which the disk holds the header alone."""
    written(folder)
    r, n = 256, gigabytes * 2**30 // (2 * 256 * 4)
    header = {}
    for place, (key, shape) in enumerate({"lora_A": [r, n], "lora_B": [n, r]}.items()):
        header[f"{Q0}.{key}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [place * r * n * 4, (place + 1) * r * n * 4]}
    text = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * r * n * 4)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "r": r, "target_modules": ["q_proj"]}))
    return 8 + len(text)


def read_so_far() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar"):
            return int(line.split()[1])
    raise AssertionError


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what is read")
def test_only_the_header_is_read_of_two_hundred_gigabytes(tmp_path: Path) -> None:
    header = sparse(tmp_path, 200)
    inspect(tmp_path)  # whatever is imported on the way is
    before, began = read_so_far(), time.monotonic()
    inspection = inspect(tmp_path)
    assert read_so_far() - before < header + 100_000
    assert time.monotonic() - began < 5
    assert sum(module.parameters for module in inspection.modules.values()) > 5e10
    assert not inspection.wrong


def test_thousands_of_experts_take_seconds(tmp_path: Path) -> None:
    pair = {"lora_A": np.ones((RANK, 2), "f2"), "lora_B": np.ones((2, RANK), "f2")}
    modules = [f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in range(20) for e in range(300)]
    written(
        tmp_path, {"target_modules": ["up_proj"]}, {f"base_model.model.{m}.{key}.weight": v for m in modules for key, v in pair.items()}
    )
    began = time.process_time()
    inspection = inspect(tmp_path)
    assert [len(verdicts(inspection, program)) for program in PROGRAMS] == [0, 0, 4]
    assert len(inspection.modules) == 6000
    assert time.process_time() - began < 8  # it takes about one; with the configuration written out for every module, twenty


# ---- what is found

FINDINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "a key nothing asks for": ({}, {f"{Q0}.weight": np.ones((2, 2), "f4")}, "wrong", "is no parameter of LoRA"),
    "a key of no PEFT adapter": ({}, {"model.norm": np.ones(2, "f4")}, "wrong", "does not begin with"),
    "half of a pair": ({}, {f"{Q0}.lora_A.weight": None}, "wrong", "lora_A.weight missing"),
    "another rank": ({}, {f"{Q0}.lora_A.weight": np.ones((7, WIDTH), "f4")}, "wrong", "lora_A.weight is (7, 12)"),
    "a mix of dtypes": ({}, {f"{Q0}.lora_A.weight": np.ones((RANK, WIDTH), "f2")}, "odd", "mixed: 11 of F32, 1 of F16"),
    "a pattern of nothing": ({"rank_pattern": {"v_proj": 2}}, {}, "odd", "rank_pattern 'v_proj' matches no module"),
    "a target of nothing": ({"target_modules": ["q_proj", "up_proj", "v_proj"]}, {}, "odd", "target_modules names v_proj"),
    "an expression that misses": ({"target_modules": ".*q_proj"}, {}, "odd", "does not match model.layers.{0..2}.mlp.up_proj"),
    "a module that was not saved": ({"modules_to_save": ["score"]}, {}, "odd", "modules_to_save names score"),
    "a start that changed the weight": ({"init_lora_weights": "pissa"}, {}, "odd", "took a part off the frozen weight"),
    "a scale of nothing": ({"lora_alpha": 0}, {}, "odd", "the scale is 0"),
}


def with_changes(changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**tensors(), **changes}.items() if value is not None}


@pytest.mark.parametrize("what", FINDINGS)
def test_a_fault_in_the_header_or_the_configuration_is_found(tmp_path: Path, what: str, capsys: Capture) -> None:
    config, changes, level, text = FINDINGS[what]
    folder = written(tmp_path, config, with_changes(changes))
    code, told = said(capsys, folder)
    assert [f["level"] for f in told["findings"] if text in f["said"]] == [level]
    assert code == int(level == "wrong")


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused_as_everywhere(tmp_path: Path, alpha: float, capsys: Capture) -> None:
    path = Path(written(tmp_path)) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": alpha}))
    assert main(["inspect", str(tmp_path)]) == 2
    assert "a finite number is needed" in capsys.readouterr().err


def test_a_faultless_adapter_has_no_finding(tmp_path: Path, capsys: Capture) -> None:
    code, told = said(capsys, written(tmp_path), "--numbers")
    assert (code, told["findings"], told["fine"]) == (0, [], True)


NUMBERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a NaN": ({f"{Q0}.lora_B.weight": np.full((WIDTH, RANK), np.nan, "f4")}, "wrong", "lora_B.weight has 48 elements of 48 that are NaN"),
    "an infinity": ({f"{Q0}.lora_A.weight": np.full((RANK, WIDTH), np.inf, "f4")}, "wrong", "NaN or infinite"),
    "no training at all": ({k: np.zeros_like(v) for k, v in tensors().items() if "lora_B" in k}, "wrong", "was not trained"),
    "one module untrained": ({f"{Q0}.lora_B.weight": np.zeros((WIDTH, RANK), "f4")}, "odd", "nothing is added to the weight"),
}


@pytest.mark.parametrize("what", NUMBERS)
def test_a_fault_in_the_numbers_is_found_when_they_are_read(tmp_path: Path, what: str, capsys: Capture) -> None:
    changes, level, text = NUMBERS[what]
    folder = written(tmp_path, {}, with_changes(changes))
    assert said(capsys, folder)[0] == 0  # not without reading them
    code, told = said(capsys, folder, "--numbers")
    assert [f["level"] for f in told["findings"] if text in f["said"]] == [level]
    assert code == int(level == "wrong")


def test_what_lies_beside_the_adapter_is_told(tmp_path: Path, capsys: Capture) -> None:
    folder = written(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    written(tmp_path / "second")
    texts = [f["said"] for f in said(capsys, folder)[1]["findings"]]
    assert any("adapter_model.bin" in text for text in texts)
    assert any("second" in text for text in texts)


# ---- beside a base


@pytest.mark.parametrize("head", ["", "model."])
def test_an_adapter_fits_its_base_also_where_names_begin_otherwise(tmp_path: Path, head: str, capsys: Capture) -> None:
    code, told = said(capsys, base(tmp_path / "base", head=head), written(tmp_path / "adapter"))
    assert (code, told["findings"]) == (0, [])
    assert set(told["base"]["fits"]) == set(names())
    assert len(told["base"]["changed"]) == len(names())
    adapted = sum(out * n_in for out, n_in in names().values())
    assert (told["base"]["changed_parameters"], told["base"]["parameters"]) == (adapted, adapted + 30 * WIDTH)


def test_a_base_with_a_name_in_front_is_the_same_base(tmp_path: Path, capsys: Capture) -> None:
    bare = {key.replace("model.model.", "model."): value for key, value in tensors().items()}
    code, told = said(capsys, base(tmp_path / "base"), written(tmp_path / "adapter", {}, bare))
    assert (code, told["findings"]) == (0, [])


WRONG_BASES: dict[str, tuple[dict[str, Any], str]] = {
    "fewer layers": ({"layers": 2}, "The base has no model.layers.2.mlp.up_proj"),
    "more layers": ({"layers": 4}, "2 of the 8 modules that target_modules matches in the base have no adapter"),
    "another width": ({"width": 16}, "expected (4, 16)"),
}


@pytest.mark.parametrize("what", WRONG_BASES)
def test_another_model_s_base_is_told(tmp_path: Path, what: str, capsys: Capture) -> None:
    sizes, text = WRONG_BASES[what]
    code, told = said(capsys, base(tmp_path / "base", **sizes), written(tmp_path / "adapter"))
    assert code == 1
    assert any(text in f["said"] and f["level"] == "wrong" for f in told["findings"]), told["findings"]


def test_a_base_of_other_names_is_another_model_s(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(serialize({"h.0.attn.c_attn.weight": np.ones((4, 12), "f4")}, {"format": "pt"}))
    code, told = said(capsys, str(folder), written(tmp_path / "adapter"))
    assert code == 1
    assert "another model's adapter" in told["findings"][0]["said"]


def test_a_resized_embedding_does_not_fit(tmp_path: Path, capsys: Capture) -> None:
    saved = {"base_model.model.model.embed_tokens.weight": np.ones((31, WIDTH), "f4")}
    code, told = said(capsys, base(tmp_path / "base"), written(tmp_path / "adapter", {}, {**tensors(), **saved}))
    assert code == 1
    assert "(31, 12) in the file (embeddings) and (30, 12) in the base" in told["findings"][0]["said"]


# ---- numbers


def test_effective_rank_counts_equal_singular_values() -> None:
    assert effective_rank((3.0, 3.0, 3.0, 0.0)) == pytest.approx(3.0, rel=1e-14)
    assert effective_rank((5.0,)) == 1.0
    assert effective_rank((0.0, 0.0)) == 0.0
    assert effective_rank((1e200, 1e200)) == pytest.approx(2.0)  # whose squares are too large


def test_the_rank_of_an_energy_is_the_smallest_that_has_it() -> None:
    singular = (2.0, 1.0, 1.0)  # energies 4, 1, 1 of 6
    assert [rank_of_energy(singular, share) for share in (0.5, 4 / 6, 0.7, 5 / 6, 0.99, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert rank_of_energy((0.0,), 0.9) == 0


def test_the_singular_values_are_numpy_s_of_the_product(tmp_path: Path, capsys: Capture) -> None:
    told = said(capsys, base(tmp_path / "base"), written(tmp_path / "adapter"), "--spectrum")[1]["modules"]
    held = {key: value.astype(np.float64) for key, value in tensors().items()}
    for name in names():
        delta = 6 / 4 * held[f"base_model.model.{name}.lora_B.weight"] @ held[f"base_model.model.{name}.lora_A.weight"]
        wanted = np.linalg.svd(delta, compute_uv=False)[:RANK]
        np.testing.assert_allclose(told[name]["singular_values"], wanted, rtol=0, atol=1e-13 * wanted[0])
        assert told[name]["delta_norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-13)
        p = wanted**2 / np.sum(wanted**2)
        assert told[name]["effective_rank"] == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-12)


# ---- the command


def test_json_has_every_key_that_is_promised(tmp_path: Path, capsys: Capture) -> None:
    told = said(capsys, written(tmp_path), "--spectrum", "--for", "vllm")[1]
    assert told.keys() == {
        *("peft_ref_inspect", "folder", "method", "peft_type", "switch", "settings", "base_model", "task_type", "peft_version"),
        *("adapter_config", "tensors", "parameters", "bytes", "dtypes", "modules", "blocks", "prompt", "beside", "findings", "elsewhere"),
        *("fine", "numbers"),
    }
    assert (told["method"], told["peft_version"], told["base_model"]) == ("LoRA", "0.21.2", "somebody/something")
    module = told["modules"]["model.layers.0.self_attn.q_proj"]
    assert (module["rank"], module["scale"], module["scale_from"]) == (RANK, 1.5, "lora_alpha / r = 6 / 4")
    assert (module["kind"], module["shape"], module["parameters"]) == ("linear", [12, 12], 2 * RANK * WIDTH)
    assert {"delta_norm", "relative_norm", "singular_values", "effective_rank", "rank_of_90_energy", "rank_of_99_energy"} <= module.keys()
    assert told["elsewhere"] == {"vllm": []}


def test_a_checkpoint_alone_is_told_by_its_headers(tmp_path: Path, capsys: Capture) -> None:
    code, told = said(capsys, base(tmp_path / "base"))
    assert code == 0
    assert told["parameters"] == sum(out * n_in for out, n_in in names().values()) + 30 * WIDTH
    assert [shard["tensors"] for shard in told["shards"].values()] == [4, 3]
    assert told["dtypes"] == {"F32": told["parameters"]}
    assert main(["inspect", str(tmp_path / "base")]) == 0
    assert "model.layers.{0..2}.mlp.up_proj.weight" in capsys.readouterr().out


def test_an_index_that_says_another_size_is_odd(tmp_path: Path, capsys: Capture) -> None:
    folder = Path(base(tmp_path / "base"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "metadata": {"total_size": 7}}))
    assert [f["level"] for f in said(capsys, str(folder))[1]["findings"]] == ["odd"]


def test_the_table_folds_modules_and_says_scales_and_each_tells_them_apart(tmp_path: Path, capsys: Capture) -> None:
    folder = written(tmp_path, {"alpha_pattern": {"up_proj": 8}})
    assert main(["inspect", folder]) == 0
    out = capsys.readouterr().out
    assert "model.layers.{0..2}.mlp.up_proj" in out
    assert "lora_alpha / r = 8 / 4, lora_alpha from alpha_pattern 'up_proj'" in out
    assert out.splitlines()[-1].startswith("FINE")
    assert max(map(len, out.splitlines())) <= 120
    assert main(["inspect", folder, "--each"]) == 0
    assert "model.layers.1.mlp.up_proj" in capsys.readouterr().out


def test_a_program_that_would_not_load_it_is_exit_code_one(tmp_path: Path, capsys: Capture) -> None:
    folder = written(tmp_path, {"use_rslora": True})
    assert main(["inspect", folder, "--for", "vllm"]) == 0
    assert main(["inspect", folder, "--for", "vllm", "--for", "llama.cpp"]) == 1
    out = capsys.readouterr().out
    assert "1 instead of 3" not in out
    assert "1.5 instead of 3" in out
    assert "ggml-org/llama.cpp src/llama-adapter.h" in out


def test_the_picture_is_an_svg_and_the_page_needs_nothing_else(tmp_path: Path) -> None:
    hostile = "</title><script>alert(1)</script>"
    folder = written(tmp_path / "adapter", {"base_model_name_or_path": hostile})
    svg, page = tmp_path / "it.svg", tmp_path / "it.html"
    assert main(["inspect", folder, "--spectrum", "--svg", str(svg), "--html", str(page), "--for", "mlx"]) == 1
    root = ET.fromstring(svg.read_text())
    assert root.tag.endswith("svg")
    lines = [path for path in root.iter("{http://www.w3.org/2000/svg}path") if path.get("fill") == "none"]
    assert len(lines) == len(names())
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<svg" in text


REFUSED: dict[str, tuple[list[str], str]] = {
    "no folder": (["nowhere"], "nowhere is no folder"),
    "an empty folder": (["empty"], "has no adapter_config.json and no model.safetensors"),
    "the wrong order": (["adapter", "base"], "The base comes first"),
    "an adapter below": (["above"], "Give one of"),
    "three folders": (["base", "adapter", "adapter"], "3 folders"),
    "no weights": (["bare"], "has no adapter_model.safetensors"),
    "a configuration that is none": (["broken"], "is not JSON"),
    "another program": (["adapter", "--for", "ollama"], "vllm, llama.cpp, mlx"),
    "numbers of a checkpoint": (["base", "--numbers"], "--numbers is asked of an adapter"),
    "a picture of nothing": (["ia3", "--svg", "ia3.svg"], "give the base"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_exit_code_two_and_one_clear_error(tmp_path: Path, what: str, capsys: Capture) -> None:
    arguments, text = REFUSED[what]
    base(tmp_path / "base")
    written(tmp_path / "adapter")
    written(tmp_path / "above" / "second")
    for name in ("empty", "bare", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "bare" / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    ia3 = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    save_tensors(tmp_path / "ia3", from_dict(ia3), {f"{Q0}.ia3_l": np.ones((12, 1), "f4")}, {"format": "pt"})
    given = [str(tmp_path / a) if (tmp_path / a).exists() or a.endswith(".svg") else a for a in arguments]
    assert main(["inspect", *given]) == 2
    shown = capsys.readouterr()
    assert text in shown.err
    assert len(shown.err.splitlines()) <= 4
    assert not shown.out
    assert not (tmp_path / "ia3.svg").exists()
