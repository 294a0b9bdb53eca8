"""Transformers in array-API mathematics, with hand-written gradients: what adapters are trained and judged in.

functions    norms, activations                              net      the numbers: apply and vjp of a named module, an adapter of attention
attention    rotary positions, cache, masks                  model    what an architecture states, and what follows
loss         the losses of HF's models                       blocks   the same for a row of blocks: decoders and encoders
modules      norms and feed-forward maps by name             llama, gpt2, bert, bert_heads    architectures
relative     T5's bias of distances                          encoder_decoder, t5    one with two stacks
load, graph  a folder of HF's as a model; a model as a graph
prompted     a prompt before a model's inputs                    generate   tokens one after the other
optim, schedules, tree    optimisers and learning rates over trees of arrays; peft_ref/train uses them
"""

from peft_ref.nn.attention import KeyValue, as_cache, as_cache_vjp
from peft_ref.nn.bert_heads import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from peft_ref.nn.blocks import Blocks, Decoder
from peft_ref.nn.encoder_decoder import EncoderDecoder
from peft_ref.nn.gpt2 import GPT2
from peft_ref.nn.graph import ModelGraph
from peft_ref.nn.llama import Llama
from peft_ref.nn.load import ARCHITECTURES, Loaded, load, model_of
from peft_ref.nn.model import Cache, Inputs, Model, ModelGradients, Output, OutputGradient
from peft_ref.nn.net import Gradients, Net
from peft_ref.nn.t5 import T5

__all__ = [
    "ARCHITECTURES",
    "GPT2",
    "T5",
    "BertForMaskedLM",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "Blocks",
    "Cache",
    "Decoder",
    "EncoderDecoder",
    "Gradients",
    "Inputs",
    "KeyValue",
    "Llama",
    "Loaded",
    "Model",
    "ModelGradients",
    "ModelGraph",
    "Net",
    "Output",
    "OutputGradient",
    "as_cache",
    "as_cache_vjp",
    "load",
    "model_of",
]
