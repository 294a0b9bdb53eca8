"""Random merges of LoRA and its kin beside PEFT, to the bit: methods, dtypes, shards, several adapters, roundings, ties."""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("peft", reason="the extra `hf` is not installed")

from peft_ref.checkpoints.plan import Source
from peft_ref.checkpoints.planning import plan
from tests.checkpoints.beside_peft import (
    DTYPES,
    Net,
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

MODELS = {
    "llama": (llama, ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "embed_tokens", "lm_head"]),
    "tied llama": (lambda: llama(tie_word_embeddings=True), ["q_proj", "embed_tokens", "lm_head"]),
    "llama with biases": (lambda: llama(attention_bias=True), ["q_proj", "v_proj", "o_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_fc", "wte", "wpe"]),
    "net": (Net, ["q", "up", "conv1", "conv2", "conv3", "embed_tokens"]),
}


@st.composite
def configs(draw: st.DrawFn, model: str, peft_type: str, alone: bool) -> Any:
    targets = draw(st.lists(st.sampled_from(MODELS[model][1]), min_size=1, unique=True))
    if peft_type == "ia3":
        targets = [t for t in targets if "emb" not in t and t not in ("wte", "wpe", "conv1")] or [MODELS[model][1][0]]
        return peft.IA3Config(target_modules=targets, feedforward_modules=draw(st.lists(st.sampled_from(targets), unique=True)))
    if peft_type == "adalora":
        targets = [t for t in targets if "emb" not in t and t not in ("wte", "wpe", "conv1", "conv3")] or [MODELS[model][1][0]]
        return peft.AdaLoraConfig(
            init_r=draw(st.integers(1, 40)), lora_alpha=draw(st.integers(1, 40)), total_step=9, target_modules=targets
        )
    table = any("emb" in t or t in ("wte", "wpe") for t in targets)
    biased = {"llama with biases", "gpt2"}
    return peft.LoraConfig(
        r=draw(st.integers(1, 40) | st.just(200)) if model != "net" else draw(st.integers(1, 40)),
        lora_alpha=draw(st.sampled_from([1, 3, 16, 0.37, -2.5])),
        use_rslora=draw(st.booleans()),
        target_modules=targets,
        rank_pattern=draw(st.sampled_from([{}, {targets[0]: 5}])),
        alpha_pattern=draw(st.sampled_from([{}, {targets[0]: 7}])),
        lora_bias=model in biased and not table and draw(st.booleans()),
        bias=draw(st.sampled_from(["none", "all", "lora_only"])) if alone else "none",
    )


@pytest.mark.sweep
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate,))
@given(st.data())
def test_a_random_merge_has_the_bits_of_pefts(data: st.DataObject) -> None:
    warnings.simplefilter("ignore")
    name = data.draw(st.sampled_from(list(MODELS)), "model")
    dtype = data.draw(st.sampled_from(list(DTYPES)), "dtype")
    kind = data.draw(st.sampled_from(["lora", "lora", "lora", "ia3", "adalora"]), "method")
    count = data.draw(st.integers(1, 3), "adapters") if kind == "lora" else 1
    chosen = [data.draw(configs(name, kind, count == 1)) for _ in range(count)]
    weights = [data.draw(st.sampled_from([1.0, 1.0, 0.5, -0.3])) if c.bias == "none" else 1.0 for c in chosen] if kind == "lora" else [1.0]
    rounding: Any = data.draw(st.sampled_from(["default", "safe", "kept"] if kind == "lora" else ["default", "safe"]), "rounding")
    with TemporaryDirectory() as folder:
        model = made(MODELS[name][0], dtype)
        base = saved_base(model, Path(folder) / "base", data.draw(st.sampled_from(["20KB", "1GB"])))
        adapters = [saved_adapter(model, config, Path(folder) / f"a{n}", seed=n) for n, config in enumerate(chosen)]
        theirs = merged_by_peft(model, adapters, rounding, weights)
        sources = [Source(*pair) for pair in zip(adapters, weights, strict=True)]
        ours = carried_out(plan(base, sources, rounding=rounding, exact=True, ties="share"), data.draw(st.integers(1, 100)))
        found = differing({key: theirs[key] for key in ours}, ours)
        assert not found, (found, {key: ours[key].shape for key in found})
