"""What the tests of pipelines share: results of plain and of fresh pipelines, each made once."""

import functools

import ditopt
from tests.diffusers.tiny import make, run

FORA, FORECAST = "fora{interval=3}", "forecast{interval=2,order=1}"


class Stop(Exception):
    """What a test raises to cancel a request."""


@functools.cache
def plain(name, **request):
    """The pipeline itself."""
    return run(make(name), name, **request)


@functools.cache
def shared(name, recipe):
    """An optimized pipeline that many tests use one after the other: none of them may change what the next one sees."""
    return ditopt.optimize(make(name), recipe, target="eager")


@functools.cache
def fresh(name, recipe, **request):
    """What a new process gives."""
    return run(ditopt.optimize(make(name), recipe, target="eager"), name, **request)


def computed(denoiser):
    """By guidance branch: the steps that computed, and the number of calls, in the last request."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for row in denoiser.schedule_rows:
        steps, calls = found.setdefault(row.branch, ([], []))
        calls.append(row.step)
        if "compute" in row.choices.values():
            steps.append(row.step)
    assert all(calls == sorted(set(calls)) for _, calls in found.values())
    return {branch: (steps, len(calls)) for branch, (steps, calls) in found.items()}
