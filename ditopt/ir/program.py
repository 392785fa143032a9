"""Program, the value that every pass takes and returns.

A Program is one step of the denoising loop as functional ATen, plus what the loop around it needs to know:

* ``functions``: the step itself (``entry``), block bodies that call sites share, and memo functions;
* ``params``: weights and constants by handle, never copied;
* ``state``: the slots that live from one step to the next (caches are data, not side effects);
* ``memos``: values that the loop reads and does not recompute;
* ``decisions``: what is asked once a step (compute this region, or predict it), with its schedule and predictor;
* ``regions``: the structure that was discovered;
* ``pace``: by how much each step of the sampler is shortened (ir/pacing.py), where it is.

Programs are frozen. ``ir/edit.py`` makes new ones, ``ir/text.py`` prints and parses them, ``ir/verify.py`` checks them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ditopt._torch import invoke_subgraph

Role = Literal["latent", "timestep", "prompt", "shape"]
"""What an input of the model is to the loop: changes every step by the sampler; the time of the step; fixed for a
request (text embeddings, pooled embeddings, class labels, guidance); fixed for a shape (position ids, masks)."""

FormalKind = Literal["input", "param", "state", "memo", "control", "formal", "carry"]


@dataclass(frozen=True)
class Formal:
    """What a placeholder stands for: ``node.meta["formal"]``.

    kind      ref
    input     name of a model input (``Program.inputs``)
    param     name of a weight or constant (``Program.params``)
    state     name of a StateSlot
    memo      name of a memo value (``"<memo>.<k>"``)
    control   a small tensor the host provides each step (``Decision.controls``)
    formal    a parameter of a shared block body; ref is the placeholder's name
    carry     in step graphs only: a value that the probe of the same step computed (codegen/probe.py)
    """

    kind: FormalKind
    ref: str


@dataclass(frozen=True)
class TensorType:
    """dtype and static shape; ``stride`` only where it is not the contiguous one."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

    @staticmethod
    def of(value: Tensor) -> TensorType:
        """The type of a (fake) tensor."""
        shape = tuple(int(s) for s in value.shape)
        stride = tuple(int(s) for s in value.stride())
        return TensorType(value.dtype, shape, None if value.is_contiguous() else stride)

    def pairs(self, value: Tensor) -> Tensor:
        """``value``, or where it is complex and this type holds its pairs of real numbers (passes/lower_complex.py) a
        view of it as these."""
        if not value.is_complex() or self.dtype.is_complex:
            return value
        return torch.view_as_real(value.resolve_conj())

    @property
    def nbytes(self) -> int:
        """Bytes of a dense tensor of this type."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Input:
    """A tensor input of the model: dotted name, role in the loop, type."""

    name: str
    role: Role
    type: TensorType


@dataclass(frozen=True)
class StateSlot:
    """A tensor that a step reads and the next step finds as this one left it; zeros when a request begins.

    ``lifetime``: "request" slots are held once a guidance branch; "step" slots once for all of them: the first call of
    a step writes them, and the other calls of that step read them; "model" slots outlive requests.
    """

    name: str
    type: TensorType
    lifetime: Literal["request", "model", "step"] = "request"


def owner(slot: str) -> str:
    """The name of the decision that a state slot belongs to."""
    return slot.partition(".")[0]


@dataclass(frozen=True)
class Memo:
    """Values that do not depend on the latent: computed by ``function`` when one of ``keys`` changes, else remembered.

    ``keys`` are the model inputs the values depend on, also by way of other memos. A "request" memo depends on prompt
    inputs only and holds one entry a guidance branch; a "schedule" memo depends on the timestep too and holds one entry
    a step (a table).
    ``values`` name the function's outputs; the entry reads them as ``memo`` formals.
    """

    name: str
    function: str
    keys: tuple[str, ...]
    values: tuple[str, ...]
    lifetime: Literal["request", "schedule"]


@dataclass(frozen=True)
class Interval:
    """Steps that compute: 0..first-1, then one in ``every`` (0: none), and the ``last`` ones of the request.

    After the warm-up the counter starts at the last warm-up step: first=3, every=6 computes 0,1,2,8,14,20,...
    ``mask`` (text of 1 = compute and 0 = reuse, one a step) replaces the formula and fixes the number of steps.
    ``since``, ``until``: the part of the request, 0 to 1, within which the formula holds; ``outside`` of it every step
    computes, or every step reuses. A window that begins later starts with a computed step.
    ``low``, ``high``: the model's time, without its ends, outside of which every step computes (and what it computes is
    kept); both 0: any time. ``resets``: steps that compute besides, as text: numbers such as "12 22", or shares of the
    request such as "40% 73%".
    """

    every: int = 1
    first: int = 1
    last: int = 0
    mask: str = ""
    since: float = 0.0
    until: float = 1.0
    low: float = 0.0
    high: float = 0.0
    resets: str = ""
    outside: Literal["compute", "reuse"] = "compute"

    @property
    def timed(self) -> bool:
        """Whether it looks at the model's time."""
        return self.low < self.high


Basis = Literal["hold", "taylor", "newton", "lagrange", "hermite", "ab2", "ramp", "foca", "dmd", "bands", "learned"]


Rows = tuple[tuple[float, ...], ...]
"""Numbers for each step of a request."""


@dataclass(frozen=True)
class Predictor:
    """How a skipped value is predicted: as a linear combination of earlier ones (runtime/predict.py has the formulas),
    or by a module that was trained.

    ``basis``: "hold" (newest value), "taylor" (TaylorSeer's finite differences), "newton" / "lagrange" (the polynomial
    through the last order + 1 values), "hermite" (HiCache), "ab2" (Adams-Bashforth), "ramp" (FasterCache), "foca"
    (FoCa), "dmd" (dynamic mode decomposition), "bands" (FasterCache: low and high frequencies of the newest value, each
    with a coefficient), "learned" (a trained module, whose weights are tables of the Program: ir/learned.py), "none"
    (no earlier value is read: what stands in for the skipped value belongs to the step itself). ``order`` is that of
    the first five; "learned" reads ``order + 1`` values. ``time``: measure distance in "step" index or in "timestep".
    ``fitted``: for each step of a mask, coefficients of the newest computed values, newest first; () where the step
    computes. They take the place of the formula wherever the computed steps behind are those of the mask.
    """

    basis: Basis | Literal["none"] = "hold"
    order: int = 0
    time: Literal["step", "timestep"] = "step"
    fitted: Rows = ()

    @property
    def anchors(self) -> int:
        """How many computed values it reads."""
        return {"none": 0, "learned": 0, "ab2": 3, "ramp": 2, "foca": 2, "dmd": 6}.get(self.basis, self.order + 1)

    @property
    def window(self) -> int:
        """How many of the values before this step it reads besides, computed or predicted."""
        return {"foca": 2, "learned": self.order + 1}.get(self.basis, 0)

    @property
    def bands(self) -> int:
        """In how many parts it reads each value."""
        return 2 if self.basis == "bands" else 1

    @property
    def size(self) -> int:
        """Number of values read, and of their coefficients where they have some: anchors, newest first, then the
        window, newest first; of each its bands."""
        return (self.anchors + self.window) * self.bands


@dataclass(frozen=True)
class Rule:
    """When the host lets a step reuse: by a number that the loop measures, read once a step.

    ``signal``: state slot with what is read, float32 (1,). Where ``lag`` is False it is measured by the step itself,
    before the decision; else it is what an earlier step left. ``test``: "below" (reuse while it is below ``limit``),
    "sum" (add it up since the last computed step, reuse while the sum is below ``limit``), "book" (after a computed
    step ``book`` says how many steps later the next one computes: pairs of an upper bound and steps, the last bound
    inf; it is asked with the number divided by the distance between the two newest computed steps). ``polynomial``:
    coefficients, highest degree first, applied to what was read, after clamping it to ``domain`` (lowest, highest; ()
    does not clamp); negative results count as 0.
    ``longest``, ``most``, ``budget``: at most so many reused steps in a row, in a request, and at most so large a sum
    of what was measured at reused steps since the last computed one; 0 is no bound.
    ``since``: the decision whose computed steps set the sum of "sum" to 0, where it is not this one's own: several
    decisions that share a sum, each with its own limit, choose among more than two ways to run a step
    (ir/widening.py). ``need``, ``room``: besides, only while the number in the state slot ``need``, float32 (1,), which
    an earlier step left, is at most ``room``; what computes all of a step anyway is not asked that.
    ``slots``, ``weights``, ``predictor``: of the forecast that the signal is the error of, where it is one. ``kind``:
    the name of the signal in ir/signals.py, for display.
    """

    signal: str
    test: Literal["below", "sum", "book"] = "below"
    limit: float = 0.0
    lag: bool = False
    polynomial: tuple[float, ...] = ()
    domain: tuple[float, ...] = ()
    book: tuple[tuple[float, ...], ...] = ()
    longest: int = 0
    most: int = 0
    budget: float = 0.0
    slots: tuple[str, ...] = ()
    weights: str = ""
    predictor: Predictor = Predictor()
    kind: str = ""
    since: str = ""
    need: str = ""
    room: float = 0.0


@dataclass(frozen=True)
class Decision:
    """One question a step: compute these regions, or predict them?

    ``slots[k]`` are the state slots of the k-th kept value (or of a part of its encoding): ``predictor.anchors``
    computed ones, newest first, then ``predictor.window`` ones. When a step computes, slot 0 takes the new value and
    slot i that of slot i-1; when it predicts, only the window moves.
    ``schedule`` is the whole answer where ``rule`` is None; else steps that it computes compute, and the rule decides
    the others. ``weights`` names the control input that carries the predictor's coefficients, newest first; ``row`` the
    one that carries the step's row in a table of corrections; ``gram`` the state slot (float64, (anchors, anchors))
    with the inner products of the kept values, which "dmd" needs.
    ``guidance``: what is skipped is a branch of guidance, and is only skipped where there is one: with "calls" a call
    that another one of its step, with the same latent, came before; with "batch" one half of a batch whose halves are
    the same latent. Without slots nothing has to be computed before it is predicted. Regions ``<region>.<name>`` are
    paths of the decision ``name``: which of them is taken is asked where that one predicts.
    ``reads``: of a "learned" predictor, row by row of its tables, how many values of consecutive steps it needs, 0
    where it was not trained: a step that has fewer computes.
    """

    name: str
    regions: tuple[str, ...]
    schedule: Interval
    predictor: Predictor
    slots: tuple[tuple[str, ...], ...]
    weights: str
    rule: Rule | None = None
    row: str = ""
    rows: int = 0
    gram: str = ""
    guidance: Literal["", "calls", "batch"] = ""
    reads: tuple[int, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def controls(self) -> dict[str, TensorType]:
        """The control inputs that the host fills for it, by name."""
        found = {self.weights: TensorType(torch.float32, (self.predictor.size,))} if self.weights else {}
        if self.rule is not None and self.rule.weights:
            found[self.rule.weights] = TensorType(torch.float32, (self.rule.predictor.size,))
        if self.row:
            found[self.row] = TensorType(torch.int64, (1,))
        return found

    @property
    def depth(self) -> int:
        """Computed steps that have to be remembered."""
        return max(self.predictor.anchors, self.rule.predictor.anchors if self.rule else 1)


RegionRole = Literal[
    "model", "embed", "stage", "head", "block", "aux", "attn", "mlp", "mod", "part",
    "self", "joint", "cross", "temporal", "spatial",
]  # fmt: skip
"""What a region is to the model. ``embed``: what makes the streams that enter the first blocks; ``head``: what follows
the last ones; ``aux``: a block of a chain beside the main one; ``mod``: what makes shifts, scales and gates of the
timestep; ``part``: a block once more, on part of its tokens. The last five are the attention of one kind in a block
(ir/sites.py)."""


@dataclass(frozen=True)
class Raster:
    """Rows ``start`` to ``start + tokens`` along ``axis`` of the input ``source`` hold the positions of ``grid``, one
    after the other (ir/positions.py). Read off the values of an example: other values may hold another grid."""

    source: str
    axis: int
    start: int
    grid: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


MadeOf = Literal["latent", "prompt", ""]
"""The role of the input that a stream comes from."""


@dataclass(frozen=True)
class Stream:
    """Tokens to which the residual branches of a block add.

    ``formal``: the parameter of the block's function that holds them; ``result``: the number of the result that
    continues it. ``axes``: the axes of both over which attention mixes; along them ``tokens`` positions from ``start``
    on are this stream (others, in the same tensor, are another one). ``grid``: rows x columns, or frames x rows x
    columns, of the tokens, () where neither the graph nor the positions that come with the call show one. ``made_of``:
    "" where it is unknown. ``raster``: the positions that show the grid, None where the graph does.
    """

    formal: str
    result: int
    axes: tuple[int, ...]
    tokens: int
    start: int = 0
    grid: tuple[int, ...] = ()
    made_of: MadeOf = ""
    raster: Raster | None = None


@dataclass(frozen=True)
class Region:
    """A piece of the model found in the graph.

    ``id``: ``model``; ``blocks.3`` (numbered along the main latent chain over all stages); ``blocks.3.attn``;
    ``blocks.3.attn.cross``; ``aux0.1`` (a block of another chain, such as a refiner of the text).
    ``stage``: index of the run of isomorphic blocks, or of groups of them that alternate, this one belongs to.
    ``alias``: the module path where the capture knew one, for display only. ``flops``: of one call, by ``ir/cost.py``.
    ``function``: the shared body of a block; ``streams``: what runs through it.
    """

    id: str
    role: RegionRole
    parent: str
    stage: int = -1
    flops: int = 0
    function: str = ""
    alias: str = ""
    streams: tuple[Stream, ...] = ()


@dataclass(frozen=True)
class Function:
    """An fx graph with typed inputs and outputs. Never mutate ``graph``: ir/edit.py makes changed copies.

    Every node carries ``meta["val"]`` (a FakeTensor, or a tuple of them for a call), ``meta["region"]`` (region id, or
    a relative ``.attn`` inside a block body, or "") and ``meta["origin"]`` (the pass that made it). Placeholders carry
    ``meta["formal"]``. The output is a flat tuple of nodes: the results, then one value for each of ``state_out``.
    """

    name: str
    graph: fx.Graph
    state_out: tuple[str, ...] = ()

    @property
    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        return self.graph.output_node()

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """All output nodes: results of the function, then the new state."""
        return tuple(self.output.args[0])  # type: ignore[arg-type]

    @property
    def n_results(self) -> int:
        return len(self.results) - len(self.state_out)


def formal(node: fx.Node) -> Formal:
    """What a placeholder stands for."""
    value: Formal = node.meta["formal"]
    return value


def is_call(node: fx.Node) -> bool:
    """Whether the node calls a shared block body."""
    return node.op == "call_function" and node.target is invoke_subgraph


def callee(node: fx.Node) -> str:
    """Name of the function that a call node calls."""
    return str(node.args[1])


def call_args(node: fx.Node) -> tuple[fx.Node, ...]:
    """Actual arguments of a call node."""
    return tuple(node.args[2:])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Program:
    """See the module docstring. ``inputs`` and ``outputs`` are flat; packing into the model's own structure is the
    caller's (``capture.CallSpec``). ``relies`` lists the positions whose grid something in the program was made for: it
    is for inputs that hold them. ``applied`` lists the passes so far in their text form, so that a second run of a pass
    knows."""

    functions: Mapping[str, Function]
    entry: str
    params: Mapping[str, Tensor]
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    state: tuple[StateSlot, ...] = ()
    memos: tuple[Memo, ...] = ()
    decisions: tuple[Decision, ...] = ()
    regions: tuple[Region, ...] = ()
    relies: tuple[Raster, ...] = ()
    applied: tuple[str, ...] = ()
    pace: tuple[float, ...] = ()
    _cache: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def replace(self, **changes: Any) -> Program:
        """A Program with some fields changed."""
        return dataclasses.replace(self, _cache={}, **changes)

    @property
    def step(self) -> Function:
        """The entry function: one step of the loop."""
        return self.functions[self.entry]

    def relying(self, rasters: Iterable[Raster | None]) -> Program:
        """A Program that relies on these positions too."""
        return self.replace(relies=tuple(dict.fromkeys((*self.relies, *(r for r in rasters if r is not None)))))

    def region(self, id: str) -> Region:
        """The region of this id."""
        for region in self.regions:
            if region.id == id:
                return region
        raise KeyError(id)

    def blocks(self) -> list[Region]:
        """The block regions in order of the main chain."""
        return [r for r in self.regions if r.role == "block"]

    def calls(self) -> Iterator[fx.Node]:
        """Call sites of the entry, in order."""
        return (n for n in self.step.graph.nodes if is_call(n))

    def module(self, function: str | None = None) -> fx.GraphModule:
        """A GraphModule of a function, block bodies attached; inputs in placeholder order, outputs a flat tuple."""
        root = torch.nn.Module()
        chosen = self.functions[function or self.entry]
        for node in chosen.graph.nodes:
            if is_call(node) and not hasattr(root, callee(node)):
                setattr(root, callee(node), self.module(callee(node)))
        return fx.GraphModule(root, _copy(chosen.graph), class_name=chosen.name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Program):
            return NotImplemented
        from ditopt.ir.text import print_program

        return print_program(self) == print_program(other) and all(
            self.params[k] is other.params[k] or torch.equal(self.params[k], other.params[k]) for k in self.params
        )

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        from ditopt.ir.text import print_program

        return print_program(self)


def _copy(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    out = new.graph_copy(graph, values)
    new.output(out)
    return new
