"""Whether a captured signature fits a call beyond its shapes, and what is said when one does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ditopt.capture import CallSpec, Guard
from ditopt.errors import DitoptWarning
from ditopt.runtime.same import Known


class Valid:
    """The verdicts of a guard, remembered by the tensors that it reads: it runs once a prompt, not once a step."""

    def __init__(self, guard: Guard | None, params: Callable[[], Mapping[str, Tensor]]) -> None:
        self._guard = guard
        self._params = params
        self._known = Known(8)
        self._broken: dict[int, str] = {}

    def broken(self, given: Mapping[str, Tensor]) -> str:
        """What is another than in the captured signature for these inputs by name, in words, or ""."""
        if self._guard is None:
            return ""
        args = self._guard.arguments(given, self._params())
        self._known.doubt()  # requests are not told apart here: memory whose writes nobody counts is compared
        number = self._known.find(args)
        if number is None:
            number = self._known.add(args)
            self._broken = {n: b for n, b in self._broken.items() if n in self._known}
            self._broken[number] = self._guard.broken(args)
        return self._broken[number]


def notice(spec: CallSpec, before: Sequence[CallSpec], broken: str, way: str | None = None) -> None:
    """A DitoptWarning where a call is captured again for a reason that its author may not see: ``way`` says where
    forward goes another way around its blocks, ``broken`` what is another, or a list of ``spec`` has another length
    than in the newest of ``before``."""
    if way is not None:
        warnings.warn(
            f"the model is captured again: around its blocks forward does other things{way} than in the calls captured "
            "so far; each way has a graph of its own, and caches that start empty",
            DitoptWarning,
            stacklevel=6,
        )
    elif broken:
        warnings.warn(
            f"the model is captured again: {broken}; each value has a graph of its own",
            DitoptWarning,
            stacklevel=6,
        )
    elif before:
        then, now = before[-1].lengths(), spec.lengths()
        for name in then.keys() & now.keys():
            if then[name] != now[name]:
                warnings.warn(
                    f"the model is captured again: the list {name} has {now[name]} entries and had {then[name]}; each "
                    "length has a graph of its own",
                    DitoptWarning,
                    stacklevel=6,
                )
