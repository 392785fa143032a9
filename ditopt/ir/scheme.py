"""Quantization schemes as data: what happens to the weight and to the input of a linear layer, and which layers.

A scheme says formats (how numbers become small integers), what is done to weight and input before (``transforms``,
each exact without rounding), a branch beside the product in full precision, how weights are rounded, and the layers
that it is for. A published system is one value of ``QuantScheme``; passes/quantize.py writes any of them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ditopt.ir.program import RegionRole


@dataclass(frozen=True)
class Format:
    """Symmetric integers of ``bits`` bits (ops/quantize.py), one scale for ``group`` numbers along the inputs of the
    layer, 0 for all of them: a row of the weight is an output channel, a row of the activation is a token. Scales of
    weights are computed once, those of activations at every step."""

    bits: int
    group: int = 0


@dataclass(frozen=True)
class Smooth:
    """Divide the input by ``lam`` and multiply the weight with it, channel by channel: outliers of activations move
    into the weight. ``lam = activation^alpha / weight^(1 - alpha)`` of the largest magnitudes of each channel, those of
    activations measured beforehand. Only where the division disappears into the scale and shift of the norm before
    (ir/smoothing.py)."""

    alpha: float = 0.5


Transform = Smooth
"""What may happen to input and weight together."""


@dataclass(frozen=True)
class LowRank:
    """``rank`` directions of the weight, the largest, stay in full precision as a branch beside the product; what is
    left is quantized. ``rounds``: how often the directions are found again, of the weight without what the integers
    hold, while that brings the two closer."""

    rank: int
    rounds: int = 1


@dataclass(frozen=True)
class LayerPolicy:
    """Which linear layers: those inside blocks, in modules of these ``roles`` ("" is a block outside of its modules),
    whose input depends on the latent. What leads to the blocks, what follows them, and what the timestep or the prompt
    alone decides (modulation, keys of the text) stay as they are: structure, no names."""

    roles: tuple[RegionRole | Literal[""], ...] = ("attn", "mlp", "")


@dataclass(frozen=True)
class QuantScheme:
    """See the module docstring. Without ``activation`` the input stays as it is: weights only. ``packed``: two values
    of 4 bits in a byte."""

    weight: Format
    activation: Format | None = None
    transforms: tuple[Transform, ...] = ()
    branch: LowRank | None = None
    rounding: Literal["nearest"] = "nearest"
    policy: LayerPolicy = LayerPolicy()

    @property
    def packed(self) -> bool:
        """Whether weights are stored two to a byte."""
        return self.weight.bits == 4

    @property
    def integer(self) -> bool:
        """Whether the products are ones of integers in 8 bits with a scale for each row (``ditopt::int8_linear``)."""
        formats = (self.weight, self.activation)
        return all(f is not None and f.bits == 8 and f.group == 0 for f in formats)


SCHEMES: dict[str, QuantScheme] = {
    "w8a8": QuantScheme(Format(8), Format(8)),
    "w4a16": QuantScheme(Format(4, 128)),
    "svdquant": QuantScheme(Format(4, 64), Format(4, 64), branch=LowRank(32)),
}
"""Schemes by name."""
