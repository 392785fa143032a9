"""Running a model aside: nothing is said, and no cache of a function keeps what a trace put into it."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import logging
import sys
import warnings
from collections.abc import Iterator

import torch

_CACHE = type(functools.lru_cache(lambda: None))
_FOREIGN = ("torch", "sympy")
"""Packages whose caches hold no tensors of a model."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides warnings, and what torch.export prints where tracing stops."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """What a model itself gives to torch.compile runs as it is written: compiled code is closed to who watches a run,
    and rounds otherwise."""
    if "torch._dynamo" not in sys.modules:  # so nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def forgetful() -> Iterator[None]:
    """What ``functools.lru_cache`` remembers from inside is forgotten: the tensors of a trace would be taken for tables
    by the next plain call of the model."""
    caches = [c for c in gc.get_referrers(_CACHE) if type(c) is _CACHE and not _is_foreign(c)]
    before = [c.cache_info().misses for c in caches]
    try:
        yield
    finally:
        for cache, misses in zip(caches, before, strict=True):
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def _is_foreign(cache: functools._lru_cache_wrapper[object]) -> bool:
    return str(getattr(cache, "__module__", "")).partition(".")[0] in _FOREIGN
