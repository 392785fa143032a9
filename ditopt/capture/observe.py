"""One run of a model, watched for the segments of its forward that blocks make up.

Blocks are found by their calls: submodules of one class that one module calls twice or more in a run. What forward does
with their results is noted step by step, until Python looks at a value of one: there a segment ends.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditopt._torch import TorchDispatchMode, pytree
from ditopt.capture import where
from ditopt.capture.aside import as_written, quiet
from ditopt.capture.deferred import Deferred, describes, writes
from ditopt.capture.flat import Flat, shared_copy
from ditopt.capture.job import Job, refuse_packing
from ditopt.capture.replay import Recorder
from ditopt.capture.segment import Given, Kind, Made, Part, Segment, Step, Weight
from ditopt.capture.spec import STATIC, dotted
from ditopt.errors import CaptureError

_FIXED = (*STATIC, slice, type(...), torch.memory_format, torch.layout, Part)
"""Types of leaves of a call that a segment holds fixed."""

LEAST = 0.25
"""Share of a model's FLOPs below which repeated modules are not taken for its blocks."""


@dataclass(frozen=True)
class Found:
    """A segment with the tensors that it reads from outside, and the FLOPs of its blocks."""

    segment: Segment
    tensors: tuple[Tensor, ...]
    flops: int


class _Work(TorchDispatchMode):
    """Counts ``flops`` as torch.utils.flop_counter does. Its own mode also follows gradients, and cannot run where a
    view of a weight is taken without any."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # imports triton

        super().__init__()
        self.flops = 0
        self._known = flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named, operator = dict(kwargs or {}), func._overloadpacket
        if operator not in self._known:
            with self:
                parts = func.decompose(*args, **named)
            return func(*args, **named) if parts is NotImplemented else parts
        out = func(*args, **named)
        self.flops += self._known[operator](*args, **named, out_val=out)
        return out


def block_paths(job: Job) -> list[tuple[str, ...]]:
    """Paths of modules that may be the blocks of a model, in the order of their calls: groups of submodules that the
    same module calls, of classes that come twice or more among them. Those that do most of the work come first."""
    twin = shared_copy(job.model, runs=True)
    calls: dict[int, dict[type, list[tuple[str, int]]]] = defaultdict(lambda: defaultdict(list))
    numbers = itertools.count()
    running, begun = [next(numbers)], list[int]()
    counter = _Work()

    def enter(*_: Any) -> None:
        running.append(next(numbers))
        begun.append(counter.flops)

    def leave(path: str, module: nn.Module, *_: Any) -> None:
        running.pop()
        work = counter.flops - begun.pop()
        if any(True for _ in module.children()) or not type(module).__module__.startswith("torch."):
            calls[running[-1]][type(module)].append((path, work))

    for path, module in twin.named_modules():
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(functools.partial(leave, path))
    with counter:
        _run(Flat(twin, job.spec), job)
    total = counter.flops
    groups = []
    for by_class in calls.values():
        repeated = [one for found in by_class.values() if len(found) > 1 for one in found]
        groups.append((sum(work for _, work in repeated), tuple(dict.fromkeys(path for path, _ in repeated))))
    best = sorted((g for g in groups if g[0] > LEAST * total), key=lambda g: -g[0])
    return [paths for _, paths in best]


def _run(flat: Flat, job: Job) -> tuple[Tensor, ...]:
    with quiet(), as_written(), torch.no_grad():
        results: tuple[Tensor, ...] = flat(*job.tensors)
    return results


@dataclass(frozen=True)
class _Raw:
    """A tensor that no step gave, and how often it had been written into when it was used."""

    tensor: Tensor
    writes: int | None


@dataclass(frozen=True)
class _Look:
    """Python learns values of the tensors ``made``, or does what no step can say. ``path``: of a module that was
    called, if that was it."""

    line: str
    made: tuple[Made, ...]
    path: str = ""


class Observer(Recorder):
    """Watches a run of ``model``, a copy, whose blocks are the modules at ``paths``. ``flops``: of the whole run."""

    def __init__(self, model: nn.Module, paths: Collection[str]) -> None:
        super().__init__(model)
        self._model = model
        self._events: list[Step | _Look] = []
        self._arguments: dict[int, list[str]] = {}
        self._work: dict[int, int] = {}
        self._names: dict[int, Made] = {}
        self._parts = {id(module): path for path, module in model.named_modules()}
        self._tensors: dict[Made, Tensor] = {}
        self._counter = _Work()
        self.kept: tuple[str, ...] = ()
        for path in paths:
            module = model.get_submodule(path)
            module.forward = functools.partial(self._block, path, module.forward)

    def watch(self, job: Job) -> tuple[Tensor, ...]:
        """Run the model once; its results."""
        flat = Flat(self._model, job.spec, lambda: self)
        state = [*self._model.parameters(), *self._model.buffers()]
        before = [writes(t) for t in state]
        with self._counter:
            results = _run(flat, job)
        refuse_packing(job, flat.packing)
        if [writes(t) for t in state] != before:
            raise CaptureError(f"{job.name} changes a buffer during forward; pass it in and return it")
        self._events.append(_Look("", tuple(self._names[id(t)] for t in results if id(t) in self._names)))
        self.flops, self.kept = self._counter.flops, flat.packing.kept
        return results

    @property
    def looked(self) -> str:
        """Where Python first learned a value of a tensor: " at file:line (code)", or ""."""
        return next((r.line for r in self.reads), "")

    @property
    def interrupted(self) -> str:
        """The same of a tensor that a block gave."""
        return next((e.line for e in self._events if isinstance(e, _Look) and e.made), "")

    def _block(self, path: str, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        operands, tree = self._operands((args, kwargs))
        before = self._counter.flops
        with self.paused():
            out = plain(*args, **kwargs)
        self._arguments[len(self._events)] = [f"{path}.{name}" for name in _names(plain, args, kwargs)]
        self._work[len(self._events)] = self._counter.flops - before
        self._note(path, operands, tree, out, path)
        return out

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        leaves = [v for v in pytree.tree_leaves((tuple(args), named)) if isinstance(v, Tensor)]
        if self._paused or not any(id(v) in self._names for v in leaves):
            return super().__torch_function__(func, types, args, named)
        operands, tree = self._operands((tuple(args), named))
        reads, before = len(self.reads), [writes(v) for v in leaves]
        out = super().__torch_function__(func, types, args, named)
        written = [v for v, w in zip(leaves, before, strict=True) if writes(v) != w]
        if len(self.reads) > reads or any(id(v) not in self._names for v in written):
            self._look(operands)
        elif written or any(isinstance(v, Tensor) for v in pytree.tree_leaves(out)):
            self._note(func, operands, tree, out)
        else:
            blind = pytree.tree_map_only(Tensor, lambda t: Deferred.of(Kind.of(t)), (tuple(args), named))
            if not describes(func, *blind)[0]:
                self._look(operands)
        return out

    def _operands(self, arguments: Any) -> tuple[tuple[Any, ...], pytree.TreeSpec]:
        leaves, tree = pytree.tree_flatten(arguments)
        return tuple(map(self._operand, leaves)), tree

    def _operand(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._names.get(id(value), _Raw(value, writes(value)))
        return Part(self._parts[id(value)]) if id(value) in self._parts else value

    def _look(self, operands: Sequence[Any], path: str = "") -> None:
        self._events.append(_Look(where.of_caller(), tuple(o for o in operands if isinstance(o, Made)), path))

    def _note(self, callee: Any, operands: tuple[Any, ...], tree: pytree.TreeSpec, out: Any, path: str = "") -> None:
        leaves, packing = pytree.tree_flatten(out)
        if not all(isinstance(v, (Made, _Raw, Tensor)) or _is_fixed(v) for v in (*operands, *leaves)):
            self._look(operands, path)
            return
        raw = {id(o.tensor): o for o in operands if isinstance(o, _Raw)}
        results: list[Any] = []
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                results.append(leaf)
            elif id(leaf) in self._names or id(leaf) in raw:
                results.append(self._names.get(id(leaf), raw.get(id(leaf))))
            else:
                name = Made(len(self._events), i)
                self._names[id(leaf)], self._tensors[name] = name, leaf
                results.append(Kind.of(leaf))
        self._events.append(Step(callee, operands, tree, tuple(results), packing))

    def segments(self) -> list[Found]:
        """What was seen, the segment with the most work first; those of one block are none."""
        spans: list[tuple[int, int]] = []
        start: int | None = None
        for i, event in enumerate(self._events):
            if isinstance(event, Step) and event.is_block and start is None:
                start = i
            elif isinstance(event, _Look) and start is not None and any(m.step >= start for m in event.made):
                spans.append((start, i))
                start = None
        trimmed = [(a, 1 + max(i for i in range(a, b) if i in self._work and self._is_step(i))) for a, b in spans]
        made = [self._segment(a, b) for a, b in trimmed if sum(i in self._work for i in range(a, b)) > 1]
        return sorted(made, key=lambda f: -f.flops)

    def _is_step(self, i: int) -> bool:
        return isinstance(self._events[i], Step)

    def _segment(self, start: int, end: int) -> Found:
        steps = [i for i in range(start, end) if self._is_step(i)]
        place = {i: k for k, i in enumerate(steps)}
        cut = _Cut(self._model, place, self._tensors)
        made = [cut.step(self._events[i], self._arguments.get(i)) for i in steps]  # type: ignore[arg-type]
        later = self._events[end:]
        used = [m for e in later for m in (e.made if isinstance(e, _Look) else e.operands) if isinstance(m, Made)]
        outputs = dict.fromkeys(Made(place[m.step], m.leaf) for m in used if m.step in place)
        paths = {s.callee for s in made if s.is_block}
        before = sum(getattr(e, "path", getattr(e, "callee", "")) in paths for e in self._events[:start])
        segment = Segment(tuple(made), tuple(cut.names), tuple(cut.kinds), tuple(outputs), before)
        return Found(segment, tuple(cut.tensors), sum(self._work.get(i, 0) for i in steps))


def _is_fixed(value: Any) -> bool:
    parts = (value.start, value.stop, value.step) if isinstance(value, slice) else ()
    return isinstance(value, _FIXED) and not any(isinstance(v, Tensor) for v in parts)


class _Cut:
    """Takes steps out of a run: what they read of it becomes tensors from outside, with ``names`` and ``kinds``."""

    def __init__(self, model: nn.Module, place: Mapping[int, int], values: Mapping[Made, Tensor]) -> None:
        self.names: list[str] = []
        self.kinds: list[Kind] = []
        self.tensors: list[Tensor] = []
        self._place, self._values = place, values
        self._numbers: dict[int, int] = {}
        self._writes: dict[int, int | None] = {}
        held = (model.named_parameters(), model.named_buffers())
        self._weights = {id(t): name for table in held for name, t in table}

    def step(self, step: Step, names: Sequence[str] | None) -> Step:
        """``step`` with references into the segment."""
        told = names or [f"between.{len(self.names)}"] * len(step.operands)
        operands = tuple(map(self._leaf, step.operands, told))
        results = tuple(r if isinstance(r, Kind) else self._leaf(r, "") for r in step.results)
        return Step(step.callee, operands, step.arguments, results, step.packing)

    def _leaf(self, leaf: Any, name: str) -> Any:
        if isinstance(leaf, Made) and leaf.step in self._place:
            return Made(self._place[leaf.step], leaf.leaf)
        if not isinstance(leaf, (Made, _Raw)):
            return leaf
        tensor = self._values[leaf] if isinstance(leaf, Made) else leaf.tensor
        if id(tensor) in self._weights:
            return Weight(self._weights[id(tensor)])
        if isinstance(leaf, _Raw) and self._writes.setdefault(id(tensor), leaf.writes) != leaf.writes:
            raise CaptureError(f"forward writes into {name} between two blocks that read it")
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.names)
            self.names.append(name if name not in self.names else f"{name}.{len(self.names)}")
            self.kinds.append(Kind.of(tensor))
            self.tensors.append(tensor)
        return Given(self._numbers[id(tensor)])


def _names(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> list[str]:
    """A dotted name for each leaf of the arguments of a call, by the parameters of ``function``."""
    try:
        words = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        words = []
    paths = [path for path, _ in pytree.tree_flatten_with_path((args, dict(kwargs)))[0]]
    found = []
    for path in paths:
        first, *rest = path[1:]
        place = getattr(first, "idx", None)
        word = words[place] if place is not None and place < len(words) else dotted([first])
        found.append(dotted([pytree.MappingKey(word), *rest]))
    return found
