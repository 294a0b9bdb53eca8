"""trainable_token_indices of a LoRA: which tokens are trained, in which layers, beside what the adapter does to its targets.

The mathematics is that of `trainable_tokens.py`; an adapter has it on the embeddings that are named, and its own method on its targets.
A head that is tied to the table has the table's rows, which a file holds once.

[3, 7]                                  tokens of the model's input embedding, which a configuration does not name
{"embed_tokens": [3], "lm_head": [5]}   of the layers whose names end so

base_model.model.<module path>.token_adapter.trainable_tokens_delta    the rows, in a file
base_model.model.<module path>.token_adapter.base_layer.weight         the whole frozen table, with save_embedding_layers

HF      peft.utils.other.TrainableTokensWrapper around the module, of LoRA and AdaLoRA.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

from peft_ref.arrays import Array
from peft_ref.contracts import Key, WeightMethod
from peft_ref.errors import ConfigError
from peft_ref.methods.trainable_tokens import KINDS, TrainableTokens

WORD = "trainable_token_indices"
TAKERS = ("LORA", "ADALORA")
INPUT = ""  # in place of a layer's name: the model's input embedding
WRAPPER = "token_adapter"  # what stands in keys between the module's name and the rows, or the frozen table
KEY = f"{WRAPPER}.trainable_tokens_delta"


class Params(NamedTuple):
    D: Annotated[Array, "tokens size", Key(KEY, kinds=KINDS, saved="own")]


@final
@dataclass(frozen=True, kw_only=True)
class TokensBeside(TrainableTokens):
    own: bool = True  # false of a head that has the rows of the table it is tied to

    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    key: ClassVar[str] = KEY

    @property
    def alone(self) -> TrainableTokens:
        """The same as a method of its own."""
        return TrainableTokens(token_indices=self.token_indices)


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


def once_more(keys: Collection[str]) -> dict[str, str]:
    """The keys whose rows are those of another key, of adapters of nothing but tokens.

    With every further adapter HF wraps what is tied to the table once more, and saves what each wrapper has: one and the same tensor.
    """
    rows = f".{TrainableTokens.key}"
    wrapped = f".base_layer{rows}"
    return {key: own for key in keys if key.endswith(wrapped) and (own := key.removesuffix(wrapped) + rows) in keys}


def differs(key: str, own: str) -> str:
    return f"{key} is not {own}, whose rows it should hold once more (HF PEFT drops it).\n  Take it out, if those are the right ones."
