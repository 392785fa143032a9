"""Shorten steps of the sampler: the scheduler of a pipeline runs at other times than its own.

A step that reuses is wrong by more the further it goes, so ERTACache (arXiv 2508.21091) lets it go less far, and the
steps after it further. This is the one pass that changes no value of the model: it declares the pace
(``Program.pace``), and the hook on the pipeline's scheduler (ditopt/diffusers.py) applies it when ``set_timesteps`` is
called. A model alone has no scheduler: there the recipe is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from ditopt.errors import RecipeError
from ditopt.ir import example
from ditopt.ir.pacing import read_factors
from ditopt.ir.program import Program
from ditopt.pipeline import Context, Outcome, Pass


@dataclass(frozen=True)
class RescaleSteps(Pass):
    """Let the steps of the pipeline's scheduler go less far than they would.

    ``factors``: one number a step, or one for all of them: 1 goes as far as the scheduler would from there, 0 nowhere.
    What a step leaves is shared by those that follow, and the last one goes to the end.
    """

    factors: str = "0.9"

    contract = "approximate"

    def validate(self) -> None:
        try:
            read_factors(self.factors)
        except RecipeError as error:
            raise RecipeError(f"rescale_steps: {error}") from None

    @property
    def pace(self) -> tuple[float, ...]:
        found = read_factors(self.factors)
        return found if any(f != 1 for f in found) else ()

    @classmethod
    def neutral(cls) -> RescaleSteps:
        return cls(factors="1")

    def run(self, program: Program, context: Context) -> Outcome:
        if not self.pace:
            return Outcome(program, 0, ("every factor is 1: the scheduler keeps its own times",))
        if len(self.pace) > 1 and context.steps and len(self.pace) != context.steps:
            raise RecipeError(
                f"{len(self.pace)} factors given, the request has {context.steps} steps: give one a step, or one "
                "for all"
            )
        if program.pace:
            return Outcome(program, 0, ("an earlier pass changes the pace of the sampler already: join the factors",))
        if not any(i.role == "timestep" for i in program.inputs):
            return Outcome(program, 0, ("there is no timestep, by which the model would be told its new times",))
        shorter = sum(f < 1 for f in self.pace)
        note = f"{shorter if len(self.pace) > 1 else 'all'} steps of the pipeline's scheduler go less far"
        return Outcome(program.replace(pace=self.pace), max(shorter, 1), notes=(note,))

    @classmethod
    def example_applies(cls) -> Program:
        return example.tiny_dit()

    @classmethod
    def example_refuses(cls) -> Program:
        return cls.example_applies().replace(pace=cls().pace)
