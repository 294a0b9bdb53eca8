"""Dropout masks, and PVeRA's and MonteCLoRA's noise, drawn by a NumPy generator for a model whose modules all see (batch, T, in).

HF      draws anew at every forward: lora_dropout, or what a method calls it, on what enters an adapter; encoder_dropout between the
        layers of P-tuning's LSTM; boft_dropout on the blocks of one of BOFT's factors; rank_dropout on the rows of LoHa's and LoKr's
        delta, and module_dropout on all of it. PVeRA draws for each token, MonteCLoRA once for a whole batch
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from peft_ref.arrays import Array, to, zeros_like
from peft_ref.errors import ConfigError
from peft_ref.files.config import AdapterConfig
from peft_ref.layers import Layer
from peft_ref.methods.monteclora import MonteCLoRA, Noise
from peft_ref.methods.p_tuning import PTuning
from peft_ref.methods.pvera import PVeRA
from peft_ref.prompts import Context
from peft_ref.stack import BlockDropout, Drawn, Dropout, Drops, RowDropout
from peft_ref.train.learner import Batch, Learner, RowDrops, context_of


def with_dropout(learner: Learner, batch: Batch, rng: np.random.Generator, like: Array) -> Batch:
    """`batch` with fresh masks in `like`'s library, where the methods ask for dropout, and fresh noise."""
    ids = batch.inputs.input_ids
    masks: dict[str, Drops] = {}
    for name, method in learner.methods.items():
        p, layer = 0.0 if method.dropout is None else float(getattr(method, method.dropout)), learner.net.layers[name]
        if p > 0 and layer.kind != "embedding" and ids is not None:
            masks[name] = Dropout(_drawn(rng, (*ids.shape, layer.fan_in), p, like), p)
        elif (keep := method.kept_blocks(layer, rng)) is not None:
            masks[name] = BlockDropout(to(keep, like))
        elif learner.row_drops is not None and (rows := _of_rows(learner.row_drops, layer.shape[0], rng, like)) is not None:
            masks[name] = rows
        if ids is not None and (noise := _noise(method, layer, tuple(ids.shape), rng, like)) is not None:
            dropout = masks.get(name)
            masks[name] = Drawn(noise, dropout if isinstance(dropout, Dropout) else None)
    return replace(batch, dropout=masks, context=_of_encoder(learner, batch, rng, like))


def row_drops(config: AdapterConfig) -> RowDrops | None:
    """The dropout of LoHa and LoKr, which their configurations say beside the method: it is no part of what an adapter computes."""
    kind, said = config.method.peft_type, config.housekeeping
    if kind not in ("LOHA", "LOKR"):
        return None
    for name in ("rank_dropout", "module_dropout"):
        p = said.get(name, 0.0)
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
            raise ConfigError(f"{name}={p!r}: a probability below 1 is needed to train.")
    rank, module = float(said.get("rank_dropout", 0.0)), float(said.get("module_dropout", 0.0))
    scaled = kind == "LOHA" or bool(said.get("rank_dropout_scale", False))
    return RowDrops(rank, module, scaled) if rank or module else None


def _of_rows(drops: RowDrops, out: int, rng: np.random.Generator, like: Array) -> RowDropout | None:
    if drops.module and rng.random() < drops.module:
        return RowDropout(zeros_like((out,), like))
    return RowDropout.of(_drawn(rng, (out,), drops.rank, like), scaled=drops.scaled) if drops.rank else None


def _of_encoder(learner: Learner, batch: Batch, rng: np.random.Generator, like: Array) -> Context | None:
    method = learner.prompt
    if not isinstance(method, PTuning) or not method.is_lstm or not method.encoder_dropout or method.inference_mode:
        return batch.context
    shape = (method.table_shape[0], 2 * method.size("encoder_hidden_size"))
    drawn = tuple(_drawn(rng, shape, method.encoder_dropout, like) for _ in range(method.encoder_num_layers - 1))
    return context_of(batch)._replace(dropout=drawn)


def _noise(method: Any, layer: Layer, tokens: tuple[int, ...], rng: np.random.Generator, like: Array) -> Any:
    if isinstance(method, PVeRA):
        return to(rng.normal(size=(*tokens, method.r)), like)
    if not isinstance(method, MonteCLoRA):
        return None
    n, r = method.monteclora_config.num_samples, method.r
    G = rng.normal(size=(r, r))  # G G^T is of Wishart's law with r degrees
    return Noise(*(to(drawn, like) for drawn in (rng.normal(size=(n, layer.fan_in, r)), G @ G.T, rng.normal(size=n))))


def _drawn(rng: np.random.Generator, shape: tuple[int, ...], p: float, like: Array) -> Any:
    return to(rng.random(shape) >= p, like)
