"""PeftModel: a model with adapters, PEFT's methods and their names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, final

import numpy as np

from peft_ref.arrays import Array
from peft_ref.errors import ConfigError
from peft_ref.files.adapter import DEFAULT, load_adapter, load_config, save_adapter
from peft_ref.graph.protocol import Graph
from peft_ref.hf.base import BaseModel, auto_mapping
from peft_ref.hf.config import PeftConfig, as_kept, of, plain
from peft_ref.hf.prompted import Prompted
from peft_ref.hf.state import Layered
from peft_ref.hf.wrapped import Seed, Wrapped, refuse
from peft_ref.methods import IA3
from peft_ref.model import (
    LayerStatus,
    ModelStatus,
    add_weighted,
    add_weighted_ia3,
    bernoulli,
    layer_status,
    model_status,
    set_trainable,
)
from peft_ref.model.converting import plain as plain_lora
from peft_ref.model.pruning import Majority
from peft_ref.model.ties import Ties
from peft_ref.nn import Loaded


class PeftModel(Wrapped):
    """A model with adapters of one type."""

    @classmethod
    def from_pretrained(
        cls,
        model: Loaded | Graph | BaseModel,
        model_id: str | os.PathLike[str],
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        subfolder: str | None = None,
        rng: Seed = None,
        ties: Ties = "refuse",
    ) -> PeftModel:
        """`model` with the adapter in the folder `model_id`, of the class that its task type asks for."""
        refuse({"ephemeral_gpu_offload": ephemeral_gpu_offload, "key_mapping": key_mapping})
        said = of(load_config(model_id, subfolder or DEFAULT)) if config is None else config
        chosen = class_for(said.task_type) if cls is PeftModel else cls
        return chosen._from_folder(
            model, model_id, adapter_name, is_trainable, config, autocast_adapter_dtype, low_cpu_mem_usage, subfolder, rng, ties
        )

    @final
    @property
    def peft_type(self) -> str:
        return self._kinds()

    @final
    @property
    def active_peft_config(self) -> PeftConfig:
        if len(self.active_adapters) != 1:
            raise ConfigError(f"{len(self.active_adapters)} adapters are active: there is no one configuration of theirs.")
        return self._configs[self.active_adapters[0]]

    @final
    @property
    def modules_to_save(self) -> set[str] | None:
        names = {name for config in self._configs.values() for name in getattr(config, "modules_to_save", None) or ()}
        return names or None

    @final
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
    ) -> None:
        """Each adapter's two files: "default" into the folder, the others into folders below by their names."""
        refuse({"safe_serialization=False": not safe_serialization})
        if Path(save_directory).is_file():
            raise ConfigError(f"{save_directory} is a file (HF PEFT refuses it too).\n  Give a folder.")
        names = list(self._configs) if selected_adapters is None else list(selected_adapters)
        if unknown := sorted(set(names) - set(self._configs)):
            raise ConfigError(f"there is no adapter {unknown[0]!r} (HF PEFT refuses it too).\n  There are {', '.join(self._configs)}.")
        files = {name: self._state.file(name, save_embedding_layers) for name in names} if is_main_process else {}
        for name, file in files.items():
            config = as_kept(self._configs[name], file.config)
            if path_initial_model_for_weight_conversion is not None:
                file = plain_lora(replace(file, config=config), load_adapter(path_initial_model_for_weight_conversion))
                config = file.config
            housekeeping = dict(config.housekeeping)
            if housekeeping.get("task_type") is None and (mapping := auto_mapping(self._state.base)):
                housekeeping["auto_mapping"] = mapping
            save_adapter(save_directory, replace(file, config=replace(config, housekeeping=housekeeping)), name)

    @final
    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        self._state = Layered(adapted=set_trainable(self._adapted("set_requires_grad"), adapter_names, requires_grad))

    @final
    def get_layer_status(self) -> list[LayerStatus]:
        return layer_status(self._adapted("get_layer_status"))

    @final
    def get_model_status(self) -> ModelStatus:
        return model_status(self._adapted("get_model_status"))

    @final
    def get_prompt(self, batch_size: int, task_ids: Array | None = None) -> Array:
        """What goes before the inputs: embeddings (batch, rows, dim), or keys and values (layers, 2, batch, heads, tokens, head_dim)."""
        if not isinstance(self._state, Prompted):
            raise ConfigError(f"{self.peft_type} has no prompt.")
        return self._state.rows(self.active_adapters[0], batch_size, task_ids)

    @final
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str | None = None,
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Majority = "total",
        *,
        rng: Seed = None,
    ) -> None:
        """A weighted combination of LoRAs, of type "svd" unless another is given, or of IA3s, which have one type.

        The DARE types draw from `rng`, or else the model's own generator. `svd_full_matrices` makes no difference to the numbers.
        """
        refuse({"svd_driver": svd_driver})
        adapted = self._adapted("add_weighted_adapter")
        if all(isinstance(adapted.attached(name).config.method, IA3) for name in adapters):
            refuse({"combination_type of IA3": combination_type, "svd_rank": svd_rank, "svd_clamp": svd_clamp, "density": density})
            combined = add_weighted_ia3(adapted, adapters, weights, adapter_name)
        else:
            generator = self.rng if rng is None else np.random.default_rng(rng)
            combined = add_weighted(
                adapted,
                adapters,
                weights,
                adapter_name,
                combination_type or "svd",
                svd_rank=svd_rank,
                svd_clamp=svd_clamp,
                density=density,
                majority_sign_method=majority_sign_method,
                draw=None if density is None else bernoulli(generator, density),
            )
        made = combined.attached(adapter_name)
        config = of(made.config)
        whole = replace(made, config=config.frozen())  # every key that PEFT writes, where a combination has those it needs
        self._state = Layered(adapted=replace(combined, adapters={**combined.adapters, adapter_name: whole}))
        self._keep(adapter_name, config)


@final
class PeftModelForCausalLM(PeftModel):
    task = "CAUSAL_LM"


@final
class PeftModelForSeq2SeqLM(PeftModel):
    task = "SEQ_2_SEQ_LM"


@final
class PeftModelForSequenceClassification(PeftModel):
    task = "SEQ_CLS"


@final
class PeftModelForTokenClassification(PeftModel):
    task = "TOKEN_CLS"


@final
class PeftModelForQuestionAnswering(PeftModel):
    """PEFT loses token types and positions here, of LoRA and its like too; they are used, and before a prompt refused."""

    task = "QUESTION_ANS"


@final
class PeftModelForFeatureExtraction(PeftModel):
    task = "FEATURE_EXTRACTION"


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    str(cls.task): cls
    for cls in (
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
    )
}


def class_for(task_type: str | None) -> type[PeftModel]:
    return PeftModel if task_type is None else MODEL_TYPE_TO_PEFT_MODEL_MAPPING[plain(task_type)]
