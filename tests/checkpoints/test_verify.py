"""`verify` on merges that were made by HF PEFT, and on merges that were made wrongly by hand, in torch: each is told by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("peft", reason="needs HF PEFT")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from peft_ref.checkpoints.plan import Source  # noqa: E402
from peft_ref.checkpoints.planning import plan  # noqa: E402
from peft_ref.checkpoints.verifying import verify  # noqa: E402
from peft_ref.cli import main  # noqa: E402

pytestmark = pytest.mark.hf
Weights = dict[str, Any]
Deltas = Mapping[str, tuple[Any, Any, float]]  # B, A, scale by the name of the weight
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
R, ALPHA = 8, 6.0


@pytest.fixture(scope="module", params=DTYPES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter on its square and on its oblong layers, and what PEFT merges of them."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4
    )
    LlamaForCausalLM(config).to(DTYPES[request.param]).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=DTYPES[request.param])
    lora = get_peft_model(base, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["q_proj", "o_proj", "up_proj"]))
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    lora.save_pretrained(folder / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=DTYPES[request.param])
    PeftModel.from_pretrained(fresh, folder / "adapter").merge_and_unload().save_pretrained(folder / "merged")
    return folder


def deltas(folder: Path) -> Deltas:
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    names = [k.removesuffix(".lora_A.weight") for k in tensors if k.endswith("lora_A.weight")]
    weight = {n: n.removeprefix("base_model.model.") + ".weight" for n in names}
    return {weight[n]: (tensors[f"{n}.lora_B.weight"].double(), tensors[f"{n}.lora_A.weight"].double(), ALPHA / R) for n in names}


def with_each(change: Callable[[Any, Any, Any, float], Any]) -> Callable[[Weights, Deltas], Weights]:
    def changed(weights: Weights, found: Deltas) -> Weights:
        return {k: change(w.double(), *found[k]).to(w.dtype) if k in found else w for k, w in weights.items()}

    return changed


def square(change: Callable[[Any, Any, Any, float], Any]) -> Callable[[Weights, Deltas], Weights]:
    right = with_each(lambda W, B, A, s: W + s * B @ A)

    def changed(weights: Weights, found: Deltas) -> Weights:
        wrong = with_each(lambda W, B, A, s: change(W, B, A, s) if W.shape[0] == W.shape[1] else W + s * B @ A)
        return right(weights, {}) | wrong(weights, found)

    return changed


def other(W: Any, B: Any, A: Any, s: float) -> Any:
    generator = torch.Generator().manual_seed(W.shape[0])
    return W + s * torch.randn(B.shape, generator=generator).double() @ torch.randn(A.shape, generator=generator).double() * 0.1


WRONG: dict[str, tuple[Callable[[Weights, Deltas], Weights], str]] = {
    "alpha instead of alpha / r": (with_each(lambda W, B, A, s: W + ALPHA * B @ A), "scale-is-alpha"),
    "no scale": (with_each(lambda W, B, A, s: W + B @ A), "scale-is-one"),
    "alpha / sqrt(r)": (with_each(lambda W, B, A, s: W + ALPHA / R**0.5 * B @ A), "rslora-always"),
    "merged twice": (with_each(lambda W, B, A, s: W + 2 * s * B @ A), "double-merge"),
    "not merged": (with_each(lambda W, B, A, s: W), "not-merged"),
    "7.3 times": (with_each(lambda W, B, A, s: W + 7.3 * s * B @ A), "another-scale"),
    "transposed where it fits": (square(lambda W, B, A, s: W + s * (B @ A).T), "delta-transposed"),
    "another adapter": (with_each(other), "another-adapter"),
    "half of the digits": (with_each(lambda W, B, A, s: (W + s * B @ A).to(torch.bfloat16).double()), "rounded-through-bfloat16"),
}


def test_what_peft_merged_is_right(made: Path) -> None:
    report = verify(plan(made / "base", [Source(made / "adapter")]), made / "merged")
    assert report.exit_code == 0, report.verdicts
    assert {v.status for v in report.verdicts} == {"right"}
    touched = [v for v in report.verdicts if v.method == "lora"]
    assert len(touched) == 6
    assert all(v.reason.endswith("ulp worst") for v in touched)


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_merge_is_told_by_its_name(made: Path, what: str, tmp_path: Path) -> None:
    change, name = WRONG[what]
    if made.name.startswith("bfloat16") and name == "rounded-through-bfloat16":
        pytest.skip("that is how it is stored")
    merged = remade(made, tmp_path, lambda weights: change(weights, deltas(made)))
    report = verify(plan(made / "base", [Source(made / "adapter")]), merged)
    assert report.exit_code == 1
    (diagnosis,) = report.diagnoses
    assert name in diagnosis.mistakes, (diagnosis.mistakes, diagnosis.text)
    assert len(diagnosis.mistakes) <= 2, diagnosis.mistakes
    assert set(diagnosis.cases) == {v.case for v in report.verdicts if v.status == "wrong"}


def test_one_layer_that_was_left_out_is_named(made: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    base = load_file(made / "base" / "model.safetensors")
    merged = remade(made, tmp_path, lambda weights: weights | {name: base[name]}, of="merged")
    report = verify(plan(made / "base", [Source(made / "adapter")]), merged)
    assert [(d.mistakes, d.cases) for d in report.diagnoses] == [(("not-merged",), (name,))]


def test_a_tensor_that_no_adapter_touches_is_the_base_s(made: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    merged = remade(made, tmp_path, lambda weights: weights | {name: weights[name] * 1.25}, of="merged")
    report = verify(plan(made / "base", [Source(made / "adapter")]), merged)
    assert [v.case for v in report.verdicts if v.status == "wrong"] == [name]


@pytest.mark.parametrize("how", ["missing", "extra", "shape", "nan"])
def test_what_is_not_there_or_no_number_is_wrong(made: Path, how: str, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"

    def spoil(weights: Weights) -> Weights:
        if how == "missing":
            return {k: w for k, w in weights.items() if k != name}
        if how == "extra":
            return weights | {"more": weights[name].clone()}
        return weights | {name: weights[name][1:].contiguous() if how == "shape" else weights[name] * float("nan")}

    report = verify(plan(made / "base", [Source(made / "adapter")]), remade(made, tmp_path, spoil, of="merged"))
    assert report.exit_code == 1
    assert [v.case for v in report.verdicts if v.status == "wrong"] == ["more" if how == "extra" else name]


def test_a_change_below_the_dtype_s_rounding_is_no_evidence(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "adapter", tmp_path / "faint")
    path = tmp_path / "faint" / "adapter_model.safetensors"
    save_file({k: t * 1e-7 for k, t in load_file(path).items()}, path)
    report = verify(plan(made / "base", [Source(tmp_path / "faint")]), made / "base")
    assert {v.status for v in report.verdicts if v.method == "lora"} == {"undecidable"}


def remade(made: Path, folder: Path, change: Callable[[Weights], Weights], *, of: str = "base") -> Path:
    """A checkpoint like the merged one with other numbers."""
    shutil.copytree(made / of, folder / "remade")
    path = folder / "remade" / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder / "remade"


def test_the_verb_says_it_in_words_in_json_and_on_a_page(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, name = WRONG["alpha instead of alpha / r"]
    wrong = remade(made, tmp_path, lambda weights: change(weights, deltas(made)))
    base, adapter, page = str(made / "base"), str(made / "adapter"), tmp_path / "page.html"
    assert main(["verify", base, adapter, str(made / "merged"), "--verbose"]) == 0
    said = capsys.readouterr().out
    assert "ulp worst" in said
    assert "untouched" in said
    assert main(["verify", base, adapter, str(wrong), "--html", str(page)]) == 1
    assert name in capsys.readouterr().out
    assert name in page.read_text()
    assert main(["verify", base, adapter, str(wrong), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [d["mistakes"] for d in report["diagnoses"]] == [[name]]
    assert main(["verify", base, str(made / "merged"), str(wrong)]) == 2
