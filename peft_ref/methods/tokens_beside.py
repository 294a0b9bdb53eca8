"""Trained tokens beside another method: what trainable_token_indices of a LoraConfig asks for.

The mathematics is that of `trainable_tokens.py`; an adapter has it on the embeddings that are named, and its own method on its targets.
A head that is tied to the table has the table's rows, which a file holds once.

HF      peft.utils.other.TrainableTokensWrapper around the module, of LoRA and AdaLoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

from peft_ref.arrays import Array
from peft_ref.contracts import Key
from peft_ref.methods.trainable_tokens import KINDS, TrainableTokens

WRAPPER = "token_adapter"  # what stands in keys between the module's name and the rows, or the frozen table
KEY = f"{WRAPPER}.trainable_tokens_delta"


class Params(NamedTuple):
    D: Annotated[Array, "tokens size", Key("token_adapter.trainable_tokens_delta", kinds=KINDS, saved="own")]


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
