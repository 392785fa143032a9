"""Where the blocks are: the residual branches of a model, grouped along the dataflow.

A transformer is a sequence of residual branches (ir/residual.py). Three rules of dataflow group them into blocks; no
module path, class or argument name is read, and blocks need not repeat:

* **Level.** In a block, attention comes first and what it gathered is then fed through MLPs. So a block begins where a
  branch attends to what an earlier branch fed forward: the level of a branch counts these turns along its longest
  path. The branches of several streams (image and text) have the same levels whatever the order of their trace. Where
  all begins with a branch that feeds, and ends with one that attends, the turns from attending to feeding are counted.
* **Component.** Branches of one level are one block where they share operators (joint attention) or where one reads
  the other with no layer between them that belongs to no branch. Two towers that run side by side stay apart.
* **Chain.** Blocks that continue each other are a chain. The main one sees the latent and does most of the work; all
  blocks of other latent chains that lie before or after all of it belong to it too (a refiner of the noisy image, the
  part after a long skip). Other chains are auxiliary: text refiners, a control tower.

A level of branches that only attend, or only feed, has no turns to count; there the smallest period splits it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ditopt.ir.binding import Binding
from ditopt.ir.cost import flops, is_matmul
from ditopt.ir.extent import extend, label, pattern
from ditopt.ir.modules import Module, find_modules, rejoined, stream_origins
from ditopt.ir.program import Function
from ditopt.ir.reach import Reach, places
from ditopt.ir.residual import Branch, find_branches

__all__ = [
    "Block",
    "Module",
    "find_blocks",
    "find_ends",
    "find_modules",
    "label",
    "rejoined",
    "stream_origins",
    "trace",
]


@dataclass(frozen=True)
class Block:
    """The operators of one block, in trace order.

    ``chain``: 0 for the main one, else 1 + the number of the auxiliary chain. ``stage``: in the main chain, the number
    of the run of equal blocks (or of equal groups of blocks, where classes alternate), else -1.
    """

    nodes: tuple[fx.Node, ...]
    stage: int
    chain: int = 0


def trace(function: Function) -> list[fx.Node]:
    """The operators of a function in order."""
    return [n for n in function.graph.nodes if n.op == "call_function"]


def find_blocks(function: Function, binding: Mapping[fx.Node, Binding]) -> list[Block]:
    """The blocks of a flat function: those of the main chain in order, then the auxiliary ones; empty where no branch
    attends and nothing repeats."""
    reach = Reach(function)
    branches = find_branches(function, binding, reach)
    latent = [b for b in branches if binding[b.sum] & Binding.LATENT]
    other = [b for b in branches if not binding[b.sum] & Binding.LATENT]
    near = _near(branches, reach)
    main, *aside = _chains(_groups(latent, near, reach), near, reach) or [[]]
    chains = [main, *aside, *_chains(_groups(other, near, reach), near, reach, lead=False)]
    groups = [g for chain in chains for g in chain]
    extents = extend(
        [reach.convex(_union(b.nodes for b in g)) for g in groups],
        [reach.bits(b.stream for b in g) for g in groups],
        binding,
        reach,
    )
    members = [tuple(n for n in reach.members(e) if n.op == "call_function") for e in extents]
    stages = _stages([pattern(m)[0] for m in members[: len(main)]])
    number = [k for k, chain in enumerate(chains) for _ in chain]
    stages += [-1] * (len(groups) - len(main))
    return [Block(m, s, k) for m, s, k in zip(members, stages, number, strict=True)]


def find_ends(
    function: Function, blocks: Sequence[Block], binding: Mapping[fx.Node, Binding]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Operators that make the streams of the first blocks of the main chain, and operators that follow the last ones
    (with what only those read)."""
    reach = Reach(function)
    inside = _union(reach.bits(b.nodes) for b in blocks)
    main = [reach.bits(b.nodes) for b in blocks if b.chain == 0]
    behind = _union(reach.below[i] for b in main for i in places(b)) & ~inside
    ahead = _union(reach.above[i] for b in main for i in places(b)) & ~inside
    head = _private(behind & ~ahead, ~inside, reach)
    entries = {a for b in main for i in places(b) for a in reach.reads[i] if not inside >> a & 1}
    embed = _union(reach.above[a] for a in entries if binding[reach.nodes[a]] & Binding.LATENT) & ahead & ~behind
    return [[n for n in reach.members(s) if n.op == "call_function"] for s in (embed, head)]  # type: ignore[return-value]


def _private(bits: int, among: int, reach: Reach) -> int:
    """The set with the operators ``among`` that nothing else reads."""
    for i in reversed(range(len(reach.nodes))):
        node = reach.nodes[i]
        if among >> i & 1 and node.users and all(u.op != "output" and bits >> reach.place[u] & 1 for u in node.users):
            bits |= 1 << i
    return bits


def _union(sets: Iterable[int]) -> int:
    out = 0
    for s in sets:
        out |= s
    return out


# -- levels and components ---------------------------------------------------------------------------------------------


def _near(branches: Sequence[Branch], reach: Reach) -> dict[fx.Node, set[fx.Node]]:
    """For each branch (by its sum) those that share operators with it, whose stream it continues with no layer between,
    and those that it reads beside its stream (what it attends to, through layers of keys and values)."""
    owners: dict[int, list[fx.Node]] = {}
    for b in branches:
        for i in places(b.nodes):
            owners.setdefault(i, []).append(b.sum)
    found: dict[fx.Node, set[fx.Node]] = {}
    for b in branches:
        stream = reach.place[b.stream]
        found[b.sum] = {o for i in places(b.nodes) for o in owners[i]}
        beside = {a for i in places(b.nodes) for a in reach.reads[i] if not b.nodes >> a & 1 and a != stream}
        for todo, through in (([stream], False), (list(beside), True)):
            seen = set(todo)
            while todo:
                i = todo.pop()
                if i in owners:
                    found[b.sum].update(owners[i])
                elif through or not is_matmul(reach.nodes[i]):
                    todo += [a for a in reach.reads[i] if a not in seen]
                    seen.update(reach.reads[i])
    return found


def _levels(branches: Sequence[Branch], reach: Reach, feeds_first: bool = False) -> dict[fx.Node, int]:
    """How often, on the longest path to each branch, one attends to what an earlier one fed forward; with
    ``feeds_first``, how often one feeds forward what an earlier one attended to."""
    levels: dict[fx.Node, int] = {}
    for i, b in enumerate(branches):
        behind, read = reach.above[reach.place[b.sum]], reach.above[reach.place[b.value]]
        level = 0
        for a in branches[:i]:
            at = reach.place[a.sum]
            if behind >> at & 1:
                turns = b.feeds and a.attends if feeds_first else b.attends and a.feeds
                level = max(level, levels[a.sum] + bool(turns and read >> at & 1))
        levels[b.sum] = level
    return levels


def _blocks_of(branches: Sequence[Branch], reach: Reach) -> dict[fx.Node, int]:
    """The level of each branch: by blocks that feed first where there are fewer of these, of which the first two begin
    alike (a feed-forward stem is no block)."""
    levels = _levels(branches, reach)
    if not branches or branches[0].attends or branches[-1].feeds:
        return levels
    turned = _levels(branches, reach, feeds_first=True)
    first, second = (next((b for b in branches if turned[b.sum] == k), None) for k in (0, 1))
    alike = second is not None and first is not None and _kind(first, reach) == _kind(second, reach)
    return turned if alike and max(turned.values()) < max(levels.values()) else levels


def _kind(branch: Branch, reach: Reach) -> tuple[Hashable, ...]:
    return tuple(label(n) for n in reach.members(branch.inside))


def _groups(branches: Sequence[Branch], near: Mapping[fx.Node, set[fx.Node]], reach: Reach) -> list[list[Branch]]:
    """The branches of each block, in the order of levels."""
    level = _blocks_of(branches, reach)
    links = [
        (i, j) for i, j in _links([[b] for b in branches], near) if level[branches[i].sum] == level[branches[j].sum]
    ]
    groups = [[branches[i] for i in part] for part in _components(len(branches), links)]
    groups = _apart(_alike(groups, level, reach), reach)
    groups.sort(key=lambda g: (level[g[0].sum], reach.place[g[0].sum]))
    if any(b.attends for b in branches):
        groups = [g for g in groups if any(b.attends for b in g)]
        made: list[list[Branch]] = []
        for g in groups:
            made += [g] if any(b.feeds for b in g) else _copies(g, reach, _attentions_before(g, made, near))
        return made
    return [part for g in groups for part in _copies(g, reach) if len(part) < len(g)]


def _alike(groups: Sequence[Sequence[Branch]], level: Mapping[fx.Node, int], reach: Reach) -> list[list[Branch]]:
    """Groups of one level that multiply by the same weights are one: a block that is called once for each prompt."""
    made: dict[Hashable, list[Branch]] = {}
    for k, g in enumerate(groups):
        weights = frozenset(w for b in g for n in reach.members(b.inside) for w in _weights(n))
        made.setdefault((level[g[0].sum], weights) if weights else k, []).extend(g)
    return [sorted(g, key=lambda b: reach.place[b.sum]) for g in made.values()]


def _weights(node: fx.Node) -> list[fx.Node]:
    return [a for a in node.all_input_nodes if a.op == "placeholder"] if is_matmul(node) else []


def _apart(groups: list[list[Branch]], reach: Reach) -> list[list[Branch]]:
    """Groups that read each other are one: none of them could be called before the other."""
    nodes = [_union(b.nodes for b in g) for g in groups]
    above = [_union(reach.above[reach.place[b.sum]] for b in g) for g in groups]
    pairs = [(i, j) for i in range(len(groups)) for j in range(i) if above[i] & nodes[j] and above[j] & nodes[i]]
    merged = [
        sorted((b for i in part for b in groups[i]), key=lambda b: reach.place[b.sum])
        for part in _components(len(groups), pairs)
    ]
    return merged


def _links(groups: Sequence[Sequence[Branch]], near: Mapping[fx.Node, set[fx.Node]]) -> list[tuple[int, int]]:
    """Pairs of groups of which one reads, or overlaps, the other."""
    owner = {b.sum: i for i, g in enumerate(groups) for b in g}
    return [(i, owner[other]) for i, g in enumerate(groups) for b in g for other in near[b.sum] if other in owner]


def _components(count: int, links: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The connected parts of ``0..count-1``, each ascending."""
    part = list(range(count))
    for a, b in links:
        if part[a] != part[b]:
            part = [part[a] if p == part[b] else p for p in part]
    return [[i for i in range(count) if part[i] == p] for p in dict.fromkeys(part)]


def _attentions_before(
    group: Sequence[Branch], groups: Sequence[Sequence[Branch]], near: Mapping[fx.Node, set[fx.Node]]
) -> int:
    """How many attentions the block has that ``group`` continues; 1 where it continues none."""
    before = next((g for g in reversed(groups) if any(near[a.sum] & {b.sum for b in g} for a in group)), ())
    return max(sum(b.attends for b in before), 1)


def _copies(group: list[Branch], reach: Reach, least: int = 1) -> list[list[Branch]]:
    """Equal parts, of ``least`` branches or more, of a group of which no turn tells where a block ends: its smallest
    period. The last of blocks that attend twice, where nothing is fed forward any more, is such a group."""
    kinds = [_kind(b, reach) for b in group]
    for period in range(least, len(group) // 2 + 1):
        if len(group) % period == 0 and kinds[period:] == kinds[:-period]:
            return [group[i : i + period] for i in range(0, len(group), period)]
    return [group]


# -- chains and stages -------------------------------------------------------------------------------------------------


def _chains(
    groups: list[list[Branch]], near: Mapping[fx.Node, set[fx.Node]], reach: Reach, lead: bool = True
) -> list[list[list[Branch]]]:
    """Groups that continue each other; with ``lead`` the main chain first, with all that comes before or after it."""
    chains = [[groups[i] for i in part] for part in _components(len(groups), _links(groups, near))]
    if not lead or not chains:
        return chains
    main = max(chains, key=lambda c: sum(flops(n) for g in c for b in g for n in reach.members(b.inside)))
    along = [c for c in chains if c is main or all(_comparable(g, h, reach) for g in c for h in main)]
    ordered = [g for g in groups if any(g is h for c in along for h in c)]
    return [ordered, *(c for c in chains if not any(c is a for a in along))]


def _comparable(a: Sequence[Branch], b: Sequence[Branch], reach: Reach) -> bool:
    """Whether one of two groups is computed from the other."""
    for one, other in ((a, b), (b, a)):
        ends = reach.bits(x.sum for x in one)
        if any(reach.above[reach.place[y.sum]] & ends for y in other):
            return True
    return False


def _stages(classes: Sequence[Hashable]) -> list[int]:
    """The number of the run that each block is in: equal blocks in a row, or a group of blocks that repeats."""
    stages: list[int] = []
    while (at := len(stages)) < len(classes):
        best, stage = 1, stages[-1] + 1 if stages else 0
        for period in range(1, (len(classes) - at) // 2 + 1):
            end = at + period
            while end < len(classes) and classes[end] == classes[end - period]:
                end += 1
            copies = (end - at) // period
            if copies > 1:
                best = max(best, copies * period)
        stages += [stage] * best
    return stages
