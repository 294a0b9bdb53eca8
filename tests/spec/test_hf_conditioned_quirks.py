"""The quirks of GLoRA, PEANuT and DEFT, which compute from the frozen weight what they add to it, seen in HF PEFT run live."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft import DeftConfig, GloraConfig, PeanutConfig  # noqa: E402
from torch import nn  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from peft_ref import stack  # noqa: E402
from peft_ref.layers import Linear  # noqa: E402
from peft_ref.methods import DEFT, GLoRA  # noqa: E402
from peft_ref.stack import Adapter  # noqa: E402
from tests.spec.hf_made import keys, model, wrapped  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]


def test_glora_q1_what_is_none_is_saved_and_loaded_and_acts() -> None:
    made = model(nn.Linear(6, 5), GloraConfig(config_A_B="none", config_C="none", config_D_E="none", target_modules=["l"]))
    assert keys(made) == {
        "glora_A.zeros": (5, 6),
        "glora_B.zeros": (5, 6),
        "glora_C.zeros": (6, 1),
        "glora_D.zeros": (5,),
        "glora_E.zeros": (5,),
    }
    x = torch.randn(2, 6, dtype=torch.float64)
    before = made(x)
    peft.set_peft_model_state_dict(made, {"base_model.model.l.glora_B.zeros": torch.ones(5, 6)}, adapter_name="a0")
    assert torch.allclose(made(x) - before, x.sum(1, keepdim=True).expand(2, 5))


def test_glora_q2_unmerging_divides_by_nothing_and_ours_does_not() -> None:
    made = model(nn.Linear(6, 5), GloraConfig(config_A_B="constant", config_C="none", config_D_E="none", target_modules=["l"]))
    layer = wrapped(made)
    weight, bias = (v.detach().numpy().copy() for v in (layer.base_layer.weight, layer.base_layer.bias))
    layer.glora_A["a0"].X.data[:] = -1.0
    made.merge_adapter()
    merged = layer.base_layer.weight.detach().numpy().copy()
    made.unmerge_adapter()
    assert not torch.isfinite(layer.base_layer.weight).any()
    method = GLoRA(config_A_B="constant", config_C="none", config_D_E="none")
    B = float(layer.glora_B["a0"].X)
    zeros = {"C": np.zeros((6, 1)), "D": np.zeros(5), "E": np.zeros(5)}
    adapter = Adapter(method, method.to_params(A=np.full((1, 1), -1.0), B=np.full((1, 1), B), **zeros))
    back, _ = stack.unmerge(Linear(in_features=6, out_features=5), merged, bias, [adapter], weight, bias)
    np.testing.assert_allclose(back, weight, atol=1e-12)


def test_glora_q3_the_keys_depend_on_whether_the_layer_has_a_bias() -> None:
    config = GloraConfig(r=2, target_modules=["l"])
    with_bias, without = keys(model(nn.Linear(6, 5), config)), keys(model(nn.Linear(6, 5, bias=False), config))
    assert with_bias.keys() - without.keys() == {"glora_C.Xd", "glora_C.Xu", "glora_D.X", "glora_E.X"}
    for bias, found in ((True, with_bias), (False, without)):
        layer = Linear(in_features=6, out_features=5, bias=bias)
        assert {s.key: s.stored_shape for s in GLoRA(r=2).spec(layer)} == found


def test_peanut_q1_unmerging_puts_a_copy_back() -> None:
    made = model(nn.Linear(6, 5), PeanutConfig(r=2, target_modules=["l"]))
    layer = wrapped(made)
    before = layer.base_layer.weight.detach().clone()
    made.merge_adapter()
    layer.base_layer.weight.data += 7.0
    made.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)


def test_peanut_q2_unmerging_takes_every_adapter_out() -> None:
    made = model(nn.Linear(6, 5), *(PeanutConfig(r=2, target_modules=["l"]) for _ in range(2)))
    layer = wrapped(made)
    made.merge_adapter()
    assert layer.merged_adapters == ["a0", "a1"]
    layer.unmerge()
    assert layer.merged_adapters == []
    assert layer._base_weight_before_merge is None


def test_peanut_q3_the_slope_of_prelu_is_made_anew() -> None:
    made = model(nn.Linear(6, 5).float(), PeanutConfig(r=2, act_fn="prelu", target_modules=["l"])).float()
    made(torch.randn(2, 6)).sum().backward()
    assert not any(p.requires_grad and p.numel() == 1 for p in made.parameters())


def test_deft_q1_it_computes_in_float32() -> None:
    torch.manual_seed(1)
    made = model(nn.Linear(6, 5), DeftConfig(r=2, target_modules=["l"]))
    layer, x = wrapped(made), torch.randn(3, 6, dtype=torch.float64)
    method = DEFT(r=2)
    params = method.to_params(P=layer.deft_P["a0"].detach().numpy(), R=layer.deft_R["a0"].detach().numpy())
    W, b = (v.detach().numpy() for v in (layer.base_layer.weight, layer.base_layer.bias))
    ours = stack.forward(Linear(in_features=6, out_features=5), W, b, [Adapter(method, params)], x.numpy())
    far = np.max(np.abs(made(x).detach().numpy() - ours))
    assert 1e-9 < far < 1e-5


def test_deft_q2_alpha_zero_is_no_alpha() -> None:
    made = model(nn.Linear(6, 5), DeftConfig(r=2, alpha=0, target_modules=["l"]))
    assert wrapped(made).deft_scaling["a0"] == 1.0 == DEFT(r=2, alpha=0).scale(2)


def test_deft_q3_a_second_adapter_on_a_conv1d_reads_the_weight_transposed() -> None:
    made = model(Conv1D(6, 6), DeftConfig(r=2, target_modules=["l"]))
    layer, x = wrapped(made), torch.randn(3, 6, dtype=torch.float64)
    before, right = layer.get_delta_weight("a0").clone(), made(x)
    made.add_adapter("a1", DeftConfig(r=2, target_modules=["l"]))
    assert not torch.allclose(layer.get_delta_weight("a0"), before, atol=1e-3)  # of the first one
    assert torch.allclose(made(x), right, atol=1e-5)  # the forward pass does not ask
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(Conv1D(7, 6), *(DeftConfig(r=2, target_modules=["l"]) for _ in range(2))).merge_adapter()
