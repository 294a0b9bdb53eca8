"""Trainable tokens: replace some rows of an embedding, and train nothing else.

    W' = W with column t of every given token t replaced by row k of D,   k its place in token_indices        b' = b

    D (tokens, dim).  W (dim, num) is the transposed table; on a linear layer, an output head say, rows of W (out, in) are replaced.

With S (tokens, num) the rows of the identity at the given tokens:   W' = W where no token is given, else D^T S.
For a gradient G of W':   dD = S G^T,  what the rows themselves got;  of W what is given gets nothing.
D starts at the rows as they are, so a fresh adapter changes nothing: the name PEFT gives it, delta, is not what it holds.

HF      peft.TrainableTokensConfig, on nn.Embedding and nn.Linear. On a linear layer the forward pass loses the bias, merging keeps it; here
        it is kept. Several adapters must not share a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np

from peft_ref.arrays import Array, namespace, to
from peft_ref.contracts import Key, Reweight, Start, WeightGradients
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Embedding, Layer

KINDS = frozenset({"embedding", "linear"})


class Params(NamedTuple):
    D: Annotated[Array, "tokens size", Key("trainable_tokens_delta", kinds=KINDS)]


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Reweight[Params]):
    token_indices: tuple[int, ...] = ()
    init_weights: bool = True

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    tuner_prefix: ClassVar[str] = "trainable_tokens_"
    kinds: ClassVar[frozenset[str]] = KINDS
    replaces: ClassVar[bool] = True
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    key: ClassVar[str] = "trainable_tokens_delta"

    def __post_init__(self) -> None:
        tokens: Any = self.token_indices
        if not isinstance(tokens, list | tuple) or not all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in tokens):
            raise ConfigError(f"token_indices={tokens!r:.80}: a list of whole numbers, none below 0.")
        if len(set(tokens)) != len(tokens):
            raise ConfigError(f"token_indices={tokens!r:.80}: a token is there twice, and only one of its rows could count.")
        object.__setattr__(self, "token_indices", tuple(tokens))

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"tokens": len(self.token_indices), "size": layer.shape[0] if layer.kind == "embedding" else layer.shape[1]}

    def check_geometry(self, layer: Layer) -> None:
        rows = layer.shape[1] if layer.kind == "embedding" else layer.shape[0]
        if any(token >= rows for token in self.token_indices):
            raise UnsupportedLayerError(
                f"trainable tokens: there is no token {max(self.token_indices)} among {rows} rows (HF PEFT refuses it too)."
            )

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        """An embedding that is just large enough: a file does not tell how many words there are."""
        size = shapes.get(self.key, ())
        return Embedding(num_embeddings=max(self.token_indices, default=0) + 1, embedding_dim=size[1]) if len(size) == 2 else None

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        if not self.init_weights:
            return Start(self.to_params(D=to(rng.normal(size=tuple(self.dims(layer).values())), W)), W)
        rows = _rows(layer, W)
        return Start(self.to_params(D=self._chosen(rows) @ rows), W)

    def weight(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        S = self._chosen(_rows(layer, W))
        return _rows(layer, self._replaced(S, _rows(layer, W), namespace(S).matrix_transpose(S) @ p.D)), b

    def weight_vjp(
        self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array, dW: Array, db: Array | None
    ) -> WeightGradients[Params]:
        G = _rows(layer, dW)
        S = self._chosen(G)
        return WeightGradients(self.to_params(D=S @ G), _rows(layer, self._replaced(S, G, 0 * G)), db)

    def unmerge(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        rows = _rows(layer, W)
        return _rows(layer, self._replaced(self._chosen(rows), rows, _rows(layer, W0))), b

    def _chosen(self, rows: Array) -> Array:
        """S: for every given token the row of the identity that picks it."""
        S = np.zeros((len(self.token_indices), rows.shape[0]))
        S[np.arange(len(self.token_indices)), list(self.token_indices)] = 1
        return to(S, rows)

    def _replaced(self, S: Array, rows: Array, others: Array) -> Array:
        xp = namespace(rows)
        return xp.where(xp.expand_dims(xp.sum(S, axis=0), axis=1) > 0, others, rows)


def _rows(layer: Layer, W: Array) -> Array:
    """The matrix as it is stored, a row per token; and back."""
    return namespace(W).matrix_transpose(W) if layer.kind == "embedding" else W
