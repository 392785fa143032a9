"""Make integer products of what ``quantize`` wrote.

A linear layer between dequantized operands becomes ``ditopt::int8_linear``: integers times integers, with the scales,
the bias, the activation, the gate and the residual sum in its epilogue. Quantization after a norm and its modulation
becomes ``ditopt::norm_quantize``. Layers of which only the weight is quantized become ``ditopt::packed_linear``, those
of 4 bits in groups, with their branch of low rank, ``ditopt::int4_linear``. Which backend runs these how is codegen's
(codegen/claims).

Sums of integers are exact where those of dequantized numbers round, and the epilogue rounds once: the same values
within rounding. ``fuse=none`` changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ditopt.ir import example
from ditopt.ir.edit import replace_functions
from ditopt.ir.fusing import Fusing
from ditopt.ir.program import Program
from ditopt.ir.quantizing import is_quantized
from ditopt.ops import int4_linear, int8_linear, packed_linear
from ditopt.pipeline import Context, Outcome, Pass


@dataclass(frozen=True)
class FuseQuantization(Pass):
    """One operator for quantize, multiply, dequantize and what follows point by point.

    ``fuse``: "all"; "products" alone, without epilogues and norms; "none".
    """

    fuse: Literal["all", "products", "none"] = "all"

    contract = "approximate"
    requires = ("quantize",)

    @classmethod
    def neutral(cls) -> FuseQuantization:
        return cls("none")

    def run(self, program: Program, context: Context) -> Outcome:
        if self.fuse == "none":
            return Outcome(program, 0, ("fuse=none leaves the program as it is",))
        changed, count, refused = {}, 0, []
        for name, function in program.functions.items():
            done = Fusing(function, self.name, self.fuse == "all")
            if done.count:
                changed[name] = done.function
                count += done.count
            refused += done.refused
        if count:
            return Outcome(replace_functions(program, changed), count, tuple(refused))
        nodes = [n for f in program.functions.values() for n in f.graph.nodes]
        fused = sum(n.target in (int4_linear, int8_linear, packed_linear) for n in nodes)
        nothing = (
            f"all {fused} quantized layers are fused already"
            if fused
            else "no layer is quantized"
            if not any(map(is_quantized, nodes))
            else ""
        )
        return Outcome(program, 0, (*refused, *([nothing] if nothing else [])))

    @classmethod
    def example_applies(cls) -> Program:
        from ditopt.passes.quantize import Quantize

        return Quantize().run(Quantize.example_applies(), Context()).program

    @classmethod
    def example_refuses(cls) -> Program:
        return example.tiny_dit()
