"""Forward around a segment: the model's own Python runs, and its run of blocks is handed to somebody else.

The modules of the segment are called by forward as ever, and compute nothing. What they return is a ``Deferred``: a
tensor without values, which knows its shape. When the last call of the segment comes, all that it reads from outside is
known; the segment is run at once (by ``step``), and the rest of forward goes on with its results. Each call is compared
with the one that the segment has in its place; the first one that differs stops forward with ``Off``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ditopt._torch import DisableTorchFunctionSubclass, pytree, valueless
from ditopt.capture import where
from ditopt.capture.flat import arguments_of_call, shared_copy
from ditopt.capture.held import renew
from ditopt.capture.segment import Given, Kind, Made, Part, Segment, Step, Weight
from ditopt.capture.spec import CallSpec

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""The tensors that a segment reads from outside, in order -> its outputs."""


class Off(BaseException):
    """Forward does not do what the segment says; ``line`` is " at file:line (code)". No Exception, because the model's
    own code may catch those."""

    def __init__(self, line: str) -> None:
        super().__init__(line)
        self.line = line


class Deferred(Tensor):
    """A tensor of a segment that is yet to be run. ``value``: itself, once it is known."""

    owner: _Follower | None
    value: Tensor | None

    @staticmethod
    def of(kind: Kind, owner: _Follower | None = None) -> Deferred:
        made: Deferred = valueless(Deferred, kind.shape, kind.stride, kind.dtype, kind.device)
        made.owner, made.value = owner, None
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Deferred(shape={tuple(self.shape)}, dtype={self.dtype})"  # debuggers ask

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        owner = next(v.owner for v in pytree.tree_leaves((tuple(args), named)) if isinstance(v, Deferred))
        if owner is None:
            raise Off("")
        return owner.function(func, tuple(args), named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given, named = pytree.tree_map_only(Deferred, known, (tuple(args), dict(kwargs or {})))
        return func(*given, **named)


def known(tensor: Deferred) -> Tensor:
    """The values of a tensor of a segment. Off where it has not run, or does not give them."""
    if tensor.value is None:
        raise Off(where.of_caller())
    return tensor.value


def describes(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> tuple[bool, Any]:
    """Whether what ``func`` returns is told by the types of its tensors alone (a shape, a device), and what it is.
    Tensors of which no value is to be read are Deferred."""
    with DisableTorchFunctionSubclass():
        try:
            found = func(*args, **kwargs)
        except (Exception, Off):
            return False, None
    return not any(isinstance(v, Tensor) for v in pytree.tree_leaves(found)), found


class Around:
    """``model``, called by its own convention, with ``segment`` run by whoever calls. ``line``: " at file:line (code)"
    of what keeps all of forward from being a graph; ``kept``: attributes in which the model keeps what it made, which
    here it makes anew in each call; ``flops``: of a call outside of the segment."""

    def __init__(self, model: nn.Module, segment: Segment, line: str = "", kept: Sequence[str] = ()) -> None:
        self.segment, self.line, self.flops = segment, line, 0
        self._model, self._twin = model, shared_copy(model).eval()
        self._kept, self._fresh = kept, shared_copy(model) if kept else model
        self._pairs = list(zip(self._twin.modules(), model.modules(), strict=True))
        self._follower: _Follower | None = None
        self._plain = {path: self._twin.get_submodule(path).forward for path in segment.paths}
        for path in segment.paths:
            self._place(path, self._twin.get_submodule(path))

    def _place(self, path: str, module: nn.Module) -> None:
        def forward(*args: Any, **kwargs: Any) -> Any:
            assert self._follower is not None
            return self._follower.block(path, args, kwargs)

        module.forward = forward

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any], run: Run) -> Any:
        """One call of the model. Off where forward goes another way than the segment's."""
        follower = _Follower(self._twin, self.segment, self._plain, run)
        out = self._follow(follower, args, kwargs)
        if not follower.done:
            raise Off(", where it returns before its blocks have all run")
        return pytree.tree_map_only(Deferred, known, out)

    def call_flat(self, spec: CallSpec, tensors: Sequence[Tensor], run: Run) -> Any:
        """The same for flat tensors."""
        return self.call(*arguments_of_call(self._model, spec.unflatten(tensors)), run)

    def entries(self, spec: CallSpec, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
        """What the segment would read from outside in a call, by number, as far as forward goes its way. No block
        runs."""

        def stop(_: Sequence[Tensor]) -> Sequence[Tensor]:
            raise Off("")

        follower = _Follower(self._twin, self.segment, self._plain, stop)
        with contextlib.suppress(Off, Exception):  # tensors that nobody chose may be none of the model's
            self._follow(follower, *arguments_of_call(self._model, spec.unflatten(tensors)))
        return follower.given

    def _follow(self, follower: _Follower, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        for twin, live in self._pairs:
            twin.__dict__["_parameters"] = live._parameters  # as they are now; what is exchanged is seen
            twin.__dict__["_buffers"] = dict(live._buffers)  # the copy may keep tables of its own in them
        renew(self._twin, self._fresh, self._kept)
        self._follower = follower
        try:
            with torch.no_grad():
                return self._twin(*args, **kwargs)
        finally:
            self._follower = None
            follower.release()


class _Follower:
    """One call of a model, compared with a segment on the way."""

    def __init__(self, model: nn.Module, segment: Segment, plain: Mapping[str, Callable[..., Any]], run: Run) -> None:
        self._model, self._segment, self._plain, self._run = model, segment, plain, run
        self._skip = segment.before
        self._at = 0
        self._given: dict[int, tuple[Tensor, int | None]] = {}
        self._made: dict[Made, Deferred] = {}

    @property
    def given(self) -> dict[int, Tensor]:
        """The tensors from outside that are known, by number."""
        return {i: t for i, (t, _) in self._given.items()}

    def release(self) -> None:
        """The call is over: tensors without values, which know their follower, would keep all of its tensors alive."""
        self._made.clear()

    @property
    def done(self) -> bool:
        """Whether the segment has run."""
        return self._at == len(self._segment.steps)

    def block(self, path: str, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Forward calls the module at ``path``."""
        if self._skip or self.done:
            self._skip = max(self._skip - 1, 0)
            given, named = pytree.tree_map_only(Deferred, known, (args, dict(kwargs)))
            return self._plain[path](*given, **named)
        step = self._segment.steps[self._at]
        if step.callee != path or not self._matches(step, args, kwargs):
            raise Off(where.of_caller())
        return self._advance(step)

    def function(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Forward calls a function of torch on tensors of the segment."""
        if self.done and all(
            v.value is not None for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Deferred)
        ):
            given, named = pytree.tree_map_only(Deferred, known, (args, dict(kwargs)))
            return func(*given, **named)
        if not self.done:
            step = self._segment.steps[self._at]
            if step.callee == func and self._matches(step, args, kwargs):
                return self._advance(step)
        told, answer = describes(func, args, kwargs)
        if told:
            return answer
        raise Off(where.of_caller())

    def _matches(self, step: Step, args: Any, kwargs: Mapping[str, Any]) -> bool:
        leaves, tree = pytree.tree_flatten((args, dict(kwargs)))
        return tree == step.arguments and all(map(self._is, leaves, step.operands))

    def _is(self, leaf: Any, operand: Any) -> bool:
        if isinstance(operand, Made):
            return leaf is self._made[operand]
        if isinstance(operand, Weight):
            path, _, name = operand.name.rpartition(".")
            return leaf is getattr(self._model.get_submodule(path), name)
        if isinstance(operand, Part):
            return leaf is self._model.get_submodule(operand.path)
        if not isinstance(operand, Given):
            return type(leaf) is type(operand) and bool(leaf == operand)
        if operand.index in self._given:
            return leaf is self._given[operand.index][0]
        fits = (
            isinstance(leaf, Tensor)
            and not isinstance(leaf, Deferred)
            and self._segment.kinds[operand.index].fits(leaf)
        )
        if fits:
            self._given[operand.index] = leaf, writes(leaf)
        return fits

    def _advance(self, step: Step) -> Any:
        index, self._at = self._at, self._at + 1
        leaves = [self._result(r, Made(index, i)) for i, r in enumerate(step.results)]
        if self.done:
            self._settle()
            leaves = [v.value if isinstance(v, Deferred) and v.value is not None else v for v in leaves]
        return pytree.tree_unflatten(leaves, step.packing)

    def _result(self, result: Any, name: Made) -> Any:
        if isinstance(result, Kind):
            self._made[name] = Deferred.of(result, self)
            return self._made[name]
        if isinstance(result, Made):
            return self._made[result]
        return self._given[result.index][0] if isinstance(result, Given) else result

    def _settle(self) -> None:
        """All is known that the segment reads: run it."""
        if any(writes(t) != before for t, before in self._given.values()):
            raise Off(", which writes into what its blocks read")
        results = self._run([self._given[i][0] for i in range(len(self._segment.kinds))])
        for name, value in zip(self._segment.outputs, results, strict=True):
            self._made[name].value = value


def writes(tensor: Tensor) -> int | None:
    """How often ``tensor`` was written into; None where nobody counts."""
    return None if tensor.is_inference() else tensor._version
