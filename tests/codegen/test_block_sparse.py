"""ditopt::block_sparse_attention and ditopt::select_blocks against dense masked softmax, written out in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ditopt.ops import block_sparse_attention, select_blocks
from ditopt.ops.block_sparse_attention import blocks, reference, reference_lse

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def oracle(q, k, v, index, count, mask, scale, block_q, block_k, dense_q, dense_k):
    n, m, layout = q.shape[-2], k.shape[-2], q.shape[:-2]
    seen = torch.zeros(*layout, n, m, dtype=torch.bool)
    seen[..., : dense_q[0], :] = True
    seen[..., n - dense_q[1] :, :] = True
    seen[..., :, : dense_k[0]] = True
    seen[..., :, m - dense_k[1] :] = True
    lists = index.expand(*layout, *index.shape[-2:])
    counts = None if count is None else count.expand(*layout, index.shape[-2])
    for b in itertools.product(*map(range, layout)):
        for i in range(index.shape[-2]):
            length = lists.shape[-1] if counts is None else int(counts[b][i])
            for j in lists[b][i][:length].tolist():
                rows = slice(dense_q[0] + i * block_q, min(dense_q[0] + (i + 1) * block_q, n - dense_q[1]))
                keys = slice(dense_k[0] + j * block_k, min(dense_k[0] + (j + 1) * block_k, m - dense_k[1]))
                seen[b][rows, keys] = True
    scores = q.double() @ k.double().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    scores = scores.masked_fill(~seen, -math.inf)
    return torch.softmax(scores, -1).nan_to_num(0) @ v.double(), torch.logsumexp(scores, -1)


def case(trial):
    g = torch.Generator().manual_seed(trial)

    def number(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=g))

    layout = [(2, 3), (4,), (1, 2)][trial % 3]
    ends = [(number(0, 5), number(0, 5)) if trial % 2 else (0, 0) for _ in range(2)]
    n, m = (number(1, 70) + sum(e) for e in ends)
    block_q, block_k = [(16, 16), (8, 16), (32, 8)][trial % 3]
    nq, nk = blocks(n, ends[0], block_q), blocks(m, ends[1], block_k)
    batch = [(), layout, (1,) * (len(layout) - 1) + layout[-1:]][trial % 3]
    length = number(1, nk)
    index = torch.rand(*batch, nq, nk, generator=g).argsort(-1)[..., :length].int()
    count = torch.randint(0, length + 1, (*batch, nq), generator=g).int() if trial % 4 == 1 else None
    dtype = [F32, BF16, F16][trial % 3 if trial > 20 else 0]
    q, k, v = (torch.randn(*layout, r, c, generator=g).to(dtype) for r, c in ((n, 8), (m, 8), (m, 12)))
    if trial % 5 == 0 and len(layout) == 2:  # as models have it: (batch, tokens, heads, channels) in memory
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    mask = [None, torch.rand(1, m, generator=g) > 0.3, torch.randn(1, m, generator=g).to(dtype)][trial % 3]
    return q, k, v, index, count, mask, None if trial % 5 else 0.3, block_q, block_k, *ends


@pytest.mark.parametrize("trial", range(40))
def test_random_lists(trial):
    args = case(trial)
    out, lse = reference(*args), reference_lse(*args)
    expected, logs = oracle(*args)
    within = {F32: 3e-6, F16: 4e-3, BF16: 3e-2}[args[0].dtype]
    assert out.shape == expected.shape
    assert out.is_contiguous()
    assert (out - expected).abs().max() < within
    assert (lse[0] - expected).abs().max() < within
    assert torch.allclose(lse[1].double(), logs, atol=1e-4)
    assert lse[1].dtype is F32


@pytest.mark.parametrize("tokens", [1, 63, 1000])
def test_full_lists_are_dense_attention(tokens):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, tokens, 16) for _ in range(3))
    count = blocks(tokens, (0, 0), 16)
    index = torch.arange(count, dtype=torch.int32).expand(count, count)
    out = block_sparse_attention(q, k, v, index, block_q=16, block_k=16)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert (out - dense).abs().max() < 1e-6


def test_parts_are_merged_by_their_lse():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 64, 8) for _ in range(3))
    halves = [torch.tensor([[a, b]], dtype=torch.int32).expand(4, 2) for a, b in ((0, 3), (2, 1))]
    parts = [reference_lse(q, k, v, i, block_q=16, block_k=16) for i in halves]
    total = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(o * (s - total).exp().unsqueeze(-1) for o, s in parts)
    assert (merged - torch.nn.functional.scaled_dot_product_attention(q, k, v)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"index": torch.zeros(3, 2, dtype=torch.int32)}, "a row for each block of queries"),
        ({"index": torch.zeros(4, 2, dtype=torch.int64)}, "index is int32"),
        ({"count": torch.zeros(2, dtype=torch.int32)}, "a number for each block of queries"),
        ({"mask": torch.ones(64, 64, dtype=torch.bool)}, "a mask of keys broadcasts"),
        ({"key": torch.zeros(2, 64, 9)}, "takes"),
        ({"dense_q": [32, 32]}, "nothing to cut"),
    ],
)
def test_operands_that_do_not_fit(change, said):
    given = {name: torch.zeros(2, 64, 8) for name in ("query", "key", "value")}
    given |= {"index": torch.zeros(4, 2, dtype=torch.int32), "block_q": 16, "block_k": 16} | change
    with pytest.raises(ValueError, match=said):
        block_sparse_attention(**given)


def draft_of(q, k, block, d):
    """The draft, with averages over what there is of each block."""
    pooled = [
        torch.stack([x[..., i : i + block, :].mean(-2) for i in range(0, x.shape[-2], block)], -2) for x in (q, k)
    ]
    return torch.softmax(pooled[0] @ pooled[1].transpose(-1, -2) * d**-0.5, -1)


def test_topk_of_each_row_in_the_order_of_the_keys():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 70, 8), torch.randn(2, 3, 90, 8)
    index, count = select_blocks(q, k, 2, 16, 16, [0, 0], [0, 0])
    expected = draft_of(q, k, 16, 8).topk(2, -1).indices.sort(-1).values
    assert torch.equal(index.long(), expected)
    assert (count == 2).all()


def test_topp_stops_where_the_share_is_held():
    torch.manual_seed(0)
    q, k = torch.randn(2, 64, 8) * 3, torch.randn(2, 96, 8) * 3
    index, count = select_blocks(q, k, 6, 16, 16, [0, 0], [0, 0], "topp", 0.7)
    draft = draft_of(q, k, 16, 8)
    for b, i in itertools.product(range(2), range(4)):
        held = draft[b, i][index[b, i].long()].cumsum(0)
        c = int(count[b, i])
        assert held[c - 1] >= 0.7 - 1e-6
        assert c == 1 or held[c - 2] < 0.7 + 1e-6
    assert len(set(count.flatten().tolist())) > 1


def test_head_takes_the_best_entries_of_all_rows():
    torch.manual_seed(0)
    q, k = torch.randn(2, 64, 8) * 3, torch.randn(2, 96, 8) * 3
    index, count = select_blocks(q, k, 6, 16, 16, [0, 0], [0, 0], "head", 0.25)
    draft = draft_of(q, k, 16, 8)
    for b in range(2):
        least = draft[b].flatten().sort(descending=True).values[round(0.25 * 24) - 1]
        for i in range(4):
            kept = set((draft[b, i] >= least).nonzero().flatten().tolist()) or {int(draft[b, i].argmax())}
            assert set(index[b, i, : int(count[b, i])].tolist()) == kept


def test_dense_ends_are_no_part_of_the_draft():
    torch.manual_seed(0)
    q, k = torch.randn(1, 70, 8), torch.randn(1, 70, 8)
    inside = select_blocks(q[:, 4:-2], k[:, 4:-2], 2, 16, 16, [0, 0], [0, 0])
    whole = select_blocks(q, k, 2, 16, 16, [4, 2], [4, 2])
    assert all(torch.equal(a, b) for a, b in zip(inside, whole, strict=True))
