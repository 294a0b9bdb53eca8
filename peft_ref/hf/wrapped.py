"""A model with adapters that is written into: what PeftModel and PeftMixedModel share.

It holds one value (`state.py`), which every method replaces by the next, and the configurations as PEFT's objects. The model that it was
made of is never changed. PEFT draws fresh adapters from torch's global generator; here every wrapped model has a NumPy generator of its
own, `rng`, with seed 0 unless another is given, from which one adapter after the other is drawn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Self, TypeAlias, final

import numpy as np

from peft_ref.arrays import Array
from peft_ref.errors import ConfigError, naming
from peft_ref.files.adapter import DEFAULT, AdapterFile, load_adapter, load_config
from peft_ref.files.config import AdapterConfig
from peft_ref.graph.protocol import Graph
from peft_ref.hf.base import BaseModel, ModelOutput, as_inputs, as_output
from peft_ref.hf.config import PeftConfig, of
from peft_ref.hf.prompted import Prompted
from peft_ref.hf.state import Layered, Start, State
from peft_ref.model import Adapted, adapt, disable, enable, merge, merge_and_unload, unload, unmerge
from peft_ref.model.numbers import HALF
from peft_ref.model.ties import Ties
from peft_ref.nn import Cache, Loaded
from peft_ref.nn.generate import Sampling, generate, greedy, sampler

Seed: TypeAlias = np.random.Generator | int | None
Tokenize: TypeAlias = Callable[[str], Sequence[int]]


class Wrapped:
    mixed: ClassVar[bool] = False
    task: ClassVar[str | None] = None  # of a class that is for one

    def __init__(
        self,
        model: Loaded | Graph | BaseModel,
        peft_config: PeftConfig,
        adapter_name: str = DEFAULT,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        rng: Seed = None,
        ties: Ties = "refuse",
        tokenize: Tokenize | None = None,
    ) -> None:
        self._begin(model, peft_config.is_prompt_learning, rng)
        self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype, ties=ties, tokenize=tokenize)

    def _begin(self, model: Loaded | Graph | BaseModel, prompts: bool, rng: Seed) -> None:
        """Start with no adapter."""
        base = BaseModel(model)
        graph, self._name = base.graph, base.name
        if isinstance(graph, Adapted) and graph.adapters:
            raise ConfigError(
                f"the model has adapters already: {', '.join(graph.adapters)}.\n  Add to them with add_adapter, or unload them first."
            )
        self._state: State = Prompted(graph=graph) if prompts else Layered(adapted=adapt(graph, mixed=self.mixed))
        self._configs: dict[str, PeftConfig] = {}
        self.rng = np.random.default_rng(0 if rng is None else rng)

    @final
    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Every adapter's configuration. Of what is written into them, a save keeps what computes nothing, and refuses the rest."""
        return self._configs

    @final
    @property
    def active_adapters(self) -> list[str]:
        return list(self._state.active)

    @final
    @property
    def active_adapter(self) -> str | list[str]:
        """One name, or a list of several or none."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @final
    @property
    def has_active_enabled_adapter(self) -> bool:
        return self._state.enabled and bool(self._state.active)

    @final
    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config.json."""
        return self._state.base.config

    @final
    @property
    def state(self) -> State:
        """All of it as a value; of adapters on layers, `state.adapted` is what peft_ref.model works with."""
        return self._state

    @final
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        rng: Seed = None,
        ties: Ties = "refuse",
        tokenize: Tokenize | None = None,
    ) -> None:
        """A fresh adapter, drawn from `rng` or else the model's own generator. It waits for `set_adapter`, but for the first one."""
        if low_cpu_mem_usage:
            raise ConfigError(
                "low_cpu_mem_usage=True of a fresh adapter: its numbers are drawn at once.\n  Load one with it, or leave it out."
            )
        self._check(peft_config, autocast_adapter_dtype)
        start = Start(self.rng if rng is None else np.random.default_rng(rng), ties, tokenize)
        self._state = self._state.added(adapter_name, self._named(peft_config.fresh()), start)
        self._keep(adapter_name, peft_config)

    @final
    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        subfolder: str | None = None,
        ties: Ties = "refuse",
    ) -> None:
        """The adapter in a folder. With low_cpu_mem_usage its tensors stay in the file until they are asked for."""
        device = None if torch_device == "cpu" else torch_device
        refuse({"torch_device": device, "ephemeral_gpu_offload": ephemeral_gpu_offload, "key_mapping": key_mapping})
        sub = DEFAULT if subfolder is None else subfolder
        self._check(of(load_config(model_id, sub)), autocast_adapter_dtype)
        self._state = self._state.loaded(model_id, adapter_name, sub, is_trainable, low_cpu_mem_usage, ties)
        self._keep(adapter_name, of(self._state.config(adapter_name)))

    @final
    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """This adapter acts, or these in their order, and no other."""
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        self._state = self._state.activated(names, inference_mode)

    @final
    def delete_adapter(self, adapter_name: str) -> None:
        self._state = self._state.deleted(adapter_name)
        del self._configs[adapter_name]

    @final
    def disable_adapter_layers(self) -> None:
        self._state = Layered(adapted=disable(self._adapted("disable_adapter_layers")))

    @final
    def enable_adapter_layers(self) -> None:
        self._state = Layered(adapted=enable(self._adapted("enable_adapter_layers")))

    @final
    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model's own output inside of it. What is merged is unmerged, as PEFT's next forward does."""
        was_on = self._state.enabled
        self._state = self._state.switched(False)
        try:
            yield
        finally:
            if was_on:
                self._state = self._state.switched(True)

    @final
    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False, *, ties: Ties = "refuse") -> None:
        self._state = Layered(adapted=merge(self._adapted("merge_adapter"), adapter_names, safe=safe_merge, ties=ties))

    @final
    def unmerge_adapter(self) -> None:
        self._state = Layered(adapted=unmerge(self._adapted("unmerge_adapter")))

    @final
    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        ties: Ties = "refuse",
    ) -> BaseModel:
        """The model with these adapters, or the active ones, in its weights. This one stays as it was."""
        refuse({"progressbar": progressbar})
        bare = merge_and_unload(self._adapted("merge_and_unload"), adapter_names, safe=safe_merge, ties=ties)
        return BaseModel(bare, self._name)

    @final
    def unload(self) -> BaseModel:
        """The model without adapters. This one stays as it was."""
        return BaseModel(unload(self._adapted("unload")), self._name)

    @final
    def get_base_model(self) -> BaseModel:
        """The model that was wrapped, which no adapter changes."""
        return BaseModel(self._state.base, self._name)

    @final
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        counted = self._state.counted()
        return counted.trainable, counted.total

    @final
    def print_trainable_parameters(self) -> None:
        print(self._state.counted())

    @final
    def forward(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Array | None = None,
        *,
        adapter_names: Sequence[str] | None = None,
        position_ids: Array | None = None,
        token_type_ids: Array | None = None,
        input_type_mask: Array | None = None,
        start_positions: Array | None = None,
        end_positions: Array | None = None,
        past_key_values: Cache | None = None,
        decoder_input_ids: Array | None = None,
        decoder_inputs_embeds: Array | None = None,
        decoder_attention_mask: Array | None = None,
    ) -> ModelOutput:
        """What the model puts out with the adapters that act on it, in evaluation: without dropout."""
        inputs = as_inputs(locals())
        unbuilt = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        refuse({**unbuilt, "return_dict=False": return_dict is False})
        return as_output(self._state.base, self._state.output(inputs, task_ids, adapter_names))

    __call__ = forward

    @final
    def generate(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        use_cache: bool = True,
        task_ids: Array | None = None,
        rng: Seed = None,
    ) -> Array:
        """The rows (batch, T), padded on the left, with what follows; of an encoder-decoder the decoder's tokens.

        The token that ends a row and the one behind it are config.json's where none is given; `eos_token_id=()` ends nothing. A sample is
        drawn from `rng`, or else the model's own generator. PEFT's generate loses a prefix under transformers 5.24: this one keeps it.
        """
        eos: Any = self.config.get("eos_token_id") if eos_token_id is None else eos_token_id
        pad: Any = self.config.get("pad_token_id") if pad_token_id is None else pad_token_id
        model, net, front = self._state.ready(input_ids.shape[0], task_ids)
        sampling = Sampling(temperature=temperature, top_k=top_k or None, top_p=top_p)
        return generate(
            model,
            net,
            input_ids,
            new_tokens=max_new_tokens,
            attention_mask=attention_mask,
            choose=sampler(sampling, self.rng if rng is None else np.random.default_rng(rng)) if do_sample else greedy,
            eos=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
            pad=pad,
            front=front,
            use_cache=use_cache,
        )

    @final
    def renumber(self, adapter_name: str, tensors: Mapping[str, Any]) -> None:
        """The numbers of a file for the adapter: `set_peft_model_state_dict` in PEFT."""
        self._state = self._state.renumbered(adapter_name, tensors)

    @final
    def eval(self) -> Self:
        """Nothing to do: a model here is always in evaluation."""
        return self

    @final
    def __repr__(self) -> str:
        adapters = ", ".join(f"{name}={config.peft_type}" for name, config in self._configs.items())
        return f"{type(self).__name__}({self.get_base_model()!r}, {adapters})"

    @classmethod
    def _from_folder(
        cls,
        model: Loaded | Graph | BaseModel,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool,
        config: PeftConfig | None,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
        subfolder: str | None,
        rng: Seed,
        ties: Ties,
    ) -> Self:
        sub = DEFAULT if subfolder is None else subfolder
        said = of(load_config(model_id, sub)) if config is None else config
        made = cls.__new__(cls)
        made._begin(model, said.is_prompt_learning, rng)
        if config is None:
            made.load_adapter(
                model_id,
                adapter_name,
                is_trainable,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                subfolder=sub,
                ties=ties,
            )
            return made
        refuse({"low_cpu_mem_usage with a config": low_cpu_mem_usage})
        made._check(config, autocast_adapter_dtype)
        file = load_adapter(model_id, sub)
        with naming(model_id):
            made._state = made._state.attached(adapter_name, AdapterFile(**{**vars(file), "config": config.frozen()}), is_trainable, ties)
        made._keep(adapter_name, config)
        return made

    @final
    def _adapted(self, what: str) -> Adapted:
        if not isinstance(self._state, Layered):
            raise ConfigError(f"{what}: a prompt is in no layer's weight (HF PEFT has no such method there).")
        return self._state.adapted

    @final
    def _check(self, config: PeftConfig, autocast: bool) -> None:
        if self.task is not None and config.task_type != self.task:
            raise ConfigError(
                f"{type(self).__name__} is for task_type={self.task!r}, the configuration says {config.task_type!r}.\n  Say it there."
            )
        if config.is_prompt_learning != isinstance(self._state, Prompted):
            raise ConfigError(f"{config.peft_type} beside {self._kinds()}: prompts and layers are not mixed (HF PEFT refuses it too).")
        if not autocast and any(p.dtype in HALF for p in self._state.base.parameters().values()):
            raise ConfigError("autocast_adapter_dtype=False on weights of 16 bits: adapters have 32 at least.\n  Leave it out.")

    @final
    def _kinds(self) -> str:
        return ", ".join(sorted({str(config.peft_type) for config in self._configs.values()})) or "none"

    @final
    def _named(self, config: AdapterConfig) -> AdapterConfig:
        """`config` with the name of the model, whatever it said before. PEFT also forgets what it said where the model has none."""
        if self._name is None:
            return config
        return replace(config, housekeeping={**config.housekeeping, "base_model_name_or_path": self._name})

    @final
    def _keep(self, name: str, config: PeftConfig) -> None:
        config.settle(self._state.config(name))
        self._configs[name] = config


def refuse(asked: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for what was asked for and is not there."""
    if given := [name for name, value in asked.items() if value]:
        raise ConfigError(f"{', '.join(given)}: not built here, and nothing is ignored in silence.\n  Leave it out.")
