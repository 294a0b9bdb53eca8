"""Trainable tokens, as the tests need to know them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from peft_ref.layers import Embedding, Linear
from peft_ref.methods.trainable_tokens import TrainableTokens
from tests.methods.facts import Facts, Tour
from tests.methods.wrong import replaced


def tokens(**options: Any) -> Any:
    import peft

    return lambda: peft.TrainableTokensConfig(**options)


FACTS = Facts(
    alone=True,  # PEFT refuses adapters that share a token
    bias=False,  # which PEFT loses: TRAINABLETOKENS-Q1
    settings={"trainable_tokens": TrainableTokens(token_indices=(4, 0, 2))},
    fields={"token_indices": st.sampled_from(((2, 0), (1,), (3, 1, 2)))},
    fresh={"init_weights": st.just(True)},
    few={"token_indices": st.just((2, 0))},
    layers={
        "embedding": st.builds(Embedding, num_embeddings=st.integers(4, 6), embedding_dim=st.integers(1, 5)),
        "linear": st.builds(Linear, in_features=st.integers(1, 5), out_features=st.integers(4, 6)),
    },
    few_layers={"embedding": Embedding(num_embeddings=4, embedding_dim=3), "linear": Linear(in_features=3, out_features=4)},
    models={"trainable_tokens": (None, tokens(token_indices=[3, 1], target_modules=["table"]))},
    # On Conv1D PEFT raises; a layer's bias it loses (TRAINABLETOKENS-Q1); for a head that its configuration cannot name it raises.
    tour=Tour("TrainableTokensConfig", {"token_indices": [4, 0, 2]}, frozenset({"gpt2", "classifier", "bert", "tokens", "questions"})),
    wrong_starts={
        "tokens at zero": ("trainable_tokens.embedding.init-default", replaced("tokens", lambda c, v, rng: v * 0), "init-not-identity"),
        "tokens in another order": (
            "trainable_tokens.embedding.init-default",
            replaced("tokens", lambda c, v, rng: v[::-1]),
            "init-not-identity",
        ),
    },
    bits="bfloat16",  # nothing is computed
)
