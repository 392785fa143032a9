"""Golden text: what each pass makes of a small program, as a file to read and to review.

A file holds ``# RUN: <recipe>`` (``# RUN within <error>: <recipe>`` for one that rounds), a program, ``# ----``, the
program after the recipe (``# unchanged`` where it is), and what the last pass said: ``# applied: n`` and
``# refused: <sentence>`` lines. ``pytest --update-golden`` rewrites the second half of each; a new file needs the RUN
line and a program.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from ditopt import pipeline
from ditopt.ir.interpret import random_inputs, run_program
from ditopt.ir.program import Program
from ditopt.ir.text import parse_program, print_program
from ditopt.pipeline import PassManager

FILES = sorted(Path(__file__).parent.glob("*.txt"))
RUN, CUT = "# RUN: ", "# ----\n"
_WITHIN = re.compile(r"# RUN within ([\d.]+): ")
_PARAM = re.compile(r'Param\("([^"]+)", f32\[([\d, ]*)\]\)')


def parse(text: str, constants: Mapping[str, torch.Tensor] | None = None) -> Program:
    """The program of a text, with made-up weights, and with the ``constants`` that a pass made."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn([int(s) for s in shape.split(",") if s.strip()], generator=generator) * 0.4
        for name, shape in _PARAM.findall(text)
    }
    return parse_program(text, {**(constants or {}), **tensors})


def read(path: Path) -> tuple[str, str, str]:
    """Recipe, program before, and what is expected."""
    first, _, rest = path.read_text().partition("\n")
    first = _WITHIN.sub(RUN, first)
    assert first.startswith(RUN), f"{path.name} begins with {RUN}<recipe>"
    before, _, expected = rest.partition(CUT)
    return first.removeprefix(RUN), before, expected


def expected_of(recipe: str, before: Program) -> str:
    last = PassManager(recipe).run(before)[-1]
    after = print_program(last.program) if last.applied else "# unchanged\n"
    return after + f"# applied: {last.applied}\n" + "".join(f"# refused: {s}\n" for s in last.refused)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden(path, request):
    recipe, text, expected = read(path)
    before = parse(text)
    assert print_program(before) == text, "the first half must be a program as ditopt prints it"
    found = expected_of(recipe, before)
    if request.config.getoption("--update-golden"):
        first, _, _ = path.read_text().partition("\n")
        path.write_text(f"{first}\n{text}{CUT}{found}")
        return
    assert found == expected, f"{path.name} differs; if that is meant: pytest --update-golden {Path(__file__).name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_both_halves_compute_the_same(path):
    """Undecided, every program here computes what it did before; what rounds is as far off as its file says."""
    within = _WITHIN.match(path.read_text())
    recipe, text, expected = read(path)
    before = parse(text)
    program = re.sub(r"^# (applied|refused): .*\n", "", expected, flags=re.M)
    after = before if program.startswith("# unchanged") else parse(program, PassManager(recipe).run(before)[-1].program.params)
    inputs = random_inputs(before)
    (a,), (b,) = run_program(before, inputs)[0], run_program(after, inputs)[0]
    assert a.isfinite().all()
    assert a.abs().max() > 0
    if within is None:
        assert torch.equal(a, b)
    else:
        assert 0 < (a - b).norm() / a.norm() < float(within[1])


def test_every_pass_has_a_file_where_it_applies_and_one_where_it_refuses():
    said: dict[str, set[bool]] = {name: set() for name in pipeline.names()}
    for path in FILES:
        recipe, _, expected = read(path)
        said[re.split(r"[{,]", recipe)[0]].add("# applied: 0\n" not in expected)
    missing = [name for name, kinds in said.items() if kinds != {True, False}]
    assert not missing, f"write tests/passes/{missing[0]}*.txt"


def test_the_runner_sees_a_difference():
    recipe, text, expected = read(Path(__file__).with_name("cache_run.txt"))
    assert expected_of(recipe, parse(text)) == expected
    assert expected_of("cache{region=model}", parse(text)) != expected
    assert expected_of(recipe, parse(text.replace("aten.gelu", "aten.silu"))) != expected
