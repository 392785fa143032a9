"""What mixes tokens and what routes them: attention stays attention, experts are an MLP."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditopt.capture import bind, capture
from ditopt.ir.program import Program
from ditopt.pipeline import PassManager
from tests.denoisers import REGISTRY
from tests.foreign import ZOO
from tests.foreign.base import randn, sinusoid

WIDTH, TOKENS, EXPERTS = 16, 12, 4


class Soft(nn.Module):
    """Every expert counts, by a softmax: no choice is made."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * WIDTH) * WIDTH**-0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH) * WIDTH**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("bnd,edh->bneh", x, self.up))
        return torch.einsum("bneh,ehd,bne->bnd", hidden, self.down, self.router(x).softmax(dim=-1))


class SoftByMatmul(Soft):
    """The same by a product of matrices for each token."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("bnd,edh->bneh", x, self.up))
        outputs = torch.einsum("bneh,ehd->bned", hidden, self.down)
        return (self.router(x).softmax(dim=-1).unsqueeze(-2) @ outputs).squeeze(-2)


class Attention(nn.Module):
    """Softmax written out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(self.attend(q, k, v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)).softmax(dim=-1) @ v


class TopKeys(Attention):
    """Each query attends to the keys with the largest scores: a choice, and attention all the same."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2)
        least = scores.topk(4, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < least, -torch.inf).softmax(dim=-1) @ v


class Kernel(Attention):
    """Linear attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.relu(), k.relu()
        return q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(dim=-2, keepdim=True).transpose(-1, -2) + 1e-4)


class Bare(Attention):
    """No layer makes queries and keys, so no axis is known to be the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x @ x.transpose(-1, -2)).softmax(dim=-1) @ x)


class Block(nn.Module):
    def __init__(self, inner: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.inner = Attention(), inner()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.inner(self.norm2(x))


class Model(nn.Module):
    def __init__(self, inner: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(inner) for _ in range(2))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        x = self.embed(latents) + self.time(sinusoid(timestep, WIDTH))[:, None]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def outlined(model: nn.Module, *args: object, **kwargs: object) -> Program:
    spec, tensors = bind(model, args, kwargs)
    return PassManager("outline_blocks").run(capture(model, spec, tensors).program)[-1].program


def flops_by_role(program: Program) -> dict[str, int]:
    """Of the first block."""
    return {r.role: r.flops for r in program.regions if r.parent == "blocks.0" and r.role != "mod"}


@pytest.mark.parametrize("inner", [Soft, SoftByMatmul])
def test_experts_that_all_count_are_an_mlp(inner):
    program = outlined(Model(inner).eval(), randn(2, TOKENS, 4, seed=0), torch.tensor([500.0, 500.0]))
    assert len(program.blocks()) == 2
    roles = flops_by_role(program)
    assert list(roles) == ["attn", "mlp"]
    projections, scores = 2 * 2 * TOKENS * WIDTH * 4 * WIDTH, 2 * 2 * 2 * TOKENS * TOKENS * WIDTH
    assert roles["attn"] == projections + scores


@pytest.mark.parametrize("inner", [Attention, TopKeys, Kernel, Bare])
def test_attention_is_no_mlp(inner):
    """A block of two attentions: where the second one counted as routing it would have an MLP."""
    program = outlined(Model(inner).eval(), randn(2, TOKENS, 4, seed=0), torch.tensor([500.0, 500.0]))
    roles = {r.role for r in program.regions if r.parent in {b.id for b in program.blocks()}}
    assert roles == {"attn"}


@pytest.mark.parametrize("name", ["moe_dense", "moe_capacity"])
def test_chosen_experts_are_an_mlp(name):
    foreign = ZOO[name]
    call = foreign.call(0, 0)
    assert isinstance(call, dict)
    program = outlined(foreign.model(), **call)
    assert len(program.blocks()) == foreign.blocks
    for block in program.blocks():
        assert [r.role for r in program.regions if r.parent == block.id] == ["attn", "mlp", "mod"]
    roles = flops_by_role(program)
    assert roles["mlp"] > 2 * roles["attn"], "experts cost more than attention here"


def test_experts_that_python_chose_are_an_mlp():
    model, call = REGISTRY["nucleus_moe"].build()
    program = outlined(model, **call)
    assert len(program.blocks()) == 4
    for block in program.blocks():
        assert [r.role for r in program.regions if r.parent == block.id] == ["attn", "mlp", "mod"]
