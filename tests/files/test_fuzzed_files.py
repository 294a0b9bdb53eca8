"""Random configurations of every method, live: PEFT writes and we read to the byte, we write and PEFT reads, and both compute the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_ref.errors import KeyMismatchError  # noqa: E402
from peft_ref.files.adapter import WEIGHTS, AdapterFile, adapter_names, all_tensors, load_adapter, save_adapter  # noqa: E402
from peft_ref.files.config import from_dict  # noqa: E402
from peft_ref.files.keys import PROMPT_PREFIX, parameter_name  # noqa: E402
from peft_ref.files.safetensors import serialize  # noqa: E402
from peft_ref.methods import CPT, METHODS  # noqa: E402
from peft_ref.prompts import EMBEDDING, SAVED, Prompt  # noqa: E402
from tests.files.peft_models import (  # noqa: E402
    RANDOM,
    Net,
    assert_same_files,
    layer_of,
    our_output,
    random_input,
    random_peft_config,
    tuned,
    with_random_parameters,
)
from tests.files.prompt_models import MODELS, PAIRS, PROMPTS, base, our_prompt, peft_s_prompt, prompted, random_prompt  # noqa: E402
from tests.methods import facts  # noqa: E402
from tests.methods.widened import widen  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("quiet")]
PER_TASK, ON_WEIGHTS = 5, 90
assert PER_TASK * len(PAIRS) >= 120
assert PER_TASK * len(PAIRS) + ON_WEIGHTS >= 200


def assert_same_state(adapter: AdapterFile, model: Any) -> None:
    """What PEFT would save of the model is what the adapter holds."""
    theirs, ours = peft.get_peft_model_state_dict(model), all_tensors(adapter)
    assert theirs.keys() == ours.keys()
    again = 1e-6 if isinstance(adapter.config.method, CPT) else 0  # each time PEFT is asked it projects once more, in float32
    for key, tensor in theirs.items():
        np.testing.assert_allclose(ours[key], tensor.detach().numpy(), rtol=again, atol=again, err_msg=key)


def assert_same_prompt(model: Any, adapter: AdapterFile, rng: np.random.Generator) -> None:
    method: Any = adapter.config.method.in_inference()  # type: ignore[attr-defined]
    tasks = getattr(method, "num_tasks", None)
    ids = None if tasks is None else rng.integers(0, tasks, 2).tolist()
    ours, theirs = our_prompt(method, adapter.prompt, 2, ids), peft_s_prompt(model, 2, ids)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 if tasks else 2e-6)  # float32, summed in another order


@pytest.mark.parametrize(("kind", "task"), PAIRS)
def test_prompts_of_every_kind_and_task(kind: str, task: str, tmp_path: Path) -> None:
    rng = np.random.default_rng([PROMPTS.index(kind), list(MODELS).index(task)])
    for i in range(PER_TASK):
        which = i % len(MODELS[task])
        data = random_prompt(rng, kind, task)
        hf, ours, fresh = (tmp_path / f"{i}{name}" for name in ("hf", "ours", "fresh"))
        trained = prompted(data, base(task, which), seed=i)
        trained.save_pretrained(hf)
        adapter = load_adapter(hf)
        save_adapter(ours, adapter)
        assert_same_files(hf, ours)
        assert_same_state(adapter, trained)
        assert_same_prompt(trained, adapter, rng)

        sized: Prompt = from_dict(data).method.sized(base(task, which).config.to_dict(), task)  # type: ignore[attr-defined]
        assert sized.in_inference() == adapter.config.method, data

        config = dataclasses.replace(adapter.config, method=sized.in_inference(), text=None)
        prompt = {name: rng.normal(size=shape).astype(np.float32) for name, shape in sized.in_inference().shapes().items()}
        saved = {key: rng.normal(size=value.shape).astype(np.float32) for key, value in adapter.modules_to_save.items()}
        written = AdapterFile(config=config, prompt=prompt, modules_to_save=saved)
        save_adapter(fresh, written)
        model = peft.PeftModel.from_pretrained(base(task, which), str(fresh)).eval()
        assert_same_state(written, model)
        assert_same_prompt(model, written, rng)


def test_the_prompts_that_are_drawn_are_of_every_shape() -> None:
    """With and without what a prompt can have: the fuzz must not be one case many times."""
    rng = np.random.default_rng(5)
    drawn = [random_prompt(rng, kind, task) for kind, task in PAIRS for _ in range(PER_TASK)]
    for word in ("prefix_projection", "encoder_reparameterization_type", "modules_to_save", "num_transformer_submodules", "num_tasks"):
        assert len({str(data[word]) for data in drawn if word in data}) > 1, word


def adapted(config: Any, base_model: Any) -> Any:
    model = peft.get_peft_model(base_model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:  # AdaLoRA's count, which PEFT makes trainable and does not save
                parameter.copy_(torch.randn_like(parameter))
    return model.eval()


def assert_same_outputs(model: Any, adapter: AdapterFile, rng: np.random.Generator) -> None:
    modules = tuned(model)
    assert modules.keys() == adapter.modules.keys()
    for name, module in adapter.modules.items():
        x = random_input(module.layer, rng)
        with torch.no_grad():
            theirs = modules[name](torch.from_numpy(x)).numpy()
        # PEFT keeps LoHa's scale as a float32
        np.testing.assert_allclose(our_output(module, modules[name].base_layer, x), theirs, rtol=1e-6, atol=1e-6, err_msg=name)


def completed(adapter: AdapterFile) -> AdapterFile:
    """With what the file leaves out, for its seed makes it again."""
    layers = {name: module.layer for name, module in adapter.modules.items()}
    method: Any = adapter.config.method
    made = method.common(layers, {name: np.zeros(layer.shape) for name, layer in layers.items()}, np.random.default_rng(0))
    modules = {}
    for name, module in adapter.modules.items():
        left_out = {s.field: getattr(made[name], s.field) for s in module.method.spec(module.layer) if not s.saved}
        modules[name] = module._replace(params=module.params._replace(**left_out)) if left_out else module
    return dataclasses.replace(adapter, modules=modules)


def random_weights_config(rng: np.random.Generator, method: str) -> Any:
    config = random_peft_config(rng, method)
    config.base_model_name_or_path = None
    for name in ("rank_pattern", "alpha_pattern"):  # PEFT saves them sorted: in another order the file would mean another adapter
        if getattr(config, name, None):
            setattr(config, name, dict(sorted(getattr(config, name).items())))
    if config.peft_type == "IA3" and config.feedforward_modules is None:
        config.feedforward_modules = []  # Net has no default
    return config


def test_methods_on_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widen(monkeypatch)
    rng = np.random.default_rng(40)
    kinds, names = set(), list(RANDOM)
    for i in range(ON_WEIGHTS):
        torch.manual_seed(i)
        hf, ours, fresh = (tmp_path / f"{i}{name}" for name in ("hf", "ours", "fresh"))
        trained = adapted(random_weights_config(rng, names[i % len(names)]), Net().to(torch.float64))
        trained.save_pretrained(hf)
        layers = {name: layer_of(module) for name, module in tuned(trained).items()}
        adapter = load_adapter(hf, layers=layers)
        kinds.add(type(adapter.config.method))
        save_adapter(ours, adapter)
        assert_same_files(hf, ours)
        assert_same_outputs(trained, completed(adapter), rng)

        rest = {key: rng.normal(size=value.shape) for key, value in {**adapter.modules_to_save, **adapter.biases}.items()}
        rest = {key: rest[key.replace(".modules_to_save", "")] for key in rest}  # with bias="all" PEFT saves a trained head's bias twice
        written = AdapterFile(
            config=dataclasses.replace(adapter.config, text=None),
            modules=with_random_parameters(adapter.config, layers, rng),
            modules_to_save=rest,
        )
        save_adapter(fresh, written)
        model = peft.PeftModel.from_pretrained(Net().to(torch.float64), str(fresh)).eval()
        assert_same_outputs(model, written, rng)
        assert_same_state(written, model)
    assert kinds == {cls for name, cls in METHODS.weights.items() if not facts(name).files_elsewhere}


def test_a_loaded_prefix_with_projection_is_used_as_it_is_saved(tmp_path: Path) -> None:
    """Its network is gone: PEFT reads the table, and cannot call the encoder any more."""
    data = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2, "prefix_projection": True}
    prompted(data, base("CAUSAL_LM"), seed=0).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base("CAUSAL_LM"), str(tmp_path))
    assert load_adapter(tmp_path).prompt.keys() == {EMBEDDING}
    with pytest.raises(AttributeError, match="transform"):
        loaded.get_prompt_embedding_to_save("default")


def assert_written_back(folder: Path, again: Path, name: str = "default") -> AdapterFile:
    adapter = load_adapter(folder, name)
    save_adapter(again, adapter, name)
    inner = () if name == "default" else (name,)
    assert_same_files(folder.joinpath(*inner), again.joinpath(*inner))
    return adapter


@pytest.mark.parametrize(("task", "which"), [(task, which) for task in MODELS for which in range(len(MODELS[task]))])
def test_embeddings_that_are_saved_beside_a_prompt(task: str, which: int, tmp_path: Path) -> None:
    """As PEFT does by itself where the vocabulary was resized."""
    model = prompted({"peft_type": "PROMPT_TUNING", "task_type": task, "num_virtual_tokens": 2}, base(task, which), seed=0)
    model.save_pretrained(tmp_path / "hf", save_embedding_layers=True)
    adapter = assert_written_back(tmp_path / "hf", tmp_path / "ours")
    own = model.get_base_model().state_dict()
    for key, tensor in adapter.embeddings.items():
        np.testing.assert_array_equal(tensor, own[parameter_name(key, PROMPT_PREFIX)].numpy())  # type: ignore[arg-type]
    assert any(np.array_equal(t, model.get_input_embeddings().weight.detach().numpy()) for t in adapter.embeddings.values())  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_half_or_double_prompt_is_written_back_to_the_byte(dtype: str, tmp_path: Path) -> None:
    data = random_prompt(np.random.default_rng(0), "PREFIX_TUNING", "SEQ_CLS")
    prompted({**data, "modules_to_save": None}, base("SEQ_CLS"), seed=0).to(getattr(torch, dtype)).save_pretrained(tmp_path / "hf")
    adapter = assert_written_back(tmp_path / "hf", tmp_path / "ours")
    assert str(adapter.prompt[EMBEDDING].dtype) == dtype
    assert adapter.modules_to_save


def test_several_prompts_are_saved_where_peft_saves_them(tmp_path: Path) -> None:
    data = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2, "modules_to_save": ["lm_head"]}
    model = prompted(data, base("CAUSAL_LM"), seed=0)
    model.add_adapter("other", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "hf")
    assert adapter_names(tmp_path / "hf") == ("default", "other")
    rows = [assert_written_back(tmp_path / "hf", tmp_path / "ours", name).prompt[EMBEDDING].shape[0] for name in ("default", "other")]
    assert rows == [2, 3]


def test_a_start_from_another_adapter_is_read_without_it(tmp_path: Path) -> None:
    """PEFT makes the start again when it loads, and cannot where the other adapter's file is gone."""
    data = {"peft_type": "MULTITASK_PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    prompted({**data, "num_tasks": 3}, base("CAUSAL_LM"), seed=0).save_pretrained(tmp_path / "source")
    source = str(tmp_path / "source" / "adapter_model.safetensors")
    start = {"prompt_tuning_init": "AVERAGE_SOURCE_TASKS", "prompt_tuning_init_state_dict_path": source}
    prompted({**data, **start}, base("CAUSAL_LM"), seed=1).save_pretrained(tmp_path / "hf")
    Path(source).unlink()
    assert_written_back(tmp_path / "hf", tmp_path / "ours")
    with pytest.raises(FileNotFoundError):
        peft.PeftModel.from_pretrained(base("CAUSAL_LM"), str(tmp_path / "hf"))


def test_half_a_multitask_prompt_is_refused_though_peft_draws_the_rest_anew(tmp_path: Path) -> None:
    data = {"peft_type": "MULTITASK_PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    prompted(data, base("CAUSAL_LM"), seed=0).save_pretrained(tmp_path)
    table = load_adapter(tmp_path).prompt[EMBEDDING]
    (tmp_path / WEIGHTS).write_bytes(serialize({SAVED: table}, {"format": "pt"}))
    prompts = [peft_s_prompt(peft.PeftModel.from_pretrained(base("CAUSAL_LM"), str(tmp_path)), 1, [0]) for _ in range(2)]
    assert not np.allclose(*prompts)
    with pytest.raises(KeyMismatchError, match="prefix_task_cols, prefix_task_rows missing"):
        load_adapter(tmp_path)
