"""A hand-made plan and a sampling loop for it, for the tests of the Session."""

from collections import Counter

import torch

from ditopt.artifact import Manifest, Plan, StepGraph, Update
from ditopt.ir.program import Decision, Formal, Input, Interval, Memo, Predictor, StateSlot, TensorType
from ditopt.runtime.policy import table

SHAPE = (2, 3)
WEIGHT = torch.tensor(0.7)


def F(kind, *refs):
    return [Formal(kind, ref) for ref in refs]


def body(x, t, p, w):
    """What the cache skips."""
    return torch.sin(w * x + t.mean() * 0.01) + p.mean()


def make(interval=None, predictor=None, *, steps=0, memo=False, rows=1, weight=None, fail=None, state_out=None):
    """y = body(x, t, p, w) + 0.1 x, with the body cached; ``memo`` hoists w * p.mean() and a table over t."""
    predictor = predictor or Predictor("taylor", 1)
    n = predictor.order + 1
    slots = tuple(f"c.{i}" for i in range(n))
    weight = WEIGHT.clone() if weight is None else weight
    shape = (SHAPE[0] * rows, SHAPE[1])
    calls: Counter[str] = Counter()

    def full(args):
        calls["full"] += 1
        if fail and fail():
            raise RuntimeError("out of memory")
        x, t, p, w, *rest = args
        value = body(x, t, p, w)
        if memo:
            value = value + rest[0] + rest[1]
        return [value + 0.1 * x, value]

    def reuse(args):
        calls["reuse"] += 1
        if fail and fail():
            raise RuntimeError("out of memory")
        x, weights, *values = args
        assert weights.dtype == torch.float32
        assert weights.shape == (n,)
        return [sum(w * v for w, v in zip(weights, values, strict=True)) + 0.1 * x]

    def hoisted(args):
        calls["hoisted"] += 1
        p, w = args
        return [w * p.mean()]

    def tabled(args):
        calls["tabled"] += 1
        return [args[0].mean() * args[1]]

    memos = (
        Memo("h", "hoisted", ("p",), ("h.0",), "request"),
        Memo("k", "tabled", ("t",), ("k.0",), "schedule"),
    )
    updates = tuple([Update("c.0", output=1)] + [Update(f"c.{i}", source=f"c.{i - 1}") for i in range(1, n)])
    manifest = Manifest(
        inputs=(
            Input("x", "latent", TensorType(torch.float32, shape)),
            Input("t", "timestep", TensorType(torch.float32, (1,))),
            Input("p", "prompt", TensorType(torch.float32, (4,))),
        ),
        outputs=("y",),
        state=tuple(StateSlot(s, TensorType(torch.float32, shape)) for s in slots),
        decisions=(Decision("cache", ("blocks.0",), interval or Interval(3, 2), predictor, (slots,), "cache.weights"),),
        memos=memos if memo else (),
        graphs=(
            StepGraph(
                "full",
                {"cache": "compute"},
                tuple(F("input", "x", "t", "p") + F("param", "w") + (F("memo", "h.0", "k.0") if memo else [])),
                1,
                updates,
                flops=10,
                block_flops=8,
            ),
            StepGraph(
                "reuse",
                {"cache": "reuse"},
                tuple(F("input", "x") + F("control", "cache.weights") + F("state", *slots)),
                1,
                flops=2,
            ),
        ),
        memo_graphs=(
            StepGraph("hoisted", {}, tuple(F("input", "p") + F("param", "w")), 1, flops=1),
            StepGraph("tabled", {}, tuple(F("input", "t") + F("param", "w")), 1, flops=1),
        ),
        full_flops=10,
        full_block_flops=8,
        steps=steps,
    )
    run = {"full": full, "reuse": reuse, "hoisted": hoisted, "tabled": tabled}
    plan = Plan(manifest, run, lambda: {"w": weight})
    return plan, calls


PROMPT, NEGATIVE = torch.arange(4.0), -torch.ones(4)


def sample(session, plan, times=range(900, 0, -100), prompts=(PROMPT,), seed=0, stop=None, hook=False, again=False):
    """A sampling loop with guidance in separate calls; -> the latents after each step. ``hook``: as a scheduler that
    was patched would; ``again``: prompts are made again each step; ``stop``: cancelled after so many steps."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    if hook:
        session.begin(len(times), list(times))
    trace = []
    for i, t in enumerate(times):
        if i == stop:
            break
        outs = [session.call(plan, [x, torch.tensor([float(t)]), p.clone() if again else p])[0] for p in prompts]
        x = x - 0.05 * outs[0] - sum(0.02 * o for o in outs[1:])
        if hook:
            session.advance(i)
        trace.append(x)
    return trace


def choices(session, branch=0):
    return [r.choices["cache"] for r in session.schedule_rows if r.branch == branch]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def expected(plan, steps):
    return [r.choices["cache"] for r in table(plan.manifest.decisions, steps)]
