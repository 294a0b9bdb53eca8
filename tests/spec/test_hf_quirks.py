"""Every quirk of the spec's pages, seen in HF PEFT run live. A quirk that a newer PEFT has lost fails here, and leaves its page."""

from __future__ import annotations

import copy
import re
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig  # noqa: E402
from peft.tuners.tuners_utils import check_target_module_exists  # noqa: E402
from torch import nn  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from tests.spec.pages import METHOD_PAGES, entries  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _float64_and_seed() -> Iterator[None]:
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def lora(**more: Any) -> Any:
    return LoraConfig(target_modules=["l"], **{"r": 4, "lora_alpha": 6, **more})


def loha(**more: Any) -> Any:
    return LoHaConfig(target_modules=["l"], **{"r": 2, "alpha": 3, **more})


def ia3(feedforward: bool = False) -> Any:
    return IA3Config(target_modules=["l"], feedforward_modules=["l"] if feedforward else [])


def model(layer: Any, *configs: Any) -> Any:
    """HF's model of one layer `l` with active adapters, none of whose numbers is at its start."""
    base = nn.Sequential()
    base.add_module("l", layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(base, configs[0], adapter_name="a0", autocast_adapter_dtype=False)
        for i, config in enumerate(configs[1:], start=1):
            made.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
    made.base_model.set_adapter([f"a{i}" for i in range(len(configs))])
    for name, p in made.named_parameters():
        if re.search("lora_|hada_|ia3_", name):
            p.data = torch.rand_like(p) + 0.5
    return made.eval()


def wrapped(made: Any) -> Any:
    return made.base_model.model.l


def disagreement(made: Any, x: Any) -> float:
    """How far the merged layer is from the forward pass."""
    y = made(x)
    made.merge_adapter()
    return float((made(x) - y).abs().max())


def keys(made: Any, name: str = "a0") -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in peft.get_peft_model_state_dict(made, adapter_name=name).items()}


def image() -> Any:
    return torch.randn(2, 3, 7, 6)


def test_every_quirk_of_the_pages_is_run_here_or_beside() -> None:
    listed = {e.id for page in METHOD_PAGES.values() for e in entries(page) if e.letter == "Q"}
    source = "\n".join(file.read_text("utf-8") for file in Path(__file__).parent.glob("test_hf_*quirks.py"))
    assert listed == {name.replace("_", "-").upper() for name in re.findall(r"^def test_([a-z0-9]+_q\d+)_", source, re.M)}


def test_merged_equals_forward_on_an_ordinary_convolution() -> None:
    for config in (lora(), lora(use_dora=True), loha()):
        assert disagreement(model(nn.Conv2d(3, 5, 3, padding=1), config), image()) < 1e-11


def adalora(**more: Any) -> Any:
    return AdaLoraConfig(target_modules=["l"], **{"init_r": 3, "target_r": 2, "total_step": 5, **more})


def test_adalora_q1_equal_ranks_raise_at_the_first_allocation() -> None:
    for target_r, raises in ((2, False), (3, True)):
        made = model(nn.Linear(3, 5), adalora(target_r=target_r))
        made(torch.randn(2, 3)).sum().backward()
        if raises:
            with pytest.raises(RuntimeError, match="kthvalue"):
                made.base_model.update_and_allocate(1)
        else:
            made.base_model.update_and_allocate(1)


def test_adalora_q2_a_grouped_convolution_raises() -> None:
    with pytest.raises(RuntimeError):
        model(nn.Conv2d(4, 6, 3, groups=2), adalora())(torch.randn(2, 4, 5, 5))


def test_adalora_q3_without_a_task_type_the_penalty_is_left_out() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(3, 5)

        def forward(self, x: Any) -> Any:
            return types.SimpleNamespace(loss=self.l(x).sum())

    made = peft.get_peft_model(Loss(), adalora(), autocast_adapter_dtype=False)
    x = torch.randn(2, 3)
    plain = made.base_model.model(x).loss.item()
    assert made(x).loss.item() == plain
    assert made.base_model(x).loss.item() > plain + 0.1


def test_adalora_q4_an_adapter_called_0_cannot_be_saved_with_its_ranks() -> None:
    base = nn.Module()
    base.layers = nn.ModuleList(nn.ModuleDict({"l": nn.Linear(3, 5)}) for _ in range(1))
    for name in ("first", "0"):
        made = peft.get_peft_model(copy.deepcopy(base), adalora(), adapter_name=name)
        made.peft_config[name].rank_pattern = {f"layers.0.l.lora_E.{name}": [True, False, True]}
        if name == "first":
            assert keys(made, name)["base_model.model.layers.0.l.lora_A"] == (2, 3)
        else:
            with pytest.raises(KeyError, match="layers"):
                keys(made, name)


def test_adalora_q5_what_the_layer_says_of_its_scale_is_not_what_acts() -> None:
    made = model(nn.Linear(3, 5), adalora(lora_alpha=6))
    before = wrapped(made).get_delta_weight("a0")
    made.base_model.resize_modules_by_rank_pattern({"l.lora_E.a0": [True, True, False]}, "a0")
    layer = wrapped(made)
    assert (layer.r["a0"], layer.scaling["a0"], layer.ranknum["a0"].item()) == (2, 6, 3)
    left = layer.lora_B["a0"] @ (layer.lora_A["a0"] * layer.lora_E["a0"]) * 6 / 3.00001
    assert torch.allclose(layer.get_delta_weight("a0"), left, rtol=1e-12)
    assert before.shape == left.shape


def test_adalora_q6_the_divisor_is_trainable_where_the_weight_has_another_dtype() -> None:
    for dtype, trained in ((torch.float32, False), (torch.bfloat16, True)):
        torch.set_default_dtype(torch.float32)
        made = model(nn.Linear(3, 5, dtype=dtype), adalora())
        made(torch.randn(2, 3, dtype=dtype)).sum().backward()
        divisor = wrapped(made).ranknum["a0"]
        assert (divisor.requires_grad, divisor.grad is not None) == (trained, trained)
    assert not any("ranknum" in key for key in keys(made))


def test_lora_q1_a_dilated_convolution_raises() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(nn.Conv2d(3, 5, 3, dilation=2), lora())(image())


def test_lora_q1_a_dilated_convolution_with_same_padding_is_silently_another_function() -> None:
    assert disagreement(model(nn.Conv2d(3, 5, 3, dilation=2, padding="same"), lora()), image()) > 1


def test_lora_q2_padding_mode_is_not_given_to_A() -> None:
    assert disagreement(model(nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), lora()), image()) > 1


def test_lora_q3_merging_a_conv3d_with_a_flat_kernel_raises() -> None:
    for kernel in ((1, 1, 3), (1, 1, 1)):
        made = model(nn.Conv3d(3, 5, kernel), lora())
        with pytest.raises(RuntimeError):
            made.merge_adapter()


def test_lora_q4_max_norm_rewrites_A_in_place() -> None:
    made = model(nn.Embedding(9, 5, max_norm=1.0), lora())
    A = wrapped(made).lora_embedding_A["a0"]
    before = A.detach().clone()
    made(torch.tensor([1, 2]))
    changed = (before != A).any(dim=0).tolist()
    assert changed == [False, True, True] + [False] * 6


def test_lora_q5_padding_idx_has_a_delta_and_no_gradient() -> None:
    made = model(nn.Embedding(9, 5, padding_idx=1), lora())
    y = made(torch.tensor([1, 2]))
    y.sum().backward()
    assert (y[0] - wrapped(made).base_layer.weight[1]).abs().min() > 0
    gradient = wrapped(made).lora_embedding_A["a0"].grad
    assert not gradient[:, 1].any()
    assert gradient[:, 2].all()


def test_lora_q6_a_refused_merge_has_changed_the_weight() -> None:
    made = model(nn.Linear(3, 5, bias=False), lora(lora_bias=True))
    before = wrapped(made).base_layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="has no bias"):
        made.merge_adapter()
    assert (wrapped(made).base_layer.weight - before).abs().min() > 0
    assert not wrapped(made).merged


def test_lora_q7_olora_on_conv1d_raises_in_forward() -> None:
    torch.set_default_dtype(torch.float32)
    base = nn.Sequential()
    base.add_module("l", Conv1D(5, 3))
    made = peft.get_peft_model(base, lora(r=2, init_lora_weights="olora"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        made(torch.randn(2, 3))


def test_lora_q8_an_adapter_called_0_takes_keys_from_another() -> None:
    base = nn.Module()
    base.layers = nn.ModuleList(nn.ModuleDict({"l": nn.Linear(3, 5)}) for _ in range(2))
    made = peft.get_peft_model(base, lora(), adapter_name="first")
    assert len(keys(made, "first")) == 4
    made.add_adapter("0", lora())
    assert sorted(keys(made, "first")) == [f"base_model.model.layers.1.l.lora_{x}.weight" for x in "AB"]


def test_lora_q9_a_full_name_is_adapted_in_an_unlisted_layer() -> None:
    base = nn.Module()
    base.layers = nn.ModuleList(nn.ModuleDict({"l": nn.Linear(3, 5)}) for _ in range(3))
    config = LoraConfig(target_modules=["layers.0.l", "l"], layers_to_transform=[2], layers_pattern="layers")
    assert {k.split(".")[3] for k in keys(peft.get_peft_model(base, config), "default")} == {"0", "2"}


def test_lora_q10_a_list_of_layers_at_the_root_needs_layers_pattern() -> None:
    def reached(**more: Any) -> bool:
        config = LoraConfig(target_modules=["l"], layers_to_transform=[2], **more)
        return bool(check_target_module_exists(config, "layers.2.l"))

    assert not reached()
    assert reached(layers_pattern="layers")
    assert check_target_module_exists(LoraConfig(target_modules=["l"], layers_to_transform=[2]), "model.layers.2.l")


def test_dora_q1_the_norm_of_a_grouped_convolution_is_that_of_a_reshaped_product() -> None:
    conv = nn.Conv2d(4, 6, 2, groups=2, bias=False)
    made = model(conv, lora(use_dora=True))
    dora, x = wrapped(made), torch.randn(2, 4, 5, 5)
    A, B, m = dora.lora_A["a0"], dora.lora_B["a0"], dora.lora_magnitude_vector["a0"].weight
    gain = made(x) / (conv(x) + 1.5 * B(A(x)))
    scrambled = (B.weight.reshape(-1, 4) @ A.weight.reshape(4, -1)).reshape(conv.weight.shape)
    n = (conv.weight + 1.5 * scrambled).flatten(1).norm(dim=1)
    assert torch.allclose(gain, (m.reshape(-1) / n).reshape(1, -1, 1, 1).expand_as(gain))
    with pytest.raises(NotImplementedError):
        made.merge_adapter()


def test_dora_q2_an_earlier_lora_bias_is_scaled_in_forward_and_not_in_merge() -> None:
    linear = nn.Linear(3, 5)
    made = model(linear, lora(lora_bias=True), lora(use_dora=True))
    x = torch.zeros(1, 3)  # only biases are left
    c = 1.5 * wrapped(made).lora_B["a0"].bias
    forward = made(x)[0] - linear.bias.detach().clone()
    bias = linear.bias.detach().clone()
    made.merge_adapter()
    assert torch.allclose(made(x)[0] - bias, c)
    assert (forward / c - 1).abs().min() > 0.01


def test_dora_q3_a_reloaded_merged_model_is_not_unmerged() -> None:
    made = model(nn.Linear(3, 5), lora(use_dora=True))
    made.merge_adapter()
    merged = wrapped(made).base_layer.weight.detach().clone()
    loaded = model(nn.Linear(3, 5), lora(use_dora=True))
    loaded.load_state_dict(copy.deepcopy(made.state_dict()))
    assert torch.equal(wrapped(loaded).base_layer.weight, merged)
    wrapped(loaded).merged_adapters = ["a0"]  # even when told that it is merged, it lacks the norm
    with pytest.raises(KeyError, match="weight_norm"):
        loaded.unmerge_adapter()


def test_dora_q4_a_vector_comes_back_as_a_matrix_of_one_row() -> None:
    made = model(nn.Linear(3, 5), lora(use_dora=True))
    assert made(torch.randn(3)).shape == (1, 5)
    assert made(torch.randn(2, 3)).shape == (2, 5)
    assert model(nn.Linear(3, 5), lora())(torch.randn(3)).shape == (5,)


def test_loha_q1_rank_dropout_divides_by_the_mean_of_its_mask() -> None:
    linear = nn.Linear(3, 200, bias=False)
    made = model(linear, loha(rank_dropout=0.25))
    x = torch.randn(1, 3)
    whole = made(x) - linear(x)
    dropped = made.train()(x) - linear(x)
    ratio = (dropped / whole).reshape(-1)
    kept = ratio.abs() > 1e-9
    assert torch.allclose(ratio[kept], 1 / kept.double().mean())
    assert not kept.all()


def test_loha_q1_all_rows_dropped_give_no_number() -> None:
    made = model(nn.Linear(3, 4), loha(rank_dropout=0.9999)).train()
    assert made(torch.randn(1, 3)).isnan().all()


def test_loha_q2_padding_mode_is_not_followed() -> None:
    assert disagreement(model(nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), loha()), image()) > 1


def test_loha_q3_use_effective_conv2d_has_other_tensors() -> None:
    plain = keys(model(nn.Conv2d(4, 6, 3), loha()))
    made = keys(model(nn.Conv2d(4, 6, 3), loha(use_effective_conv2d=True)))
    name = "base_model.model.l.hada_"
    assert plain[name + "w1_a"] == plain[name + "w2_a"] == (6, 2)
    assert made[name + "w1_a"] == made[name + "w2_a"] == (2, 6)
    assert made.keys() - plain.keys() == {name + "t1", name + "t2"}


@pytest.mark.parametrize(("l", "ratio"), [(2.0, 1 - 5e-9), (1e-8, 0.5), (-1e-8, float("-inf")), (0.0, 0.0)])
def test_ia3_q1_unmerge_divides_by_l_plus_epsilon(l: float, ratio: float) -> None:
    linear = nn.Linear(3, 5)
    linear.weight.data = torch.ones(5, 3)
    made = model(linear, ia3())
    wrapped(made).ia3_l["a0"].data[:] = l
    made.merge_adapter()
    made.unmerge_adapter()
    assert linear.weight[0, 0].item() == pytest.approx(ratio, rel=1e-12)


def test_ia3_q2_a_second_adapter_takes_the_first_ones_side() -> None:
    made = model(nn.Linear(3, 5), ia3(feedforward=True), ia3(feedforward=False))
    assert keys(made, "a1") == {"base_model.model.l.ia3_l": (1, 3)}


def test_ia3_q3_feedforward_modules_match_inside_a_part() -> None:
    base = nn.Module()
    base.c_proj, base.proj = nn.Linear(3, 5), nn.Linear(3, 5)
    config = IA3Config(target_modules=["c_proj", "proj"], feedforward_modules=["proj"])
    made = peft.get_peft_model(base, config)
    assert set(keys(made, "default").values()) == {(1, 3)}
    other = nn.Module()
    other.c_proj, other.proj = nn.Linear(3, 5), nn.Linear(3, 5)
    reached = keys(peft.get_peft_model(other, LoraConfig(target_modules=["proj"])), "default")
    assert {k.split(".")[2] for k in reached} == {"proj"}
