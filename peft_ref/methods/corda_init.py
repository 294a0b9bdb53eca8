"""CorDA: the part of a weight that a task uses most, or least, becomes the LoRA.

    C~ = C + d mean(diag C) I,    W C~ = U S V^T,    s B A = U_k U_k^T W,    and W loses it

C (in, in) is the mean over samples of X^T X, X a sample's inputs (tokens, in) over the absolute value of their largest entry. U_k: the
columns of the r largest singular values ("ipm", to learn the task), or of the r smallest ("kpm", to keep what the data know). With
V' = C~^-1 V and S' = S / s:   A = sqrt(S'_k) V'_k^T,   B = U_k sqrt(S'_k).   d is 0.01, doubled until C~ is inverted well.

Paper   Yang et al. 2024, arXiv:2406.05223
HF      LoraConfig(init_lora_weights="corda", corda_config=...) after preprocess_corda, in float32. Followed: |max x|, not max |x|. A sample
        is one call with batch size 1: with more, HF's covariance is no matrix
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from peft_ref.arrays import Array, as_rows, column, eye_like, namespace, thin_svd
from peft_ref.contracts import Start
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.methods.lora import Params
from peft_ref.methods.lora_init import Factored

Mode = Literal["ipm", "kpm"]
DAMP, WELL = 0.01, 0.05


def covariance(samples: Iterable[Array]) -> Array:
    """C of a layer's inputs, one array (tokens, in) for each sample."""
    total, n = None, 0
    for sample in samples:
        xp, x = namespace(sample), as_rows(sample)
        x = x / xp.abs(xp.max(x))
        if not bool(xp.all(xp.isfinite(x))):
            raise ConfigError(f"sample {n}: its inputs are not finite, or their largest entry is zero (HF PEFT refuses it too).")
        product = xp.matrix_transpose(x) @ x
        total, n = (product if total is None else total + product), n + 1
    if total is None:
        raise ConfigError("a covariance needs samples: there are none.")
    return total / n


def corda(method: Factored, layer: Layer, W: Array, C: Array, corda_method: Mode = "ipm") -> Start[Params]:
    """A and B of W (out, in) for inputs of covariance C (in, in), and what W is without them."""
    if corda_method not in ("ipm", "kpm"):
        raise ConfigError(f"corda_method={corda_method!r} (HF PEFT refuses it too).\n  There are 'ipm' and 'kpm'.")
    if not isinstance(layer, Linear):
        raise UnsupportedLayerError(f"init_lora_weights='corda' on a {layer.kind} layer: HF PEFT refuses it.\n  Use a linear layer.")
    if tuple(C.shape) != (W.shape[1], W.shape[1]):
        raise ConfigError(f"a covariance {tuple(C.shape)} for a weight {tuple(W.shape)}: expected {(W.shape[1], W.shape[1])}.")
    if method.r > min(layer.shape):
        raise UnsupportedLayerError(f"init_lora_weights='corda' with r={method.r}: a weight {layer.shape} has {min(layer.shape)} ranks.")
    xp = namespace(W)
    damped, inverse = _inverted(C)
    U, S, Vh = thin_svd(W @ damped)
    first = 0 if corda_method == "ipm" else S.shape[0] - method.r
    kept = slice(first, first + method.r)
    root = xp.sqrt(S[kept] / method.scale)
    A, B = column(root) * (Vh[kept, :] @ inverse), U[:, kept] * root
    return Start(Params(A, B), W - method.scale * (B @ A))


def _inverted(C: Array) -> tuple[Array, Array]:
    """C~ and its inverse."""
    xp, (n, _) = namespace(C), C.shape
    one = eye_like(n, C)
    mean = xp.sum(C * one) / n
    if not float(mean) > 0:
        raise ConfigError("the covariance has no positive diagonal and cannot be inverted: were all inputs zero?")
    damp = DAMP
    while True:
        damped = C + damp * mean * one
        inverse = xp.linalg.inv(damped)
        off = damped @ inverse - one
        if float(xp.sqrt(xp.sum(off * off))) < WELL:
            return damped, inverse
        damp = 2 * damp
