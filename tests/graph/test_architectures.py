"""What is told from names and shapes alone is what the live model has: kinds, ties and the head, on architectures of many families."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

import torch  # noqa: E402
import transformers  # noqa: E402

from peft_ref.graph import TorchGraph  # noqa: E402
from peft_ref.graph.names import stored_modules  # noqa: E402
from peft_ref.graph.protocol import Parameter  # noqa: E402
from peft_ref.graph.ties import head_of, tied_parameters  # noqa: E402

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers")
MODELS = """
    AlbertForMaskedLM BartForConditionalGeneration BertForMaskedLM BioGptForCausalLM BloomForCausalLM CTRLLMHeadModel DebertaV2ForMaskedLM
    DistilBertForMaskedLM ElectraForMaskedLM FalconForCausalLM GPTNeoXForCausalLM GPTJForCausalLM GemmaForCausalLM ImageGPTModel
    MambaForCausalLM MixtralForCausalLM ModernBertForMaskedLM OPTForCausalLM OpenAIGPTLMHeadModel Phi3ForCausalLM Qwen2ForCausalLM
    RobertaForMaskedLM T5ForConditionalGeneration ViTForImageClassification WhisperForConditionalGeneration XLNetLMHeadModel
""".split()  # noqa: SIM905 - a literal would be a line each


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_tells_what_the_live_model_has(name: str) -> None:
    cls: Any = getattr(transformers, name)
    config = cls.config_class()
    for key in LAYERS:
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, 2)
    with torch.device("meta"):  # shapes and no numbers
        model = cls(config)
        model.tie_weights()
    live = TorchGraph(model)
    stored, said = dict(live.parameters()), {**live.config, "architectures": [name]}
    ties = tied_parameters(stored, said)
    assert ties == live.tied()
    seconds = {second: Parameter(name=second, shape=stored[first].shape, dtype="F32") for second, first in ties.items()}
    told = stored_modules(stored | seconds, said)
    expected = {n: (m.kind, m.weight and m.layer and m.layer.shape) for n, m in live.modules().items() if n in told}
    assert {n: (m.kind, m.layer and m.layer.shape) for n, m in told.items()} == expected
    assert head_of(told, live.model_type) == live.output_head
