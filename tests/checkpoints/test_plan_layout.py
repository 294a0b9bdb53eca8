"""How a plan lays the output out, beside what transformers writes; what comes along; and every refusal."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="the extra `hf` is not installed")

from safetensors.numpy import load_file, save_file

from peft_ref.checkpoints.layout import greedy
from peft_ref.checkpoints.plan import Plan, Source
from peft_ref.checkpoints.planning import plan
from peft_ref.errors import (
    ConfigError,
    FileFormatError,
    KeyMismatchError,
    NotMergeableError,
    PeftRefError,
    ShapeError,
    TargetError,
)
from tests.checkpoints.beside_peft import (
    array_of,
    carried_out,
    config_in,
    differing,
    gpt2,
    llama,
    made,
    merged_by_peft,
    peft,
    quietly,
    saved_adapter,
    saved_base,
    torch,
    transformers,
)

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def model() -> Any:
    return made(llama, "BF16")


@pytest.fixture
def base(model: Any, tmp_path: Path) -> Path:
    folder = saved_base(model, tmp_path / "base", "30KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options})


@pytest.fixture
def adapter(model: Any, tmp_path: Path) -> Path:
    return saved_adapter(model, lora(), tmp_path / "adapter")


def written(made_plan: Plan, name: str) -> Any:
    return json.loads(dict(made_plan.written)[name])


def test_without_a_wish_every_shard_keeps_its_header_and_the_index_comes_along(base: Path, adapter: Path) -> None:
    made_plan = plan(base, [Source(adapter)])
    shards = sorted(base.glob("*.safetensors"))
    assert [(shard.name, shard.source) for shard in made_plan.shards] == [(path.name, path) for path in shards]
    assert len(shards) > 2
    for shard, path in zip(made_plan.shards, shards, strict=True):
        at = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        for tensor in shard.tensors:  # one after the other, as they lie there
            assert (tensor.path, tensor.begin) == (path, at)
            at = tensor.end
        assert at == path.stat().st_size
    assert {path.name for path in made_plan.along} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
    }
    assert (made_plan.written, made_plan.left) == ((), ())
    assert sum(bool(t.changes) for shard in made_plan.shards for t in shard.tensors) == 2


def test_weights_in_other_formats_hidden_files_and_folders_stay_behind_and_are_named(base: Path, adapter: Path) -> None:
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", ".gitattributes", "other.safetensors", "a.pt"):
        (base / name).write_text("{}")
    (base / "onnx").mkdir()
    made_plan = plan(base, [Source(adapter)])
    assert set(made_plan.left) == {
        ".gitattributes",
        "a.pt",
        "model.gguf",
        "onnx/",
        "other.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    }
    assert not {path.name for path in made_plan.along} & set(made_plan.left)


@pytest.mark.parametrize(("stored", "wanted"), [("BF16", "F32"), ("F32", "BF16"), ("BF16", "F16")])
def test_another_dtype_is_that_of_all_floats_and_of_the_configuration(tmp_path: Path, stored: str, wanted: str) -> None:
    """Widened before PEFT merges, narrowed after."""
    model = made(llama, stored)
    base, adapter = saved_base(model, tmp_path / "base", "30KB"), saved_adapter(model, lora(), tmp_path / "adapter")
    spelled = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[wanted]
    made_plan = plan(base, [Source(adapter)], dtype=spelled, exact=True)
    first = model.float() if wanted == "F32" else model
    theirs = merged_by_peft(first, [adapter])
    ours = carried_out(made_plan)
    assert not differing({name: x.astype(ours[name].dtype) for name, x in theirs.items()}, ours)
    assert all(shard.source is None and t.dtype == wanted for shard in made_plan.shards for t in shard.tensors)
    assert written(made_plan, "config.json")["dtype"] == spelled
    index = written(made_plan, "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in ours.values())
    assert index["weight_map"] == {t.name: shard.name for shard in made_plan.shards for t in shard.tensors}
    assert not {path.name for path in made_plan.along} & {name for name, _ in made_plan.written}


@pytest.mark.parametrize("most", [1, 9_000, 30_000, 60_000, 10**9])
def test_shards_are_filled_as_hugging_face_fills_them(base: Path, adapter: Path, most: int) -> None:
    from huggingface_hub.serialization import split_state_dict_into_shards_factory

    made_plan = plan(base, [Source(adapter)], max_shard_size=most)
    order = [name for shard in plan(base, [Source(adapter)]).shards for name in (t.name for t in shard.tensors)]
    sizes = {t.name: t.end - t.begin for shard in made_plan.shards for t in shard.tensors}
    theirs = split_state_dict_into_shards_factory(
        {name: sizes[name] for name in order},
        max_shard_size=most,
        filename_pattern="model{suffix}.safetensors",
        get_storage_size=lambda size: size,
    )
    assert {s.name: {t.name for t in s.tensors} for s in made_plan.shards} == {f: set(n) for f, n in theirs.filename_to_tensors.items()}
    names = [name for name, _ in made_plan.written]
    assert names == (["model.safetensors.index.json"] if len(made_plan.shards) > 1 else [])
    assert not any(path.name == "model.safetensors.index.json" for path in made_plan.along)


def test_a_tensor_that_is_too_large_is_alone() -> None:
    assert greedy([("a", 3), ("b", 9), ("c", 4), ("d", 3)], 7) == [["b"], ["a", "c"], ["d"]]


def test_a_plan_can_be_sent_to_another_machine(base: Path, adapter: Path) -> None:
    made_plan = plan(base, [Source(adapter)])
    assert pickle.loads(pickle.dumps(made_plan)) == made_plan
    assert len(pickle.dumps(made_plan)) < 40_000


def test_a_file_that_leaves_out_the_first_part_of_the_names_is_matched_by_the_live_ones(tmp_path: Path) -> None:
    model = made(gpt2, "F32")
    base = saved_base(model, tmp_path / "base")
    adapter = saved_adapter(model, lora(target_modules=["c_attn"]), tmp_path / "adapter")
    path = base / "model.safetensors"
    save_file({name.removeprefix("transformer."): x for name, x in load_file(path).items()}, path)
    ours = carried_out(plan(base, [Source(adapter)], exact=True))
    theirs = merged_by_peft(model, [adapter])
    assert not differing({name: theirs[f"transformer.{name}"] for name in ours}, ours)


class TestTiedWeights:
    @pytest.fixture
    def tied(self, tmp_path: Path) -> tuple[Any, Path]:
        model = made(lambda: llama(tie_word_embeddings=True), "F32")
        return model, saved_base(model, tmp_path / "base")

    def test_a_change_of_one_is_refused_unless_it_is_said_what_becomes_of_the_other(self, tied: Any, tmp_path: Path) -> None:
        model, base = tied
        adapter = saved_adapter(model, lora(target_modules=["embed_tokens"]), tmp_path / "adapter")
        with pytest.raises(NotMergeableError, match=r"which is also lm_head\.weight"):
            plan(base, [Source(adapter)])

    def test_shared_both_change_as_in_pefts_memory(self, tied: Any, tmp_path: Path) -> None:
        model, base = tied
        config = lora(target_modules=["embed_tokens", "lm_head"])
        adapters = [saved_adapter(model, config, tmp_path / f"a{n}", seed=n) for n in range(2)]
        theirs = merged_by_peft(model, adapters)
        made_plan = plan(base, [Source(folder) for folder in adapters], ties="share", exact=True)
        ours = carried_out(made_plan)
        assert "lm_head.weight" not in ours
        assert not differing({name: theirs[name] for name in ours}, ours)
        assert made_plan.shards[0].source is not None

    def test_parted_each_has_its_own_and_the_configuration_says_so(self, tied: Any, tmp_path: Path) -> None:
        """The merged model then computes what the unmerged one did: transformers loads it, and its logits are those of PEFT's forward."""
        model, base = tied
        adapter = saved_adapter(model, lora(target_modules=["embed_tokens", "q_proj"]), tmp_path / "adapter")
        made_plan = plan(base, [Source(adapter)], ties="untie")
        ours = carried_out(made_plan)
        before = array_of(model.lm_head.weight)
        assert (ours["lm_head.weight"] == before).all()
        assert (ours["model.embed_tokens.weight"] != before).any()
        assert written(made_plan, "config.json")["tie_word_embeddings"] is False
        out = tmp_path / "out"
        out.mkdir()
        save_file(ours, out / "model.safetensors", {"format": "pt"})
        (out / "config.json").write_bytes(dict(made_plan.written)["config.json"])
        ids = torch.arange(12)[None]
        with quietly(), torch.no_grad():
            merged = transformers.LlamaForCausalLM.from_pretrained(out)(ids).logits
            beside = peft.PeftModel.from_pretrained(model, adapter)(ids).logits
        assert torch.allclose(merged, beside, atol=1e-5)

    @pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
    def test_a_copy_parts_them_as_in_pefts_own_save(self, tied: Any, tmp_path: Path, module: str) -> None:
        model, base = tied
        adapter = saved_adapter(model, lora(modules_to_save=[module]), tmp_path / "adapter")
        made_plan = plan(base, [Source(adapter)], exact=True)
        with quietly():
            peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(tmp_path / "theirs")
        assert not differing(load_file(tmp_path / "theirs" / "model.safetensors"), carried_out(made_plan))
        assert written(made_plan, "config.json")["tie_word_embeddings"] is config_in(tmp_path / "theirs")["tie_word_embeddings"] is False


class TestRefusals:
    def refused(self, error: type[PeftRefError], match: str, base: Path, *sources: Source, **options: Any) -> None:
        with pytest.raises(error, match=match) as raised:
            carried_out(plan(base, list(sources), **options))
        assert len(str(raised.value).splitlines()) <= 4

    def test_an_adapter_of_another_model(self, base: Path, tmp_path: Path) -> None:
        other = saved_adapter(made(gpt2, "F32"), lora(target_modules=["c_attn"]), tmp_path / "other")
        self.refused(TargetError, "c_attn", base, Source(other))
        wider = saved_adapter(made(lambda: llama(hidden_size=64), "F32"), lora(), tmp_path / "wider")
        self.refused(ShapeError, r"\(4, 64\), expected \(4, 48\)", base, Source(wider))
        deeper = saved_adapter(made(lambda: llama(num_hidden_layers=3), "F32"), lora(), tmp_path / "deeper")
        self.refused(KeyMismatchError, r"layers\.2\.self_attn\.q_proj", base, Source(deeper))
        fewer = saved_adapter(made(lambda: llama(num_hidden_layers=1), "F32"), lora(), tmp_path / "fewer")
        self.refused(KeyMismatchError, r"layers\.1\.self_attn\.q_proj.*missing", base, Source(fewer))

    def test_a_tensor_that_nothing_asked_for(self, base: Path, adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        save_file({**load_file(path), "base_model.model.model.norm.odd": np.zeros(3, np.float32)}, path)
        self.refused(KeyMismatchError, "odd", base, Source(adapter))

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_nan_in_an_adapter(self, base: Path, adapter: Path, value: float) -> None:
        path = adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        next(iter(tensors.values()))[0, 0] = value
        save_file(tensors, path)
        self.refused(FileFormatError, "NaN or an infinity", base, Source(adapter))

    def test_a_nan_in_a_copy(self, base: Path, model: Any, tmp_path: Path) -> None:
        adapter = saved_adapter(model, lora(modules_to_save=["lm_head"]), tmp_path / "copy")
        path = adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors["base_model.model.lm_head.weight"] = np.full((100, 48), np.nan, np.float32)
        save_file(tensors, path)
        self.refused(FileFormatError, "lm_head", base, Source(adapter))

    def test_what_no_weight_can_take_up(self, base: Path, model: Any, tmp_path: Path) -> None:
        for n, config in enumerate(
            (
                peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
                peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1),
            )
        ):
            folder = saved_adapter(made(llama, "F32"), config, tmp_path / f"p{n}")
            self.refused(NotMergeableError, "no weight can take up", base, Source(folder))
        replicated = saved_adapter(model, lora(layer_replication=[[0, 2], [1, 2]]), tmp_path / "replicated")
        self.refused(NotMergeableError, "layer_replication", base, Source(replicated))

    def test_a_weight_where_there_is_nothing_to_scale(self, base: Path, model: Any, tmp_path: Path) -> None:
        copies = saved_adapter(model, lora(modules_to_save=["lm_head"]), tmp_path / "copies")
        self.refused(ConfigError, "has no scale", base, Source(copies, 0.5))
        ia3 = saved_adapter(model, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), tmp_path / "ia3")
        self.refused(ConfigError, "no delta that could be scaled", base, Source(ia3, 0.5))
        self.refused(ConfigError, "is no number", base, Source(copies, float("nan")))

    def test_two_that_cannot_both_be(self, base: Path, model: Any, tmp_path: Path) -> None:
        one, two = (saved_adapter(model, lora(modules_to_save=["lm_head"]), tmp_path / name, seed=len(name)) for name in ("a", "bb"))
        self.refused(ConfigError, "both hold a copy", base, Source(one), Source(two))
        self.refused(ConfigError, "there twice", base, Source(one), Source(one))
        self.refused(ConfigError, "no adapter", base)

    def test_a_base_that_is_quantised_or_broken(self, base: Path, adapter: Path) -> None:
        config = config_in(base)
        (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
        self.refused(NotMergeableError, "quantised by gptq", base, Source(adapter))
        (base / "config.json").write_text(json.dumps(config))
        first = sorted(base.glob("*.safetensors"))[0]
        data = first.read_bytes()
        first.write_bytes(data[:-1])
        self.refused(FileFormatError, first.name, base, Source(adapter))
        first.unlink()
        self.refused(FileFormatError, f"{first.name} is not there", base, Source(adapter))
        shutil.rmtree(base)
        base.mkdir()
        (base / "pytorch_model.bin").write_bytes(b"")
        self.refused(FileFormatError, "a pickle, which is not read", base, Source(adapter))

    def test_options_that_make_no_sense(self, base: Path, adapter: Path) -> None:
        self.refused(ConfigError, "dtype='int8'", base, Source(adapter), dtype="int8")
        self.refused(ConfigError, "rounding='up'", base, Source(adapter), rounding="up")
        self.refused(ConfigError, "max_shard_size=0", base, Source(adapter), max_shard_size=0)
        self.refused(ConfigError, "ties=", base, Source(adapter), ties="cut")
