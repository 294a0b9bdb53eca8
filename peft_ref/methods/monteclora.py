"""MonteCLoRA: LoRA whose A is, while it is trained, an average over random neighbours; the adapter that is used is plain LoRA.

    W' = W + s B A      s = alpha / r,  or alpha / sqrt(r) with use_rslora

    A (r, in)    B (out, r)    sigma (r,)    p (n,), both trained    n is num_samples

In training A gives way to  A~ = A + t sum_k w_k (z_k L)^T  with
    L = diag(l),  l_i = sqrt(max(e^(2 sigma_i) Z_ii, 1/1000))             the deviation of rank i
    w = softmax(c * zeta + log a - mean log a),   a = e^p                 how much a sample counts
    c_j = sqrt(1/a_j (1 - 2/n) + sum_k (1/a_k) / n^2 + 1/10^6)            the first two terms at least 1/10^6
t is sample_scaler. The noise is an argument: z (n, in, r) and zeta (n,) standard normal, Z (r, r) of Wishart's law with r degrees.
For a gradient G of W':  dA = s B^T G  and  dB = s G A^T, with A~ in training, from where `noisy_vjp` goes on to sigma and p.
A fresh B is zero, so a fresh adapter changes nothing, noise or not.

Paper   Monte Carlo Low-Rank Adaptation
HF      peft.LoraConfig(monteclora_config=...). L and c come from a Cholesky decomposition in float32. A file also holds the last
        variances and weights of training, gaussian_var_prior and expert_weights, which nothing reads but the penalty.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, at_least, at_least_vjp, eye_like, namespace, to, zeros_like
from peft_ref.contracts import Factors, Key, LowRank, Start
from peft_ref.layers import Layer
from peft_ref.methods import lora
from peft_ref.methods.lora_init import biased, check_bias, check_init, check_rank, initial_factors, scaled, scaling
from peft_ref.methods.submap import as_submap
from peft_ref.ranges import positive

LEAST_VARIANCE, LEAST = 1e-3, 1e-6
SAMPLER = "lora_monteclora_sampler."


class Params(NamedTuple):
    A: Annotated[Array, "r in", Key("lora_A.weight", kinds=lora.LINEAR)]
    B: Annotated[Array, "out r", Key("lora_B.weight", kinds=lora.LINEAR)]
    sigma: Annotated[Array, "r", Key(SAMPLER + "std_prior", kinds=lora.LINEAR)]
    p: Annotated[Array, "samples", Key(SAMPLER + "expert_weights_prior", kinds=lora.LINEAR)]
    variances: Annotated[Array, "r r", Key(SAMPLER + "gaussian_var_prior", kinds=lora.LINEAR, trained=False)]
    w: Annotated[Array, "samples", Key(SAMPLER + "expert_weights", kinds=lora.LINEAR, trained=False)]
    c: Annotated[Array | None, "out", Key("lora_B.bias", kinds=lora.LINEAR, when="lora_bias")] = None


class Noise(NamedTuple):
    """One draw: standard normal numbers for every sample, and a Wishart matrix of which the diagonal is read."""

    z: Array  # (samples, in, r)
    Z: Array  # (r, r)
    zeta: Array  # (samples,)


@dataclass(frozen=True, kw_only=True)
class MontecloraConfig:
    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        positive(self, "num_samples")


@final
@dataclass(frozen=True, kw_only=True)
class MonteCLoRA(LowRank[Params]):
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    monteclora_config: MontecloraConfig = field(default_factory=MontecloraConfig)

    peft_type: ClassVar[str] = "LORA"
    flag: ClassVar[str | None] = "monteclora_config"
    flag_value: ClassVar[bool | str | type] = MontecloraConfig
    tuner_prefix: ClassVar[str] = "lora_"
    kinds: ClassVar[frozenset[str]] = lora.LINEAR
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    dropout: ClassVar[str | None] = "lora_dropout"

    def __post_init__(self) -> None:
        check_rank(self)
        check_bias(self)
        object.__setattr__(self, "monteclora_config", as_submap(MontecloraConfig, "monteclora_config", self.monteclora_config))

    @property
    def scale(self) -> float:
        return scaling(self.r, self.lora_alpha, self.use_rslora)

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r, "samples": self.monteclora_config.num_samples}

    def check_geometry(self, layer: Layer) -> None:
        check_init(self, layer)

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        A, B, W = initial_factors(layer, W, self.r, self.scale, self.init_lora_weights, rng)
        n = self.monteclora_config.num_samples
        sigma, p = to(rng.uniform(size=self.r), W), to(rng.uniform(size=n), W)
        return Start(biased(self, Params(A, B, sigma, p, eye_like(self.r, W), zeros_like((n,), W) + 1 / n), layer, W, rng), W)

    def factors(self, p: Params) -> Factors:
        return Factors(B=self.scale * p.B, A=p.A, b=scaled(self.scale, p.c))

    def factors_vjp(self, p: Params, d: Factors) -> Params:
        sigma, logits = (zeros_like(tuple(of.shape), of) for of in (p.sigma, p.p))
        return self.to_params(A=d.A, B=self.scale * d.B, sigma=sigma, p=logits, c=scaled(self.scale, d.b))

    def noisy(self, p: Params, noise: Noise) -> Params:
        """What acts in training: A~ in the place of A, and the variances and weights that PEFT keeps of this draw."""
        xp = namespace(p.A)
        variances, w = self._variances(p, noise), self._weights(p, noise)
        mixed = xp.sum(noise.z * xp.reshape(w, (w.shape[0], 1, 1)), axis=0) * xp.sqrt(variances)
        A = p.A + self.monteclora_config.sample_scaler * xp.matrix_transpose(mixed)
        return p._replace(A=A, variances=eye_like(self.r, p.A) * variances, w=w)

    def noisy_vjp(self, p: Params, noise: Noise, d: Params) -> Params:
        """The gradients of p, given those of `noisy`'s A and B."""
        xp, t = namespace(p.A), self.monteclora_config.sample_scaler
        variances, w, D = self._variances(p, noise), self._weights(p, noise), xp.matrix_transpose(d.A)
        l = xp.sqrt(variances)
        mixed = xp.sum(noise.z * xp.reshape(w, (w.shape[0], 1, 1)), axis=0)
        dsigma = at_least_vjp(self._raw_variances(p, noise), LEAST_VARIANCE, t * xp.sum(D * mixed, axis=0) * l)
        dw = t * xp.sum(noise.z * (D * l), axis=(1, 2))
        du = w * (dw - xp.sum(w * dw))  # through the softmax
        return d._replace(sigma=d.sigma + dsigma, p=d.p + self._logits_vjp(p, noise, du))

    def _raw_variances(self, p: Params, noise: Noise) -> Array:
        xp = namespace(p.sigma)
        return xp.exp(2 * p.sigma) * xp.sum(noise.Z * eye_like(self.r, noise.Z), axis=1)

    def _variances(self, p: Params, noise: Noise) -> Array:
        return at_least(self._raw_variances(p, noise), LEAST_VARIANCE)

    def _weights(self, p: Params, noise: Noise) -> Array:
        xp = namespace(p.p)
        u = self._deviations(p) * noise.zeta + p.p  # the mean of log a is the same for all: it cancels
        e = xp.exp(u - xp.max(u))
        return e / xp.sum(e)

    def _deviations(self, p: Params) -> Array:
        return namespace(p.p).sqrt(at_least(self._spread(namespace(p.p).exp(-p.p)), LEAST) + LEAST)

    def _logits_vjp(self, p: Params, noise: Noise, du: Array) -> Array:
        inverse = namespace(p.p).exp(-p.p)
        dspread = at_least_vjp(self._spread(inverse), LEAST, du * noise.zeta / (2 * self._deviations(p)))
        return du - inverse * self._spread(dspread)

    def _spread(self, x: Array) -> Array:
        """How 1/a makes the variances of the logarithms: a symmetric map, so its own transpose."""
        n = self.monteclora_config.num_samples
        return x * (1 - 2 / n) + namespace(x).sum(x) / n**2
