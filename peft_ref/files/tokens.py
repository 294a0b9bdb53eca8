"""trainable_token_indices of a LoRA: which tokens are trained, in which layers, beside what the adapter does to its targets.

[3, 7]                                  tokens of the model's input embedding, which a configuration does not name
{"embed_tokens": [3], "lm_head": [5]}   of the layers whose names end so

base_model.model.<module path>.token_adapter.trainable_tokens_delta    the rows, in a file
base_model.model.<module path>.token_adapter.base_layer.weight         the whole frozen table, with save_embedding_layers
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from peft_ref.contracts import WeightMethod
from peft_ref.errors import ConfigError
from peft_ref.methods.tokens_beside import KEY as KEY
from peft_ref.methods.tokens_beside import WRAPPER as WRAPPER
from peft_ref.methods.tokens_beside import TokensBeside

WORD = "trainable_token_indices"
TAKERS = ("LORA", "ADALORA")
INPUT = ""  # in place of a layer's name: the model's input embedding


def tokens_asked(value: Any, where: str) -> Mapping[str, TokensBeside]:
    """The tokens by the ends of the layers' names. Raises `ConfigError` where HF PEFT takes them and then cannot run."""
    if value is None or value == {}:
        return {}
    given = value if isinstance(value, Mapping) else {INPUT: value}
    found = {}
    for name, tokens in given.items():
        at = f"{where}: {WORD}{name and f' of {name!r}'}"
        if not tokens or (isinstance(value, Mapping) and not name):
            raise ConfigError(f"{at} is {tokens!r:.60} (HF PEFT takes it, and cannot run).\n  Give a list of tokens, or {{layer: tokens}}.")
        try:
            found[name] = TokensBeside(token_indices=tokens)
        except ConfigError as error:
            raise ConfigError(f"{at}: {error}") from None
    return found


def name_of(method: WeightMethod[Any]) -> str:
    """A method as errors call it: by what its user has written."""
    return WORD if isinstance(method, TokensBeside) else type(method).__name__


def tokens_at(tokens: Mapping[str, TokensBeside], modules: Collection[str]) -> dict[str, TokensBeside]:
    """What each of these modules, which have rows in a file, has by the configuration; nothing for one that it does not name."""
    found = {}
    for module in modules:
        if (name := next((name for name in tokens if module.endswith(name)), None)) is not None:
            found[module] = tokens[name]
    return found
