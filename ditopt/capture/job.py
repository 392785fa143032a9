"""What is captured, and what comes out: what all ways of capture share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditopt._torch import is_fake
from ditopt.capture import flex, fused, where
from ditopt.capture.aside import as_written, forgetful, quiet
from ditopt.capture.check import differ
from ditopt.capture.deferred import Around
from ditopt.capture.flat import Flat, Packing, shared_copy
from ditopt.capture.functional import functionalised, is_functional
from ditopt.capture.graph import Untraceable, refuse_symbols, to_program, written
from ditopt.capture.guard import Guard
from ditopt.capture.spec import CallSpec
from ditopt.errors import BadInput, CaptureError
from ditopt.ir.program import Program, Role


@dataclass(frozen=True)
class Captured:
    """A captured signature: the Program, how calls map to it, how its outputs are packed, and what capture did.

    ``guard``: what must hold of the inputs beyond their signature, where anything must. ``put(results, arguments)``
    writes into the arguments of a call what the model writes into them (a cache of keys and values); None where it
    writes nothing. ``written``: dotted names of the tensors among that, which are results after those of the output.
    ``kept``: dotted names of attributes in which the model keeps what it made for its next call; the graph makes it
    anew. ``state``: of the parameters and buffers that its forward writes into, the same at each call.
    ``around``: the rest of the model's forward, where the Program is that of its blocks alone: it reads what they read,
    after the inputs of the model.
    """

    program: Program
    spec: CallSpec
    pack: Callable[[Sequence[Tensor]], Any]
    structure: str | tuple[str, ...]
    notes: tuple[str, ...] = ()
    guard: Guard | None = None
    put: Callable[[Sequence[Tensor], Any], None] | None = None
    written: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    around: Around | None = None
    state: tuple[str, ...] = ()

    def refuse_file(self, action: str) -> None:
        """BadInput where a call is more than graphs: where the model writes tensors into its arguments, or only its
        blocks are captured. ``action``: "exported"."""
        if self.around is not None:
            raise BadInput(
                f"this model cannot be {action}: only its blocks are graphs, and the rest of forward is its own Python"
                f"{self.around.line}; run it in this process, with target eager or inductor"
            )
        if self.written:
            raise BadInput(
                f"this call cannot be {action}: it writes {self.written[0]} into its arguments, and a file has nothing "
                "to write it into; give example_inputs of a call that only reads them"
            )


@dataclass(frozen=True)
class Job:
    """One signature of a model that is to be captured. ``blocks``: paths of modules that are no use outside of the
    graph."""

    model: nn.Module
    spec: CallSpec
    tensors: Sequence[Tensor]
    roles: Mapping[str, Role]
    weights: Collection[str]
    blocks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def fake(self) -> bool:
        """Whether there are no values: shapes and types only."""
        return any(is_fake(t) for t in [*self.tensors, *self.model.parameters(), *self.model.buffers()])

    def export(self, flat: Flat, more: Callable[[], int] = lambda: 0) -> tuple[Program, int]:
        """The Program of ``flat``, whose last ``more()`` results are not the model's, and how many flex attentions were
        lowered. Untraceable where tracing stops."""
        exported = self.exported(flat)
        flat.packing.state = tuple(written(exported))
        refuse_packing(self, flat.packing)
        lowered = flex.expand(exported.graph_module)
        return self.program(exported, more()), lowered

    def program(self, exported: Any, more: int = 0) -> Program:
        """The Program of what ``exported`` or ``dynamic`` gives, without symbols."""
        if is_functional(exported.graph):
            exported = functionalised(exported)
        fused.expand(exported.graph)
        return to_program(self.model, exported, self.spec, self.tensors, self.roles, self.weights, more)

    def exported(self, module: nn.Module, dynamic_shapes: Any = None) -> Any:
        """The ExportedProgram of ``module``, called with the tensors: nothing in it writes in place. Untraceable where
        tracing stops."""
        try:
            with quiet(), forgetful(), fused.reached(), torch.no_grad():
                exported = torch.export.export(
                    module, distinct(self.tensors), strict=False, dynamic_shapes=dynamic_shapes
                )
                refuse_symbols(self.name, exported.graph)
                return exported if is_functional(exported.graph) else exported.run_decompositions({})
        except Untraceable:
            raise
        except Exception as error:
            raise Untraceable(_stopped(self.name, error)) from error


def refuse_packing(job: Job, packing: Packing) -> None:
    """CaptureError where the model's run did what no graph can say."""
    name = job.name
    if unsettled := _unsettled(job, packing):
        raise CaptureError(
            f"{name} changes its attribute {unsettled} during forward, and another call with the same inputs "
            "changes it again or gives another result; a graph would keep one value for ever. Make it an input of "
            "forward."
        )
    if packing.opaque:
        raise CaptureError(
            f"{name} returns a {packing.opaque[0]}, in which ditopt does not look for tensors; return tensors, or "
            "tuples, lists, dicts and dataclasses of them"
        )
    if packing.removed:
        raise CaptureError(
            f"{name} takes {packing.removed[0]} out of its arguments during forward; a graph can put something into "
            "them, and take nothing away. Set it to None instead."
        )


def _unsettled(job: Job, packing: Packing) -> str:
    """An attribute that a run changed, and that is not what a first call makes and equal ones use again; "" without."""
    if not packing.kept:
        return ""
    if job.fake:
        return next(iter(packing.changed), "")
    flat = Flat(shared_copy(job.model, runs=True, written=packing.state), job.spec)
    with quiet(), as_written(), torch.no_grad():
        first = flat(*job.tensors)
        found = flat.packing.kept
        second = flat(*job.tensors)
    if flat.packing.changed:
        return flat.packing.changed[0]
    return found[0] if found and differ(first, second) else ""


def distinct(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``tensors`` with a copy for each that is there already: torch.export would take two arguments for one."""
    first = {id(t): i for i, t in reversed(list(enumerate(tensors)))}
    return tuple(t if first[id(t)] == i else t.clone() for i, t in enumerate(tensors))


def first_line(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [type(error).__name__])[0][:300]}"


def _stopped(name: str, error: Exception) -> str:
    return (
        f"{name} cannot be traced{where.of_error(error)}: {first_line(error)}. Python that looks at tensor values "
        "cannot become part of a graph; compute it outside forward and pass it in, or use torch.where."
    )
