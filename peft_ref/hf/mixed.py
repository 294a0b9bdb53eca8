"""PeftMixedModel: adapters of several types on one model. As in PEFT it is not saved, and has no status."""

from __future__ import annotations

import os
from typing import ClassVar, final

from peft_ref.files.adapter import DEFAULT
from peft_ref.graph.protocol import Graph
from peft_ref.hf.base import BaseModel
from peft_ref.hf.config import PeftConfig
from peft_ref.hf.wrapped import Seed, Wrapped
from peft_ref.model.ties import Ties
from peft_ref.nn import Loaded


@final
class PeftMixedModel(Wrapped):
    mixed: ClassVar[bool] = True

    @classmethod
    def from_pretrained(
        cls,
        model: Loaded | Graph | BaseModel,
        model_id: str | os.PathLike[str],
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        *,
        low_cpu_mem_usage: bool = False,
        subfolder: str | None = None,
        rng: Seed = None,
        ties: Ties = "refuse",
    ) -> PeftMixedModel:
        """`model` with the adapter in the folder `model_id`, to which others of other types may come."""
        return cls._from_folder(model, model_id, adapter_name, is_trainable, config, True, low_cpu_mem_usage, subfolder, rng, ties)
