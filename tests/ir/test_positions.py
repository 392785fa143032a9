"""The grid of packed tokens, from the positions that come with the call: ids or rotary tables, of whatever name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt.capture import bind, capture
from ditopt.errors import VerifyError
from ditopt.ir.program import Program, Raster
from ditopt.ir.regions import describe
from ditopt.ir.text import parse_program, print_program
from ditopt.ir.verify import verify
from ditopt.pipeline import Context, PassManager
from tests.foreign.positions import JointDiT, joint_call
from tests.test_structure import anonymous
from tests.tiny_models import ZOO, Plain, noise


def positions(*sizes: int) -> Tensor:
    return torch.cartesian_prod(torch.zeros(1), *(torch.arange(float(n)) for n in sizes))


def flat(model: nn.Module, call: Mapping[str, Any]) -> tuple[Program, dict[str, Tensor]]:
    spec, tensors = bind(model, (), call)
    return capture(model, spec, tensors).program, dict(zip(spec.names, tensors, strict=True))


def found(program: Program, given: Mapping[str, Tensor], recipe: str = "outline_blocks") -> Program:
    return PassManager(recipe, Context(given=given)).run(program)[-1].program


def grids(program: Program) -> set[tuple[int, ...]]:
    """The grids of the streams of the latent in all blocks."""
    return {s.grid for b in program.blocks() for s in b.streams if s.made_of == "latent"}


def joined() -> dict[str, Any]:
    call = joint_call(0, 0)
    assert isinstance(call, dict)
    return call


class Tabled(nn.Module):
    """Packed tokens, and cosines and sines for them as two inputs; ``late`` adds them to the tokens instead."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.inner, self.pack, self.late = Plain(depth=2), nn.Linear(4, 32), late

    def forward(self, x: Tensor, t: Tensor, rotary: list[Tensor]) -> Tensor:
        c = t[:, None].expand(-1, 32) * 1e-3
        h: Tensor = self.pack(x)
        for block in self.inner.blocks:
            turned = h + rotary[0] if self.late else h * rotary[0] + h.roll(1, -1) * rotary[1]
            h = block(turned, c)
        out: Tensor = self.inner.head(h)
        return out


def tabled(rotary: list[Tensor]) -> dict[str, Any]:
    return {"x": torch.randn(2, len(rotary[0]), 4), "t": torch.tensor([3.0, 500.0]), "rotary": rotary}


def rotary(*sizes: int) -> list[Tensor]:
    angles = (positions(*sizes)[:, 1:, None] * 1e-2 ** (torch.arange(16) / 16)).flatten(1)
    return [angles.cos(), angles.sin()]


def test_ids_beside_packed_tokens_show_their_grid():
    call = ZOO["flux"].inputs()
    program, given = flat(ZOO["flux"].model(), call)
    assert grids(found(program, {})) == {()}
    outlined = found(program, given)
    rasters = {s.raster for b in outlined.blocks() for s in b.streams if s.made_of == "latent"}
    assert rasters == {Raster("img_ids", 0, 0, (4, 4))}
    assert grids(outlined) == {(4, 4)}, "in the double blocks and behind the text of the single ones"
    assert {s.grid for b in outlined.blocks() for s in b.streams if s.made_of == "prompt"} == {()}


@pytest.mark.parametrize("sizes", [(5, 6), (2, 3, 5)])
def test_a_model_written_otherwise(sizes):
    call = joined() | {"img_ids": positions(*sizes)[:, -3:].expand(2, -1, -1)}
    assert grids(found(*flat(noise(JointDiT()), call))) == {sizes}


@pytest.mark.parametrize("late", [False, True])
def test_rotary_tables_show_it_too(late):
    assert grids(found(*flat(noise(Tabled(late)), tabled(rotary(5, 6))))) == {(5, 6)}


@pytest.mark.parametrize("name", ["flux", "joint"])
def test_no_name_is_read(name):
    model, call = (ZOO["flux"].model(), ZOO["flux"].inputs()) if name == "flux" else (noise(JointDiT()), joined())
    program, given = flat(model, call)
    nameless = {f"a{i}": given[item.name] for i, item in enumerate(program.inputs)}
    outlined = found(anonymous(program), nameless)
    assert grids(outlined) == {(4, 4) if name == "flux" else (5, 6)}
    assert {s.raster.source[0] for b in outlined.blocks() for s in b.streams if s.raster} == {"a"}


WITHOUT = {
    "in another order": positions(4, 4)[torch.tensor([*range(8), *range(15, 7, -1)])],
    "all alike": torch.zeros(16, 3),
    "one after the other": torch.arange(16.0)[:, None].expand(-1, 3).contiguous(),
}


@pytest.mark.parametrize("name", list(WITHOUT))
def test_other_positions_show_none(name):
    assert grids(found(*flat(ZOO["flux"].model(), ZOO["flux"].inputs() | {"img_ids": WITHOUT[name]}))) == {()}


class Stirred(Tabled):
    """The table is turned round before it meets the tokens."""

    def forward(self, x: Tensor, t: Tensor, rotary: list[Tensor]) -> Tensor:
        return super().forward(x, t, [r.flip(0) for r in rotary])


class Twice(Tabled):
    """Two tables that tell different things."""

    def forward(self, x: Tensor, t: Tensor, rotary: list[Tensor]) -> Tensor:
        return super().forward(x + rotary[2].mean(1, keepdim=True) * rotary[2][:, :4], t, rotary)


class Part(Tabled):
    """Of a longer table only the first rows are used: which ones, the graph does not tell."""

    def forward(self, x: Tensor, t: Tensor, rotary: list[Tensor]) -> Tensor:
        return super().forward(x, t, [r[: x.shape[1]] for r in rotary])


def test_what_the_graph_does_not_show_is_not_claimed():
    assert grids(found(*flat(noise(Stirred()), tabled(rotary(5, 6))))) == {()}
    assert grids(found(*flat(noise(Twice()), tabled([*rotary(5, 6), *rotary(3, 10)])))) == {()}
    longer = tabled(rotary(5, 6)) | {"rotary": rotary(8, 6)}
    assert grids(found(*flat(noise(Part()), longer))) == {()}


def test_the_grid_stays_when_the_positions_have_left_the_loop():
    program, given = flat(ZOO["flux"].model(), ZOO["flux"].inputs())
    hoisted = found(program, given, "recognize_attention, outline_blocks, hoist_invariants")
    assert not any(str(n.meta["formal"].ref) == "img_ids" for n in hoisted.step.placeholders)
    assert grids(describe(hoisted)) == {(4, 4)}


def test_it_prints_and_parses_and_is_verified():
    program, given = flat(ZOO["flux"].model(), ZOO["flux"].inputs())
    outlined = found(program, given)
    relying = outlined.relying([s.raster for s in outlined.blocks()[0].streams])
    text = print_program(relying)
    assert 'raster=Raster("img_ids", axis=0, start=0, grid=[4, 4])' in text
    assert parse_program(text, relying.params) == relying
    verify(relying)
    assert relying.relying([None, *relying.relies]).relies == relying.relies
    (raster,) = relying.relies
    for wrong in ({"source": "ids"}, {"axis": 2}, {"start": 3}, {"grid": (5, 4)}):
        with pytest.raises(VerifyError, match=r"relies: (there is no input|positions)"):
            verify(outlined.relying([dataclasses.replace(raster, **wrong)]))
