"""What names tokens, or says of which kind they are: lists of whole numbers, and what is not one is refused by its name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_ref.errors import ConfigError
from peft_ref.files.tokens import TokensBeside
from peft_ref.layers import Embedding
from peft_ref.methods import CPT, TrainableTokens

NO_NUMBERS: list[Any] = [True, False, 1.0, "1", None, [1]]


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_an_entry_is_a_whole_number(value: Any) -> None:
    for name in ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"):
        given = {"cpt_token_ids": [3, 4], name: [1, value]}
        with pytest.raises(ConfigError, match=rf"^{name}="):
            CPT(**given)
    with pytest.raises(ConfigError, match=r"^token_indices="):
        TrainableTokens(token_indices=(2, value))


@pytest.mark.parametrize("value", [-1, -5])
def test_no_token_is_below_zero_while_a_type_or_a_mask_may_be(value: int) -> None:
    method = CPT(cpt_token_ids=[0, 3], cpt_mask=[1, value], cpt_tokens_type_mask=[value, 0])
    assert (method.cpt_mask, method.types) == ([1, value], [value, 0])
    with pytest.raises(ConfigError, match=r"^cpt_token_ids="):
        CPT(cpt_token_ids=[0, value])
    with pytest.raises(ConfigError, match=r"^token_indices="):
        TrainableTokens(token_indices=(0, value))


@pytest.mark.parametrize("tokens", [{1, 2}, {1: 2}, range(2), b"ab", "12", 3, None])
def test_indices_of_tokens_are_a_list_or_a_tuple(tokens: Any) -> None:
    with pytest.raises(ConfigError, match=r"^token_indices="):
        TrainableTokens(token_indices=tokens)


def test_a_list_of_indices_is_kept_as_a_tuple_so_that_methods_are_compared_and_hashed() -> None:
    method = TrainableTokens(token_indices=[4, 0])  # type: ignore[arg-type]
    assert method == TrainableTokens(token_indices=(4, 0))
    assert isinstance(hash(method), int)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_without_tokens_every_table_is_large_enough(rows: int) -> None:
    TrainableTokens().check_layer(Embedding(num_embeddings=rows, embedding_dim=3))


TABLE = Embedding(num_embeddings=5, embedding_dim=3)
KEY = "token_adapter.trainable_tokens_delta"


def test_tokens_beside_another_method_are_the_same_rows_under_a_key_of_their_own() -> None:
    beside, alone = TokensBeside(token_indices=(4, 1)), TrainableTokens(token_indices=(4, 1))
    (of_it,), (of_one,) = beside.spec(TABLE), alone.spec(TABLE)
    assert (of_it.key, of_it.saved) == (KEY, True)
    assert of_it._replace(key=of_one.key) == of_one
    assert not TokensBeside(token_indices=(4, 1), own=False).spec(TABLE)[0].saved
    assert beside.measured({KEY: (2, 3)}) == alone.measured({of_one.key: (2, 3)}) == TABLE
    assert beside.measured({of_one.key: (2, 3)}) is None
    assert beside.alone == alone
    W = np.random.default_rng(0).normal(size=TABLE.shape)
    assert type(beside.init(TABLE, W, np.random.default_rng(0)).params).__module__ == TokensBeside.__module__
