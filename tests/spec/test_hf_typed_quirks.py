"""Every quirk of CPT and Cartridge, seen in HF PEFT run live. One that a newer PEFT has lost fails here, and leaves its page."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_ref import CPT  # noqa: E402
from peft_ref.errors import ConfigError  # noqa: E402
from peft_ref.methods.cpt import DELTA  # noqa: E402
from tests.hf.tiny_models import received, tiny  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
IDS = torch.tensor([[3, 4, 5, 6], [5, 6, 7, 8]])
WORDS = {"cpt_token_ids": [7, 3, 5, 2], "cpt_tokens_type_mask": [1, 2, 3, 4]}


@pytest.fixture(autouse=True)
def _float64_and_seed() -> Iterator[None]:
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def cpt(name: str = "default", **more: Any) -> Any:
    config = peft.CPTConfig(task_type="CAUSAL_LM", **{**WORDS, **more})
    return peft.get_peft_model(tiny("CAUSAL_LM"), config, adapter_name=name).eval()


def moved(made: Any) -> Any:
    """What is added to the words, in float64 and far outside."""
    made.prompt_encoder["default"].double()
    parameter = made.prompt_encoder["default"].delta_embedding.weight
    with torch.no_grad():
        parameter.normal_()
    return parameter


def cartridge(n: int = 3, task: str = "CAUSAL_LM", **more: Any) -> Any:
    return peft.get_peft_model(tiny(task), peft.CartridgeConfig(task_type=task, num_virtual_tokens=n, **more)).eval()


def tensors(made: Any) -> dict[str, Any]:
    return dict(made.prompt_encoder["default"].named_parameters())


# ---- CPT


@pytest.mark.parametrize("use", [lambda made: made(input_ids=IDS), lambda made: made.get_prompt(1), peft.get_peft_model_state_dict])
def test_cpt_q1_the_parameter_is_overwritten_in_evaluation_and_by_saving(use: Any) -> None:
    made = cpt()
    parameter = moved(made)
    before = parameter.detach().clone().numpy()
    with torch.no_grad():
        use(made)
    after = parameter.detach().numpy()
    ours = CPT(**WORDS, token_dim=8).projected({"embedding.weight": before, DELTA: before})[DELTA]
    assert np.max(np.abs(after - before)) > 0.1
    np.testing.assert_allclose(after, ours, rtol=1e-7)


def test_cpt_q2_radii_and_weights_of_the_loss_are_float32() -> None:
    made = cpt()
    parameter = moved(made)
    made.get_prompt(1)
    norm = parameter.norm(dim=1)[0].item()
    exactly, rounded = 0.1 * (8 / 2048) ** 0.5, float(np.float32(0.1) * np.sqrt(np.float32(8 / 2048)))
    assert abs(norm - rounded) < 1e-16 < 1e-11 < abs(norm - exactly)
    decaying = cpt(opt_weighted_loss_type="decay", opt_loss_decay_factor=0.1)
    logits = decaying(input_ids=IDS).logits
    labels = torch.tensor([7, 3, 5, 2]).expand(2, -1)
    each = -torch.log_softmax(logits[:, :-1], -1).gather(-1, torch.cat([labels, IDS], 1)[:, 1:, None])[..., 0]
    loss = decaying(input_ids=IDS, labels=IDS).loss

    def mean(factor: float) -> float:
        return float((factor * each[:, 2].sum() + each[:, 3:].sum()) / 10)

    assert abs(loss.item() - mean(float(np.float32(0.1)))) < 1e-14 < 1e-10 < abs(loss.item() - mean(0.1))


def test_cpt_q3_the_mask_of_tokens_is_not_read() -> None:
    made = cpt()
    masked = cpt(cpt_mask=[0, 0, 0, 0])
    masked.load_state_dict(made.state_dict())
    for model in (made, masked):
        moved(model)
    masked.prompt_encoder.load_state_dict(made.prompt_encoder.state_dict())
    assert torch.equal(made(input_ids=IDS, labels=IDS).loss, masked(input_ids=IDS, labels=IDS).loss)
    with pytest.raises(ValueError, match="same length"):
        cpt(cpt_mask=[0])


def test_cpt_q4_default_types_leave_no_label() -> None:
    assert cpt(cpt_tokens_type_mask=None)(input_ids=IDS, labels=IDS).loss.isnan()
    assert cpt(cpt_tokens_type_mask=[4, 5, 6, 7])(input_ids=IDS, labels=IDS, input_type_mask=torch.full((2, 4), 4)).loss.isnan()


def test_cpt_q5_the_callers_types_are_raised_in_place() -> None:
    types = torch.full((2, 4), 4)
    cpt()(input_ids=IDS, labels=IDS, input_type_mask=types)
    assert types.unique().tolist() == [8]


def test_cpt_q6_only_an_adapter_called_default_has_a_loss() -> None:
    made = cpt("other")
    made(input_ids=IDS)
    with pytest.raises(KeyError, match="default"):
        made(input_ids=IDS, labels=IDS)


def test_cpt_q7_sizes_of_a_configuration_are_overwritten() -> None:
    config = cpt(num_virtual_tokens=9, token_dim=64, num_layers=5, num_transformer_submodules=2).peft_config["default"]
    assert (config.num_virtual_tokens, config.token_dim, config.num_layers, config.num_transformer_submodules) == (4, 8, 2, 1)


def test_cpt_q8_a_loaded_adapter_has_a_dead_parameter(tmp_path: Path) -> None:
    made = cpt()
    moved(made)
    made.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny("CAUSAL_LM"), tmp_path)
    own = tensors(loaded)
    assert own[DELTA].requires_grad
    assert not own[DELTA].any()
    own["embedding.weight"].requires_grad_(True)
    loaded(input_ids=IDS, labels=IDS).loss.backward()
    assert own[DELTA].grad is None
    assert own["embedding.weight"].grad.abs().sum() > 0


def test_cpt_q9_a_type_below_zero_is_trained_and_put_back() -> None:
    made = cpt(cpt_tokens_type_mask=[-3, 2, 3, 4])
    parameter = moved(made)
    made(input_ids=IDS, labels=IDS).loss.backward()
    assert parameter.norm(dim=1)[0].item() == pytest.approx(1e-10, rel=1e-6)
    assert parameter.grad[0].any()
    assert not parameter.grad[3].any()


def test_cpt_q10_the_model_is_given_the_labels_too() -> None:
    made = cpt()
    seen: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        seen.update(kwargs, loss=out.loss)

    made.base_model.register_forward_hook(note, with_kwargs=True)
    out = made(input_ids=IDS, labels=IDS, input_type_mask=torch.tensor([[2, 4, 4, 4], [2, 2, 4, 4]]))
    assert seen["labels"].tolist() == [[-100, -100, -100, 2, -100, 4, 5, 6], [-100, -100, -100, 2, -100, -100, 7, 8]]
    assert torch.isclose(seen["loss"].double(), out.loss)


def test_cpt_q11_an_unknown_loss_is_none() -> None:
    made, unknown = cpt(opt_loss_decay_factor=0.5), cpt(opt_weighted_loss_type="linear", opt_loss_decay_factor=0.5)
    unknown.load_state_dict(made.state_dict())
    assert torch.equal(made(input_ids=IDS, labels=IDS).loss, unknown(input_ids=IDS, labels=IDS).loss)
    with pytest.raises(ConfigError, match="is not known"):
        CPT(opt_weighted_loss_type="linear")


def test_cpt_q12_a_negative_epsilon_turns_rows_round() -> None:
    made = cpt(opt_projection_epsilon=-0.5)
    parameter = moved(made)
    method, signs = CPT(**WORDS, token_dim=8, opt_projection_epsilon=-0.5), []
    for _ in range(3):
        before = parameter.detach().clone().numpy()
        made.get_prompt(1)
        after = parameter.detach().numpy()
        np.testing.assert_allclose(after, method.projected({"embedding.weight": before, DELTA: before})[DELTA], rtol=1e-6)
        signs.append(np.unique(np.sign(after[1] / before[1])).tolist())
    assert signs == [[-1.0]] * 3


def test_cpt_q13_two_files_saved_one_after_the_other_differ_by_roundings() -> None:
    words = {"cpt_token_ids": list(range(11)), "cpt_tokens_type_mask": [1] * 11}
    made = cpt(**words)
    parameter = made.prompt_encoder["default"].delta_embedding.weight
    with torch.no_grad():
        made.prompt_encoder["default"].embedding.weight.zero_()
        parameter.normal_()
    first, second = (peft.get_peft_model_state_dict(made)["prompt_embeddings"].clone() for _ in range(2))
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)
    assert torch.allclose(first, second, rtol=1e-6, atol=0)


def test_cpt_q14_the_number_of_labels_is_ignored() -> None:
    """`test_micro_batches_are_one_batch` in tests/train holds ours to one batch."""
    made = cpt(cpt_tokens_type_mask=[1, 2, 3, 4])
    given = {"input_ids": IDS, "labels": IDS}
    assert torch.equal(made(**given, num_items_in_batch=torch.tensor(1000)).loss, made(**given).loss)
    plain = tiny("CAUSAL_LM")
    assert not torch.equal(plain(**given, num_items_in_batch=torch.tensor(1000)).loss, plain(**given).loss)


# ---- Cartridge


def test_cartridge_q1_a_start_from_a_text_is_a_second_step() -> None:
    base = tiny("CAUSAL_LM")
    with torch.no_grad():
        whole = base(input_ids=IDS[:1], use_cache=True)
    made = peft.get_peft_model(base, peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    rest = whole.logits[:, 2:]
    assert (made(input_ids=IDS[:1, 2:]).logits - rest).abs().max() > 1e-4
    peft.tuners.cartridge.utils.initialize_kv_prefix_from_past_key_values(made, past_key_values=copy.deepcopy(whole.past_key_values))
    assert torch.allclose(made(input_ids=IDS[:1, 2:]).logits, rest, rtol=0, atol=1e-6)


def test_cartridge_q2_nothing_is_left_to_train() -> None:
    made = cartridge(num_frozen_tokens=3)
    assert tensors(made)["trainable_embedding"].shape == (0, 16)
    assert tensors(made)["trainable_embedding"].requires_grad
    assert made.get_nb_trainable_parameters()[0] == 0


def test_cartridge_q3_a_loaded_one_asks_for_no_gradient(tmp_path: Path) -> None:
    made = cartridge()
    made.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny("CAUSAL_LM"), tmp_path)
    assert {name: (len(p), p.requires_grad) for name, p in tensors(loaded).items()} == {
        "frozen_embedding": (1, False),
        "trainable_embedding": (2, False),
    }
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(tiny("CAUSAL_LM"), tmp_path, is_trainable=True)
    again = cartridge()
    peft.set_peft_model_state_dict(again, peft.get_peft_model_state_dict(made))
    assert all(torch.equal(p, tensors(made)[name]) for name, p in tensors(again).items())


def test_cartridge_q4_of_several_only_the_first_ones_tokens_stay_frozen(tmp_path: Path) -> None:
    for name, n, frozen in (("one", 3, 1), ("other", 4, 2)):
        cartridge(n, num_frozen_tokens=frozen).save_pretrained(tmp_path / name)
    peft.compose_cartridge_adapters([tmp_path / "one", tmp_path / "other"], output_path=tmp_path / "both")
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "both"))
    assert (config.num_virtual_tokens, config.num_frozen_tokens) == (7, 1)


def test_cartridge_q5_half_of_an_encoder_decoders_table_is_dead() -> None:
    made = cartridge(task="SEQ_2_SEQ_LM")
    made(input_ids=IDS, labels=IDS).loss.backward()
    by_slot = tensors(made)["trainable_embedding"].grad.view(2, 4, 8).abs().sum((0, 2))
    assert [bool(size > 0) for size in by_slot] == [True, True, False, False]
    layers = made.get_prompt(1).self_attention_cache.layers
    assert torch.equal(layers[0].keys[:, :, :1], layers[1].keys[:, :, :1])


def test_cartridge_q6_a_number_of_tokens_may_be_no_whole_number() -> None:
    for number in (1.0, True):
        assert tensors(cartridge(num_frozen_tokens=number))["frozen_embedding"].shape == (1, 16)


def test_a_model_receives_no_types_of_cpt() -> None:
    seen = received(cpt(), input_ids=IDS, input_type_mask=torch.full((2, 4), 4))
    assert "input_type_mask" not in seen
