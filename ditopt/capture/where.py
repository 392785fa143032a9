"""Which line of a model something happened at."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from types import FrameType

_FOREIGN = ("/torch/", "/ditopt/capture/", "<")
"""Parts of file names that are not the model's own code."""


def of_error(error: BaseException) -> str:
    """ " at file:line (code)" of the innermost line of the model that an error passed through, or ""."""
    return _words(traceback.extract_tb(error.__traceback__))


def of_trace(text: str) -> str:
    """The same of a stack trace as text (``node.meta["stack_trace"]``)."""
    lines = [line.strip() for line in text.splitlines()]
    for head, code in zip(reversed(lines[:-1]), reversed(lines[1:]), strict=True):
        if head.startswith('File "') and _own(head.split('"')[1]):
            return f" at {head.split(chr(34))[1]}:{head.split('line ')[1].split(',')[0]} ({code})"
    return ""


def of_caller() -> str:
    """The same of the line of the model that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _own(frame.f_code.co_filename):
        frame = frame.f_back
    return _words(traceback.StackSummary.extract(iter([(frame, frame.f_lineno)]))) if frame is not None else ""


def module_of_caller(paths: Mapping[int, str]) -> str:
    """The path of the innermost module that is running; ``paths`` by id. "" where none is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = paths.get(id(frame.f_locals.get("self"))) if "self" in frame.f_code.co_varnames else None
        if path is not None:
            return path
        frame = frame.f_back
    return ""


def _own(filename: str) -> bool:
    return not any(part in filename for part in _FOREIGN)


def _words(frames: traceback.StackSummary) -> str:
    own = [f for f in frames if _own(f.filename)]
    return f" at {own[-1].filename}:{own[-1].lineno} ({(own[-1].line or '').strip()})" if own else ""
