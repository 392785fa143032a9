"""Equal values leave the loop once: tables of positions that every block views, or computes, for itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ditopt

WIDTH, TOKENS, DEPTH = 16, 6, 3


class Block(nn.Module):
    """Attention with rotary positions. ``own``: makes its table itself, of frequencies that it writes down; else of a
    buffer where it has one, and else it takes what it is given."""

    def __init__(self, own: bool, buffer: bool) -> None:
        super().__init__()
        self.own = own
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mod = nn.Linear(WIDTH, 2 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        if buffer:
            self.register_buffer("freq", torch.tensor([1.0, 0.1, 0.01, 0.001]))

    def forward(self, x, c, ids, table):
        if self.own or hasattr(self, "freq"):
            freq = torch.tensor([1.0, 0.1, 0.01, 0.001]) if self.own else self.freq
            table = angles(ids, freq)
        scale, gate = self.mod(F.silu(c)).unsqueeze(1).chunk(2, -1)
        q, k, v = self.qkv(x * (1 + scale)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(rotated(q, table), rotated(k, table), v)
        x = x + gate * self.out(a.transpose(1, 2).flatten(2))
        return x + gate * self.down(F.gelu(self.up(x)))


def angles(ids, freq):
    at = torch.outer(ids.float(), freq)
    return at.cos().repeat(1, 2), at.sin().repeat(1, 2)


def rotated(x, table):
    cos, sin = (t[None, None] for t in table)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Rotary(nn.Module):
    def __init__(self, own: bool = False, buffer: bool = False) -> None:
        super().__init__()
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block(own, buffer) for _ in range(DEPTH))

    def forward(self, hidden_states, timestep, ids):
        c = self.time(timestep[:, None])
        table = angles(ids, torch.tensor([1.0, 0.1, 0.01, 0.001]))
        for block in self.blocks:
            hidden_states = block(hidden_states, c, ids, table)
        return hidden_states


def call():
    g = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, TOKENS, WIDTH, generator=g),
        "timestep": torch.tensor([0.7, 0.7]),
        "ids": torch.arange(TOKENS),
    }


@pytest.mark.parametrize(
    ("options", "tables"),
    [
        ({}, 2),  # a cosine and a sine, however many blocks view them, for queries and for keys
        ({"own": True}, 2),
        ({"buffer": True}, 2 * DEPTH),  # of three buffers, each of which may be written to
    ],
    ids=["given", "own", "buffer"],
)
def test_one_memo_for_equal_tables(options, tables):
    torch.manual_seed(0)
    model = Rotary(**options).eval()
    fast = ditopt.optimize(
        model, "outline_blocks, hoist_invariants", target="eager", example_inputs=call(), roles={"ids": "shape"}
    )
    (last,) = [h for h in fast.history if h.name == "hoist_invariants"]
    read = [n.meta["val"].shape[-2:] for n in last.program.step.placeholders if n.meta["formal"].kind == "memo"]
    assert read.count((TOKENS, WIDTH // 2)) == tables
    assert sum("compute what others compute" in note for note in last.notes) == 1
    assert len({r.function for r in last.program.blocks()}) == 1
    given = call()
    for t in (0.7, 0.4):
        given["timestep"] = torch.full((2,), t)
        assert torch.equal(fast(**given), model(**given))


def test_a_buffer_that_is_written_to_is_its_own():
    torch.manual_seed(0)
    model = Rotary(buffer=True).eval()
    fast = ditopt.optimize(
        model, "outline_blocks, hoist_invariants", target="eager", example_inputs=call(), roles={"ids": "shape"}
    )
    before = fast(**call())
    model.get_buffer("blocks.1.freq").mul_(2)
    fast.reset()
    assert torch.equal(fast(**call()), model(**call()))
    assert not torch.equal(fast(**call()), before)
