"""The sizes of matrices that all layers share, each layer seeing its part: those of the widest input and of the widest output."""

from __future__ import annotations

from collections.abc import Mapping

from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Layer


def widest(layers: Mapping[str, Layer]) -> tuple[int, int]:
    """(out, in), of two layers perhaps."""
    shapes = [layer.shape for layer in layers.values()] or [(0, 0)]
    return max(s[0] for s in shapes), max(s[1] for s in shapes)


def check_widths(method: str, layer: Layer, n_in: int | None, out: int | None) -> None:
    if layer.shape[1] > (n_in or layer.shape[1]) or layer.shape[0] > (out or layer.shape[0]):
        raise UnsupportedLayerError(
            f"{method}: the layer has {layer.shape[1]} inputs and {layer.shape[0]} outputs, the shared matrices are for {n_in} and {out}.\n"
            "  They are drawn for the widest of all adapted layers."
        )
