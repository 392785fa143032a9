"""Quantize the linear layers of the blocks: small integers for weights, and for activations at every step.

Which numbers become which integers is a scheme (ir/scheme.py): "w8a8" (8 bits for both, a scale for each token and each
output channel), "w4a16" (weights in 4 bits, in groups), "svdquant" (4 bits for both in groups, with a branch of low
rank in full precision beside). The program says so in ``ditopt::quantize`` and ``ditopt::dequantize``, and computes it
in floating point until ``fuse_quantization`` makes integer products of it. Quantized weights are a memo of the weights:
a weight that changes in place is seen, or is an error, as with all that leaves the loop.

``alpha`` smooths (ir/smoothing.py): channels of an input are divided by factors that the weight is multiplied with,
where the division disappears into the norm and modulation before. Exact without rounding.

Layers are found by structure: those inside blocks whose input depends on the latent. Embedders, modulation and the head
stay as they are. Approximate; ``scheme=none`` quantizes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ditopt.errors import RecipeError
from ditopt.ir import example
from ditopt.ir.program import Program
from ditopt.ir.quantizing import quantized, quantized_nodes
from ditopt.ir.scheme import SCHEMES, QuantScheme, Smooth
from ditopt.ir.select import select_regions
from ditopt.ir.smoothing import read_maxima
from ditopt.pipeline import Context, Outcome, Pass


@dataclass(frozen=True)
class Quantize(Pass):
    """Write weights, and activations where the scheme has them, as small integers.

    ``scheme``: what becomes what. ``group``: numbers along the inputs of a layer that share a scale (0: all of them),
    -1 for that of the scheme. ``rank``, ``rounds``: of svdquant's branch (``LowRank``), -1 for that of the scheme.
    ``alpha``: strength of smoothing, 0 to 1: 0 evens out weights alone, 1 activations alone; -1 does not smooth.
    ``maxima``: the file of the largest magnitudes of activations, which alpha > 0 needs (recipe smoothquant).
    ``keep``: a selector (ir/select.py) of what stays as it is, such as "blocks.0|blocks.-1".
    """

    scheme: Literal["none", "w8a8", "w4a16", "svdquant"] = "w8a8"
    group: int = -1
    rank: int = -1
    rounds: int = -1
    alpha: float = -1.0
    maxima: str = ""
    keep: str = ""

    contract = "approximate"
    requires = ("outline_blocks",)
    after = ("hoist_invariants", "skip_blocks", "select_tokens", "edit_tokens", "cache", "cache_guidance")

    def validate(self) -> None:
        for option, least in (("group", 0), ("rank", 1), ("rounds", 1)):
            value = getattr(self, option)
            if value != -1 and value < least:
                raise RecipeError(f"quantize{{{option}={value}}}: expected {least} or more, or -1 for the scheme's own")
        if self.alpha != -1 and not 0 <= self.alpha <= 1:
            raise RecipeError(f"quantize{{alpha={self.alpha:g}}}: expected 0 to 1, or -1 for no smoothing")
        if (self.alpha > 0) != bool(self.maxima):
            raise RecipeError(
                f"quantize{{alpha={self.alpha:g},maxima={self.maxima}}}: smoothing by activations takes alpha > 0 "
                "and the file of their largest magnitudes; ditopt.calibrate(model, 'smoothquant', ...) gives them"
            )
        scheme = SCHEMES.get(self.scheme)
        for option in ("rank", "rounds"):
            if getattr(self, option) != -1 and (scheme is None or scheme.branch is None):
                raise RecipeError(f"quantize{{scheme={self.scheme}}} has no branch of low rank; leave {option} out")

    @classmethod
    def neutral(cls) -> Quantize:
        return cls(scheme="none")

    def resolved(self) -> QuantScheme | None:
        """The scheme with the options in place; None for "none"."""
        scheme = SCHEMES.get(self.scheme)
        if scheme is None:
            return None
        if self.group != -1:
            activation = None if scheme.activation is None else replace(scheme.activation, group=self.group)
            scheme = replace(scheme, weight=replace(scheme.weight, group=self.group), activation=activation)
        if scheme.branch is not None:
            given = {k: getattr(self, k) for k in ("rank", "rounds") if getattr(self, k) != -1}
            scheme = replace(scheme, branch=replace(scheme.branch, **given))
        if self.alpha != -1:
            scheme = replace(scheme, transforms=(*scheme.transforms, Smooth(self.alpha)))
        return scheme

    def run(self, program: Program, context: Context) -> Outcome:
        scheme = self.resolved()
        if scheme is None:
            return Outcome(program, 0, ("scheme=none quantizes nothing",))
        if next(quantized_nodes(program), None) is not None:
            return Outcome(program, 0, ("the program is quantized already",))
        if not program.blocks():
            return Outcome(program, 0, ("no blocks were found, and layers outside of blocks are not quantized",))
        if scheme.activation is not None and scheme.activation.bits == 8 and not scheme.integer:
            group = scheme.activation.group
            return Outcome(
                program,
                0,
                (
                    f"no int8 product of target {context.target} takes a scale for each group of {group}; leave group "
                    "out, or use scheme=w4a16",
                ),
            )
        keep = {i for s in select_regions(program, self.keep) for i in s.ids} if self.keep else set()
        maxima = read_maxima(Path(self.maxima)) if self.maxima else None
        done = quantized(program, scheme, keep, self.name, maxima)
        if not done.layers:
            return Outcome(
                program,
                0,
                tuple(done.refused) or ("no linear layer inside the blocks reads what depends on the latent",),
            )
        smoothed = (
            f"smoothing, alpha={self.alpha:g}: {done.smoothed} of {done.inputs} inputs of layers are divided in the "
            "norm and modulation before them",
        )
        notes = (
            *(smoothed if self.alpha != -1 else ()),
            f"{done.flops / max(done.of, 1):.1%} of the FLOPs of the blocks' linear layers are quantized; their "
            f"weights shrink from {done.before / 1e6:.2f} to {done.after / 1e6:.2f} MB",
        )
        return Outcome(done.program, done.layers, tuple(done.refused), notes)

    @classmethod
    def example_applies(cls) -> Program:
        from ditopt.passes.outline_blocks import OutlineBlocks

        return OutlineBlocks().run(example.tiny_dit(), Context()).program

    @classmethod
    def example_refuses(cls) -> Program:
        return example.tiny_dit(attention=False)
