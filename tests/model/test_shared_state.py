"""What the layers of an adapter share is one array: made once, held once, in a file once; live PEFT's bits and bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft_ref.arrays import Array  # noqa: E402
from peft_ref.errors import ConfigError, KeyMismatchError, ShapeError  # noqa: E402
from peft_ref.files.adapter import WEIGHTS, load_adapter, save_adapter  # noqa: E402
from peft_ref.model import adapt, add, count, forward, load, merge, save, state_dict, update  # noqa: E402
from peft_ref.model.adapted import Adapted  # noqa: E402
from tests.files.peft_models import Net, assert_same_files, gpt2, llama  # noqa: E402
from tests.model.live import config_of, frozen_graph  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]


class Kind(NamedTuple):
    model: Callable[[], Any]
    config: Callable[[], Any]
    drawn: tuple[str, ...]  # parts of the keys whose numbers the configuration's seed decides
    module: str  # one to run
    n_in: int


Q = ("layers.0.q", 6)
KINDS: dict[str, Kind] = {
    "vera": Kind(Net, lambda: peft.VeraConfig(r=4, target_modules=["q", "up"]), ("vera_A", "vera_B"), *Q),
    "vera not saved": Kind(Net, lambda: peft.VeraConfig(r=4, target_modules=["q", "up"], save_projection=False), (), *Q),
    "vera Conv1D": Kind(
        gpt2,
        lambda: peft.VeraConfig(r=5, target_modules=["c_attn", "c_fc"], projection_prng_key=7),
        ("vera_A", "vera_B"),
        "transformer.h.1.mlp.c_fc",
        8,
    ),
    "pvera": Kind(Net, lambda: peft.PveraConfig(r=4, target_modules=["q", "up"]), ("pvera_A", "pvera_B"), *Q),
    "pvera not saved": Kind(Net, lambda: peft.PveraConfig(r=4, target_modules=["q", "up"], save_projection=False), (), *Q),
    "randlora": Kind(Net, lambda: peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=["q", "up"]), ("randlora_A", "randlora_B"), *Q),
    "randlora sparse": Kind(Net, lambda: peft.RandLoraConfig(r=3, sparse=True, target_modules=["q"]), ("randlora_A", "randlora_B"), *Q),
    "randlora not saved": Kind(Net, lambda: peft.RandLoraConfig(r=2, target_modules=["q", "up"], save_projection=False), (), *Q),
    "vblora": Kind(
        llama,
        lambda: peft.VBLoRAConfig(r=2, num_vectors=5, vector_length=4, target_modules=["q_proj", "down_proj"]),
        (),
        "model.layers.1.mlp.down_proj",
        12,
    ),
    "unilora": Kind(Net, lambda: peft.UniLoraConfig(r=3, theta_d_length=17, target_modules=["q", "up"]), (), *Q),
    "unilora with its places": Kind(
        Net,
        lambda: peft.UniLoraConfig(r=3, theta_d_length=17, target_modules=["q", "up"], save_indices=True),
        ("unilora_indices", "unilora_scales"),
        *Q,
    ),
    "tinylora": Kind(Net, lambda: peft.TinyLoraConfig(r=2, u=3, target_modules=["q", "up", "table"]), ("tinylora_P",), *Q),
    "tinylora tied": Kind(Net, lambda: peft.TinyLoraConfig(r=3, u=5, weight_tying=0.5, target_modules=["q", "up"]), (), *Q),
    "tinylora not saved": Kind(
        Net, lambda: peft.TinyLoraConfig(r=9, u=2, weight_tying=1.0, target_modules=["q", "up"], save_projection=False), (), *Q
    ),
    "frod": Kind(
        Net,
        lambda: peft.FrodConfig(sparse_rate=0.2, target_modules=["q", "up"], progressbar=False),
        ("frod_s_indices", "frod_s_size"),
        *Q,
    ),
    "frod Conv1D": Kind(
        gpt2,
        lambda: peft.FrodConfig(projection_prng_key=7, sparse_rate=0.1, target_modules=["c_attn", "c_fc"], progressbar=False),
        ("frod_s_indices", "frod_s_size"),
        "transformer.h.1.mlp.c_fc",
        8,
    ),
    "frod llama": Kind(
        llama,
        lambda: peft.FrodConfig(sparse_rate=0.05, target_modules="all-linear", progressbar=False),
        ("frod_s_indices", "frod_s_size"),
        "model.layers.1.mlp.down_proj",
        12,
    ),
    "vera llama": Kind(
        llama, lambda: peft.VeraConfig(r=2, target_modules="all-linear"), ("vera_A", "vera_B"), "model.layers.1.mlp.down_proj", 12
    ),
}


class Both(NamedTuple):
    theirs: Any
    fresh: Adapted
    folder: Path


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def both(kind: Kind, folder: Path) -> Both:
    """PEFT's trained adapter, saved, and a fresh one of ours on the same model."""
    torch.manual_seed(3)
    base = kind.model().eval()
    fresh = add(adapt(frozen_graph(base)), "default", config_of(kind.config()), np.random.default_rng(0))
    theirs = peft.get_peft_model(base, kind.config()).eval()
    state, ours = peft.get_peft_model_state_dict(theirs), state_dict(fresh, "default")
    assert ours.keys() == state.keys()
    for key, value in state.items():
        assert ours[key].shape == tuple(value.shape), key
        assert ours[key].dtype == value.numpy().dtype, key
        if any(part in key for part in kind.drawn):
            np.testing.assert_array_equal(ours[key], value.numpy(), err_msg=key)
    assert (count(fresh).trainable, count(fresh).total) == theirs.get_nb_trainable_parameters()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    theirs.save_pretrained(folder / "theirs")
    return Both(theirs, fresh, folder / "theirs")


def bare(b: Both) -> Adapted:
    return adapt(b.fresh.base)


def test_a_whole_adapter_is_pefts_to_the_byte_and_computes_the_same(kind: Kind, tmp_path: Path) -> None:
    b = both(kind, tmp_path)
    save_adapter(tmp_path / "again", load_adapter(b.folder))
    assert_same_files(b.folder, tmp_path / "again")
    x = np.random.default_rng(0).normal(size=(3, kind.n_in)).astype(np.float32)
    y = b.theirs.base_model.model.get_submodule(kind.module)(torch.tensor(x)).detach().numpy()
    for lazy in (False, True):
        ours = load(bare(b), b.folder, lazy=lazy)
        save(ours, tmp_path / f"ours{lazy}")
        assert (tmp_path / f"ours{lazy}" / WEIGHTS).read_bytes() == (b.folder / WEIGHTS).read_bytes()
        for model in (ours, merge(ours)):
            np.testing.assert_allclose(forward(model, kind.module, x), y, rtol=1e-4, atol=1e-5)


def test_what_is_shared_is_one_array(kind: Kind, tmp_path: Path) -> None:
    b = both(kind, tmp_path)
    for model in (b.fresh, load(bare(b), b.folder)):
        modules = model.attached("default").modules
        keys = next(iter(modules.values())).method.shared_keys(tuple(modules))
        first: dict[str, Array] = {}
        for name, module in modules.items():
            for field, key in keys[name].items():
                assert getattr(module.params, field) is first.setdefault(key, getattr(module.params, field)), (name, field)
        assert first


def test_peft_reads_ours(kind: Kind, tmp_path: Path) -> None:
    b = both(kind, tmp_path)
    save(b.fresh, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(kind.model(), str(tmp_path / "ours"))
    for key, value in peft.get_peft_model_state_dict(read).items():
        np.testing.assert_array_equal(state_dict(b.fresh, "default")[key], value.numpy(), err_msg=key)


def test_an_update_that_gives_one_module_another_shared_array_is_refused(kind: Kind, tmp_path: Path) -> None:
    b = both(kind, tmp_path)
    modules = b.fresh.attached("default").modules
    keys = next(iter(modules.values())).method.shared_keys(tuple(modules))
    times = [key for own in keys.values() for key in own.values()]
    name = next((name for name in modules if any(times.count(key) > 1 for key in keys[name].values())), None)
    if name is None:
        pytest.skip("every module has its own")
    field = next(f for f, key in keys[name].items() if times.count(key) > 1)
    params = modules[name].params
    with pytest.raises(ConfigError, match="shares one"):
        update(b.fresh, "default", {name: params._replace(**{field: getattr(params, field) + 1})})


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda shared: {k: v for k, v in shared.items() if k != "vera_A"}, KeyMismatchError, "base_model.vera_A missing"),
    (lambda shared: {**shared, "vera_A": shared["vera_A"][:, 1:]}, ShapeError, r"vera_A is \(4, 5\), expected \(4, 6\)"),
])  # fmt: skip
def test_a_file_whose_shared_part_is_wrong_is_refused(tmp_path: Path, change: Any, error: type[Exception], message: str) -> None:
    b = both(KINDS["vera"], tmp_path)
    file = load_adapter(b.folder)
    save_adapter(tmp_path / "wrong", type(file)(**{**vars(file), "shared": change(file.shared)}))
    with pytest.raises(error, match=message):
        load(bare(b), tmp_path / "wrong")
    with pytest.raises(error, match=message):
        load(bare(b), tmp_path / "wrong", lazy=True)
