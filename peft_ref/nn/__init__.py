"""Transformers in array-API mathematics, with hand-written gradients: what adapters are trained and judged in.

functions    softmax, norms, activations                     net      the numbers: apply and vjp of a named module
attention    heads, rotary positions, cache, masks           model    what an architecture states, and what follows
loss         cross-entropy                                   llama    an architecture
relative     T5's bias of distances                          encoder_decoder, t5    one with two stacks
load, graph  a folder of HF's as a model; a model as a graph
"""

from peft_ref.nn.attention import KeyValue, as_cache, as_cache_vjp
from peft_ref.nn.encoder_decoder import EncoderDecoder
from peft_ref.nn.graph import ModelGraph
from peft_ref.nn.llama import Llama
from peft_ref.nn.load import ARCHITECTURES, Loaded, load, model_of
from peft_ref.nn.model import Cache, Decoder, Inputs, Model, ModelGradients, Output, OutputGradient
from peft_ref.nn.net import Gradients, Net
from peft_ref.nn.t5 import T5

__all__ = [
    "ARCHITECTURES",
    "T5",
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
