"""LoRA and its kin in a plan, beside PEFT's merge: every number, to the bit, in exact mode; and what the fast mode may differ by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints.beside_peft import (
    DTYPES,
    Net,
    array_of,
    carried_out,
    differing,
    gpt2,
    llama,
    made,
    merged_by_peft,
    peft,
    saved_adapter,
    saved_base,
)

from peft_ref.checkpoints.plan import Source  # isort: skip
from peft_ref.checkpoints.planning import ROUNDINGS, plan  # isort: skip
from peft_ref.files.safetensors import open_file  # isort: skip

pytestmark = pytest.mark.usefixtures("quiet")
EVERY = ["q", "up", "conv1", "conv2", "conv3", "embed_tokens"]
Make = Callable[[], Any]


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"], **options})


CASES: dict[str, tuple[Make, Make]] = {
    "llama": (llama, lambda: lora(target_modules="all-linear")),
    "rslora, patterns": (
        llama,
        lambda: lora(use_rslora=True, rank_pattern={r"layers\.1\.self_attn\.q_proj": 11, "down_proj": 3}, alpha_pattern={"q_proj": 5}),
    ),
    "a power of two": (llama, lambda: lora(r=8, lora_alpha=16)),
    "a negative scale": (llama, lambda: lora(lora_alpha=-3)),
    "many ranks": (llama, lambda: lora(r=200, target_modules=["q_proj"])),
    "lora_bias": (lambda: llama(attention_bias=True), lambda: lora(target_modules=["q_proj", "v_proj"], lora_bias=True)),
    "bias all": (lambda: llama(attention_bias=True), lambda: lora(bias="all")),
    "bias lora_only": (lambda: llama(attention_bias=True), lambda: lora(bias="lora_only", target_modules=["v_proj"])),
    "embeddings": (llama, lambda: lora(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "modules_to_save": (llama, lambda: lora(modules_to_save=["lm_head", "input_layernorm"])),
    "gpt2 Conv1D": (gpt2, lambda: lora(target_modules=["c_attn", "c_fc", "wpe"], bias="all")),
    "every layer": (Net, lambda: lora(target_modules=EVERY)),
    "lora_bias, convolution": (Net, lambda: lora(target_modules=["q", "conv2"], lora_bias=True)),
    "orthogonal": (Net, lambda: lora(target_modules=["q"], init_lora_weights="orthogonal")),
    "mica": (Net, lambda: lora(target_modules=["q", "up"], init_lora_weights="mica")),
    "adalora": (Net, lambda: peft.AdaLoraConfig(init_r=5, target_r=2, lora_alpha=6, total_step=9, target_modules=["q", "up", "conv2"])),
    "bdlora": (Net, lambda: lora(r=4, target_modules=["q"], use_bdlora={"target_modules_bd_a": ["q"], "nblocks": 2})),
}
DIGITS = {"F32": 24, "F16": 11, "BF16": 8}
# PEFT holds an adapter of 16 bits as it is: of plain LoRA alone that is followed.
ONLY_WIDE = frozenset({"adalora", "mica", "bdlora"})


def folders(tmp_path: Path, case: str, dtype: str) -> tuple[Any, Path, Path]:
    make, config = CASES[case]
    model = made(make, dtype)
    return model, saved_base(model, tmp_path / "base", "40KB"), saved_adapter(model, config(), tmp_path / "adapter")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_an_exact_merge_has_the_bits_of_pefts(tmp_path: Path, case: str, dtype: str) -> None:
    model, base, adapter = folders(tmp_path, case, dtype)
    for rounding in ROUNDINGS[: 2 if case in ONLY_WIDE else 3]:
        theirs = merged_by_peft(model, [adapter], rounding)
        ours = carried_out(plan(base, [Source(adapter)], rounding=rounding, exact=True, ties="share"))
        assert not differing({name: theirs[name] for name in ours}, ours), rounding


@pytest.mark.parametrize("case", ["llama", "a power of two"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fast_merge_differs_by_a_last_place_and_seldom(tmp_path: Path, case: str, dtype: str) -> None:
    """A sum in any order is within 2 g S of PEFT's (exact.py), and each of the two is rounded to the stored dtype: half a last place."""
    model, base, adapter = folders(tmp_path, case, dtype)
    file, r, scale = open_file(adapter / "adapter_model.safetensors"), 8, 2.0
    factors = [(file.read(name), file.read(name.replace("lora_A", "lora_B"))) for name in file.entries if "lora_A" in name]
    S = max(float(np.linalg.norm(B, axis=1).max() * np.linalg.norm(A, axis=0).max()) for A, B in factors)
    order = scale * 2 * (r + 5) * 2.0**-24 * S
    for rounding in ROUNDINGS:
        theirs = merged_by_peft(model, [adapter], rounding)
        ours = carried_out(plan(base, [Source(adapter)], rounding=rounding))
        count = sum(differing(theirs, ours).values())
        assert count <= (0.2 if dtype == "F32" else 1e-3) * sum(x.size for x in ours.values())
        for name, x in ours.items():
            a, b = (y.astype(np.float64) for y in (x, theirs[name]))
            last = 2.0 ** (np.floor(np.log2(np.maximum(np.maximum(abs(a), abs(b)), 2.0**-24))) - DIGITS[dtype] + 1)
            # where the delta is rounded first, it is so by half a last place too, and of a number that may be larger
            assert (abs(a - b) <= order + last + (0 if rounding == "default" else 2.0 ** -DIGITS[dtype] * 2 * scale * S)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_adapters_are_merged_in_order_each_with_its_weight(tmp_path: Path, dtype: str) -> None:
    model = made(llama, dtype)
    base = saved_base(model, tmp_path / "base")
    targets = ["q_proj", "up_proj"], ["q_proj", "down_proj"], ["up_proj"]
    adapters = [saved_adapter(model, lora(target_modules=t), tmp_path / f"a{n}", seed=n) for n, t in enumerate(targets)]
    weights = [1.0, -0.7, 3.0]
    for rounding in ROUNDINGS:
        theirs = merged_by_peft(model, adapters, rounding, weights)
        sources = [Source(folder, weight) for folder, weight in zip(adapters, weights, strict=True)]
        ours = carried_out(plan(base, sources, rounding=rounding, exact=True))
        assert not differing(theirs, ours)
    if dtype != "F32":  # each rounds what the one before it left: another order is another result
        assert differing(ours, carried_out(plan(base, sources[::-1], rounding=rounding, exact=True)))


def test_an_adapter_of_16_bits_is_widened_or_kept_as_pefts_caller_says(tmp_path: Path) -> None:
    model = made(llama, "BF16")
    base = saved_base(model, tmp_path / "base")
    adapter = saved_adapter(model, lora(), tmp_path / "adapter", dtype="BF16")
    results = {}
    for rounding in ROUNDINGS:
        results[rounding] = carried_out(plan(base, [Source(adapter)], rounding=rounding, exact=True))
        assert not differing(merged_by_peft(model, [adapter], rounding), results[rounding])
    assert differing(results["default"], results["safe"])
    assert not differing(results["safe"], results["kept"])  # a 16-bit delta either way, where base and adapter have one dtype


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_an_init_took_off_the_frozen_weight_is_taken_off_again(tmp_path: Path, init: str, dtype: str) -> None:
    """PEFT runs the init once more when it loads. Two libraries' decompositions differ by a few float32 roundings of the largest singular
    value, which is a small part of a last place in 16 bits; the residual and the sum round once each."""
    model = made(llama, dtype)
    base = saved_base(model, tmp_path / "base")
    adapter = saved_adapter(model, lora(init_lora_weights=init), tmp_path / "adapter", deviation=0.01)
    theirs, ours = merged_by_peft(model, [adapter]), carried_out(plan(base, [Source(adapter)]))
    for name in differing(theirs, ours):
        a, b, W = (np.asarray(x, dtype=np.float64) for x in (theirs[name], ours[name], array_of(model.state_dict()[name])))
        assert abs(a - b).max() <= (2.0**-7 if dtype == "BF16" else 2.0**-17) * abs(W).max()
    plainly = carried_out(plan(base, [Source(_as_plain(adapter, tmp_path / "plain"))]))
    assert len(differing(theirs, plainly)) > len(differing(theirs, ours)) or dtype == "F32"


def _as_plain(adapter: Path, folder: Path) -> Path:
    """The same factors in an adapter that says nothing of its init."""
    folder.mkdir()
    for path in adapter.iterdir():
        data = path.read_bytes()
        for init in ("pissa", "olora"):
            data = data.replace(f'"init_lora_weights": "{init}"'.encode(), b'"init_lora_weights": true')
        (folder / path.name).write_bytes(data)
    return folder
