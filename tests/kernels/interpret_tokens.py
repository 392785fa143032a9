"""Run by test_tokens.py with TRITON_INTERPRET=1: random calls, odd sizes among them, against the eager references."""

from __future__ import annotations

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton chooses between interpreting and compiling at its import"

import torch  # noqa: E402

from ditopt.codegen.triton import tokens as triton  # noqa: E402
from ditopt.ops.gather_tokens import reference as gather_reference  # noqa: E402
from ditopt.ops.scatter_tokens import reference as scatter_reference  # noqa: E402
from tests.codegen.test_tokens import case, strides  # noqa: E402

TRIALS = 40

ODD = [  # shape, dimension of tokens, of samples, start, tokens, chosen: layouts of models
    ((1, 1, 1), 1, 0, 0, 1, 1),
    ((2, 63, 70), 1, 0, 0, 63, 31),
    ((2, 3, 77, 17), 2, 0, 9, 63, 1),
    ((1, 1000, 5), 1, 0, 0, 1000, 333),
    ((70, 300), 0, -1, 7, 63, 32),
    ((2, 70, 2, 1, 33), 1, 0, 3, 63, 40),
]


def odd(shape, dim, batch, start, tokens, chosen):
    """Positions in a random order, a table that is the same for all samples, and a value with the heads inside."""
    samples = shape[batch] if batch >= 0 else 1
    index = torch.stack([torch.randperm(tokens)[:chosen] for _ in range(samples)])
    values = [torch.randn(shape), torch.randint(0, 99, shape, dtype=torch.int16)]
    values.append(torch.randn(shape).transpose(-1, -2).contiguous().transpose(-1, -2))
    if batch >= 0:
        values.append(torch.randn([1 if d == batch else n for d, n in enumerate(shape)]))
    k = len(values)
    return values, index, [dim] * k, [batch] * k, [start] * k, tokens


def compare(args) -> None:
    values, *where = args
    launches.clear()
    found = triton.gather_tokens(values, *where)
    for mine, wanted in zip(found, gather_reference(values, *where), strict=True):
        assert torch.equal(mine, wanted)
        assert strides(mine) == strides(wanted)
    index, _, batches, _, _ = where
    bases = [v.expand(*v.shape[:b], len(index), *v.shape[b + 1 :]).clone() if b >= 0 else v
             for v, b in zip(values, batches, strict=True)]  # fmt: skip
    rows = [r.flip(-1).contiguous() for r in found]
    for mine, wanted in zip(
        triton.scatter_tokens(bases, rows, *where), scatter_reference(bases, rows, *where), strict=True
    ):
        assert torch.equal(mine, wanted)
        assert strides(mine) == strides(wanted)


launches: list[int] = []


def counted(jobs, *args, **kwargs):
    launches.append(len(jobs))
    return launch(jobs, *args, **kwargs)


launch, triton._launch = triton._launch, counted

if __name__ == "__main__":
    torch.manual_seed(0)
    ran = 0
    for sizes in ODD:
        compare(odd(*sizes))
        assert len(launches) == 2, "the kernel, not its fallback"
    for trial in range(TRIALS):
        compare(case(trial, one=True))
        ran += len(launches)
    many = odd(*ODD[1])
    values, index, *more, tokens = many
    compare((values * 3, index, *(m * 3 for m in more), tokens))
    assert launches == [3 * len(values)] * 2
    assert ran > 1.8 * TRIALS, ran
    print(f"compared {len(ODD) + TRIALS + 1} cases")
