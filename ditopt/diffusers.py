"""Pipelines: the denoisers replaced in place, and the scheduler's own word for steps and requests.

Any object with ``components`` and ``scheduler`` is a pipeline here. ``set_timesteps`` and ``step`` of the scheduler
*instance* are shadowed: the first announces a request and its times, the second the end of a step. A copy of a hooked
scheduler is a plain one; a scheduler that the user puts in its place is hooked when a denoiser is called next.

A recipe may change the pace of the sampler (ditopt/pacing.py): then the times are exchanged within ``set_timesteps``,
and the scheduler has its own again when the last step ends, when a call of the denoiser fails, and with ``restore``.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ditopt.capture import arguments_of, bind
from ditopt.engine import Engine
from ditopt.errors import BadInput
from ditopt.ir.program import Role
from ditopt.offload import foreign_hooks, loaded, move_hook
from ditopt.optimized import OptimizedModule
from ditopt.pacing import Pacer, early, pace_of
from ditopt.recipe import Recipe
from ditopt.release import Release
from ditopt.roles import is_time
from ditopt.runtime.session import Session

_HOOKED = ("set_timesteps", "step", "__getstate__")
_AROUND = ("encoder", "controlnet", "vae", "adapter")  # words in the names of components that take a time as well


def optimize_pipeline(
    pipe: Any,
    recipe: Recipe | str = "lossless",
    *,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    steps: int | None = None,
    target: str = "auto",
    roles: Mapping[str, Role] | None = None,
    release: Release = "keep",
    make: Callable[..., Engine] = Engine,
    dynamic: bool | None = None,
) -> Any:
    """Replace every denoiser of ``pipe`` by its optimized form and hook the scheduler; returns ``pipe``.

    Arguments are those of ``ditopt.optimize``; ``example_inputs`` are those of one call of the first denoiser (others
    of its class take them too); ``make`` is called as ``Engine`` is. After any error the pipeline is as it was.
    """
    found = denoisers(pipe)
    engines: dict[int, Engine] = {}
    for name, model in found.items():
        _refuse_hooks(name, model)
        with loaded(model):
            engine = engines[id(model)] = make(model, recipe, target, steps, roles, release=release, dynamic=dynamic)
            if example_inputs is not None and type(model) is type(next(iter(found.values()))):
                engine.prepare(*bind(model, *arguments_of(example_inputs)))
    link = _Link(pipe)
    modules = {key: Denoiser(engine, link) for key, engine in engines.items()}
    link.sessions = [engine.session for engine in engines.values()]
    link.pace = next((pace_of(engine.recipe) for engine in engines.values()), ())
    early(getattr(pipe, "scheduler", None), link.pace)
    for engine in engines.values():
        engine.scheduler = lambda: getattr(link.pipe(), "scheduler", None)
    try:
        link.attach(getattr(pipe, "scheduler", None))
        for name, model in found.items():
            move_hook(model, modules[id(model)])
            _put(pipe, name, modules[id(model)])
    except BaseException:
        for model in found.values():
            move_hook(modules[id(model)], model)
        for name, model in found.items():
            _put(pipe, name, model)
        for engine in engines.values():
            engine.shelves.restore()
        link.close()
        raise
    return pipe


def restore_pipeline(pipe: Any) -> Any:
    """Undo ``optimize_pipeline``: the denoisers themselves and the scheduler's own methods are back; returns ``pipe``.

    Offload hooks installed meanwhile stay. A pipeline that is not optimized is returned as it is.
    """
    links = {id(link): link for link in _links(getattr(pipe, "scheduler", None)) if link.pipe() is pipe}
    for name, module in pipe.components.items():
        if isinstance(module, OptimizedModule):
            # Another pipeline may have taken this one's components: what belongs to the first stays with it.
            link = module.link if isinstance(module, Denoiser) else None
            if link is None or link.pipe() in (None, pipe):
                move_hook(module, module.original)
            if link is not None and link.pipe() in (None, pipe):
                links[id(link)] = link
            module.engine.shelves.restore()
            _put(pipe, name, module.original)
    for link in links.values():
        link.close()
    return pipe


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The components that the loop calls, by name, the main one first. BadInput where there is none, or one is
    optimized already."""
    modules = {name: c for name, c in pipe.components.items() if isinstance(c, nn.Module)}
    optimized = [name for name, c in modules.items() if isinstance(c, OptimizedModule)]
    if optimized:
        raise BadInput(
            f"component {optimized[0]!r} of this pipeline is optimized already; call ditopt.restore(pipe) first, "
            "then ditopt.optimize with the recipe that you want"
        )
    named = [n for n in modules if "transformer" in n or "unet" in n]
    # A few pipelines call theirs otherwise; what takes a time is in the loop, except what conditions the denoiser.
    timed = [n for n, m in modules.items() if _takes_time(m) and not any(word in n for word in _AROUND)]
    names = sorted(named or timed, key=lambda n: (n != "transformer", n != "unet", n))
    if not names:
        listed = ", ".join(f"{n} ({type(c).__name__})" for n, c in pipe.components.items())
        raise BadInput(
            f"no denoiser was found in this {type(pipe).__name__}; its components are {listed}. Optimize the model "
            "itself with ditopt.optimize(model) and put it into the pipeline"
        )
    return {name: modules[name] for name in names}


class Denoiser(OptimizedModule):
    """The OptimizedModule of a pipeline. ``link``: what it knows of the pipeline."""

    def __init__(self, engine: Engine, link: _Link) -> None:
        super().__init__(engine)
        self.__dict__["link"] = link

    def _step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        _refuse_hooks("the denoiser", self.original)
        self.link.follow(kwargs)
        try:
            return super()._step(args, kwargs)
        except BaseException:
            self.link.suspend()
            raise


class _Link:
    """A pipeline (held weakly), the sessions of its denoisers, and the schedulers that were hooked for them."""

    def __init__(self, pipe: Any) -> None:
        self.pipe: Callable[[], Any] = weakref.ref(pipe)
        self.sessions: list[Session] = []
        self.pace: tuple[float, ...] = ()
        self._hooks: list[weakref.ref[_Hook]] = []
        self._closed = False

    def attach(self, scheduler: Any) -> _Hook | None:
        """The hook of ``scheduler``, telling these sessions too; None where it has no methods to hook."""
        if not hasattr(scheduler, "set_timesteps") or not hasattr(scheduler, "__dict__"):
            return None
        hook = _hook_of(scheduler) or _Hook(scheduler)
        if any(link.pace != self.pace for link in hook.links):
            raise BadInput(
                "this scheduler is shared with another optimized pipeline, whose recipe changes its steps otherwise "
                "(rescale_steps); give one of them its own: type(scheduler).from_config(scheduler.config)"
            )
        if self not in hook.links:
            hook.links.append(self)
            self._hooks.append(weakref.ref(hook))
        return hook

    def follow(self, call: Mapping[str, Any]) -> None:
        """A denoiser is called with the arguments ``call``: hook a scheduler that is new, and see where the loop
        starts in its times."""
        scheduler = getattr(self.pipe(), "scheduler", None)
        if self._closed or scheduler is None:
            return
        hook = _hook_of(scheduler)
        if hook is None or self not in hook.links:
            hook = self.attach(scheduler)
            if hook is not None and self.pace:
                raise BadInput(
                    "this pipeline's scheduler was exchanged after ditopt.optimize, too late to change the steps of "
                    "the running request as the recipe asks (rescale_steps); run the request again"
                )
            if hook is not None and getattr(scheduler, "num_inference_steps", None):
                hook.begin()  # its set_timesteps was called while nobody listened
        if hook is not None:
            hook.start(call)

    def suspend(self) -> None:
        """A call of a denoiser failed: schedulers have their own times, until a call follows."""
        for hook in filter(None, (reference() for reference in self._hooks)):
            hook.pacer.suspend()

    def close(self) -> None:
        """Tell the sessions nothing any more; schedulers that nobody listens to get their own methods back."""
        self._closed = True
        for reference in self._hooks:
            hook = reference()
            if hook is not None:
                hook.leave(self)


class _Hook:
    """Shadows the methods of one scheduler instance and tells the sessions of ``links``."""

    def __init__(self, scheduler: Any) -> None:
        self.links: list[_Link] = []
        self._scheduler = scheduler
        self.pacer = Pacer(scheduler)
        self._start = 0  # index in the scheduler's times of the loop's first step
        self._index: int | None = None  # the step that ended last
        self._total: int | None = None  # number of the scheduler's times; None: no request is announced
        self._called = False
        self._before = {name: vars(scheduler)[name] for name in _HOOKED if name in vars(scheduler)}
        self._install()

    def _install(self) -> None:
        scheduler = self._scheduler
        own = {name: getattr(scheduler, name) for name in _HOOKED if hasattr(scheduler, name)}

        # Plain functions on purpose: deepcopy of the scheduler's __dict__ (pipelines do that) leaves them as they are.
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            result = own["set_timesteps"](*args, **kwargs)
            self.begin()
            return result

        def step(*args: Any, **kwargs: Any) -> Any:
            result = own["step"](*args, **kwargs)
            self._finished(args[1] if len(args) > 1 else kwargs.get("timestep"))
            return result

        def getstate() -> Any:
            # copy, deepcopy and pickle ask this: a method of the copy that runs on the original would be wrong
            state = own["__getstate__"]()
            if isinstance(state, dict):
                state = {k: v for k, v in state.items() if getattr(v, "ditopt_hook", None) is None}
            return state

        for name, function in zip(_HOOKED, (set_timesteps, step, getstate), strict=True):
            if name in own:
                shadow: Any = functools.wraps(own[name])(function)  # pipelines inspect signatures
                shadow.ditopt_hook = self
                vars(scheduler)[name] = shadow

    def leave(self, link: _Link) -> None:
        """``link`` listens no more; with the last one the methods are the scheduler's own again."""
        self.links = [other for other in self.links if other is not link]
        held = vars(self._scheduler)
        if not self.links:
            self.pacer.end()
        for name in _HOOKED if not self.links else ():
            # where somebody wrapped the shadow meanwhile it stays, and tells nobody
            if getattr(held.get(name), "ditopt_hook", None) is self:
                del held[name]
                if name in self._before:
                    held[name] = self._before[name]

    def begin(self) -> None:
        """The scheduler has its times: a request begins."""
        self._total = None
        self.pacer.begin(self.links[0].pace if self.links else ())
        times = getattr(self._scheduler, "timesteps", None)
        self._start, self._index, self._called = 0, None, False
        self._total = len(times) if times is not None else None
        self._announce(times)

    def _announce(self, times: Any) -> None:
        for session in self._sessions():
            if self._total:
                session.begin(timesteps=times)
            else:
                session.close_request()

    def start(self, call: Mapping[str, Any]) -> None:
        """The first call of a request may lie inside the scheduler's times (image to image): the request has the
        steps that remain."""
        self.pacer.resume()
        if self._called or not self._total:
            return
        self._called = True
        scheduler = self._scheduler
        if hasattr(scheduler, "begin_index"):
            first = scheduler.begin_index
        else:
            times = [v for name, v in call.items() if is_time(name) and isinstance(v, (int, float, Tensor))]
            first = self._find(times[0]) if times else None
        if isinstance(first, int) and 0 < first < self._total:
            self._start = first
            self._announce(scheduler.timesteps[first:])

    def _finished(self, time: Any) -> None:
        """The scheduler's step at ``time`` ended."""
        if not self._total:
            return
        following = getattr(self._scheduler, "step_index", None)
        if isinstance(following, int):
            index = following - 1
        else:
            index = (self._find(time) or 0) if self._index is None else self._index + 1
        self._index = index
        last = index + 1 >= self._total
        if last:
            self._total = None
            self.pacer.end()
        for session in self._sessions():
            session.advance(max(index - self._start, 0))
            if last:
                session.close_request()  # frees the state now, not when the next request begins

    def _find(self, time: Any) -> int | None:
        """Index of a time in the scheduler's times, where it is one of them."""
        value = float(time.detach().double().max()) if isinstance(time, Tensor) and time.numel() else time
        times = self._scheduler.timesteps
        times = times.tolist() if isinstance(times, Tensor) else [float(t) for t in times]  # one read of a device
        return times.index(value) if value in times else None

    def _sessions(self) -> list[Session]:
        return [session for link in self.links for session in link.sessions]


def _hook_of(scheduler: Any) -> _Hook | None:
    held = getattr(scheduler, "__dict__", {})
    return next((h for n in _HOOKED if (h := getattr(held.get(n), "ditopt_hook", None)) is not None), None)


def _links(scheduler: Any) -> list[_Link]:
    hook = _hook_of(scheduler)
    return list(hook.links) if hook is not None else []


def _put(pipe: Any, name: str, module: nn.Module) -> None:
    """Set a component without the pipeline's own bookkeeping, which would write the class into its config."""
    if name in vars(pipe):
        vars(pipe)[name] = module
    else:
        setattr(pipe, name, module)


def _refuse_hooks(name: str, model: nn.Module) -> None:
    hooks = foreign_hooks(model)
    if hooks:
        raise BadInput(
            f"{name} carries hooks of diffusers ({', '.join(hooks)}) around its modules, which a compiled step cannot "
            "run; take them off first (disable_cache() for a cache; ditopt's recipes cache by themselves)"
        )


def _takes_time(model: nn.Module) -> bool:
    return any(is_time(name) for name in inspect.signature(model.forward).parameters)
