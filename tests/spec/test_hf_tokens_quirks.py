"""The quirks in spec/methods/trainable_tokens.md, each against HF PEFT run live."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch import nn  # noqa: E402

from peft_ref import Adapter, Linear, forward, merge  # noqa: E402
from peft_ref.errors import ConfigError, UnsupportedLayerError  # noqa: E402
from peft_ref.files.config import from_dict  # noqa: E402
from peft_ref.methods import TrainableTokens  # noqa: E402
from peft_ref.methods.trainable_tokens import Params  # noqa: E402
from peft_ref.model.adapted import Adapted, adapt  # noqa: E402
from peft_ref.model.attaching import add, update  # noqa: E402
from peft_ref.model.merging import merge_and_unload  # noqa: E402
from peft_ref.model.running import forward as model_forward  # noqa: E402
from peft_ref.model.switching import activate  # noqa: E402
from tests.model.live import frozen_graph  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]


def made(layer: Any, tokens: list[int], **more: Any) -> Any:
    base = nn.Sequential()
    base.add_module("l", layer.double())
    return peft.get_peft_model(base, peft.TrainableTokensConfig(target_modules=["l"], token_indices=tokens, **more), adapter_name="a0")


def tuner(model: Any) -> Any:
    return model.base_model.model.l


def test_trainabletokens_q1_a_linear_layers_bias_is_lost_until_it_is_merged() -> None:
    rng, layer = np.random.default_rng(0), Linear(in_features=3, out_features=5)
    model = made(nn.Linear(3, 5), [4, 1])
    D = rng.normal(size=(2, 3))
    tuner(model).trainable_tokens_delta["a0"].data = torch.tensor(D)
    W, b = (p.detach().numpy().copy() for p in (tuner(model).base_layer.weight, tuner(model).base_layer.bias))
    x, adapters = rng.normal(size=(2, 3)), [Adapter(TrainableTokens(token_indices=(4, 1)), Params(D=D))]
    ours = forward(layer, W, b, adapters, x)
    np.testing.assert_allclose(model(torch.tensor(x)).detach().numpy(), ours - b, atol=1e-14)
    model.merge_adapter()
    np.testing.assert_allclose(model(torch.tensor(x)).detach().numpy(), ours, atol=1e-14)
    np.testing.assert_array_equal(merge(layer, W, b, adapters)[0], tuner(model).base_layer.weight.detach().numpy())


def test_trainabletokens_q2_a_shared_token_raises_when_it_runs() -> None:
    model = made(nn.Embedding(6, 3), [4, 1])
    model.add_adapter("a1", peft.TrainableTokensConfig(target_modules=["l"], token_indices=[1]))
    model.base_model.set_adapter(["a0", "a1"])
    with pytest.raises(ValueError, match="already defined"):
        model(torch.tensor([1]))


def test_trainabletokens_q3_unmerge_writes_what_it_kept() -> None:
    model = made(nn.Embedding(6, 3), [4, 1])
    before = tuner(model).base_layer.weight.detach().clone()
    tuner(model).base_layer.weight.data += 1.0
    model.merge_adapter()
    model.unmerge_adapter()
    after = tuner(model).base_layer.weight.detach()
    assert torch.equal(after[[4, 1]], before[[4, 1]])
    assert torch.equal(after[[0, 2, 3, 5]], before[[0, 2, 3, 5]] + 1.0)


def test_trainabletokens_q4_the_delta_is_the_rows() -> None:
    model = made(nn.Embedding(6, 3), [4, 1])
    assert torch.equal(tuner(model).trainable_tokens_delta["a0"], tuner(model).base_layer.weight[[4, 1]])


def llama(tied: bool) -> Any:
    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=tied)).double().eval()


def tokens(*indices: int, of: list[str] | None = None) -> Any:
    return peft.TrainableTokensConfig(token_indices=list(indices), target_modules=of)


def ours_with(tied: bool, **asked: tuple[list[int], str]) -> Adapted:
    """A model of ours with an adapter for each name: which tokens, of which module."""
    model = adapt(frozen_graph(llama(tied)))
    for name, (indices, module) in asked.items():
        config = from_dict({"peft_type": "TRAINABLE_TOKENS", "token_indices": indices, "target_modules": [module]})
        model = add(model, name, config, np.random.default_rng(0))
        found = next(m for m in model.adapters[name].modules if m.endswith(module))
        params = model.adapters[name].modules[found].params
        model = update(model, name, {found: params._replace(D=params.D + 1)})
    return model


def test_trainabletokens_q5_a_second_adapter_on_a_tied_model_runs_no_more() -> None:
    theirs = peft.get_peft_model(llama(tied=True), tokens(4, 1), adapter_name="a0")
    ids = torch.arange(5)[None]
    theirs(ids)
    theirs.add_adapter("a1", tokens(3))
    for active in (["a0"], ["a1"], ["a0", "a1"]):
        theirs.base_model.set_adapter(active)
        with pytest.raises(ValueError, match="wraps an unknown layer"):
            theirs(ids)
    theirs.merge_and_unload(adapter_names=["a0", "a1"])(ids)
    ours = ours_with(True, a0=([4, 1], "embed_tokens"), a1=([3], "embed_tokens"))
    moved = model_forward(activate(ours, ["a0", "a1"]), "lm_head", np.eye(8)) - model_forward(adapt(ours.base), "lm_head", np.eye(8))
    np.testing.assert_allclose(moved, np.tile([0, 1, 0, 1, 1, *[0] * 7], (8, 1)), atol=1e-14)


def test_trainabletokens_q6_adapters_on_different_modules_do_not_go_together() -> None:
    theirs = peft.get_peft_model(llama(tied=False), tokens(4, 1), adapter_name="a0")
    theirs.add_adapter("a1", tokens(1, of=["lm_head"]))
    theirs.base_model.set_adapter(["a0", "a1"])
    with pytest.raises(KeyError, match="a1"):
        theirs(torch.arange(5)[None])
    with pytest.raises(KeyError, match="a1"):
        theirs.merge_adapter(["a0", "a1"])
    ours = ours_with(False, a0=([4, 1], "embed_tokens"), a1=([1], "lm_head"))
    merged = merge_and_unload(activate(ours, ["a0", "a1"]))
    for module, rows in (("model.embed_tokens", [1, 4]), ("lm_head", [1])):
        moved = np.asarray(merged.weight(f"{module}.weight")) - ours.frozen(f"{module}.weight")
        assert np.flatnonzero(moved.any(axis=1)).tolist() == rows


@pytest.mark.parametrize("tied", [False, True])
def test_trainabletokens_q7_a_head_named_beside_the_table_it_is_tied_to_cannot_run(tied: bool) -> None:
    theirs = peft.get_peft_model(llama(tied), tokens(4, 1, of=["embed_tokens", "lm_head"]))
    ours = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [4, 1], "target_modules": ["embed_tokens", "lm_head"]}
    with pytest.raises(ValueError, match="wraps an unknown layer") if tied else contextlib.nullcontext():
        theirs(torch.arange(5)[None])
    with pytest.raises(ConfigError, match=r"Name 'model.embed_tokens' alone") if tied else contextlib.nullcontext():
        add(adapt(frozen_graph(llama(tied))), "default", from_dict(ours), np.random.default_rng(0))


def test_a_token_that_is_not_there_is_refused_on_both_sides() -> None:
    with pytest.raises(IndexError):
        made(nn.Embedding(6, 3), [6])
    with pytest.raises(UnsupportedLayerError, match="no token 6 among 6 rows"):
        TrainableTokens(token_indices=(6,)).check_layer(Linear(in_features=3, out_features=6))


@pytest.mark.parametrize("tokens", [(1, 1), (-1,), (1.0,), "12", (True,)])
def test_tokens_are_whole_numbers_each_once(tokens: Any) -> None:
    with pytest.raises(ConfigError, match="token_indices="):
        TrainableTokens(token_indices=tokens)
