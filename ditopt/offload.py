"""CPU offload as accelerate installs it: hooks around ``forward`` that bring weights to the device and take them away.

A graph runs the whole model at once and never calls a submodule's ``forward``. Therefore the hook of a model moves to
the module that stands in its place, weights that hooks of submodules keep away are brought for the time of a call, and
copies made for capture carry no hook. accelerate itself is never imported: its hooks are found on the modules.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

from torch import nn

from ditopt.errors import BadInput

HOOKED = ("forward", "_hf_hook", "_old_forward", "_diffusers_hook")
"""What a hook of accelerate or diffusers puts on the module that it surrounds."""


def move_hook(source: nn.Module, target: nn.Module) -> None:
    """The hook around ``source.forward`` surrounds ``target.forward`` from now on. Nothing happens without a hook.

    The hook's own set-up does not run again: it would take the weights' present place for their original one.
    """
    if "_hf_hook" not in vars(source):
        return
    around = vars(source).get("forward")
    if not isinstance(around, functools.partial):
        raise BadInput(
            f"the offload hook of this {type(source).__name__} is of an unknown kind; call pipe.remove_all_hooks(), "
            "then ditopt.optimize, then enable the offload again"
        )
    hook = vars(source)["_hf_hook"]
    _unpatch(source)
    plain = target.forward
    vars(target).update(
        _hf_hook=hook,
        _old_forward=plain,
        forward=functools.update_wrapper(functools.partial(around.func, target), plain),
    )


def _unpatch(module: nn.Module) -> None:
    """Take the hook off ``module`` without telling it."""
    held = vars(module)
    held.pop("_hf_hook", None)
    old = held.pop("_old_forward", None)
    held.pop("forward", None)
    if old is not None and not (isinstance(old, MethodType) and old.__func__ is type(module).forward):
        held["forward"] = old


def keep_shared(model: nn.Module) -> dict[int, Any]:
    """Entries for the memo of ``copy.deepcopy``: hooks hold copies of weights and other models, which stay shared."""
    return {id(vars(m)["_hf_hook"]): vars(m)["_hf_hook"] for m in model.modules() if "_hf_hook" in vars(m)}


def strip(model: nn.Module) -> None:
    """Take all hooks off a copy of a model."""
    for module in model.modules():
        if "_hf_hook" in vars(module):
            _unpatch(module)


@contextmanager
def loaded(model: nn.Module) -> Iterator[bool]:
    """Weights that hooks of modules keep away are in place inside the block: all at once, which takes the memory of
    the whole model. Gives whether there are any."""
    found = [(m, h) for m in model.modules() if "_hf_hook" in vars(m) for h in _offloading(vars(m)["_hf_hook"])]
    with ExitStack() as stack:
        for module, hook in found:
            stack.callback(hook.post_forward, module, None)
            hook.pre_forward(module)
        yield bool(found)


def _offloading(hook: Any) -> list[Any]:
    """The hooks among those chained in ``hook`` that keep weights away."""
    return [h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "offload", False) is True]


def foreign_hooks(model: nn.Module) -> list[str]:
    """The hooks of diffusers (caches, group offload, layerwise casting) on a model, which a graph cannot contain."""
    names: dict[str, None] = {}
    for module in model.modules():
        registry = vars(module).get("_diffusers_hook")
        names.update(dict.fromkeys(getattr(registry, "hooks", None) or ()))
    return list(names)
