"""Drawings of the report: still and animated PNG without an image library, two SVG charts, and the page's style."""

from __future__ import annotations

import html
import itertools
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ditopt.ir.program import Decision
from ditopt.measure import EXACT, Row, label
from ditopt.runtime.account import Row as Ran
from ditopt.runtime.policy import REUSE

COLUMNS = 10
"""Images in a line of a grid."""

WIDEST = 1600
"""Pixels of the widest picture; larger grids are averaged down."""


FRAME_MS = 125
"""Milliseconds that a frame of an animated picture shows."""


def grid(batch: Tensor, columns: int = COLUMNS) -> Tensor:
    """(N, C, H, W) -> one picture (C, rows * (H + 1) - 1, columns * (W + 1) - 1); gaps and missing images are 0.

    Of videos (N, C, frames, H, W) the same for each frame: (C, frames, rows * (H + 1) - 1, ...).
    """
    columns = min(columns, len(batch))
    shrink = max(1, math.ceil(columns * batch.shape[-1] / WIDEST))
    if shrink > 1:
        flat = batch.float().flatten(0, -4)
        batch = torch.nn.functional.avg_pool2d(flat, shrink, ceil_mode=True).unflatten(0, batch.shape[:-3])
    n, *inner, h, w = batch.shape
    rows = math.ceil(n / columns)
    out = torch.zeros(*inner, rows * (h + 1) - 1, columns * (w + 1) - 1)
    for i, image in enumerate(batch):
        top, left = i // columns * (h + 1), i % columns * (w + 1)
        out[..., top : top + h, left : left + w] = image
    return out


def png(image: Tensor) -> bytes:
    """A (1 or 3, H, W) picture in [0, 1] as an 8-bit PNG file; (1 or 3, frames, H, W) as an animated one, in a loop.

    Whatever cannot show animated PNG files shows the first frame of it.
    """
    channels, *_, height, width = image.shape
    head = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    frames = image.unbind(1) if image.ndim == 4 else (image,)
    chunks = [_chunk(b"IHDR", head)]
    if len(frames) > 1:
        chunks.append(_chunk(b"acTL", struct.pack(">II", len(frames), 0)))  # 0: for ever
    numbers = itertools.count()  # of control and data chunks together
    for i, frame in enumerate(frames):
        if len(frames) > 1:
            control = (next(numbers), width, height, 0, 0, FRAME_MS, 1000, 0, 0)  # at 0, 0; replaces what was there
            chunks.append(_chunk(b"fcTL", struct.pack(">IIIIIHHBB", *control)))
        data = _lines(frame)
        chunks.append(_chunk(b"fdAT", struct.pack(">I", next(numbers)) + data) if i else _chunk(b"IDAT", data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + _chunk(b"IEND", b"")


def _lines(image: Tensor) -> bytes:
    """The packed pixels of a picture; each line of a PNG begins with its filter, here none."""
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    height = len(pixels)
    lines = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels.reshape(height, -1)], 1)
    return zlib.compress(lines.numpy().tobytes(), 9)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _element(tag: str, text: str = "", **attributes: object) -> str:
    """An SVG element; ``class_`` is class, and an underscore in a name stands for a hyphen. Everything is escaped."""
    named = {k.rstrip("_").replace("_", "-"): f"{v:.1f}" if isinstance(v, float) else v for k, v in attributes.items()}
    inside = "".join(f' {k}="{html.escape(str(v))}"' for k, v in named.items())
    return f"<{tag}{inside}>{html.escape(text)}</{tag}>"


def _titled(element: str, title: str) -> str:
    """An empty element with a tooltip."""
    opening, closing, name = element.rpartition("</")
    return f"{opening}<title>{html.escape(title)}</title>{closing}{name}"


# -- quality for compute -----------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 860, 380, 52, 24, 40, 44


def chart(rows: Sequence[Row]) -> str:
    """PSNR over executed FLOPs: the line of fewer steps, and a dot for each recipe. "" where all rows equal plain."""
    few = sorted((r for r in rows if r.kind == "fewer"), key=lambda r: r.cost)
    recipes = [r for r in rows if r.kind == "recipe"]
    finite = [r.psnr for r in [*few, *recipes] if r.psnr < EXACT]
    if not finite:
        return ""
    low = math.floor(min(finite) / 10) * 10
    high = max(math.ceil(max(finite) / 10) * 10, low + 10)

    def x(r: Row) -> float:
        return _LEFT + min(r.cost, 1.0) * (_WIDTH - _LEFT - _RIGHT)

    def y(db: float) -> float:
        return _TOP if db >= EXACT else _HEIGHT - _BOTTOM - (db - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP - 30)

    right, out = _WIDTH - _RIGHT, []
    for db in range(low, high + 1, 5 if high - low <= 30 else 10):
        out.append(_element("line", class_="grid", x1=_LEFT, x2=right, y1=y(db), y2=y(db)))
        out.append(_element("text", str(db), x=_LEFT - 8, y=y(db) + 4, text_anchor="end"))
    out.append(_element("line", class_="grid equal", x1=_LEFT, x2=right, y1=_TOP, y2=_TOP))
    out.append(_element("text", "equal", x=_LEFT - 8, y=_TOP + 4, text_anchor="end"))
    for percent in range(0, 101, 20):
        at = _LEFT + percent / 100 * (right - _LEFT)
        out.append(_element("text", f"{percent} %", x=at, y=_HEIGHT - 24, text_anchor="middle"))
    out.append(_element("text", "median PSNR to plain, dB", x=0, y=14))
    out.append(_element("text", "FLOPs executed, share of plain", x=right, y=_HEIGHT - 4, text_anchor="end"))
    out.append(_element("polyline", class_="few", points=" ".join(f"{x(r):.1f},{y(r.psnr):.1f}" for r in few)))
    for r in few:
        dot = _element("circle", class_="few", cx=x(r), cy=y(r.psnr), r=4)
        out.append(_titled(dot, f"{label(r)}: {r.psnr:.1f} dB"))
        out.append(_element("text", str(r.steps), x=x(r), y=y(r.psnr) + 18, text_anchor="middle"))
    if few:
        last = few[-1]
        out.append(_element("text", "fewer steps", x=x(last) + 12, y=y(last.psnr) + 5))
    out += _dots(recipes, x, y)
    inside = "".join(out)
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="PSNR by FLOPs">{inside}</svg>'


def _dots(recipes: Sequence[Row], x: Callable[[Row], float], y: Callable[[float], float]) -> list[str]:
    """Dots of recipes; what lies at the same place shares one label."""
    places: dict[tuple[int, int], list[Row]] = {}
    for r in recipes:
        places.setdefault((round(x(r) / 12), round(y(r.psnr) / 12)), []).append(r)
    out: list[str] = []
    taken: list[tuple[float, float, float]] = []  # labels so far: left, right, baseline
    for group in places.values():
        r = group[0]
        names = dict.fromkeys(g.name for g in group)
        words = ", ".join(f"{n} ({', '.join(g.target for g in group if g.name == n)})" for n in names)
        mark = "dot lost" if r.loses else "dot"
        said = f"{words}: {r.psnr:.1f} dB at {r.cost:.1%}"
        out.append(_titled(_element("circle", class_=mark, cx=x(r), cy=y(r.psnr), r=6), said))
        half = 3.5 * len(words)  # of its width at this font size, roughly
        middle = min(max(x(r), _LEFT + half), _WIDTH - _RIGHT - half)
        lines = [y(r.psnr) - 11, y(r.psnr) + 21, y(r.psnr) - 27, y(r.psnr) + 37]
        line = next((b for b in lines if not any(_over(middle, half, b, *t) for t in taken)), lines[0])
        taken.append((middle - half, middle + half, line))
        out.append(_element("text", words, class_="label", x=middle, y=line, text_anchor="middle"))
    return out


def _over(middle: float, half: float, baseline: float, left: float, right: float, line: float) -> bool:
    return middle - half < right and middle + half > left and abs(baseline - line) < 15


# -- schedule ----------------------------------------------------------------------------------------------------------

_CELL, _GUTTER, _HEAD = 24, 80, 20


def has_modules(regions: Iterable[str]) -> bool:
    """Whether some of these regions are parts of blocks."""
    return any(".attn" in region or region.endswith(".mlp") for region in regions)


def heat_map(blocks: Sequence[str], decisions: Sequence[Decision], ran: Sequence[Ran]) -> str:
    """Blocks by executed steps; a cell is the block, or its attention (each kind that is cached) over its MLP where
    modules are cached."""
    how = {d.name: "hold" if d.predictor.basis == "hold" else "forecast" for d in decisions}
    owner = {region: d.name for d in decisions for region in d.regions}
    split = has_modules(owner)
    tall = max(6, min(20, 480 // max(len(blocks), 1)))
    out = []
    for column, row in enumerate(ran):
        if column % 5 == 0 or column == len(ran) - 1:
            at = _GUTTER + column * _CELL + _CELL / 2 - 1
            out.append(_element("text", str(row.step), x=at, y=13, text_anchor="middle"))
    every = math.ceil(14 / tall)
    for line, block in enumerate(blocks):
        top = _HEAD + line * tall
        if line % every == 0:
            out.append(_element("text", block, x=_GUTTER - 8, y=top + tall / 2 + 3, text_anchor="end"))
        for column, row in enumerate(ran):
            attention = [r for r in owner if f"{r}.".startswith(f"{block}.attn.")] or [f"{block}.attn"]
            parts = [*attention, f"{block}.mlp"] if split else [block]
            states = [_state(part, block, row, owner, how) for part in parts]
            height = (tall - 2) / len(states)
            cell = "".join(
                _element(
                    "rect",
                    class_=state,
                    x=_GUTTER + column * _CELL,
                    y=top + i * height,
                    width=_CELL - 2,
                    height=height,
                )
                for i, state in enumerate(states)
            )
            said = html.escape(f"step {row.step}, {block}: {', '.join(dict.fromkeys(states))}")
            out.append(f"<g><title>{said}</title>{cell}</g>")
    width, height_ = _GUTTER + _CELL * len(ran), _HEAD + tall * len(blocks)
    box = f'width="{width}" height="{height_}" viewBox="0 0 {width} {height_}"'
    return f'<svg class="heat" {box} role="img" aria-label="schedule">{"".join(out)}</svg>'


def _state(region: str, block: str, row: Ran, owner: Mapping[str, str], how: Mapping[str, str]) -> str:
    for asked in (region, block, "model"):
        decision = owner.get(asked)
        if decision is not None and row.choices.get(decision) == REUSE:
            return how[decision]
    return "compute"


STYLE = """
:root { color-scheme: light dark; --bg: #f7f7f5; --card: #fff; --ink: #1c1e21; --soft: #5f656d; --line: #e3e4e1;
  --compute: #2f5d8a; --forecast: #f0b452; --hold: #dadfe4; --bad: #b93d26; --few: #8a8f98;
  --add: #e3f2e1; --del: #fbe4df }
@media (prefers-color-scheme: dark) { :root { --bg: #131518; --card: #1b1e23; --ink: #e7e8ea; --soft: #9aa1ab;
  --line: #2f343b; --compute: #6ea8dc; --forecast: #d99a2b; --hold: #3a414a; --bad: #ef7b62; --few: #8b929c;
  --add: #1d3323; --del: #40241f } }
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.55 system-ui, sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px }
header { margin: 0 4px 22px }
.brand { color: var(--compute); font-weight: 700; letter-spacing: .06em; margin: 0 }
h1 { margin: 0 0 .5em; font-size: 30px; line-height: 1.25; overflow-wrap: anywhere }
h2 { font-size: 19px; margin: 0 0 10px }
h3 { font-size: 14px; margin: 26px 0 6px }
dl { display: flex; flex-wrap: wrap; gap: 10px 32px; margin: 0 }
dt { font-size: 12px; color: var(--soft) }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px;
  margin: 0 0 18px }
.note, .legend { color: var(--soft); font-size: 13px; margin: 6px 0 10px }
.recipe code { color: var(--soft); overflow-wrap: anywhere }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums }
th { font-size: 12px; color: var(--soft); font-weight: 600; text-align: left; vertical-align: bottom }
td, th { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap }
td.last { white-space: normal; min-width: 12em }
.n { text-align: right }
tr.fewer td { color: var(--soft) }
tr.loses td { color: var(--bad) }
tr.recipe td:first-child, tr.loses td:first-child { font-weight: 600 }
svg { display: block }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft) }
.chart { width: 100%; max-width: 960px; height: auto }
.grid { stroke: var(--line) }
.equal { stroke-dasharray: 2 4 }
polyline.few { fill: none; stroke: var(--few); stroke-width: 2 }
circle.few { fill: var(--few) }
.dot { fill: var(--compute); stroke: var(--card); stroke-width: 2 }
.lost { fill: var(--bad) }
svg text.label { fill: var(--ink); font-weight: 600; paint-order: stroke; stroke: var(--card); stroke-width: 3px }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 24px }
figure { margin: 0; min-width: 0 }
figcaption { font-size: 13px; color: var(--soft); margin-bottom: 6px }
figcaption b { color: var(--ink); display: block }
img { display: block; width: 100%; image-rendering: pixelated; border-radius: 4px; margin-bottom: 4px;
  background: #000 }
rect.compute { fill: var(--compute) }
rect.forecast { fill: var(--forecast) }
rect.hold { fill: var(--hold) }
i.compute { background: var(--compute) }
i.forecast { background: var(--forecast) }
i.hold { background: var(--hold) }
.legend span { margin-right: 18px }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px }
summary { cursor: pointer; overflow-wrap: anywhere }
summary h2 { display: inline }
.pass { margin: 6px 0 }
.count { display: inline-block; min-width: 2.6em; padding: 0 6px; text-align: center; border-radius: 9px;
  font-size: 12px; font-weight: 700; margin-right: 8px; background: var(--hold) }
.count.applied { background: var(--compute); color: var(--card) }
.ms { color: var(--soft); font-size: 13px; margin-left: 10px }
ul { margin: 2px 0 10px 44px; padding: 0; font-size: 13px; color: var(--soft) }
.refused b { color: var(--bad) }
code, pre { font-family: ui-monospace, monospace; font-size: 13px }
pre { overflow: auto; max-height: 420px; font-size: 12px; line-height: 1.45; background: var(--bg);
  border: 1px solid var(--line); border-radius: 6px; padding: 10px }
ins, del { text-decoration: none; display: inline-block; min-width: 100% }
ins { background: var(--add) }
del { background: var(--del) }
"""
