"""The text of ``ditopt explain``: what a model consists of, what each pass did and why not more, what runs where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from torch import fx

from ditopt.artifact import StepGraph
from ditopt.codegen.claims import claims, products
from ditopt.codegen.lower import lower, lower_memos
from ditopt.codegen.probe import NAME as PROBE
from ditopt.footprint import held_bytes, live_slots
from ditopt.ir.binding import Binding, bind
from ditopt.ir.cost import flops, step_flops
from ditopt.ir.pacing import write_factors
from ditopt.ir.program import Decision, Program, Region, Rule, Stream, TensorType, formal
from ditopt.ir.signals import SIGNALS
from ditopt.ir.sites import AttentionSite, attention_sites
from ditopt.pipeline import PassResult

NEVER = "constant"
"""The name of what depends on no input."""


def explanation(
    program: Program,
    history: Sequence[PassResult],
    target: str,
    capture: Sequence[str],
    steps: int | None = None,
    rows: Sequence[Mapping[str, str]] | None = None,
) -> str:
    """How the model was captured (the notes of ``capture``); inputs, structure, attention, binding times and costs of
    ``program`` (as captured, before any pass); what each pass of ``history`` applied and refused; of the last Program,
    what is decided each step and how, which graphs ``target`` runs, and the state of a request of ``steps`` steps
    (``rows``: the choices that have graphs)."""
    final = history[-1].program if history else program
    outlined = next((r.program for r in history if r.program.blocks()), program)
    parts = [
        ("Capture", capture),
        ("Inputs", _inputs(program)),
        ("Structure", _structure(outlined)),
        ("Attention", _attention(outlined)),
        ("Binding times (what a value depends on)", _binding(program)),
        ("Passes", _passes(history)),
        ("Decisions", [*(line for d in final.decisions for line in decision_text(d)), *pace_text(final)] or ["none"]),
        (f"Graphs on {target}", _graphs(final, target)),
        ("State", _state(final, steps, rows)),
    ]
    return "\n".join(f"{title}\n{_indent(lines)}" for title, lines in parts)


# -- measures that the report shows too --------------------------------------------------------------------------------


def size(count: float) -> str:
    """Bytes with three digits and a unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def count(value: float) -> str:
    """A count with three digits and the unit prefix, to be put before a unit."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.0f} "


def weight_bytes(program: Program, graph: StepGraph) -> int:
    """Bytes of the weights that a lowered graph reads."""
    return sum(program.params[f.ref].nbytes for f in graph.inputs if f.kind == "param" and f.ref in program.params)


def role_flops(outlined: Program) -> dict[str, int]:
    """FLOPs of one step by part: attention and MLP of all blocks, the rest of the blocks, outside of them."""
    total, inside = step_flops(outlined)
    main = [r for r in outlined.regions if r.id.startswith("blocks.")]
    out = {f"blocks: {role}": sum(r.flops for r in main if r.role == role) for role in ("attn", "mlp")}
    out["blocks: other (modulation, projections)"] = inside - sum(out.values())
    out["outside blocks"] = total - inside
    return out


def binding_shares(program: Program) -> dict[str, tuple[int, int]]:
    """By what it depends on ("constant", "timestep", "prompt and timestep", "latent" ...): bytes of weights, FLOPs.

    Takes a flat Program. A weight counts for what the first values that combine it with an input depend on: for
    "latent" as soon as one of them does, else for all of it together. A weight that meets no input is constant.
    """
    binding = bind(program)
    weights: dict[Binding, int] = {}
    work: dict[Binding, int] = {}
    for node in program.step.graph.nodes:
        if node.op == "placeholder" and formal(node).kind == "param":
            met = _met(node, binding)
            weights[met] = weights.get(met, 0) + program.params[formal(node).ref].nbytes
        elif node.op == "call_function":
            kind = _simple(binding[node])
            work[kind] = work.get(kind, 0) + flops(node)
    kinds = sorted({*weights, *(k for k, f in work.items() if f)}, key=lambda k: (bool(k & Binding.LATENT), int(k)))
    return {words(k): (weights.get(k, 0), work.get(k, 0)) for k in kinds}


def words(kind: Binding) -> str:
    """A binding in words."""
    names = [str(f.name).lower() for f in Binding if f and f in kind]
    return " and ".join(names) if names else NEVER


def _met(weight: fx.Node, binding: Mapping[fx.Node, Binding]) -> Binding:
    met, todo, seen = Binding.CONSTANT, [weight], {weight}
    while todo:
        for user in todo.pop().users:
            if user.op == "output" or user in seen:
                continue
            seen.add(user)
            if binding[user] == Binding.CONSTANT:
                todo.append(user)
            else:
                met |= binding[user]
    return _simple(met)


def _simple(kind: Binding) -> Binding:
    """Latent says all; the shape says nothing beside what changes more often."""
    if kind & Binding.LATENT:
        return Binding.LATENT
    return kind & ~Binding.SHAPE if kind & (Binding.PROMPT | Binding.TIMESTEP) else kind


# -- decisions ---------------------------------------------------------------------------------------------------------


def decision_text(d: Decision) -> list[str]:
    """What a decision is about, when it computes, and by which number and rule it reuses: a line each."""
    p = d.predictor
    order = f" of order {p.order}" if p.order else ""
    told = "reused as it was" if p.basis == "hold" else f"predicted by {p.basis}{order}"
    if p.basis != "hold" and p.time == "timestep":
        told += " along the timestep"
    if p.fitted:
        told += ", with coefficients fitted for each step"
    if d.reads:
        told = f"predicted by a trained module of the last {_number(p.size, 'value')}, for {_number(d.rows, 'step')}"
    elif d.row:
        told += f", corrected by a table of {_number(d.rows, 'step')}"
    where = d.regions[0]
    if len(d.regions) > 1:
        where = f"{_number(len(d.regions), 'region')}, {where} .. {d.regions[-1]}"
    lines = [f"{d.name}: {where}; {told}", f"  computes {_schedule_text(d)}"]
    if d.gram:
        lines.append("  the host reads inner products of the kept values after a computed step")
    return lines if d.rule is None else [*lines, *(f"  {line}" for line in _rule_text(d.rule))]


def pace_text(program: Program) -> list[str]:
    """By how much the steps of the sampler are shortened, where they are."""
    if not program.pace:
        return []
    said = "the pipeline's scheduler runs at other times: its steps go as far as they would, times"
    return [f"{said} {write_factors(program.pace)}", "  a model alone has no scheduler: optimize the pipeline"]


def _schedule_text(d: Decision) -> str:
    i = d.schedule
    if i.mask:
        return f"where the mask is 1: {i.mask}"
    parts = ["the first step" if i.first < 2 else f"the first {i.first} steps"]
    parts += [f"then one step in {i.every}"] if i.every else []
    parts += [f"steps {', '.join(i.resets.split())}"] if i.resets else []
    parts += ["the last step" if i.last == 1 else f"the last {i.last} steps"] if i.last else []
    text = ", ".join(parts)
    if i.since > 0 or i.until < 1:
        text += f"; so from {i.since:.0%} to {i.until:.0%} of the request, outside of which every step {i.outside}s"
    if i.timed:
        text += f"; so while the model's time is between {i.low:g} and {i.high:g}, else at every step"
    return text


def _rule_text(rule: Rule) -> list[str]:
    meaning = " ".join((SIGNALS[rule.kind].__doc__ or "").split("\n\n")[0].split()) if rule.kind in SIGNALS else ""
    when = "left by an earlier step" if rule.lag else "measured by the step itself, in the graph probe"
    shape = f", clamped to {rule.domain[0]:g} .. {rule.domain[1]:g}" if rule.domain else ""
    if rule.polynomial:
        shape += f", put through the polynomial {' '.join(f'{c:g}' for c in rule.polynomial)} (highest degree first)"
    book = ", ".join(f"below {bound:g}: {steps:g}" for bound, steps in rule.book)
    test = {
        "below": f"reuses while it is below {rule.limit:g}",
        "sum": f"reuses while its sum since the last step that {rule.since or 'it'} computed is below {rule.limit:g}",
        "book": f"reuses by the book of steps ({book})",
    }[rule.test]
    guards = [
        f"at most {rule.longest} in a row" if rule.longest else "",
        f"at most {rule.most} in a request" if rule.most else "",
        f"at most a sum of {rule.budget:g} over reused steps" if rule.budget else "",
        f"only where the request needs at most {rule.room:.0%} of the tokens" if rule.need else "",
    ]
    return [
        f"on the other steps the host reads signal {rule.kind or rule.signal} ({when}){shape}",
        *([f"signal {rule.kind}: {meaning}"] if meaning else []),
        f"and {', '.join([test, *filter(None, guards)])}",
    ]


# -- sections ----------------------------------------------------------------------------------------------------------


def _inputs(program: Program) -> list[str]:
    return _columns([[i.name, i.role, type_text(i.type)] for i in program.inputs])


def type_text(type_: TensorType) -> str:
    """A tensor type, as ``float32[2, 4]``."""
    return f"{str(type_.dtype).removeprefix('torch.')}{list(type_.shape)}"


def _structure(program: Program) -> list[str]:
    total, inside = step_flops(program)
    if not program.blocks():
        return [f"no repeated blocks; {count(total)}FLOP a step"]
    chains = {key: list(run) for key, run in groupby(filter(_is_block, program.regions), key=_run_of)}
    outside = {r.id: r for r in program.regions if r.role in ("embed", "head")}
    mods = [r for r in program.regions if r.role == "mod"]
    rows = [_outside(outside["embed"], total)] if "embed" in outside else []
    rows += [_row(name, run, program, total) for name, run in chains.items()]
    rows += [_outside(outside["head"], total)] if "head" in outside else []
    if mods:
        rows.append(["mod", f"in {_number(len(mods), 'block')}", "", "", "", _share(mods, total), ""])
    streams = {name: _streams(run) for name, run in chains.items()}
    lines: list[str] = []
    for row, text in zip(rows, _columns(rows), strict=True):
        lines += [text, *(f"  {s}" for s in streams.get(row[0], []))]
    rest = f"{count(total)}FLOP a step, {inside / max(total, 1):.1%} of them in blocks"
    parts_ = ", ".join(f"{role} {f / max(total, 1):.1%}" for role, f in role_flops(program).items())
    return [*lines, rest, parts_]


def _is_block(region: Region) -> bool:
    return region.role in ("block", "aux")


def _run_of(block: Region) -> str:
    """The name of the blocks that are one row: a stage of the main chain, or an auxiliary chain."""
    return f"stage {block.stage}" if block.role == "block" else block.id.split(".")[0]


def _row(name: str, run: Sequence[Region], program: Program, total: int) -> list[str]:
    inside = {r.id: [_kinds(m, program) for m in program.regions if m.parent == r.id and m.role != "mod"] for r in run}
    parts = sorted({"+".join(roles) or "no modules" for roles in inside.values()})
    span = run[0].id if len(run) == 1 else f"{run[0].id}..{run[-1].id.split('.')[1]}"
    bodies = len({r.function for r in run})
    shared = "1 body" if bodies == 1 else f"{bodies} bodies"
    return [name, span, _number(len(run), "block"), shared, ", ".join(parts), _share(run, total), _alias(run)]


def _kinds(module: Region, program: Program) -> str:
    """A part of a block, with the kinds of its attention as selectors call them."""
    kinds = [r.role for r in program.regions if r.parent == module.id]
    return f"{module.role}.{'|'.join(kinds)}" if kinds else module.role


def _outside(region: Region, total: int) -> list[str]:
    return [region.id, "", "", "", "", _share([region], total), ""]


def _number(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _share(regions: Sequence[Region], total: int) -> str:
    return f"{sum(r.flops for r in regions) / max(total, 1):.1%} of FLOPs"


def _streams(run: Sequence[Region]) -> list[str]:
    """A line for each set of streams that runs through some of the blocks."""
    sets = dict.fromkeys(tuple(stream_text(s) for s in r.streams) for r in run)
    return ["; ".join(texts) or "no stream that attention mixes was found" for texts in sets]


def stream_text(stream: Stream) -> str:
    """A stream in words: ``latent: 80 tokens (8 x 10), axis 1``; behind the grid the positions that show it, if any."""
    seen = f", by the positions in {stream.raster.source}" if stream.raster else ""
    grid = f" ({' x '.join(map(str, stream.grid))}{seen})" if stream.grid else ""
    unknown = ", grid unknown" if stream.made_of == "latent" and not stream.grid else ""
    axes = f"{'axis' if len(stream.axes) == 1 else 'axes'} {', '.join(map(str, stream.axes))}"
    start = f" from {stream.start} on" if stream.start else ""
    return f"{stream.made_of or 'stream'}: {_number(stream.tokens, 'token')}{grid}{start}, {axes}{unknown}"


def _attention(program: Program) -> list[str]:
    """A line for each attention of blocks that are alike in it."""
    found = attention_sites(program)
    attends = {r.parent for r in program.regions if r.role == "attn"}
    alike: dict[tuple[str, tuple[AttentionSite, ...]], list[str]] = {}
    for id, sites in found.items():
        alike.setdefault((id.rpartition(".")[0], sites), []).append(id)
    lines: list[list[str]] = []
    for (_, sites), ids in alike.items():
        first, last = (int(ids[k].rpartition(".")[2] or 0) for k in (0, -1))
        span = ids[0] if len(ids) == 1 else f"{ids[0]}..{last}"
        some = f"{len(ids)} of {span}" if last - first >= len(ids) else span or "outside blocks"
        rows = [_site(s) for s in sites] or [["in no known spelling" if ids[0] in attends else "none", *[""] * 4]]
        lines += [[some if not k else "", *row] for k, row in enumerate(rows)]
    return _columns(lines) or ["none"]


def _site(site: AttentionSite) -> list[str]:
    heads = _number(site.heads, "head") if site.heads else "heads unknown"
    seen = [*(["causal"] if site.causal else []), *(["masked"] if site.masked else [])]
    return [site.kind, heads, f"{site.queries} x {site.keys} tokens", ", ".join(seen), site.spelling]


def _alias(run: Sequence[Region]) -> str:
    names = [r.alias for r in run if r.alias]
    if not names:
        return ""
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"


def _binding(program: Program) -> list[str]:
    shares = binding_shares(program)
    every, work = (max(sum(v[i] for v in shares.values()), 1) for i in (0, 1))
    lines = [["", "weights", "", "FLOPs"]]
    lines += [[k, size(w), f"{w / every:.1%}", f"{f / work:.2%}"] for k, (w, f) in shares.items()]
    free = [v for k, v in shares.items() if k not in ("latent", NEVER)]
    w, f = sum(v[0] for v in free), sum(v[1] for v in free)
    lines.append(["never sees the latent", size(w), f"{w / every:.1%}", f"{f / work:.2%}"])
    return _columns(lines, right=(1, 2, 3))


def _passes(history: Sequence[PassResult]) -> list[str]:
    if not history:
        return ["none"]
    out = []
    for r in history:
        out.append(f"{r.text}: " + (f"applied {r.applied}" if r.applied else "changed nothing") + f" ({r.ms:.0f} ms)")
        out += [f"  refused: {s}" for s in r.refused] + [f"  note: {s}" for s in r.notes]
    return out


def _graphs(program: Program, target: str) -> list[str]:
    """The claim table: each graph, who runs it, and what it reads and executes."""
    memos = target if target == "onnxruntime" else "eager"  # they run once a value, so they are not compiled
    runs = [(v.graph, target) for v in lower(program)] + [(m.graph, memos) for m in lower_memos(program)]
    full = max(sum(g.flops for g, _ in runs if g.name in (runs[0][0].name, PROBE)), 1)  # they run together
    lines = [["graph", "runs on", "inputs", "state", "FLOPs", "", "weights read"]]
    for g, where in runs:
        kinds = [f.kind for f in g.inputs]
        given, slots = sum(k in ("input", "memo", "control", "carry") for k in kinds), kinds.count("state")
        work = [f"{count(g.flops)}FLOP", f"{g.flops / full:.1%}", size(weight_bytes(program, g))]
        lines.append([g.name, where, str(given), str(slots), *work])
    said = [f"{c.count} x {c.op}: {c.form}, {c.reason}" for c in claims(program, target)]
    return [*_columns(lines, right=(2, 3, 4, 5, 6)), *said, *integer_plan(program, target)]


def integer_plan(program: Program, target: str) -> list[str]:
    """What share of the quantized layers' FLOPs is planned to run in integer kernels, and why not all; [] where none
    is."""
    planned = products(program, target)
    total = sum(p.flops for p in planned)
    if not total:
        return []
    share = sum(p.flops for p in planned if p.integer) / total
    return [
        f"integer kernels: {share:.1%} of the {count(total)}FLOP of quantized layers, as planned for {target}",
        *(f"  {p.flops / total:.1%} in floating point: {p.reason}" for p in planned if not p.integer),
    ]


def _state(program: Program, steps: int | None, rows: Sequence[Mapping[str, str]] | None) -> list[str]:
    slots = live_slots(program, rows)
    lines = []
    for life, where in (("request", "a guidance branch"), ("model", "the model")):
        held = [s for s in slots if s.lifetime == life]
        if held:
            total = sum(s.type.nbytes for s in held)
            most = held_bytes(program.decisions, held, steps) if life == "request" else total
            number = f"{len(held)} slots" if most == total else f"{len(held)} slots of {size(total)}, not all at once"
            lines.append(f"{size(most)} for {where} in {number}")
    for memo in program.memos:
        values = [n.meta["val"] for n in program.functions[memo.function].results]
        bytes_ = sum(TensorType.of(v).nbytes for v in values)
        every = "a request" if memo.lifetime == "request" else "a step"
        keys = ", ".join(memo.keys) or "nothing"
        lines.append(f"{size(bytes_)} {every} in {len(values)} hoisted values that depend on {keys}")
    return lines or ["none"]


def _columns(lines: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    if not lines:
        return []
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    numbers = set(right)

    def show(line: Sequence[str]) -> str:
        parts = [c.rjust(w) if i in numbers else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        return "  ".join(parts).rstrip()

    return [show(line) for line in lines]


def _indent(lines: Sequence[str]) -> str:
    return "".join(f"  {line}\n" for line in lines)
