"""Contact sheets of drawn and sampled pictures and clips, and the command line that writes them."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ditopt import zoo

FRAME_MS = 150
"""Milliseconds that a frame of an animated sheet shows."""


class Told(Protocol):
    """Something that a caption tells."""

    def caption(self) -> str:
        """The sentence."""
        ...


T = TypeVar("T", bound=Told)


def sheet(pictures: Sequence[Tensor], titles: Sequence[str], columns: int = 8, scale: int = 4) -> Image.Image:
    """A contact sheet of (3, H, W) pictures in [0, 1], all of one shape, each over its title."""
    height, width = (side * scale for side in pictures[0].shape[1:])
    wrapped = [textwrap.fill(title, width // 6) for title in titles]
    cell_x, cell_y = width + 8, height + 8 + 14 * (1 + max(text.count("\n") for text in wrapped))
    out = Image.new("RGB", (columns * cell_x, -(-len(pictures) // columns) * cell_y), "white")
    pen = ImageDraw.Draw(out)
    for i, (picture, title) in enumerate(zip(pictures, wrapped, strict=True)):
        left, top = i % columns * cell_x + 4, i // columns * cell_y + 4
        pixels = (picture.permute(1, 2, 0).float().clamp(0, 1) * 255).round().byte().numpy()
        out.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (left, top))
        pen.multiline_text((left, top + height + 1), title, fill="black", spacing=1)
    return out


def beside(*samples: Tensor) -> Tensor:
    """Pictures (3, H, W) or clips (3, frames, H, W), one beside the other with a white gap."""
    gap = torch.ones(*samples[0].shape[:-1], 2)
    return torch.cat([part for s in samples for part in (s, gap)][:-1], -1)


def write(samples: Sequence[Tensor], titles: Sequence[str], path: Path) -> None:
    """A sheet of pictures (3, H, W), or of clips (3, frames, H, W): animated in a .gif, else their frames in a row."""
    columns = min(8, len(samples))
    if samples[0].ndim == 3:
        sheet(samples, titles, columns).save(path)
    elif path.suffix.lower() == ".gif":
        moments = zip(*(clip.unbind(1) for clip in samples), strict=True)
        first, *rest = (sheet(frames, titles, columns) for frames in moments)
        first.save(path, save_all=True, append_images=rest, duration=FRAME_MS, loop=0)
    else:
        sheet([beside(*clip.unbind(1)) for clip in samples], titles, columns=1, scale=3).save(path)


def main(
    name: str,
    doc: str | None,
    parse: Callable[[str], T],
    sample: Callable[[np.random.Generator], T],
    draw: Callable[[T, np.random.Generator], npt.NDArray[np.float32]],
) -> None:
    """The command line of a module that draws the data of the model ``name``; ``doc`` is its docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", type=Path, required=True, metavar="FILE", help="write a contact sheet")
    parser.add_argument("--caption", action="append", help="draw this instead of random ones; may be repeated")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    told = [parse(c) for c in args.caption] if args.caption else [sample(rng) for _ in range(args.count)]
    captions = [t.caption() for t in told]
    shown = [torch.from_numpy(draw(t, rng)) for t in told]
    if name in zoo.names():
        samples = zoo.load(name)(captions, generator=torch.Generator().manual_seed(args.seed))
        shown = [beside(real, made) for real, made in zip(shown, samples, strict=True)]
    write(shown, captions, args.show)
    print(f"{len(told)} {name} in {args.show}" + ("; samples stand right of drawings" if name in zoo.names() else ""))
