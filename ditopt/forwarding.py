"""Which methods of a model lead to its ``forward``: those run the optimized one when an optimized model is asked."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from torch import nn


def calls_forward(cls: type, method: Callable[..., Any]) -> bool:
    """Whether ``method``, a function of ``cls``, names ``forward`` in its code, calls ``self``, or names a method of
    ``cls`` that does. One that calls ``super()`` does not count: its ``self`` must be an instance of ``cls``."""
    return _leads(cls, method, frozenset())


@functools.lru_cache(maxsize=1024)
def _leads(cls: type, method: Callable[..., Any], seen: frozenset[str]) -> bool:
    code = getattr(inspect.unwrap(method), "__code__", None)
    if code is None or "__class__" in code.co_freevars:
        return False
    names = set(_names(code))
    if "forward" in names or any(_calls(code, first) for first in code.co_varnames[:1]):
        return True
    others = {n: f for n in names - seen if n not in vars(nn.Module) and inspect.isfunction(f := getattr(cls, n, None))}
    return any(_leads(cls, f, seen | {*others}) for f in others.values())


def _calls(code: CodeType, name: str) -> bool:
    """Whether code, or a function inside it, calls its variable ``name``: what is called is loaded beside the empty
    slot of a call without self."""
    steps = [(i.opname, i.argval) for i in dis.get_instructions(code) if i.opname != "CACHE"]
    for before, (loads, of), after in zip([("", None), *steps], steps, [*steps[1:], ("", None)], strict=False):
        if of == name and loads.startswith(("LOAD_FAST", "LOAD_DEREF")):
            # the slot comes after it from Python 3.13 on
            empty = after if sys.version_info >= (3, 13) else before
            if empty[0] == "PUSH_NULL" and after[0] != "LOAD_ATTR":
                return True
    return any(_calls(inner, name) for inner in code.co_consts if isinstance(inner, CodeType))


def _names(code: CodeType) -> Iterator[str]:
    """The attributes and globals that code names, and the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
