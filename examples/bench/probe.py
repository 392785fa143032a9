"""What ditopt does with one denoiser of the tests: captured, blocks found, exact, cached, exported.

Each question is asked through the functions that users call; an answer is "yes", "no: " and the reason, or "none: "
and why the question does not apply.
"""

from __future__ import annotations

import copy
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ditopt
from ditopt._torch import pytree
from ditopt.errors import CaptureError, DitoptWarning
from ditopt.explanation import NEVER, binding_shares
from ditopt.optimized import OptimizedModule
from ditopt.recipe import Recipe
from tests.denoisers import REGISTRY, Denoiser

STEPS = 6
YES = "yes"
PENDING = "no: not measured"

Outputs = list[list[Tensor]]
"""The tensors of each step."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ``captured``: "export", with what else was needed, or "refused: ". ``nodes`` of the captured graph. ``blocks`` found
    on the main chain, of ``expected`` in the model's own lists, in ``classes`` bodies. ``hoisted``: share of the
    weights that never meet the latent. ``exact``, ``cached``, ``onnx``: see the functions below. ``seconds``: CPU time
    of capture with all exact passes; ``bare``: of torch.export and run_decompositions({}), 0 where that fails.
    """

    name: str
    captured: str = PENDING
    nodes: int = 0
    blocks: int = 0
    expected: int = 0
    classes: int = 0
    hoisted: float = 0.0
    exact: str = PENDING
    cached: str = PENDING
    onnx: str = PENDING
    seconds: float = 0.0
    bare: float = 0.0

    def passed(self, column: str) -> bool:
        """Whether ``column``, one of COLUMNS, holds."""
        if column == "blocks":
            return self.expected > 0 and self.blocks == self.expected
        value = getattr(self, column)
        return value == YES or (column == "captured" and not value.startswith(("no: ", "refused: ")))

    def applies(self, column: str) -> bool:
        """Whether the question of ``column`` makes sense for this model."""
        return column == "blocks" or not getattr(self, column).startswith("none: ")

    @property
    def green(self) -> bool:
        """Whether every column holds."""
        return all(self.passed(c) for c in COLUMNS)

    def reasons(self) -> list[str]:
        """A sentence for each column that applies and does not hold."""
        out = []
        for column in COLUMNS:
            if self.applies(column) and not self.passed(column):
                found = f"no: {self.blocks} of {self.expected}" if column == "blocks" else getattr(self, column)
                out.append(f"{column}: {found.removeprefix('no: ').removeprefix('refused: ')}")
        return out


COLUMNS = ("captured", "blocks", "exact", "cached", "onnx")
"""The columns that a model passes or fails."""


class Failed(Exception):
    """A question is answered by no; the message is the reason."""


@dataclass(frozen=True)
class Request:
    """The calls of one request, and what the plain model gives for them."""

    model: nn.Module
    calls: list[dict[str, Any]]
    plain: Outputs

    @staticmethod
    @torch.no_grad()
    def of(denoiser: Denoiser) -> Request:
        """Latents that differ at every step, times that fall, and one prompt."""
        model, call = denoiser.build()
        calls = [_step(denoiser, call, k) for k in range(STEPS)]
        return Request(model, calls, [tensors_of(model(**c)) for c in calls])


def probe(name: str, tell: Callable[[Row], None] = lambda row: None, *, full: bool = True) -> Row:
    """The row of a denoiser. ``tell`` is given the row after each question, for a caller who may lose the last ones.
    Without ``full``, ONNX and the bare export are left out."""
    row = Row(name)

    def update(**changes: Any) -> None:
        nonlocal row
        row = replace(row, **changes)
        tell(row)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the models' own
        request = Request.of(REGISTRY[name])
        update(expected=len(REGISTRY[name].block_modules(request.model)))
        _warm_up()
        start = time.process_time()
        try:
            lossless = _optimize(request, "lossless")
        except CaptureError as error:
            update(captured=f"refused: {one_line(error)}", **dict.fromkeys(("exact", "cached", "onnx"), "no: no graph"))
            return row
        except Exception as error:
            update(captured="export", **dict.fromkeys(("exact", "cached", "onnx"), f"no: {one_line(error)}"))
            return row
        update(seconds=round(time.process_time() - start, 2), **_structure(lossless))
        update(exact=_answer(lambda: exact(lossless, request)))
        made: list[OptimizedModule] = []
        update(cached=_answer(lambda: cached(request, made)))
        if full:
            fastest = made[0] if row.cached == YES else lossless
            update(onnx=_answer(lambda: onnx(fastest, request)))
            update(bare=round(_bare(REGISTRY[name]), 2))
    return row


def _step(denoiser: Denoiser, call: Mapping[str, Any], k: int) -> dict[str, Any]:
    noise = torch.Generator().manual_seed(k)

    def drift(value: Tensor) -> Tensor:
        if not value.is_floating_point():  # tokens: a tenth of them become others in each step
            others = value.flatten()[torch.randperm(value.numel(), generator=noise)].view(value.shape)
            return torch.where(torch.rand(value.shape, generator=noise) < k / 10, others, value)
        return value * (1 - k / 20) + 0.1 * k * torch.randn(value.shape, generator=noise)

    def earlier(value: Tensor) -> Tensor:
        return value * (1 - k / 8) if value.is_floating_point() else value * (8 - k) // 8

    changes = {n: pytree.tree_map(drift, call[n]) for n in denoiser.latent}
    changes |= {n: pytree.tree_map(earlier, call[n]) for n in denoiser.time}
    return {**call, **changes}


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of a model's output, in order."""
    plain = dict(output) if isinstance(output, dict) else output  # output classes are no containers to pytree
    return [v for v in pytree.tree_leaves(plain) if isinstance(v, Tensor)]


def one_line(error: BaseException) -> str:
    """The first line of an error, its middle left out where it is long, without folders of this machine."""
    first = (str(error).strip().splitlines() or [""])[0]
    if not isinstance(error, (Failed, CaptureError)):
        first = f"{type(error).__name__}: {first}"
    plain = re.sub(r"(?<![\w.])/\S*/", "", re.sub(r"/\S*/site-packages/", "", first))
    return plain if len(plain) < 400 else f"{plain[:200]} ... {plain[-190:]}"


def _answer(ask: Callable[[], None]) -> str:
    try:
        ask()
    except Exception as error:  # whatever a model brings up is an answer
        return f"no: {one_line(error)}"
    return YES


def _optimize(request: Request, recipe: Recipe | str) -> OptimizedModule:
    made: OptimizedModule = ditopt.optimize(
        request.model, recipe, example_inputs=request.calls[0], target="eager", steps=STEPS
    )
    return made


def _warm_up() -> None:
    """Import what the first export of a process imports, so that no model pays for it."""
    torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),), strict=False).run_decompositions({})


_BY = "captured by torch."
"""How a capture's note on its road begins."""


def _structure(optimized: OptimizedModule) -> dict[str, Any]:
    captured = optimized.compiled.captured
    outlined = next((r.program for r in optimized.history if r.program.blocks()), captured.program)
    main = [r for r in outlined.blocks() if r.id.startswith("blocks.")]
    weights = {kind: bytes_ for kind, (bytes_, _) in binding_shares(captured.program).items()}
    free = sum(bytes_ for kind, bytes_ in weights.items() if kind not in ("latent", NEVER))
    return {
        "captured": next((n.removeprefix(_BY) for n in captured.notes if n.startswith(_BY)), "export"),
        "nodes": sum(n.op == "call_function" for n in captured.program.step.graph.nodes),
        "blocks": len(main),
        "classes": len({r.function for r in main}),
        "hoisted": round(free / max(sum(weights.values()), 1), 3),
    }


def exact(lossless: OptimizedModule, request: Request) -> None:
    """The exact recipe gives the plain model's bits over three steps."""
    with lossless.session(steps=3):
        for k, call in enumerate(request.calls[:3]):
            if not _same(tensors_of(lossless(**call)), request.plain[k]):
                raise Failed(f"step {k} differs from the plain model")


def cached(request: Request, made: list[OptimizedModule]) -> None:
    """The recipe fora finds sites and reuses them, in one graph a step; steps that compute give the plain model's bits.

    The optimized model is appended to ``made``.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", DitoptWarning)
        fast = _optimize(request, "fora")
    made.append(fast)
    if not fast.compiled.program.decisions:
        raise Failed(str(said[0].message) if said else "the recipe found no site")
    outputs, reused = _run(fast, request)
    if not any(reused) or fast.stats.share_block_flops >= 1:
        raise Failed("nothing was reused")
    for k, output in enumerate(outputs):
        if not all(bool(v.isfinite().all()) for v in output):
            raise Failed(f"step {k} is not finite")
        if _same(output, request.plain[k]) is reused[k]:
            raise Failed(
                f"step {k} {'reuses and equals' if reused[k] else 'computes and differs from'} the plain model"
            )


def onnx(fast: OptimizedModule, request: Request) -> None:
    """Exported with its caches and run by onnxruntime, every graph of it, it is what eager gives within 1e-4; of a
    model whose float32 rounds more than that, as near to what it gives in float64 as eager is (``as_near``)."""
    want, _ = _run(fast, request)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "dit.onnx")
        manifest = ditopt.export_onnx(fast, path)
        loaded = ditopt.load(path)
        with torch.no_grad(), loaded.session(steps=STEPS):
            got = [tensors_of(loaded(**call)) for call in request.calls]
        idle = {g.name for g in manifest.graphs} - set(loaded.stats.graphs)
    if idle:
        raise Failed(f"the graphs {', '.join(sorted(idle))} never ran")
    worst = max(_difference(a, b) for a, b in zip(got, want, strict=True))
    if not worst < 1e-4 and not (worst < 1e-2 and as_near(got, want, _wide(fast, request))):  # NaN compares false
        raise Failed(f"onnxruntime differs from eager by {worst:.2g}")


def as_near(got: Outputs, want: Outputs, wide: Outputs) -> bool:
    """Whether at every step ``got`` is at most twice as far from ``wide``, the same in float64, as ``want`` is."""
    steps = zip(got, want, wide, strict=True)
    return all(_difference(a, exact) <= 2 * _difference(b, exact) for a, b, exact in steps)


def _wide(fast: OptimizedModule, request: Request) -> Outputs:
    """What the same recipe gives in eager for the same request in float64."""

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    model = copy.deepcopy(request.model).double()
    calls = [pytree.tree_map(double, call) for call in request.calls]
    wide = Request(model, calls, [])
    return _run(_optimize(wide, fast.engine.recipe), wide)[0]


@torch.no_grad()
def _run(fast: OptimizedModule, request: Request) -> tuple[Outputs, list[bool]]:
    """One request: the outputs, and which steps reused anything."""
    with fast.session(steps=STEPS) as session:
        outputs = [tensors_of(fast(**call)) for call in request.calls]
        return outputs, ["reuse" in row.choices.values() for row in session.schedule_rows]


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    pairs = zip(got, want, strict=True)
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs)


def _bare(denoiser: Denoiser) -> float:
    """CPU seconds of torch's own capture; 0 where it fails."""
    model, call = denoiser.build()  # a model of its own: export may change what it traces
    start = time.process_time()
    try:
        with torch.no_grad():
            torch.export.export(model, (), dict(call), strict=False).run_decompositions({})
    except Exception:
        return 0.0
    return time.process_time() - start
