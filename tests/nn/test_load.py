"""A folder that transformers wrote is read as the model it was: whole or in shards, with or without its prefix, in 16 bits or more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.errors import ConfigError, KeyMismatchError, ShapeError
from peft_ref.files.safetensors import serialize
from peft_ref.nn import Inputs, load, model_of
from tests.nn.tiny import LLAMA, MODELS, random_net

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": True,
    **{k: getattr(LLAMA, k) for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
    **{k: getattr(LLAMA, k) for k in ("num_key_value_heads", "head_dim", "attention_bias")},
}
IDS = np.asarray([[3, 1, 4, 1]])


def write(folder: Path, tensors: dict[str, Any], **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    (folder / "model.safetensors").write_bytes(serialize(tensors, {"format": "pt"}))
    return folder


def weights() -> dict[str, Any]:
    return dict(random_net(LLAMA).weights)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    model, net, graph = load(write(tmp_path, weights()))
    assert model == LLAMA
    np.testing.assert_array_equal(
        model.forward(net, Inputs(input_ids=IDS)).logits, LLAMA.forward(random_net(LLAMA), Inputs(input_ids=IDS)).logits
    )
    assert graph.tied() == {"lm_head.weight": "model.embed_tokens.weight"}
    assert graph.parameters()["model.norm.weight"].dtype == "F64"


def test_sixteen_bits_are_computed_in_thirty_two(tmp_path: Path) -> None:
    net = load(write(tmp_path, {n: w.astype(np.float16) for n, w in weights().items()})).net
    assert {w.dtype for w in net.weights.values()} == {np.dtype("float32")}


def test_old_names_and_what_belongs_to_nobody(tmp_path: Path) -> None:
    """A bare base model lacks the prefix; old files hold inv_freq; a tied tensor may be stored under its second name."""
    tensors = {n.removeprefix("model."): w for n, w in weights().items()}
    tensors["lm_head.weight"] = tensors.pop("embed_tokens.weight")
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1)
    net = load(write(tmp_path, tensors)).net
    assert net.weights.keys() == weights().keys()
    np.testing.assert_array_equal(net.weights["model.embed_tokens.weight"], weights()["model.embed_tokens.weight"])


def test_a_bert_of_the_first_days_has_gammas_and_betas(tmp_path: Path) -> None:
    model = MODELS["bert masked"]
    held = dict(random_net(model).weights)
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): w for n, w in held.items()}
    assert old.keys() != held.keys()
    said = {k: getattr(model, k) for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    found = load(write(tmp_path, old, architectures=["BertForMaskedLM"], model_type="bert", **said, max_position_embeddings=9))
    assert found.model == model
    for name, w in held.items():
        np.testing.assert_array_equal(found.net.weights[name], w)


def test_what_is_not_built_is_refused() -> None:
    for architecture, said, message in (
        ("GPT2LMHeadModel", {"add_cross_attention": True}, "looks at an encoder is not built"),
        ("GPT2LMHeadModel", {"n_embd": 10}, "n_embd=10 must be a multiple of n_head=12"),
        ("BertModel", {"is_decoder": True}, "a BERT that is a decoder is not built"),
        ("BertModel", {"position_embedding_type": "relative_key"}, "'relative_key' is not built"),
        ("BertModel", {"num_attention_heads": 7}, "multiple of num_attention_heads=7"),
        ("BertForSequenceClassification", {"problem_type": "guess"}, "problem_type='guess' is not known"),
        ("BertForQuestionAnswering", {"id2label": {"0": "a", "1": "b", "2": "c"}}, "num_labels=3: an answer has"),
        ("BertModel", {"hidden_act": "mish"}, "activation 'mish'"),
    ):
        with pytest.raises(ConfigError, match=message):
            model_of({"architectures": [architecture], **said})


def test_a_head_with_numbers_of_its_own_is_not_tied_whatever_the_config_says(tmp_path: Path) -> None:
    tied = weights()
    copy = tied["model.embed_tokens.weight"]
    assert load(write(tmp_path, {**tied, "lm_head.weight": copy})).model == LLAMA
    model, net, graph = load(write(tmp_path, {**tied, "lm_head.weight": 2 * copy}))
    assert model == replace(LLAMA, tie_word_embeddings=False)
    assert graph.tied() == {}
    np.testing.assert_allclose(
        model.forward(net, Inputs(input_ids=IDS)).logits, 2 * LLAMA.forward(random_net(LLAMA), Inputs(input_ids=IDS)).logits, rtol=1e-12
    )


def test_refusals(tmp_path: Path) -> None:
    tensors = weights()
    with pytest.raises(ConfigError, match=r"architectures \['Nothing'\]"):
        load(write(tmp_path, tensors, architectures=["Nothing"]))
    with pytest.raises(ConfigError, match="activation 'mish'"):
        load(write(tmp_path, tensors, hidden_act="mish"))
    with pytest.raises(ShapeError, match=r"embed_tokens.weight is \(11, 8\), expected \(12, 8\)"):
        load(write(tmp_path, tensors, vocab_size=12))
    with pytest.raises(KeyMismatchError, match=r"no tensor 'lm_head\.weight'"):
        load(write(tmp_path, tensors, tie_word_embeddings=False))


@pytest.mark.hf
@pytest.mark.parametrize("shard", ["1MB", "1KB"])
def test_as_transformers_saves_it(tmp_path: Path, shard: str) -> None:
    for module in ("torch", "peft", "transformers"):
        pytest.importorskip(module)
    import transformers

    from tests.nn.beside_hf import close, pair

    sizes = {"vocab_size": 17, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 6}
    for tied in (True, False):
        both = pair(transformers.LlamaForCausalLM, **sizes, num_key_value_heads=2, tie_word_embeddings=tied, rope_theta=50.0)
        both.live.save_pretrained(tmp_path, max_shard_size=shard)
        assert len(list(tmp_path.glob("*.safetensors"))) == 1 if shard == "1MB" else len(list(tmp_path.glob("*.safetensors"))) > 2
        model, net, graph = load(tmp_path)
        assert model == both.model
        assert graph.config["rope_parameters"]["rope_theta"] == 50.0
        for name, w in both.net.weights.items():
            np.testing.assert_array_equal(net.weights[name], w)
        given = Inputs(input_ids=IDS)
        close(model.forward(net, given).logits, both.model.forward(both.net, given).logits, "logits", 0.0)


T5 = {
    "vocab_size": 17,
    "d_model": 12,
    "d_kv": 5,
    "d_ff": 10,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "feed_forward_proj": "gated-gelu",
}


@pytest.mark.hf
@pytest.mark.parametrize("said", [True, False])  # what config.json says of tie_word_embeddings: to transformers 5, whether to scale
@pytest.mark.parametrize("apart", [True, False])
def test_t5_as_transformers_loads_it(tmp_path: Path, said: bool, apart: bool) -> None:
    for module in ("torch", "peft", "transformers"):
        pytest.importorskip(module)
    import torch
    import transformers

    from tests.nn.beside_hf import close, float64, pair

    both = pair(transformers.T5ForConditionalGeneration, **T5)
    own = {"lm_head.weight": np.random.default_rng(5).normal(size=(17, 12))} if apart else {}
    new = ("scale_decoder_outputs", "dense_act_fn", "is_gated_act", "dtype")  # not in a config.json of before
    config = {k: v for k, v in both.graph.config.items() if k not in new}
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": said}))
    (tmp_path / "model.safetensors").write_bytes(serialize({**both.net.weights, **own}, {"format": "pt"}))
    with float64(), torch.no_grad():
        live = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float64)
        expected = live(input_ids=torch.tensor(IDS), labels=torch.tensor(IDS))
    model, net, graph = load(tmp_path)
    close(model.forward(net, Inputs(input_ids=IDS, labels=IDS)).logits, expected.logits, "logits", 1e-12)
    # The live model, shown as a graph, goes by its parameters.
    assert ("lm_head.weight" in graph.tied()) == (live.lm_head.weight is live.shared.weight) == (not apart)

    live.save_pretrained(tmp_path / "again")
    model, net, _ = load(tmp_path / "again")
    close(model.forward(net, Inputs(input_ids=IDS, labels=IDS)).logits, expected.logits, "logits after transformers wrote it", 1e-12)


@pytest.mark.hf
def test_t5_in_sixteen_bits_keeps_wo_in_thirty_two(tmp_path: Path) -> None:
    for module in ("torch", "peft", "transformers"):
        pytest.importorskip(module)
    import torch
    import transformers

    from tests.nn.beside_hf import close, pair

    pair(transformers.T5ForConditionalGeneration, **T5).live.to(torch.float32).save_pretrained(tmp_path)
    half = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float16)
    assert {p.dtype for n, p in half.named_parameters() if n.endswith("wo.weight")} == {torch.float32}
    half.save_pretrained(tmp_path / "half")
    model, net, _ = load(tmp_path / "half")
    assert {w.dtype for w in net.weights.values()} == {np.dtype("float32")}
    with torch.no_grad():
        expected = half(input_ids=torch.tensor(IDS), labels=torch.tensor(IDS)).logits.float()
    close(model.forward(net, Inputs(input_ids=IDS, labels=IDS)).logits, expected, "logits", 2e-2)
