"""A decoder of pre-normalised blocks: what an architecture states of one, and what follows.

h = x + attend(norm_1(x))        y = h + mlp(norm_2(h))        logits = lm_head(norm(x))
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, final

from peft_ref.arrays import Array
from peft_ref.nn.attention import KeyValue
from peft_ref.nn.blocks import Context, Decoder
from peft_ref.nn.model import Output, OutputGradient
from peft_ref.nn.net import Gradients, Net


class PreNormDecoder(Decoder):
    attention: ClassVar[str]  # what a block calls its attention, and its two norms
    norms: ClassVar[tuple[str, str]]
    last_norm: ClassVar[str]

    @abstractmethod
    def attend(self, net: Net, name: str, x: Array, context: Context, past: KeyValue | None) -> tuple[Array, KeyValue]:
        """The attention's output, and its keys and values with the past's in front."""

    @abstractmethod
    def attend_vjp(
        self, net: Net, name: str, x: Array, context: Context, past: KeyValue | None, dy: Array
    ) -> tuple[Array, KeyValue | None, Gradients]: ...

    @abstractmethod
    def mlp(self, net: Net, name: str, x: Array) -> Array: ...

    @abstractmethod
    def mlp_vjp(self, net: Net, name: str, x: Array, dy: Array) -> tuple[Array, Gradients]: ...

    @final
    @property
    def output_head(self) -> str:
        return "lm_head"

    @final
    def block(self, net: Net, name: str, x: Array, context: Context, past: KeyValue | None) -> tuple[Array, KeyValue]:
        first, second = (f"{name}.{norm}" for norm in self.norms)
        y, kept = self.attend(net, f"{name}.{self.attention}", net.apply(first, x), context, past)
        h = x + y
        return h + self.mlp(net, f"{name}.mlp", net.apply(second, h)), kept

    @final
    def block_vjp(
        self, net: Net, name: str, x: Array, context: Context, past: KeyValue | None, dy: Array
    ) -> tuple[Array, KeyValue | None, Gradients]:
        at, first, second = (f"{name}.{part}" for part in (self.attention, *self.norms))
        n = net.apply(first, x)
        h = x + self.attend(net, at, n, context, past)[0]
        dm, of_mlp = self.mlp_vjp(net, f"{name}.mlp", net.apply(second, h), dy)
        dh, of_m = net.vjp(second, h, dm)
        dh = dy + dh
        dn, dpast, of_attention = self.attend_vjp(net, at, n, context, past, dh)
        dx, of_n = net.vjp(first, x, dn)
        return dh + dx, dpast, of_mlp + of_m + of_attention + of_n

    @final
    def leave(self, net: Net, x: Array) -> Output:
        return Output(logits=net.apply("lm_head", net.apply(self.last_norm, x)))

    @final
    def leave_vjp(self, net: Net, x: Array, d: OutputGradient) -> tuple[Array, Gradients]:
        dn, of_head = net.vjp("lm_head", net.apply(self.last_norm, x), d.logits)
        dx, of_norm = net.vjp(self.last_norm, x, dn)
        return dx, of_head + of_norm
