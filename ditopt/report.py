"""The report: one HTML file, without scripts or external parts, of what ran, what it gave, and what each pass did."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ditopt.artifact import Manifest
from ditopt.errors import BadInput
from ditopt.explanation import count, decision_text, integer_plan, pace_text, role_flops, size, weight_bytes
from ditopt.ir.program import Program
from ditopt.measure import Row, cells
from ditopt.optimized import OptimizedModule
from ditopt.pictures import STYLE, chart, grid, has_modules, heat_map, png
from ditopt.pipeline import PassResult

DIFFERENCE = 8
"""What differences of images are multiplied with to be seen."""

DIFF_LINES = 200
"""Lines of a pass's diff that a page shows."""


def write(
    fast: OptimizedModule | Mapping[str, OptimizedModule],
    path: str | Path,
    images: Mapping[str, Tensor] | None = None,
    rows: Sequence[Row] | None = None,
) -> Path:
    """Write the report of one optimized model, or of several by name, to ``path``; returns it.

    images: by name, (N, 1 or 3, H, W) in [0, 1], or videos (N, 1 or 3, frames, H, W), which are shown as animated
    pictures; the first is the reference that the others are compared with.
    rows: of ``measure.compare``. BadInput where a model was not captured yet or images differ in shape.
    """
    models = {str(fast.engine.recipe): fast} if isinstance(fast, OptimizedModule) else dict(fast)
    if not models:
        raise BadInput("no model given; a report needs at least one optimized model")
    name = type(next(iter(models.values())).original).__name__
    parts = [_header(name, models)]
    if rows:
        drawing = chart(rows)
        parts.append(_section("Measured", _measured(rows)))
        parts += [_section("Quality for compute", drawing)] if drawing else []
    if images:
        parts.append(_section("Images", _images(images)))
    parts += [_section("Schedules", _schedules(models))]
    parts += [_model(n, m) for n, m in models.items()]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ditopt: {_e(name)}</title><style>{STYLE}</style>"
    )
    body = f"<main>{''.join(parts)}</main>"
    path = Path(path)
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'
    path.write_text(page, encoding="utf-8")
    return path


def _e(value: object) -> str:
    return html.escape(str(value))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_e(title)}</h2>{body}</section>\n"


def _table(
    header: Sequence[str], body: Iterable[Sequence[str]], words: Iterable[int] = (0,), marks: Sequence[str] = ()
) -> str:
    """``words``: columns that hold text (the others are numbers). ``marks``: a class for each line."""
    left = set(words)
    last = len(header) - 1

    def line(cells: Sequence[str], tag: str, mark: str) -> str:
        inside = ""
        for i, cell in enumerate(cells):
            kind = ("last" if i == last else "") if i in left else "n"
            inside += f"<{tag}{f' class={kind}' if kind else ''}>{_e(cell)}</{tag}>"
        return f"<tr{f' class={mark}' if mark else ''}>{inside}</tr>"

    lines = "".join(line(cells, "td", marks[i] if marks else "") for i, cells in enumerate(body))
    return f"<div class=scroll><table><thead>{line(header, 'th', '')}</thead><tbody>{lines}</tbody></table></div>"


def _header(name: str, models: Mapping[str, OptimizedModule]) -> str:
    first = next(iter(models.values()))
    program = first.compiled.captured.program
    facts = [
        ("weights", size(sum(p.nbytes for p in program.params.values()))),
        ("blocks", str(len(_outlined(first).blocks()))),
        ("a step", f"{count(first.compiled.plan.manifest.full_flops)}FLOP"),
        ("inputs", ", ".join(f"{i.name} {list(i.type.shape)}" for i in program.inputs)),
    ]
    if len(models) == 1:
        facts += [("recipe", first.engine.recipe.name or str(first.engine.recipe)), ("target", first.engine.target)]
    listed = "".join(f"<div><dt>{_e(k)}</dt><dd>{_e(v)}</dd></div>" for k, v in facts)
    return f"<header><p class=brand>ditopt</p><h1>{_e(name)}</h1><dl>{listed}</dl></header>\n"


def _outlined(fast: OptimizedModule) -> Program:
    """The first Program of the history that knows its blocks: the plain model's structure."""
    found: Program = next((r.program for r in fast.history if r.program.blocks()), fast.compiled.captured.program)
    return found


def _measured(rows: Sequence[Row]) -> str:
    header, body = cells(rows)
    marks = ["loses" if r.loses else r.kind for r in rows]
    lost, tried = sum(bool(r.loses) for r in rows), sum(r.kind == "recipe" for r in rows)
    which = f"{lost} of {tried} rows" if lost else "No row"
    verb = "give" if lost > 1 else "gives"
    said = f"{which} {verb} less than plain sampling with fewer steps for the same FLOPs."
    return f"<p class=note>{_e(said)}</p>" + _table(
        header, body, (0, 1, *(i for i, title in enumerate(header) if not title)), marks
    )


def _images(images: Mapping[str, Tensor]) -> str:
    reference = next(iter(images.values()))
    figures = []
    for name, batch in images.items():
        if batch.ndim not in (4, 5) or batch.shape[1] not in (1, 3) or batch.shape != reference.shape:
            expected = "(N, 1 or 3, H, W), or (N, 1 or 3, frames, H, W) for videos, alike for all names"
            raise BadInput(f"images of {name!r} have shape {tuple(batch.shape)}; expected {expected}")
        body, said = _picture(batch, f"samples: {name}"), "the reference"
        if batch is not reference:
            difference = (batch - reference).abs()
            worst = float(difference.max())
            seen = worst * DIFFERENCE > 1 / 255
            said = f"largest difference {worst:.2g}" if worst else "equal to the reference, bit by bit"
            said += f"; below: difference x {DIFFERENCE}" if seen else ""
            body += _picture((difference * DIFFERENCE).clamp(0, 1), f"difference: {name}") if seen else ""
        figures.append(f"<figure><figcaption><b>{_e(name)}</b>{_e(said)}</figcaption>{body}</figure>")
    return f"<div class=figures>{''.join(figures)}</div>"


def _picture(batch: Tensor, alt: str) -> str:
    data = base64.b64encode(png(grid(batch))).decode()
    return f'<img alt="{_e(alt)}" src="data:image/png;base64,{data}">'


# -- one model ---------------------------------------------------------------------------------------------------------


def _schedules(models: Mapping[str, OptimizedModule]) -> str:
    """A heat map of each recipe's last request. The same recipe on two targets runs the same schedule: shown once."""
    names: dict[str, list[str]] = {}
    for name, fast in models.items():
        names.setdefault(str(fast.engine.recipe), []).append(name)
    return "".join(f"<h3>{_e(', '.join(same))}</h3>{_schedule(models[same[0]])}" for same in names.values())


def _schedule(fast: OptimizedModule) -> str:
    manifest, ran = fast.compiled.plan.manifest, fast.schedule_rows
    if not ran:
        return "<p class=note>No request has run yet.</p>"
    if not manifest.decisions:
        return f"<p class=note>Every block computes in each of the {len(ran)} calls of the last request.</p>"
    first = [r for r in ran if r.branch == ran[0].branch]
    others = len({r.branch for r in ran}) - 1
    said = f"The last request{f', first of {others + 1} guidance branches' if others else ''}. "
    said += "A column is a step, a line is a block"
    modules = has_modules(region for d in manifest.decisions for region in d.regions)
    said += ", its attention above its MLP." if modules else "."
    holds = {d.predictor.basis == "hold" for d in manifest.decisions}
    keys = [("compute", "computed")]
    keys += [("forecast", "predicted from earlier steps")] if False in holds else []
    keys += [("hold", "reused as it was")] if True in holds else []
    legend = "".join(f"<span><i class={c}></i>{_e(t)}</span>" for c, t in keys)
    picture = heat_map([b.id for b in _outlined(fast).blocks()] or ["model"], manifest.decisions, first)
    return f"<p class=note>{_e(said)}</p><div class=scroll>{picture}</div><p class=legend>{legend}</p>"


def _model(name: str, fast: OptimizedModule) -> str:
    compiled = fast.compiled
    body = f"<p class=recipe><code>{_e(fast.engine.recipe)}</code></p>"
    manifest = compiled.plan.manifest
    body += _passes(compiled.history) + _decisions(manifest, fast) + _costs(compiled.program, manifest, fast)
    return f"<section><details><summary><h2>{_e(name)}</h2></summary>{body}</details></section>\n"


def _passes(history: Sequence[PassResult]) -> str:
    out = ["<h3>Passes: sites changed, and why not more</h3>"]
    for r in history:
        said = "".join(f"<li class=refused><b>refused</b> {_e(s)}</li>" for s in r.refused)
        said += "".join(f"<li>{_e(s)}</li>" for s in r.notes)
        mark = "count applied" if r.applied else "count"
        took = f"{r.ms:.0f} ms" + ("" if r.asked else ", added because another pass needs it")
        head = f'<span class="{mark}">{r.applied}</span><code>{_e(r.text)}</code><span class=ms>{took}</span>'
        inside = f"<pre>{_diff(r.diff())}</pre>" if r.applied else "<p class=note>The program is unchanged.</p>"
        out.append(f"<details class=pass><summary>{head}</summary>{inside}</details>")
        out.append(f"<ul>{said}</ul>" if said else "")
    return "".join(out)


def _diff(text: str) -> str:
    lines = text.splitlines()
    tags = {"+": "ins", "-": "del"}
    out = []
    for line in lines[:DIFF_LINES]:
        tag = tags.get(line[:1])
        out.append(f"<{tag}>{_e(line)}</{tag}>" if tag else _e(line))
    if len(lines) > DIFF_LINES:
        out.append(f"... {len(lines) - DIFF_LINES} more lines")
    return "\n".join(out)


def _decisions(manifest: Manifest, fast: OptimizedModule) -> str:
    """What is decided each step, by what, and what the host read to do so."""
    pace = [f"<li>{_e(line.strip())}</li>" for line in pace_text(fast.program)[:1]]
    if not manifest.decisions and not pace:
        return ""
    last = fast.engine.session.measured
    out = []
    for d in manifest.decisions:
        first, *rest = decision_text(d)
        if d.rule is not None:
            rest.append(_read(fast.stats.measured[d.name], last.get(d.name, [])))
        out.append(f"<li>{_e(first)}<ul>{''.join(f'<li>{_e(line.strip())}</li>' for line in rest)}</ul></li>")
    return f"<h3>Decisions</h3><ul>{''.join([*out, *pace])}</ul>"


def _read(times: int, last: Sequence[float]) -> str:
    said = f"the host read it {times} times"
    if not last:
        return said
    return f"{said}; in the last request {len(last)} times, between {min(last):.3g} and {max(last):.3g}"


def _costs(program: Program, manifest: Manifest, fast: OptimizedModule) -> str:
    stats = fast.stats
    full = max(manifest.full_flops, 1)
    lines = []
    for g in manifest.every_graph:
        memo = next((m for m in manifest.memos if m.function == g.name), None)
        runs = "each step" if memo is None else "once a request" if memo.lifetime == "request" else "once a timestep"
        ran = str(stats.calls if g is manifest.probe else stats.graphs[g.name]) if memo is None else ""
        lines.append([g.name, runs, ran, count(g.flops), f"{g.flops / full:.1%}", size(weight_bytes(program, g))])
    state = sum(s.type.nbytes for s in manifest.state)
    said = [
        f"{stats.calls} calls in {stats.requests} requests executed {stats.share_block_flops:.1%} of the blocks' FLOPs"
    ]
    said[0] += f" and {stats.share_flops:.1%} of all." if stats.calls else " (none yet)."
    if manifest.state:
        said.append(f"State: {size(state)} a guidance branch, in {len(manifest.state)} slots.")
    if manifest.memos:
        said.append(f"Hoisted values: filled {stats.memo_fills} times, found {stats.memo_hits} times.")
    integers = fast.engine.observed or " ".join(line.strip() for line in integer_plan(program, fast.engine.target))
    if integers:
        said.append(f"{integers[0].upper()}{integers[1:]}.")
    parts = [[role, count(f), f"{f / full:.1%}"] for role, f in role_flops(_outlined(fast)).items()]
    return (
        f"<h3>Costs</h3><p>{_e(' '.join(said))}</p>"
        + _table(["graph", "runs", "calls", "FLOPs", "of plain", "weights read"], lines, (0, 1))
        + "<details class=pass><summary>Where the plain model's FLOPs are</summary>"
        + _table(["part", "FLOPs a step", "share"], parts)
        + "</details>"
    )
