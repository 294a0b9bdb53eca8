"""`inspect` on what HF PEFT writes, of every method: its scales, its singular values and its fit beside PEFT's own live numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft_ref.checkpoints.fitting import fitted  # noqa: E402
from peft_ref.checkpoints.inspecting import WRONG, Inspection, inspect  # noqa: E402
from peft_ref.checkpoints.spectrum import NEEDS_BASE, NEEDS_SHARED, NEEDS_SIZES, measured  # noqa: E402
from peft_ref.contracts import Additive, LowRank, WeightMethod  # noqa: E402
from peft_ref.files.safetensors import serialize  # noqa: E402
from peft_ref.graph import CheckpointGraph  # noqa: E402
from tests.files.peft_models import CASES, adapted, layer_of, tuned  # noqa: E402
from tests.files.prompt_models import PAIRS, base, prompted, random_prompt  # noqa: E402
from tests.files.test_adaption_files import peft_folder  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
EPS = 2.0**-23  # PEFT computes these in float32


def saved(case: str, folder: Path) -> tuple[Any, Inspection]:
    model = adapted(case).eval()
    model.save_pretrained(folder)
    return model, inspect(folder)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Inspection]]:
    """`saved`, once for every case; for tests that leave the model as it is."""
    return cache(lambda case: saved(case, tmp_path_factory.mktemp("kept")))


def beside_a_layer(inspection: Inspection, model: Any) -> set[str]:
    """The modules of which a file has tensors of their own."""
    config = inspection.config
    return {n for n, m in tuned(model).items() if any(s.saved and not s.shared for s in config.method_for(n).spec(layer_of(m)))}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_writes_is_not_wrong_and_every_module_and_number_is_counted(kept: Any, case: str) -> None:
    model, inspection = kept(case)
    assert not inspection.wrong, inspection.findings
    assert set(inspection.modules) == beside_a_layer(inspection, model)
    assert all(module.layer is not None for module in inspection.modules.values())
    own = sum(module.parameters for module in inspection.modules.values())
    beside = sum(math.prod(entry.shape) for held in inspection.beside.values() for entry in held.values())
    assert own + beside == sum(t.numel() for t in peft.get_peft_model_state_dict(model).values())


def peft_scale(tuner: Any) -> float | None:
    """What PEFT's layer multiplies by. AdaLoRA divides by its rank when it runs."""
    scaling = getattr(tuner, "scaling", {})
    if "default" not in scaling:
        return None
    ranks = getattr(tuner, "ranknum", {})
    return float(scaling["default"] / (float(ranks["default"]) + 1e-5)) if "default" in ranks else float(scaling["default"])


@pytest.mark.parametrize("case", CASES)
def test_every_scale_is_that_of_peft_s_live_layer(kept: Any, case: str) -> None:
    model, inspection = kept(case)
    theirs = {name: scale for name, tuner in tuned(model).items() if (scale := peft_scale(tuner)) is not None}
    ours = {name: module.scale.value for name, module in inspection.modules.items() if module.scale is not None}
    for name in theirs.keys() & ours.keys():
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6)  # some of PEFT's are float32
    if isinstance(inspection.config.method, LowRank) and theirs:
        assert ours.keys() == inspection.modules.keys() & theirs.keys()


PATTERNS: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"r": 8, "lora_alpha": 16}, {"layers.0.q": "lora_alpha / r = 16 / 8"}),
    ({"r": 1, "lora_alpha": 6, "use_rslora": True}, {"layers.0.q": "lora_alpha / sqrt(r) = 6 / sqrt(1)"}),  # both rules give 6 here
    ({"r": 4, "lora_alpha": 6, "use_rslora": True}, {"layers.0.q": "lora_alpha / sqrt(r) = 6 / sqrt(4)"}),
    (
        {"r": 4, "lora_alpha": 6, "rank_pattern": {r"layers\.1\.q": 2, "up": 3}, "alpha_pattern": {"q": 5}},
        {
            "layers.0.q": "lora_alpha / r = 5 / 4, lora_alpha from alpha_pattern 'q'",
            "layers.1.q": r"lora_alpha / r = 5 / 2, r from rank_pattern 'layers\\.1\\.q', lora_alpha from alpha_pattern 'q'",
            "layers.0.up": "lora_alpha / r = 6 / 3, r from rank_pattern 'up'",
        },
    ),
    (
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"q": 2}},
        {"layers.1.q": "lora_alpha / sqrt(r) = 6 / sqrt(2), r from rank_pattern 'q'"},
    ),
]


@pytest.mark.parametrize(("words", "expected"), PATTERNS)
def test_a_scale_says_where_it_comes_from_and_is_peft_s(tmp_path: Path, words: dict[str, Any], expected: dict[str, str]) -> None:
    from tests.files.peft_models import Net

    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["q", "up"], **words))
    model.save_pretrained(tmp_path)
    modules = inspect(tmp_path).modules
    for name, tuner in tuned(model).items():
        scale = modules[name].scale
        assert scale is not None
        assert scale.value == pytest.approx(tuner.scaling["default"], rel=1e-15)
        assert modules[name].rank == tuner.r["default"]
    assert {name: modules[name].scale.said() for name in expected} == expected  # type: ignore[union-attr]


def own_delta(tuner: Any) -> np.ndarray[Any, Any] | None:
    """PEFT's delta as the layer's matrix (out, in), where it has one."""
    if not hasattr(tuner, "get_delta_weight"):
        return None
    with torch.no_grad():
        try:
            delta = tuner.get_delta_weight("default")
        except (NotImplementedError, TypeError, RuntimeError):  # it has none, or fails itself (grouped convolutions)
            return None
    delta = delta[0] if isinstance(delta, tuple) else delta
    delta = delta.to_dense() if delta.is_sparse else delta
    if delta.numel() != tuner.get_base_layer().weight.numel():  # BD-LoRA's is one block of it
        return None
    return np.asarray(layer_of(tuner).fold(delta.float().numpy().reshape(tuner.get_base_layer().weight.shape)), dtype=np.float64)


# PEFT's get_delta_weight is another thing: a rotation to be applied, a product, or its own formula with another layout
OTHER_DELTAS = ("boft", "oft", "hra", "road", "hira", "miss bat", "lokr conv")


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(OTHER_DELTAS)])
def test_singular_values_are_those_of_peft_s_delta(kept: Any, case: str) -> None:
    model, inspection = kept(case)
    found = measured(inspection, None, spectrum=True)
    if not isinstance(inspection.config.method, LowRank | Additive):
        assert {delta.why_not for delta in found.deltas.values()} <= {NEEDS_BASE, NEEDS_SHARED}
        return
    for name, tuner in tuned(model).items():
        if name not in found.deltas or found.deltas[name].why_not in (NEEDS_SHARED, NEEDS_SIZES) or (theirs := own_delta(tuner)) is None:
            continue
        wanted = np.linalg.svd(theirs, compute_uv=False)
        got = np.asarray(found.deltas[name].singular)
        tolerance = 64 * EPS * max(theirs.shape) * wanted[0]
        np.testing.assert_allclose(got[: len(wanted)], wanted[: len(got)], rtol=0, atol=tolerance, err_msg=name)
        assert np.all(wanted[len(got) :] <= tolerance)
        assert found.deltas[name].norm == pytest.approx(np.linalg.norm(theirs), rel=1e-5)


def test_singular_values_of_a_grouped_convolution_are_those_of_what_peft_s_layers_do_to_every_input(tmp_path: Path) -> None:
    model, inspection = saved("grouped conv", tmp_path)
    ((name, tuner),) = tuned(model).items()
    layer = layer_of(tuner)
    inputs = torch.eye(layer.channels * math.prod(layer.kernel_size)).reshape(-1, layer.channels, *layer.kernel_size)
    with torch.no_grad():  # one place of the output for every place of the input that is one
        A, B = tuner.lora_A["default"], tuner.lora_B["default"]
        down = torch.nn.functional.conv2d(inputs, A.weight, groups=A.groups)
        delta = tuner.scaling["default"] * torch.nn.functional.conv2d(down, B.weight, groups=B.groups)
    wanted = np.linalg.svd(delta.reshape(len(inputs), -1).double().numpy(), compute_uv=False)
    got = np.asarray(measured(inspection, None, spectrum=True).deltas[name].singular)
    np.testing.assert_allclose(got, wanted[: len(got)], rtol=0, atol=64 * EPS * len(inputs) * wanted[0])


def checkpoint(model: Any, folder: Path) -> CheckpointGraph:
    """The frozen model under the adapter, as a folder that save_pretrained could have written."""
    state: dict[str, Any] = {}
    for key, value in model.base_model.model.state_dict().items():
        name = key.replace(".base_layer.", ".").replace(".original_module.", ".")
        if ".modules_to_save." in key or inspected_prefix(model) in key:
            continue
        state[name] = value.contiguous().numpy().copy()
    config = getattr(model.base_model.model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(serialize(state, {"format": "pt"}))
    if hasattr(config, "to_json_string"):
        (folder / "config.json").write_text(config.to_json_string())
    return CheckpointGraph(folder)


def inspected_prefix(model: Any) -> str:
    return str(model.base_model.prefix)


NO_TABLES = [case for case in CASES if case not in ("lora", "dora")]  # whose table a checkpoint without a config does not tell


@pytest.mark.parametrize("case", NO_TABLES)
def test_an_adapter_fits_its_own_base_and_what_it_changes_is_what_a_merge_by_peft_changes(tmp_path: Path, case: str) -> None:
    model, inspection = saved(case, tmp_path / "adapter")
    if any(layer_of(t).kind == "embedding" for t in tuned(model).values()) and not hasattr(model.base_model.model, "config"):
        pytest.skip("a table of a model without a configuration")
    fit = fitted(inspection, checkpoint(model, tmp_path / "base"))
    assert not [finding for finding in fit.findings if finding.level == WRONG], fit.findings
    assert fit.layers.keys() == inspection.modules.keys()
    assert isinstance(inspection.config.method, WeightMethod)
    found = measured(inspection, fit, spectrum=True)
    if inspection.config.method.counts_layers and not fit.graph.in_order:
        assert all("place in the live model" in delta.why_not for delta in found.deltas.values())
        return
    for name, tuner in tuned(model).items():
        W = np.asarray(layer_of(tuner).fold(tuner.get_base_layer().weight.detach().numpy().copy()), dtype=np.float64)
        try:
            with torch.no_grad():
                tuner.merge()
        except (NotImplementedError, ValueError, RuntimeError, AttributeError, TypeError):
            continue
        merged = np.asarray(layer_of(tuner).fold(tuner.get_base_layer().weight.detach().numpy()), dtype=np.float64)
        delta = found.deltas[name]
        assert not delta.why_not
        size = np.linalg.norm(W) + np.linalg.norm(merged)
        wanted = np.linalg.svd(merged - W, compute_uv=False)
        got = np.asarray(delta.singular)
        np.testing.assert_allclose(got[: len(wanted)], wanted[: len(got)], rtol=0, atol=64 * EPS * max(W.shape) * size, err_msg=name)
        assert delta.relative == pytest.approx(np.linalg.norm(merged - W) / np.linalg.norm(W), abs=1e-4, rel=1e-4)


class Attending(torch.nn.Module):  # type: ignore[misc]  # torch has no types here
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.attn, self.q = torch.nn.MultiheadAttention(size, 2), torch.nn.Linear(6, 6)

    def forward(self, x: Any) -> Any:
        return self.attn(x, x, x)


@pytest.mark.parametrize("size", [8, 16])
def test_a_packed_attention_fits_its_own_base_and_no_other(tmp_path: Path, size: int) -> None:
    peft.get_peft_model(Attending(), peft.LoraConfig(r=2, target_modules=["attn", "q"])).save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    state = {name: value.numpy() for name, value in Attending(size).state_dict().items()}
    (tmp_path / "base" / "model.safetensors").write_bytes(serialize(state, {"format": "pt"}))
    fit = fitted(inspect(tmp_path / "adapter"), CheckpointGraph(tmp_path / "base"))
    assert ("attn.in_proj_weight" in fit.changed) == (size == 8)
    wrong = [finding for finding in fit.findings if finding.level == WRONG]
    assert bool(wrong) == (size != 8), wrong


@pytest.mark.parametrize(("kind", "task"), PAIRS)
def test_a_prompt_fits_its_own_model_and_no_wider_one(tmp_path: Path, kind: str, task: str) -> None:
    model = base(task)
    config = random_prompt(np.random.default_rng(5), kind, task)
    prompted(config | {"modules_to_save": None}, model, 3).save_pretrained(tmp_path / "adapter")
    inspection = inspect(tmp_path / "adapter")
    assert not inspection.findings
    own = base(task).config.to_dict()
    wider = own | {name: 2 * own[name] for name in ("hidden_size", "n_embd", "d_model") if name in own}
    for name, sizes, fits in (("own", own, True), ("wider", wider | {"head_dim": None}, False)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(serialize({"a.weight": np.zeros((2, 2), "f4")}, {"format": "pt"}))
        (folder / "config.json").write_text(json.dumps(sizes, default=str))
        findings = fitted(inspection, CheckpointGraph(folder)).findings
        assert bool(findings) != fits, findings


def test_an_adaption_prompt_fits_its_own_model(tmp_path: Path) -> None:
    live, folder = peft_folder(tmp_path / "adapter")
    inspection = inspect(folder)
    assert not inspection.findings
    base_folder = tmp_path / "base"
    transformers.LlamaForCausalLM(live.config).save_pretrained(base_folder)
    assert not fitted(inspection, CheckpointGraph(base_folder)).findings
    words = json.loads((base_folder / "config.json").read_text())
    (base_folder / "config.json").write_text(json.dumps(words | {"hidden_size": 24}))
    assert [finding.level for finding in fitted(inspection, CheckpointGraph(base_folder)).findings] == [WRONG]
