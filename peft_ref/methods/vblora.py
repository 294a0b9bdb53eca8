"""VB-LoRA: a low-rank change put together from pieces, each a mixture of a few vectors from a bank that all layers share.

    W' = W + B A

    bank (n, L), trained, one for all layers       logits of A (r, in/L, n)       logits of B (out/L, r, n)
    piece = w bank,   w = softmax of the k largest of its n logits, zero elsewhere
    A (r, in): row i is its in/L pieces one after the other        B (out, r): column j is its out/L pieces one below the other

For a gradient G of W':  dA = B^T G,  dB = G A^T, cut into pieces; of a piece with gradient d:
    dbank = sum of w d^T        u = bank d        dlogits = w * (u - w . u),  zero outside the k largest.
Neither factor starts at zero, so a fresh adapter is near the identity and not it.

Paper   VB-LoRA: Li et al. 2024, arXiv:2405.15179
HF      peft.VBLoRAConfig, on linear layers and Conv1D whose sizes L divides. No scale. save_only_topk_weights saves of each piece the
        places of its k vectors, from the largest weight on, and all weights but the last. Read again the other logits are minus
        infinity, so that nothing else can be trained: HF refuses to, here those k are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace, to
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.errors import ConfigError, KeyMismatchError, ShapeError, UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.ranges import positive, probability

KINDS = frozenset({"linear", "transposed_linear"})
PLACES, WEIGHTS = "_topk_indices", "_topk_weights"


class Params(NamedTuple):
    logits_A: Annotated[Array, "r tiles_in vectors", Key("vblora_logits_A", kinds=KINDS)]
    logits_B: Annotated[Array, "tiles_out r vectors", Key("vblora_logits_B", kinds=KINDS)]
    bank: Annotated[Array, "vectors length", Key("vblora_vector_bank", kinds=KINDS, shared=True)]


@final
@dataclass(frozen=True, kw_only=True)
class VBLoRA(Additive[Params]):
    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    peft_type: ClassVar[str] = "VBLORA"
    tuner_prefix: ClassVar[str] = "vblora_"
    dropout: ClassVar[str | None] = "vblora_dropout"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        positive(self, "r", "num_vectors", "vector_length", "topk")
        if self.topk > self.num_vectors:
            raise ConfigError(f"topk={self.topk} of num_vectors={self.num_vectors}: there are not as many.")
        probability(self, "vblora_dropout")

    def dims(self, layer: Layer) -> dict[str, int]:
        out, n_in = layer.shape
        tiles = {"tiles_in": n_in // self.vector_length, "tiles_out": out // self.vector_length}
        return {"r": self.r, "vectors": self.num_vectors, "length": self.vector_length, **tiles}

    def check_geometry(self, layer: Layer) -> None:
        if any(size % self.vector_length for size in layer.shape):
            raise UnsupportedLayerError(
                f"VBLoRA: vector_length={self.vector_length} does not divide the layer's {layer.shape[1]} inputs and"
                f" {layer.shape[0]} outputs\n  (HF PEFT refuses it too)."
            )

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        A, B = shapes.get("vblora_logits_A", ()), shapes.get("vblora_logits_B", ())
        if len(A) != 3 or len(B) != 3:
            return None
        return Linear(in_features=A[1] * self.vector_length, out_features=B[0] * self.vector_length)

    def common(self, layers: Mapping[str, Layer], weights: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Params]:
        if not layers:
            return {}
        bound = self.init_vector_bank_bound
        bank = to(rng.uniform(-bound, bound, (self.num_vectors, self.vector_length)), weights[next(iter(layers))])
        return dict.fromkeys(layers, self.to_params(bank=bank))

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        return self.start_alone(layer, W, rng)

    def start(self, layer: Layer, W: Array, rng: np.random.Generator, common: Params | None) -> Start[Params]:
        assert common is not None
        shapes = {s.field: s.shape for s in self.spec(layer)}
        logits = {name: to(rng.normal(0, self.init_logits_std, shapes[name]), W) for name in ("logits_A", "logits_B")}
        return Start(common._replace(**logits), W)

    @property
    def saves_another_form(self) -> bool:
        return self.save_only_topk_weights

    def in_file(self, tensors: Mapping[str, Array]) -> Mapping[str, Array]:
        if not self.save_only_topk_weights:
            return tensors
        found: dict[str, Array] = {}
        for key, tensor in tensors.items():
            logits = np.asarray(tensor)
            places = np.argsort(-logits, kind="stable")[..., : self.topk]
            top = np.take_along_axis(logits, places, axis=-1)
            powers = np.exp(top - top[..., :1])
            found[key + PLACES] = places.astype(self._place_dtype)
            found[key + WEIGHTS] = (powers / np.sum(powers, axis=-1, keepdims=True))[..., :-1]
        return found

    def from_file(self, tensors: Mapping[str, Array]) -> Mapping[str, Array]:
        if not self.save_only_topk_weights:
            return tensors
        found: dict[str, Array] = {}
        for key in sorted({key.removesuffix(PLACES).removesuffix(WEIGHTS) for key in tensors}):
            if key + PLACES not in tensors or key + WEIGHTS not in tensors:
                raise KeyMismatchError(f"{key} with save_only_topk_weights: expected {key + PLACES} and {key + WEIGHTS}.")
            places, weights = np.asarray(tensors[key + PLACES]), np.asarray(tensors[key + WEIGHTS])
            if places.ndim != 3 or places.shape[-1] != self.topk or weights.shape != (*places.shape[:-1], self.topk - 1):
                raise ShapeError(
                    f"{key + PLACES} is {places.shape} and {key + WEIGHTS} {weights.shape}: expected topk={self.topk} and one less."
                )
            if places.dtype.kind not in "iu" or np.any(places < 0) or np.any(places >= self.num_vectors):
                raise ShapeError(f"{key + PLACES}: places from 0 to num_vectors={self.num_vectors} were expected.")
            last = 1 - np.sum(weights, axis=-1, keepdims=True)
            logits = np.full((*places.shape[:-1], self.num_vectors), -np.inf, dtype=weights.dtype)
            with np.errstate(divide="ignore"):
                np.put_along_axis(logits, places.astype(np.int64), np.log(np.concatenate([weights, last], axis=-1)), axis=-1)
            found[key] = logits
        return found

    @property
    def _place_dtype(self) -> str:
        """The smallest of those that PEFT chooses from."""
        return next((name for name, n in (("uint8", 2**8), ("int16", 2**15), ("int32", 2**31)) if self.num_vectors < n), "int64")

    def delta(self, layer: Layer, p: Params) -> Delta:
        B, A = self._factors(layer, p)
        return Delta(B @ A)

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        xp = namespace(d.W)
        mT, L = xp.matrix_transpose, self.vector_length
        B, A = self._factors(layer, p)
        pieces_A = xp.reshape(mT(B) @ d.W, (-1, L))
        # (out, r) into (tiles, r, L)
        pieces_B = xp.reshape(mT(xp.reshape(d.W @ mT(A), (p.logits_B.shape[0], L, self.r))), (-1, L))
        dA, bank_A = self._mixed_vjp(p.logits_A, p.bank, pieces_A)
        dB, bank_B = self._mixed_vjp(p.logits_B, p.bank, pieces_B)
        return Params(dA, dB, bank_A + bank_B)

    def _factors(self, layer: Layer, p: Params) -> tuple[Array, Array]:
        xp, (out, n_in), L = namespace(p.bank), layer.shape, self.vector_length
        A = xp.reshape(self._weights(p.logits_A) @ p.bank, (self.r, n_in))
        tiles = xp.reshape(self._weights(p.logits_B) @ p.bank, (p.logits_B.shape[0], self.r, L))
        return xp.reshape(xp.matrix_transpose(tiles), (out, self.r)), A

    def _weights(self, logits: Array) -> Array:
        """How much of each vector a piece has: (pieces, n)."""
        xp, n = namespace(logits), logits.shape[-1]
        flat = xp.reshape(logits, (-1, n))
        top = largest(flat, self.topk)
        powers = xp.where(top, xp.exp(flat - xp.max(flat, axis=1, keepdims=True)), xp.zeros_like(flat))
        return powers / xp.sum(powers, axis=1, keepdims=True)

    def _mixed_vjp(self, logits: Array, bank: Array, d: Array) -> tuple[Array, Array]:
        """The gradients for logits and bank of pieces with the gradient d (pieces, L)."""
        xp, w = namespace(logits), self._weights(logits)
        u = d @ xp.matrix_transpose(bank)
        return xp.reshape(w * (u - xp.sum(w * u, axis=1, keepdims=True)), logits.shape), xp.matrix_transpose(w) @ d


def largest(x: Array, k: int) -> Array:
    """Which of each row's numbers are among its k largest; of equal ones the first: the standard has no top-k."""
    xp, n = namespace(x), x.shape[1]
    one, other = xp.expand_dims(x, axis=2), xp.expand_dims(x, axis=1)
    earlier = to(np.tri(n, k=-1), x) > 0.0
    ahead = (other > one) | ((other == one) & earlier)
    return xp.sum(xp.astype(ahead, xp.int32), axis=2) < k
