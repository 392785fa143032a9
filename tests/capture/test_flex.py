"""Higher-order operators: autocast regions and flex attention are plain operators in a Program."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.capture.use import run, same, take

aten = torch.ops.aten


class Attends(nn.Module):
    """Flex attention over 6 tokens with 4 query heads. ``groups``: query heads of a key head."""

    def __init__(self, bias: bool, mask: bool, groups: int = 1, strided: bool = False) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(16, 16), nn.Linear(16, 32 // groups)
        self.table = nn.Parameter(torch.randn(4, 6))
        self.bias, self.mask, self.groups, self.strided = bias, mask, groups, strided

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        q = self.q(x * t[:, None, None]).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(x + text).unflatten(-1, (2, 4 // self.groups, 4)).unbind(2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if not self.strided:
            q = q.contiguous()
        score = (lambda s, b, h, i, j: s * 2 + self.table[h, j] - (i - j).abs()) if self.bias else None
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 6, 6, device="cpu") if self.mask else None
        out = flex_attention(q, k, v, score, mask, enable_gqa=self.groups > 1)
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False, "mask": False},
        {"bias": True, "mask": False},
        {"bias": False, "mask": True},
        {"bias": True, "mask": True},
        {"bias": True, "mask": True, "groups": 2},
        {"bias": False, "mask": True, "strided": True},
    ],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_written_out_bit_for_bit(options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Attends(**options).eval()
        calls = [(torch.randn(2, 6, 16), torch.rand(2), torch.randn(2, 6, 16)) for _ in range(2)]
    c = take(model, *calls[0])
    assert c.notes == (
        "captured by torch.export",
        "1 flex_attention calls written out as the attention that PyTorch runs uncompiled",
    )
    assert sum(n.target is aten._safe_softmax.default for n in c.program.step.graph.nodes) == 1
    for call in calls:
        with torch.no_grad():
            want = model(*call)
        assert same(run(model, c, *call), want)


class Regions(nn.Module):
    """Each region changes the result: bfloat16 rounds, the inner one does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.a(x)
            with torch.autocast("cpu", enabled=False):
                z = self.b(y.float())
        with torch.no_grad():
            return z * t + y


def test_autocast_regions_are_their_operators_with_casts():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Regions().eval()
        x, t = torch.randn(2, 8), torch.rand(2, 1)
    c = take(model, x, t)
    types = [n.meta["val"].dtype for n in c.program.step.graph.nodes if n.target is aten.linear.default]
    assert types == [torch.bfloat16, torch.float32]
    assert len(c.program.functions) == 1
    with torch.no_grad():
        for a, b in ((x, t), (x * 3, t + 1)):
            assert same(run(model, c, a, b), model(a, b))


@functools.lru_cache
def table(length: int) -> Tensor:
    return torch.arange(length) * 0.5


class Remembers(nn.Module):
    """Keeps a table between calls in the cache of a function, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.line(x) * t + table(x.shape[-1])


def test_caches_of_functions_keep_nothing_of_a_trace():
    model, x, t = Remembers(), torch.randn(2, 4), torch.rand(2, 1)
    table.cache_clear()
    c = take(model, x, t)
    assert type(table(4)) is Tensor
    with torch.no_grad():
        assert same(run(model, c, x, t), model(x, t))
