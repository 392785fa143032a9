"""The module that ``optimize`` returns: it stands where the model stood, and every step goes through the engine."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditopt.engine import Compiled, Engine
from ditopt.errors import BadInput, DitoptWarning
from ditopt.forwarding import calls_forward
from ditopt.ir.program import Program
from ditopt.offload import HOOKED, loaded
from ditopt.pipeline import PassResult
from ditopt.release import Shelves
from ditopt.runtime.account import Row, Stats
from ditopt.runtime.session import Session

if TYPE_CHECKING:
    from ditopt.kernels import Observed

_WHY = (
    "ditopt.optimize compiles by itself: a step counter or a timestep read inside a traced forward would recompile "
    "each step"
)

_OFFLOADED = (
    "the weights of this model are offloaded module by module, and a compiled step needs all of them at once: they are "
    "loaded together for each step; enable_model_cpu_offload() needs no more memory and is faster"
)


_OWN = frozenset([*vars(nn.Module()), *HOOKED])
"""Attributes that are set on the optimized model, and not on the original."""


class OptimizedModule(nn.Module):
    """A drop-in for the model: same weights (shared, not copied), same attributes, same calling convention. Its methods
    that call ``forward`` (``forward_with_cfg``) call the optimized one; what they or a user set, the model is set.

    ``history`` lists what each pass did, ``stats`` what ran. ``original`` is the model itself, untouched. Gradients are
    not recorded. Steps, requests and guidance branches are recognised as ARCHITECTURE describes: from the scheduler of
    a pipeline, from ``session(steps=...)``, else from the timesteps and prompts of the calls.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        model = engine.model
        # one set of weights: modules, parameters and buffers are the model's own dictionaries
        for shared in ("_modules", "_parameters", "_buffers"):
            self.__dict__[shared] = model.__dict__[shared]
        self.__dict__["training"] = False
        self.__dict__["original"] = model
        self.__dict__["engine"] = engine
        self.__dict__["_told"] = False

        @functools.wraps(model.forward)  # pipelines inspect the signature of forward
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._step(args, kwargs)

        # here and not on the class: torch.compiler.disable imports Dynamo, which is slow and imports triton
        self.__dict__["forward"] = torch.compiler.disable(forward, recursive=True, reason=_WHY)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__:  # copy and pickle ask before there are any attributes
                raise
            original = self.__dict__["original"]
            value = getattr(original, name)
            if getattr(value, "__self__", None) is original and calls_forward(type(original), value.__func__):
                return value.__func__.__get__(self)
            return value

    def __setattr__(self, name: str, value: Any) -> None:
        if "original" not in self.__dict__ or name in self.__dict__ or name in _OWN:
            super().__setattr__(name, value)
        else:
            setattr(self.__dict__["original"], name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ or name in _OWN:
            super().__delattr__(name)
        else:
            delattr(self.__dict__["original"], name)

    def _step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with loaded(self.original) as offloaded:
            if offloaded and not self._told:
                self.__dict__["_told"] = True
                warnings.warn(_OFFLOADED, DitoptWarning, stacklevel=2)
            return self.engine(args, kwargs)

    def to(self, *args: Any, **kwargs: Any) -> OptimizedModule:
        """Moves or casts the model in its own way. A later step on another device or dtype is a SessionError."""
        self.original.to(*args, **kwargs)
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: says so."""
        warnings.warn(f"compile() has no effect here. {_WHY}", DitoptWarning, stacklevel=2)

    def train(self, mode: bool = True) -> OptimizedModule:
        """An optimized model only runs inference; BadInput for ``mode=True``."""
        if mode:
            raise BadInput("an optimized model cannot be trained; train the original (ditopt.restore gives it back)")
        return self

    # -- requests --------------------------------------------------------------------------------------------------

    def session(
        self, steps: int | None = None, timesteps: Sequence[float] | Tensor | None = None
    ) -> AbstractContextManager[Session]:
        """The calls inside ``with fast.session(steps=50):`` are one request."""
        return self.engine.session.open(steps, timesteps)

    def reset(self) -> None:
        """What follows is a new request."""
        self.engine.session.reset()

    def refresh(self) -> None:
        """Capture the model again at the next call (after its modules were exchanged)."""
        self.engine.refresh()

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Calls inside belong to the guidance branch ``name``; the model's own cache context is entered too."""
        with ExitStack() as stack:
            own = getattr(self.original, "cache_context", None)
            if own is not None:
                stack.enter_context(own(name, **where))
            stack.enter_context(self.engine.session.context(name))
            yield

    # -- what happened ---------------------------------------------------------------------------------------------

    @property
    def compiled(self) -> Compiled:
        """The signature used last; BadInput before the first call without example inputs."""
        last = self.engine.last
        if last is None:
            raise BadInput("nothing is captured yet: pass example_inputs to ditopt.optimize, or call the model once")
        return last

    @property
    def history(self) -> tuple[PassResult, ...]:
        """What each pass did to the signature used last."""
        return self.compiled.history

    @property
    def program(self) -> Program:
        """The final Program of the signature used last."""
        return self.compiled.program

    @property
    def stats(self) -> Stats:
        """Calls, reuses and executed FLOPs since optimize."""
        return self.engine.session.stats

    def integer_share(self, *args: Any, **kwargs: Any) -> Observed:
        """Run one step with these arguments and say which share of the quantized layers' FLOPs ran in integer kernels,
        by the engine's own profile (``.share``; printable, with what is missing and why). The running request is
        forgotten. Reports made later show it."""
        from ditopt.kernels import observe

        return observe(self, *args, **kwargs)

    @property
    def schedule_rows(self) -> list[Row]:
        """What ran in the running, else in the last request."""
        return self.engine.session.schedule_rows

    @property
    def release(self) -> Shelves:
        """The weights that left memory: how many bytes, how often they came in, how long that took (printable)."""
        return self.engine.shelves

    def report(self, path: str | Path) -> Path:
        """Write a self-contained HTML page of passes, schedule, costs and refusals; its path."""
        from ditopt.report import write

        return write(self, Path(path))

    def __repr__(self) -> str:
        name, recipe, target = type(self.original).__name__, str(self.engine.recipe), self.engine.target
        return f"OptimizedModule({name}, recipe={recipe!r}, target={target!r})"
