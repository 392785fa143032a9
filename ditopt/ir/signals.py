"""Signals: numbers by which the host decides, as a few nodes in the step.

Each is a function that writes its number, float32 (1,), into the entry and says whether it is known before the decision
(the step's probe computes it) or is left for the next steps. A new signal is one function here, under its name in
``SIGNALS``. Relative L1 throughout: mean|a - b| / mean|b|, over all elements, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ditopt.errors import RecipeError
from ditopt.ir.edit import Editor
from ditopt.ir.program import Predictor, TensorType
from ditopt.ir.reuse import Reuse, guess, predict

aten = torch.ops.aten

EPS = 1e-8


@dataclass(frozen=True)
class Site:
    """Where a signal is measured; nodes are editable, None where the region has no such value.

    ``base``: the latent stream that enters the region; ``start``: the same stream before the first block;
    ``modulated``: makes what the first block's first layer reads; ``latent``, ``output``: the model's, ``output`` as
    computed; ``kept``: of each value of the latent's stream that the cache keeps, what was computed and its slots;
    ``predictor``: of ``forecast``; ``blocks``: how many the model has.
    """

    e: Editor
    reuse: Reuse
    base: fx.Node | None
    start: fx.Node | None
    modulated: Callable[[], fx.Node | None]
    latent: fx.Node | None
    output: fx.Node | None
    kept: Sequence[tuple[fx.Node, Sequence[Sequence[fx.Node]]]]
    predictor: Predictor
    blocks: int


@dataclass(frozen=True)
class Signal:
    """``node``: the number. ``lag``: a step leaves it for later ones, ``when`` it computes or always. ``slots``,
    ``weights``: of the forecast whose error it is."""

    node: fx.Node
    lag: bool = False
    when: Literal["always", "computed"] = "always"
    slots: tuple[str, ...] = ()
    weights: str = ""


def relative(e: Editor, a: fx.Node, b: fx.Node) -> fx.Node:
    """mean|a - b| / mean|b|, float32 (1,)."""
    return e.op(aten.div.Tensor, _mean(e, e.op(aten.sub.Tensor, _wide(e, a), _wide(e, b))), _mean(e, _wide(e, b)))


def _wide(e: Editor, a: fx.Node) -> fx.Node:
    return a if a.meta["val"].dtype is torch.float32 else e.op(aten._to_copy.default, a, dtype=torch.float32)


def _mean(e: Editor, a: fx.Node) -> fx.Node:
    """mean|a| + EPS, shape (1,)."""
    mean = e.op(aten.mean.default, e.op(aten.abs.default, a))
    return e.op(aten.view.default, e.op(aten.add.Tensor, mean, EPS), [1])


def _needed(node: fx.Node | None, what: str) -> fx.Node:
    if node is None:
        raise RecipeError(what)
    return node


def residual(s: Site) -> Signal:
    """First-block caching: how far what the blocks in front of the region add is from what they added when all was
    computed last."""
    front = (
        "signal=residual needs a block in front of the region: start it at blocks.1 or later (it starts at the first "
        f"of {s.blocks})"
    )
    base, start = _needed(s.base, front), _needed(s.start, front)
    now = s.e.op(aten.sub.Tensor, base, start)
    seen = s.reuse.slot("seen", now.meta["val"])
    s.reuse.update(seen, now, "computed")
    return Signal(relative(s.e, now, seen))


def hidden(s: Site) -> Signal:
    """How far the stream that enters the region is from what it was when all was computed last."""
    base = _needed(s.base, "signal=hidden needs a run of blocks that continues a stream of the latent")
    seen = s.reuse.slot("seen", base.meta["val"])
    s.reuse.update(seen, base, "computed")
    return Signal(relative(s.e, base, seen))


def modulated(s: Site) -> Signal:
    """TeaCache: how far the modulated input of the first block is from that of the step before."""
    now = _needed(s.modulated(), "signal=modulated needs a first block that norms or modulates its input")
    seen = s.reuse.slot("seen", now.meta["val"])
    s.reuse.update(seen, now, "always")
    return Signal(relative(s.e, now, seen))


def forecast(s: Site) -> Signal:
    """CG-Taylor: the relative error of a forecast of the stream that enters the region."""
    base = _needed(s.base, "signal=forecast needs a run of blocks with at least one block in front of it")
    slots = s.reuse.forecast(base.meta["val"], s.predictor, "watch")
    weights = f"{s.reuse.name}.watch" if s.predictor.size > 1 else ""
    control = s.reuse.host(weights, TensorType(torch.float32, (s.predictor.size,))) if weights else None
    told = predict(s.e, slots, control, s.e.graph.output_node())
    s.reuse.shift(slots, s.predictor, base, base)
    error = s.e.op(aten.sub.Tensor, _wide(s.e, told), _wide(s.e, base))
    node = s.e.op(aten.div.Tensor, _mean(s.e, error), _mean(s.e, _wide(s.e, base)))
    return Signal(node, slots=tuple(x.meta["formal"].ref for x in slots), weights=weights)


def boundary(s: Site) -> Signal:
    """EasyCache: the change of the output that the change of the latent since the step before lets expect.

    kappa mean|x - x of the step before| / mean|o|, with o the last computed output and kappa = mean|change of o| /
    mean|change of x| between the last two computed steps; infinite until there are two.
    """
    needs = "signal=boundary needs a latent input of the shape of the model's output"
    x, o = _needed(s.latent, needs), _needed(s.output, needs)
    e, reuse = s.e, s.reuse
    before, old_x = reuse.slot("before", x.meta["val"]), reuse.slot("input", x.meta["val"])
    old_o, rate = reuse.slot("output", o.meta["val"]), reuse.slot("rate", _one(e))

    def moved(a: fx.Node, b: fx.Node) -> fx.Node:
        return _mean(e, e.op(aten.sub.Tensor, _wide(e, a), _wide(e, b)))

    reuse.update(before, x, "always")
    reuse.update(old_x, x, "computed")
    reuse.update(old_o, o, "computed")
    found = e.op(aten.div.Tensor, moved(o, old_o), moved(x, old_x))
    two = e.op(aten.gt.Scalar, _mean(e, _wide(e, old_o)), 2 * EPS)  # a slot that nothing was written to is zero
    unknown = e.op(aten.full.default, [1], torch.inf, dtype=torch.float32, device=o.meta["val"].device)
    reuse.update(rate, e.op(aten.where.self, two, found, unknown), "computed")
    expected = e.op(aten.mul.Tensor, rate, moved(x, before))
    return Signal(e.op(aten.div.Tensor, expected, _mean(e, _wide(e, old_o))))


def change(s: Site) -> Signal:
    """AdaCache, Temporal Delta Cache: how far a kept value, the middle one of those of the latent's stream, is from the
    one computed before it; left for the steps that follow."""
    value, slots = s.kept[len(s.kept) // 2]
    at = s.e.graph.output_node()
    return Signal(relative(s.e, value, guess(s.e, slots, value.meta["val"], None, at)), lag=True, when="computed")


def drift(s: Site) -> Signal:
    """Dynamic block pruning: how far the stream that enters the region is from that of the step before; left for the
    step that follows, so that one read serves the decisions of all blocks."""
    base = _needed(s.base, "signal=drift needs a run of blocks that continues a stream of the latent")
    seen = s.reuse.slot("seen", base.meta["val"])
    s.reuse.update(seen, base, "always")
    return Signal(relative(s.e, base, seen), lag=True)


def _one(e: Editor) -> Any:
    with e.mode:
        return torch.empty(1)


SIGNALS: Mapping[str, Callable[[Site], Signal]] = {
    "residual": residual,
    "hidden": hidden,
    "modulated": modulated,
    "forecast": forecast,
    "boundary": boundary,
    "change": change,
    "drift": drift,
}
