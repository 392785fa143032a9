"""Weights that left the loop may leave memory: they are brought in when hoisted values are filled, and go again.

What only memo functions read is put away: on the host for a model on an accelerator, into a memory-mapped temporary
file for a model on the CPU. With ``free``, what fills a table that no request changes is given up once it is full. The
original model cannot run meanwhile, and says so; ``restore`` brings its weights back.
"""

from __future__ import annotations

import math
import mmap
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ditopt.artifact import Executable, Manifest, StepGraph
from ditopt.codegen.lower import lower_memos
from ditopt.codegen.stream import Streamed
from ditopt.errors import BadInput, SessionError
from ditopt.ir.program import Program

Release = Literal["keep", "offload", "free"]


def check(release: str, target: str) -> None:
    """BadInput for a mode that does not exist or that ``target`` cannot follow."""
    if release not in get_args(Release):
        raise BadInput(f"release={release!r} given; expected one of {', '.join(get_args(Release))}")
    if release != "keep" and target == "onnxruntime":
        raise BadInput(
            f"release={release!r} given with target 'onnxruntime', whose sessions hold weights of their own; leave "
            "release out, and delete the model if its memory is needed"
        )


class Shelves:
    """The weights of ``model`` that are away. ``streamed_bytes`` and ``seconds`` count what filling tables brought in,
    and how long these fills took; ``bytes`` is what is away now, ``freed`` what is gone for good."""

    def __init__(self, model: nn.Module, mode: Release) -> None:
        self.model, self.mode = model, mode
        self.seconds, self.streamed_bytes, self.freed = 0.0, 0, 0
        self._away: dict[str, _Weight] = {}
        self._guard: Any = None

    def require_all(self, done: str) -> None:
        """BadInput where weights were freed, without which the model cannot be ``done`` (a participle)."""
        if self.freed:
            raise BadInput(
                f"this {type(self.model).__name__} cannot be {done}: weights were freed (release='free'); load the "
                "model again and optimize it with release='offload'"
            )

    @property
    def bytes(self) -> int:
        """Bytes of weights that are away."""
        return sum(w.nbytes for w in self._away.values())

    def __str__(self) -> str:
        from ditopt.explanation import size

        total = sum(p.nbytes for p in self.model.parameters()) + self.freed
        said = f"{self.mode}: {size(self.bytes + self.freed)} of {size(total)} of weights are out of memory"
        return f"{said}; {size(self.streamed_bytes)} streamed in by fills that took {self.seconds:.2f} s"

    # -- putting away and bringing back --------------------------------------------------------------------------------

    def put(self, manifests: Sequence[Manifest], weights: Mapping[str, Tensor]) -> int:
        """Put away the weights that no step of ``manifests`` reads: only memo functions do, or nothing, where blocks
        are left out; the latter go for good under ``free``. Returns how many."""
        read = {f.ref for m in manifests for g in _steps(m) for f in g.inputs if f.kind == "param"}
        filled = {f.ref for m in manifests for g in m.memo_graphs for f in g.inputs if f.kind == "param"} - read
        live = dict(self.model.named_parameters(remove_duplicate=False))
        held = {live[n].untyped_storage().data_ptr() for n in read if n in live}
        idle, names = [], []
        for name in sorted(live):
            storage = live[name].untyped_storage().data_ptr()
            unread = name not in read and name not in filled
            if storage in held or not live[name].is_contiguous() or not (unread or weights.get(name) is live[name]):
                continue
            held.add(storage)  # a weight with two names goes once
            names.append(name)
            idle += [name] if unread else []
        for name in names:
            self._away[name] = _Weight(live[name])
        if names and self._guard is None:
            self._guard = self.model.register_forward_pre_hook(self._refuse, prepend=True)
        if self.mode == "free":
            self.free(idle)
        return len(names)

    def _refuse(self, *_: Any) -> None:
        raise SessionError(
            f"weights of this {type(self.model).__name__} are out of memory (release={self.mode!r}): run the optimized "
            "model, or ditopt.restore(it) to have this one back"
        )

    def restore(self) -> None:
        """Bring every weight home. BadInput where some were freed."""
        if self._guard is not None:
            self._guard.remove()
            self._guard = None
        for weight in self._away.values():
            weight.home()
        self._away.clear()
        if self.freed:
            raise BadInput(
                f"weights of this {type(self.model).__name__} were freed (release='free'); load the model again"
            )

    # -- filling tables ------------------------------------------------------------------------------------------------

    def executables(
        self, program: Program, manifest: Manifest, give_up: Callable[[Sequence[str]], None]
    ) -> dict[str, Executable]:
        """The memo functions of ``program`` over weights that are away. Where no request changes a table, its weights
        go for good under ``free`` when it is full; ``give_up`` is told their names."""
        roles = {i.name: i.role for i in manifest.inputs}
        made: dict[str, Executable] = {}
        for memo, step in zip(manifest.memos, lower_memos(program), strict=True):
            fixed = bool(memo.keys) and all(roles[k] == "timestep" for k in memo.keys)
            made[step.graph.name] = _Filled(Streamed(step, self), self, give_up if fixed else None)
        return made

    def take(self, name: str, weight: Tensor, device: torch.device) -> Tensor:
        """See ``codegen.stream.Shelf``."""
        if weight.numel() == 0 and name not in self._away:
            raise SessionError(
                f"weight {name!r} was freed when the table of its timesteps was full, and this step asks for another "
                "timestep: use release='offload', or run the schedule of the first request"
            )
        if name in self._away:
            self.streamed_bytes += weight.nbytes
            self._away[name].expect()
        return weight.detach().to(device)

    def drop(self, name: str) -> None:
        """See ``codegen.stream.Shelf``."""
        if name in self._away:
            self._away[name].drop()

    def settle(self) -> bool:
        """A request begins, and a look at the weights may have brought pages of them in. Nothing of it is stale."""
        for weight in self._away.values():
            weight.drop()
        return False

    def free(self, names: Sequence[str]) -> list[str]:
        """Give up weights for good; those that were away."""
        gone = [n for n in names if n in self._away]
        for name in gone:
            self.freed += self._away.pop(name).free()
        return gone


class _Filled:
    """The executable that a Session runs: ``table`` ends the life of weights that nobody will read again."""

    def __init__(self, run: Streamed, shelves: Shelves, give_up: Callable[[Sequence[str]], None] | None) -> None:
        self._run, self._shelves, self._give_up = run, shelves, give_up

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._timed([inputs])[0]

    def table(self, rows: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """The results of each row; there will be no others in this request."""
        out = self._timed(rows)
        if self._give_up is not None and self._shelves.mode == "free":
            self._give_up(self._shelves.free([f.ref for f in self._run.graph.inputs if f.kind == "param"]))
        return out

    def _timed(self, rows: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        began = time.perf_counter()
        out = self._run.table(rows)
        self._shelves.seconds += time.perf_counter() - began
        return out


class _Weight:
    """One parameter that is away: its data is on the host, or in a memory-mapped file where it was on the host."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter, self._device = parameter, parameter.device
        self.nbytes = parameter.nbytes
        self._map: mmap.mmap | None = None
        if self._device.type != "cpu":
            parameter.data = parameter.data.cpu()
        elif self.nbytes:
            parameter.data, self._map = _mapped(parameter.data)

    def expect(self) -> None:
        """All of it will be read."""
        self._advise("MADV_WILLNEED")

    def drop(self) -> None:
        """Its pages need not stay in memory."""
        self._advise("MADV_DONTNEED")

    def _advise(self, what: str) -> None:
        if self._map is not None and hasattr(mmap, what):
            self._map.madvise(getattr(mmap, what))

    def home(self) -> None:
        self._parameter.data = self._parameter.data.to(self._device, copy=True)

    def free(self) -> int:
        self._parameter.data = torch.empty(0, dtype=self._parameter.dtype, device=self._device)
        self._map = None
        return self.nbytes


def _mapped(tensor: Tensor) -> tuple[Tensor, mmap.mmap]:
    """A copy of a contiguous ``tensor`` in a temporary file that has no name any more, mapped into memory."""
    with tempfile.TemporaryFile(prefix="ditopt-") as file:
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        held = mmap.mmap(file.fileno(), tensor.nbytes)  # shared, so that a write survives its pages
    count = math.prod(tensor.shape)
    return torch.frombuffer(held, dtype=tensor.dtype, count=count).view(tensor.shape), held


def _steps(manifest: Manifest) -> list[StepGraph]:
    """The graphs that run inside the loop."""
    return [g for g in manifest.every_graph if g not in manifest.memo_graphs]
