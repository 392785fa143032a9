"""The report: one HTML file without scripts or external files, of what was run, what it gave, and what each pass did."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ditopt.artifact import Manifest, StepGraph
from ditopt.errors import BadInput
from ditopt.explain import role_flops, size, weight_bytes
from ditopt.ir.program import Decision, Program
from ditopt.measure import Row, cells, label
from ditopt.optimized import OptimizedModule
from ditopt.pipeline import PassResult
from ditopt.runtime.account import Row as Ran
from ditopt.runtime.policy import REUSE

COLUMNS = 10
"""Images in a line of a grid."""

WIDEST = 1600
"""Pixels of the widest picture; larger grids are averaged down."""


def write(
    fast: OptimizedModule | Mapping[str, OptimizedModule],
    path: Path,
    images: Mapping[str, Tensor] | None = None,
    rows: Sequence[Row] | None = None,
) -> Path:
    """Write the report of one optimized model, or of several by name, to ``path``; returns it.

    images: by name, (N, 1 or 3, H, W) in [0, 1]; the first is the reference that the others are compared with.
    rows: of ``measure.compare``. BadInput where a model was not called yet or images have another shape.
    """
    models = {str(fast.engine.recipe): fast} if isinstance(fast, OptimizedModule) else dict(fast)
    if not models:
        raise BadInput("a report needs at least one optimized model")
    first = next(iter(models.values()))
    name = type(first.original).__name__
    parts = [_header(name, models)]
    if rows:
        parts += [_section("Quality for compute", _chart(rows)), _section("Measured", _measured(rows))]
    if images:
        parts.append(_section("Images", _images(images)))
    parts += [_model(n, m, alone=len(models) == 1) for n, m in models.items()]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ditopt: {_e(name)}</title><style>{STYLE}</style></head>\n<body><main>{''.join(parts)}</main></body></html>\n"
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _e(value: object) -> str:
    return html.escape(str(value))


def _section(title: str, body: str, note: str = "") -> str:
    return f"<section><h2>{_e(title)}</h2>{f'<p class=note>{_e(note)}</p>' if note else ''}{body}</section>\n"


def _table(header: Sequence[str], body: Iterable[Sequence[str]], text: Iterable[int] = (0,), marks: Sequence[str] = ()) -> str:
    """``text``: columns that hold words (the others are numbers). Cells are escaped here. ``marks``: a class a line."""
    left = set(text)

    def line(cells: Sequence[str], tag: str, mark: str = "") -> str:
        inside = "".join(f"<{tag}{'' if i in left else ' class=n'}>{_e(c)}</{tag}>" for i, c in enumerate(cells))
        return f"<tr{f' class={mark}' if mark else ''}>{inside}</tr>"

    lines = [line(c, "td", marks[i] if marks else "") for i, c in enumerate(body)]
    return f"<div class=scroll><table><thead>{line(header, 'th')}</thead><tbody>{''.join(lines)}</tbody></table></div>"


def _header(name: str, models: Mapping[str, OptimizedModule]) -> str:
    first = next(iter(models.values()))
    program = first.compiled.captured.program
    blocks = next((len(r.program.blocks()) for r in first.history if r.program.blocks()), 0)
    facts = [
        ("weights", size(sum(p.nbytes for p in program.params.values()))),
        ("blocks", str(blocks)),
        ("FLOPs a step", number(first.compiled.plan.manifest.full_flops)),
        ("inputs", ", ".join(f"{i.name} {tuple(i.type.shape)}" for i in program.inputs)),
    ]
    if len(models) == 1:
        facts += [("recipe", str(first.engine.recipe)), ("target", first.engine.target)]
    listed = "".join(f"<div><dt>{_e(k)}</dt><dd>{_e(v)}</dd></div>" for k, v in facts)
    return f"<header><p class=brand>ditopt</p><h1>{_e(name)}</h1><dl>{listed}</dl></header>\n"


def number(value: float) -> str:
    """A count with three digits and a unit prefix."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g}"


# -- measured ----------------------------------------------------------------------------------------------------------


def _measured(rows: Sequence[Row]) -> str:
    header, body = cells(rows)
    marks = ["loses" if r.loses else r.kind for r in rows]
    lost = sum(bool(r.loses) for r in rows)
    said = (
        f"{lost} of {sum(r.kind == 'recipe' for r in rows)} recipes give less than plain sampling with fewer steps at the same "
        "cost." if lost else "No recipe gives less than plain sampling with fewer steps at the same cost."
    )
    return _table(header, body, (0, 1, len(header) - 1), marks) + f"<p class=note>{_e(said)}</p>"


def _chart(rows: Sequence[Row]) -> str:
    """PSNR over executed FLOPs: the line of fewer steps, and a dot for each recipe."""
    dots = [r for r in rows if r.kind in ("fewer", "recipe")]
    finite = [r.psnr for r in dots if math.isfinite(r.psnr) and r.psnr < 90]
    if not finite:
        return "<p class=note>Every row equals plain sampling.</p>"
    low = math.floor(min(finite) / 10) * 10 - 0.0
    high = max(math.ceil(max(finite) / 10) * 10, low + 10)
    width, height, left, bottom, top = 860, 360, 52, 40, 34

    def x(share: float) -> float:
        return left + min(share, 1.05) * (width - left - 24) / 1.05

    def y(db: float) -> float:
        return top if db > high else height - bottom - (db - low) / (high - low) * (height - bottom - top - 22)

    out = [f'<svg class=chart viewBox="0 0 {width} {height}" role=img aria-label="PSNR over executed FLOPs">']
    for db in range(int(low), int(high) + 1, 5 if high - low <= 30 else 10):
        out.append(f'<line class=grid x1={left} x2={width - 24} y1={y(db):.1f} y2={y(db):.1f} /><text class=tick x={left - 8} y={y(db) + 4:.1f} text-anchor=end>{db}</text>')
    for percent in range(0, 101, 20):
        out.append(f'<text class=tick x={x(percent / 100):.1f} y={height - 18} text-anchor=middle>{percent} %</text>')
    out.append(f'<text class=tick x={left - 8} y={top + 4} text-anchor=end>equal</text><line class=grid x1={left} x2={width - 24} y1={top} y2={top} stroke-dasharray="2 4" />')
    out.append(f'<text class=axis x={left} y=14>median PSNR to plain, dB</text><text class=axis x={width - 24} y={height - 2} text-anchor=end>FLOPs executed, share of plain</text>')
    few = sorted((r for r in dots if r.kind == "fewer"), key=lambda r: r.cost)
    line = " ".join(f"{x(r.cost):.1f},{y(r.psnr):.1f}" for r in few)
    out.append(f"<polyline class=fewer points='{line}' />")
    for r in few:
        out.append(f"<circle class=few cx={x(r.cost):.1f} cy={y(r.psnr):.1f} r=4><title>{_e(label(r))}: {r.psnr:.1f} dB</title></circle>")
    if few:
        out.append(f'<text class=few x={x(few[0].cost) + 8:.1f} y={y(few[0].psnr) + 14:.1f}>fewer steps</text>')
    out += _labelled([r for r in dots if r.kind == "recipe"], x, y)
    return "".join(out) + "</svg>"


def _labelled(rows: Sequence[Row], x: object, y: object) -> list[str]:
    """Dots of recipes; rows at the same place share one label."""
    places: dict[tuple[int, int], list[Row]] = {}
    for r in rows:
        places.setdefault((round(x(r.cost) / 14), round(y(r.psnr) / 14)), []).append(r)  # type: ignore[operator]
    out = []
    for group in places.values():
        r = group[0]
        px, py = x(r.cost), y(r.psnr)  # type: ignore[operator]
        names = list(dict.fromkeys(g.name for g in group))
        words = ", ".join(f"{n} ({', '.join(g.target for g in group if g.name == n)})" for n in names)
        anchor, dx = ("end", -10) if px > 560 else ("start", 10)
        mark = "dot lost" if r.loses else "dot"
        out.append(f"<circle class='{mark}' cx={px:.1f} cy={py:.1f} r=6><title>{_e(words)}: {r.psnr:.1f} dB at {r.cost:.1%}</title></circle>")
        out.append(f"<text class=label x={px + dx:.1f} y={py - 9 if anchor == 'start' else py + 18:.1f} text-anchor={anchor}>{_e(words)}</text>")
    return out


# -- images ------------------------------------------------------------------------------------------------------------


def _images(images: Mapping[str, Tensor]) -> str:
    reference = next(iter(images.values()))
    figures = []
    for name, batch in images.items():
        if batch.ndim != 4 or batch.shape[1] not in (1, 3) or batch.shape != reference.shape:
            raise BadInput(f"images of {name!r} have shape {tuple(batch.shape)}; expected (N, 1 or 3, H, W), alike for all names")
        body = _picture(batch, f"samples of {name}")
        if batch is not reference:
            difference = (batch - reference).abs()
            worst = float(difference.max())
            body += _picture((difference * 8).clamp(0, 1), f"difference of {name} to the reference, times 8")
            caption = f"largest difference {worst:.3f}; lower picture: difference x 8" if worst else "equal to the reference"
        else:
            caption = "the reference"
        figures.append(f"<figure><figcaption><b>{_e(name)}</b> {_e(caption)}</figcaption>{body}</figure>")
    return f"<div class=figures>{''.join(figures)}</div>"


def _picture(batch: Tensor, alt: str) -> str:
    data = base64.b64encode(png(grid(batch))).decode()
    return f'<img alt="{_e(alt)}" src="data:image/png;base64,{data}">'


def grid(batch: Tensor, columns: int = COLUMNS) -> Tensor:
    """(N, C, H, W) -> one picture (C, rows * (H + 1) - 1, columns * (W + 1) - 1); gaps and missing images are 0."""
    n, c, h, w = batch.shape
    columns = min(columns, n)
    shrink = max(1, math.ceil(columns * w / WIDEST))
    if shrink > 1:
        batch = torch.nn.functional.avg_pool2d(batch.float(), shrink, ceil_mode=True)
        n, c, h, w = batch.shape
    rows = math.ceil(n / columns)
    out = torch.zeros(c, rows * (h + 1) - 1, columns * (w + 1) - 1)
    for i, image in enumerate(batch):
        top, left = i // columns * (h + 1), i % columns * (w + 1)
        out[:, top : top + h, left : left + w] = image
    return out


def png(image: Tensor) -> bytes:
    """A (1 or 3, H, W) picture in [0, 1] as an 8-bit PNG file."""
    channels, height, width = image.shape
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    lines = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels.reshape(height, -1)], 1)  # filter 0 a line

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    body = zlib.compress(lines.numpy().tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


# -- one model ---------------------------------------------------------------------------------------------------------


def _model(name: str, fast: OptimizedModule, alone: bool) -> str:
    compiled = fast.compiled
    body = f"<p class=recipe><code>{_e(fast.engine.recipe)}</code></p>"
    body += _schedule(compiled.program, compiled.plan.manifest, fast.schedule_rows)
    body += _passes(compiled.history) + _costs(compiled.program, compiled.plan.manifest, fast)
    if alone:
        return _section("Schedule, passes and costs", body)
    return f"<section><details class=model open><summary><h2>{_e(name)}</h2></summary>{body}</details></section>\n"


def _schedule(program: Program, manifest: Manifest, ran: Sequence[Ran]) -> str:
    blocks = [b.id for b in program.blocks()]
    if not ran:
        return "<h3>Schedule</h3><p class=note>No request has run yet.</p>"
    if not manifest.decisions:
        return f"<h3>Schedule</h3><p class=note>Every block computes at each of the {len(ran)} calls of the last request.</p>"
    first = [r for r in ran if r.branch == ran[0].branch]
    more = len({r.branch for r in ran}) - 1
    note = f"First of {more + 1} guidance branches. " if more else ""
    forecast = any(d.predictor.basis != "hold" for d in manifest.decisions)
    keys = [("compute", "computed"), ("forecast", "predicted from earlier steps")] if forecast else [("compute", "computed")]
    keys += [("hold", "reused as it was")] if any(d.predictor.basis == "hold" for d in manifest.decisions) else []
    legend = "".join(f"<span><i class='{c}'></i>{_e(t)}</span>" for c, t in keys)
    picture = heat_map(blocks or ["model"], manifest.decisions, first)
    return f"<h3>Schedule</h3><p class=note>{note}Columns are steps, rows are blocks (a cell split in two: attention over MLP).</p><div class=scroll>{picture}</div><p class=legend>{legend}</p>"


def heat_map(blocks: Sequence[str], decisions: Sequence[Decision], ran: Sequence[Ran]) -> str:
    """An SVG of blocks by executed steps; each cell is the block, or its attention over its MLP where they are cached."""
    how = {d.name: "hold" if d.predictor.basis == "hold" else "forecast" for d in decisions}
    owner = {region: d.name for d in decisions for region in d.regions}
    split = any(r.endswith((".attn", ".mlp")) for r in owner)
    cell, tall, left, top = 22, max(8, min(20, 460 // max(len(blocks), 1))), 76, 18
    width, height = left + cell * len(ran) + 2, top + tall * len(blocks) + 2
    out = [f'<svg class=heat width={width} height={height} viewBox="0 0 {width} {height}" role=img aria-label="schedule">']
    for column, row in enumerate(ran):
        if column % 5 == 0 or column == len(ran) - 1:
            out.append(f"<text class=tick x={left + column * cell + cell / 2 - 1:.1f} y=12 text-anchor=middle>{row.step}</text>")
    every = max(1, math.ceil(12 / tall))
    for line, block in enumerate(blocks):
        y = top + line * tall
        if line % every == 0:
            out.append(f"<text class=tick x={left - 8} y={y + tall / 2 + 4:.1f} text-anchor=end>{_e(block)}</text>")
        for column, row in enumerate(ran):
            x = left + column * cell
            halves = [f"{block}.attn", f"{block}.mlp"] if split else [block]
            states = [_state(h, block, row, owner, how) for h in halves]
            title = f"step {row.step}, {block}: {' / '.join(dict.fromkeys(states))}"
            part = (tall - 2) / len(states)
            rects = "".join(f"<rect class={s} x={x} y={y + i * part:.1f} width={cell - 2} height={part:.1f} />" for i, s in enumerate(states))
            out.append(f"<g><title>{_e(title)}</title>{rects}</g>")
    return "".join(out) + "</svg>"


def _state(region: str, block: str, row: Ran, owner: Mapping[str, str], how: Mapping[str, str]) -> str:
    for asked in (region, block, "model"):
        decision = owner.get(asked)
        if decision is not None and row.choices.get(decision) == REUSE:
            return how[decision]
    return "compute"


def _passes(history: Sequence[PassResult]) -> str:
    out = ["<h3>Passes</h3>"]
    for result in history:
        said = "".join(f"<li class=refused><b>refused</b> {_e(s)}</li>" for s in result.refused)
        said += "".join(f"<li>{_e(s)}</li>" for s in result.notes)
        mark = "applied" if result.applied else "idle"
        head = f"<span class='count {mark}'>{result.applied}</span><code>{_e(result.text)}</code><span class=ms>{result.ms:.0f} ms{'' if result.asked else ', added by the manager'}</span>"
        diff = f"<pre>{_diff(result.diff())}</pre>" if result.applied else ""
        out.append(f"<details class=pass><summary>{head}</summary>{diff}</details>" + (f"<ul>{said}</ul>" if said else ""))
    return "".join(out)


def _diff(text: str, most: int = 400) -> str:
    lines = text.splitlines()
    marked = [f"<ins>{_e(t)}</ins>" if t[:1] == "+" else f"<del>{_e(t)}</del>" if t[:1] == "-" else _e(t) for t in lines[:most]]
    left = len(lines) - most
    return "\n".join([*marked, *([f"... and {left} more lines"] if left > 0 else [])])


def _costs(program: Program, manifest: Manifest, fast: OptimizedModule) -> str:
    stats = fast.stats
    graphs: list[tuple[StepGraph, str]] = [(g, "step") for g in manifest.graphs] + [(g, "once a value") for g in manifest.memo_graphs]
    full = max(manifest.full_flops, 1)
    lines = [
        [g.name, kind, str(stats.graphs[g.name]) if kind == "step" else "", number(g.flops), f"{g.flops / full:.1%}", size(weight_bytes(program, g))]
        for g, kind in graphs
    ]
    state = sum(s.type.nbytes for s in manifest.state)
    said = (
        f"{stats.share_block_flops:.1%} of the blocks' FLOPs and {stats.share_flops:.1%} of all were executed over {stats.calls} calls "
        f"in {stats.requests} requests. State: {size(state)} a guidance branch in {len(manifest.state)} slots. Hoisted values: "
        f"filled {stats.memo_fills} times, found {stats.memo_hits} times."
    )
    roles = [[r, number(f), f"{f / full:.1%}"] for r, f in role_flops(next((h.program for h in fast.history if h.program.blocks()), program)).items()]
    return (
        f"<h3>Costs</h3><p>{_e(said)}</p>"
        + _table(["graph", "runs", "calls", "FLOPs", "of plain", "weights read"], lines, (0, 1))
        + "<details class=pass><summary>Where the plain model's FLOPs are</summary>"
        + _table(["part", "FLOPs a step", "share"], roles)
        + "</details>"
    )


STYLE = """
:root{color-scheme:light dark;--bg:#fbfbf9;--card:#fff;--ink:#1c1e21;--soft:#62676f;--line:#e2e3e0;--compute:#2f5d8a;
--forecast:#f0b452;--hold:#d8dde3;--good:#2f5d8a;--bad:#c2452d;--few:#8a8f98;--add:#e3f2e1;--del:#fbe4df}
@media(prefers-color-scheme:dark){:root{--bg:#15171a;--card:#1c1f24;--ink:#e7e8ea;--soft:#9aa1ab;--line:#2f343b;
--compute:#6ea8dc;--forecast:#d99a2b;--hold:#3a414a;--good:#6ea8dc;--bad:#ef7b62;--few:#8b929c;--add:#1d3323;--del:#40241f}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.55 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}
header{border-bottom:1px solid var(--line);margin-bottom:20px;padding-bottom:16px}
.brand{color:var(--good);font-weight:700;letter-spacing:.06em;margin:0}h1{margin:.1em 0 .5em;font-size:30px;line-height:1.2;overflow-wrap:anywhere}
h2{font-size:19px;margin:0 0 10px}h3{font-size:13px;text-transform:uppercase;letter-spacing:.07em;color:var(--soft);margin:24px 0 8px}
dl{display:flex;flex-wrap:wrap;gap:10px 32px;margin:0}dt{font-size:12px;color:var(--soft)}dd{margin:0;font-weight:600;overflow-wrap:anywhere}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:20px 22px;margin:0 0 18px}
.note,.legend{color:var(--soft);font-size:13px;margin:6px 0 10px}.recipe code{font-size:13px;color:var(--soft)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th{font-size:12px;color:var(--soft);font-weight:600;text-align:left;white-space:nowrap;vertical-align:bottom}
td,th{padding:6px 14px 6px 0;border-bottom:1px solid var(--line)}.n{text-align:right}td:not(:last-child){white-space:nowrap}
tr.fewer td{color:var(--soft)}tr.loses td{color:var(--bad)}tr.recipe td:first-child{font-weight:600}
svg{display:block}.chart{width:100%;height:auto;max-width:860px}svg text{font:12px system-ui,sans-serif;fill:var(--soft)}
.grid{stroke:var(--line)}.fewer{fill:none;stroke:var(--few);stroke-width:2}circle.few{fill:var(--few)}
.dot{fill:var(--good);stroke:var(--card);stroke-width:2}.lost{fill:var(--bad)}svg text.label{fill:var(--ink);font-weight:600}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(320px,1fr));gap:22px}figure{margin:0;min-width:0}
figcaption{font-size:13px;color:var(--soft);margin-bottom:6px}figcaption b{color:var(--ink)}
img{display:block;width:100%;image-rendering:pixelated;border-radius:4px;margin-bottom:4px;background:#000}
.heat{margin:4px 0}rect.compute,i.compute{fill:var(--compute);background:var(--compute)}
rect.forecast,i.forecast{fill:var(--forecast);background:var(--forecast)}rect.hold,i.hold{fill:var(--hold);background:var(--hold)}
.legend span{margin-right:18px}.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
summary{cursor:pointer}summary h2{display:inline}.pass{margin:6px 0}.pass summary{overflow-wrap:anywhere}
.count{display:inline-block;min-width:2.2em;text-align:center;border-radius:9px;font-size:12px;font-weight:700;margin-right:8px;background:var(--hold)}
.count.applied{background:var(--compute);color:var(--card)}.ms{color:var(--soft);font-size:13px;margin-left:10px}
ul{margin:2px 0 10px 44px;padding:0;font-size:13px;color:var(--soft)}.refused b{color:var(--bad)}
code,pre{font-family:ui-monospace,monospace}code{font-size:13px}
pre{overflow:auto;max-height:420px;font-size:12px;line-height:1.45;background:var(--bg);border:1px solid var(--line);border-radius:6px;padding:10px}
ins,del{text-decoration:none;display:inline-block;min-width:100%}ins{background:var(--add)}del{background:var(--del)}
"""
