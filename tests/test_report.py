from __future__ import annotations

import base64
import io
import re
import struct
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import ditopt
from ditopt import pictures, report
from ditopt.errors import BadInput
from ditopt.explanation import binding_shares, role_flops
from ditopt.measure import Row, judged
from ditopt.optimized import OptimizedModule
from tests import tiny_sampler

STEPS = 6
RECIPE = "fora{interval=2}"


@pytest.fixture(scope="module")
def fast() -> OptimizedModule:
    made = ditopt.optimize(
        tiny_sampler.model(), RECIPE, example_inputs=tiny_sampler.example(), steps=STEPS, target="eager"
    )
    tiny_sampler.sample(made, 0, STEPS)
    return made


def rows(name: str = "fora") -> tuple[Row, ...]:
    def row(name, kind, share, db):
        return Row(name, kind, "eager", 6, share, share, 0.1, 1 / share, db, db - 5)

    few = [row("fewer steps", "fewer", share, 60 * share) for share in (0.4, 0.6)]
    return judged([row("plain", "plain", 1.0, float("inf")), *few, row(name, "recipe", 0.5, 20.0)])


class Page(HTMLParser):
    """Tags that are open at the end, what the page refers to, and its text."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.refers: list[str] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.refers += [v for k, v in attrs if k in ("src", "href") and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


def test_page_is_self_contained_and_well_formed(fast, tmp_path):
    plain = torch.rand(4, 1, 8, 8)
    path = report.write(fast, tmp_path / "r.html", {"plain": plain, "fora": plain * 0.9}, rows())
    page = Page(path.read_text())
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.refers
    assert all(r.startswith("data:image/png;base64,") for r in page.refers)
    assert "url(" not in path.read_text()
    assert "@import" not in path.read_text()
    said = " ".join(page.said)
    for expected in ("TinyDiT", "fora", "loses to 6 steps: 20.0 vs 24.0 dB", "1 of 1 rows gives less", "block0"):
        assert expected in said


def test_everything_is_escaped(fast, tmp_path):
    bad = '<img src=x onerror="1">&'
    images = {bad: torch.rand(2, 3, 4, 4)}
    page = Page(report.write({bad: fast}, tmp_path / "r.html", images, rows(bad)).read_text())
    assert page.tags.count("img") == 1
    assert "".join(page.said).count(bad) >= 3


def test_each_pass_is_told_with_its_diff(fast, tmp_path):
    text = report.write(fast, tmp_path / "r.html").read_text()
    for result in fast.history:
        assert result.name in text
        for sentence in (*result.refused, *result.notes):
            assert sentence.replace("'", "&#x27;") in text
    assert "<ins>+state = [</ins>" in text


def test_report_of_the_module_itself(fast, tmp_path):
    assert fast.report(tmp_path / "own.html") == tmp_path / "own.html"
    assert (tmp_path / "own.html").stat().st_size > 5000


def test_schedule_shows_what_ran(fast):
    ran = fast.schedule_rows
    assert [r.choices["cache0"] for r in ran] == ["compute", "reuse"] * 3
    drawing = pictures.heat_map([b.id for b in fast.program.blocks()], fast.program.decisions, ran)
    # three blocks, attention and MLP each
    assert drawing.count('class="compute"') == drawing.count('class="hold"') == 3 * 3 * 2
    assert "step 1, blocks.2: hold" in drawing


def test_a_block_that_is_half_cached_is_drawn_half(fast):
    model = tiny_sampler.model()
    recipe = "cache{region=blocks.1.mlp,every=2,predictor=taylor,order=1}"
    half = ditopt.optimize(model, recipe, example_inputs=tiny_sampler.example(), steps=STEPS, target="eager")
    tiny_sampler.sample(half, 0, STEPS)
    drawing = pictures.heat_map(["blocks.0", "blocks.1"], half.program.decisions, half.schedule_rows)
    assert drawing.count('class="forecast"') == 3
    assert "step 1, blocks.1: compute, forecast" in drawing
    assert "step 1, blocks.0: compute</title>" in drawing


def test_nothing_ran_is_said(tmp_path):
    made = ditopt.optimize(tiny_sampler.model(), example_inputs=tiny_sampler.example(), target="eager")
    assert "No request has run yet" in report.write(made, tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    "images",
    [
        {"a": torch.rand(2, 4, 4)},
        {"a": torch.rand(2, 1, 4, 4), "b": torch.rand(3, 1, 4, 4)},
        {"a": torch.rand(2, 2, 3, 4, 4)},
    ],
)
def test_images_of_another_shape_are_refused(fast, tmp_path, images):
    with pytest.raises(BadInput, match="expected \\(N, 1 or 3, H, W\\)"):
        report.write(fast, tmp_path / "r.html", images)


def test_a_model_that_was_never_captured_is_refused(tmp_path):
    with pytest.raises(BadInput, match="nothing is captured yet"):
        report.write(ditopt.optimize(tiny_sampler.model(), target="eager"), tmp_path / "r.html")


# -- pictures ----------------------------------------------------------------------------------------------------------


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of each chunk of a PNG file."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at = 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        name, inside = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        (check,) = struct.unpack(">I", data[at + 8 + size : at + 12 + size])
        assert check == zlib.crc32(name + inside)
        yield name, inside
        at += 12 + size


def decode(data: bytes) -> torch.Tensor:
    """Pixels of a still PNG that pictures.png wrote, (H, W, channels)."""
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert depth == 8
    parts = list(chunks(data))
    assert [name for name, _ in parts] == [b"IHDR", b"IDAT", b"IEND"]
    body = parts[1][1]
    channels = 3 if kind == 2 else 1
    lines = torch.frombuffer(bytearray(zlib.decompress(body)), dtype=torch.uint8).view(height, -1)
    assert (lines[:, 0] == 0).all()
    return lines[:, 1:].reshape(height, width, channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_pixels(channels):
    image = torch.rand(channels, 5, 7)
    assert torch.equal(decode(pictures.png(image)), (image * 255).round().to(torch.uint8).permute(1, 2, 0))


def test_an_animated_png_holds_every_frame_in_order():
    image, sequence = (pytest.importorskip(f"PIL.{name}") for name in ("Image", "ImageSequence"))
    video = torch.rand(3, 4, 5, 7)
    made = pictures.png(video)
    numbers = [struct.unpack(">I", d[:4])[0] for name, d in chunks(made) if name in (b"fcTL", b"fdAT")]
    assert numbers == list(range(7)), "a control chunk for each frame, a data chunk for each but the first"
    with image.open(io.BytesIO(made)) as opened:
        assert opened.info["loop"] == 0
        frames = [torch.from_numpy(np.array(f.convert("RGB"))) for f in sequence.Iterator(opened)]
        assert opened.info["duration"] == pictures.FRAME_MS
    assert torch.equal(torch.stack(frames), (video * 255).round().to(torch.uint8).permute(1, 2, 3, 0))


def test_a_grid_of_videos_is_the_grid_of_each_frame():
    videos = torch.rand(5, 3, 4, 6, 7)
    made = pictures.grid(videos, columns=3)
    assert torch.equal(made, torch.stack([pictures.grid(videos[:, :, i], columns=3) for i in range(4)], 1))
    large = pictures.grid(torch.rand(4, 1, 2, 500, 500))
    assert large.shape == (1, 2, 250, 1003)


def test_videos_are_shown_as_animated_pictures(fast, tmp_path):
    plain = torch.rand(3, 3, 4, 6, 6)
    images = {"plain": plain, "fora": plain * 0.9, "same": plain.clone()}
    page = Page(report.write(fast, tmp_path / "r.html", images).read_text())
    assert len(page.refers) == 4, "three samples and one difference"
    for shown in page.refers:
        made = base64.b64decode(shown.partition(",")[2])
        assert [name for name, _ in chunks(made)].count(b"fcTL") == 4
    assert "equal to the reference, bit by bit" in " ".join(page.said)


def test_grid_places_images_in_order():
    batch = torch.arange(1, 6).float().view(5, 1, 1, 1).expand(5, 1, 2, 2) / 10
    made = pictures.grid(batch, columns=3)
    assert made.shape == (1, 5, 8)
    assert made[0, 0].tolist() == pytest.approx([0.1, 0.1, 0, 0.2, 0.2, 0, 0.3, 0.3])
    assert made[0, 4].tolist() == pytest.approx([0.4, 0.4, 0, 0.5, 0.5, 0, 0, 0])


def test_large_images_are_averaged_down():
    assert pictures.grid(torch.rand(10, 3, 512, 512)).shape[2] <= pictures.WIDEST + 10


def test_chart_draws_each_recipe_once_and_marks_the_loser():
    drawing = pictures.chart(rows())
    assert drawing.count('class="dot lost"') == 1
    assert drawing.count('<circle class="few"') == 2
    assert re.search(r"fora \(eager\): 20.0 dB at 50.0%", drawing)


def test_no_chart_where_all_is_equal():
    assert pictures.chart([r for r in rows() if r.kind == "plain"]) == ""


def test_images_in_the_page_decode(fast, tmp_path):
    plain = torch.rand(3, 1, 6, 6)
    page = Page(report.write(fast, tmp_path / "r.html", {"plain": plain}).read_text())
    shown = decode(base64.b64decode(page.refers[0].partition(",")[2]))
    assert torch.equal(shown[:, :6, 0], (plain[0, 0] * 255).round().to(torch.uint8))


# -- explain -----------------------------------------------------------------------------------------------------------


def test_binding_shares_add_up_and_separate_what_is_known(fast):
    program = fast.compiled.captured.program
    shares = binding_shares(program)
    assert sum(w for w, _ in shares.values()) == sum(p.nbytes for p in program.params.values())
    assert sum(f for _, f in shares.values()) == fast.compiled.plan.manifest.full_flops
    w = tiny_sampler.WIDTH * 4  # bytes of one row
    assert shares["prompt"][0] == 4 * w  # the label table
    assert shares["timestep"][0] == 2 * w  # weight and bias of the time embedding
    assert shares["prompt and timestep"][0] == 3 * (2 * tiny_sampler.WIDTH * w + 2 * w)  # modulation of three blocks
    assert shares["latent"][1] > 0.9 * fast.compiled.plan.manifest.full_flops


def test_role_flops_add_up(fast):
    outlined = next(r.program for r in fast.history if r.program.blocks())
    assert sum(role_flops(outlined).values()) == fast.compiled.plan.manifest.full_flops
    assert all(f >= 0 for f in role_flops(outlined).values())


def test_explanation_tells_everything():
    text = ditopt.explain(
        tiny_sampler.model(), RECIPE, example_inputs=tiny_sampler.example(), steps=STEPS, target="eager"
    )
    for line in (
        r"hidden_states +latent +float32\[3, 8, 16\]",
        r"timestep +timestep +float32\[3\]",
        r"stage 0 +blocks\.0\.\.2 +3 blocks +1 body +attn\.self\+mlp",
        r"never sees the latent",
        r"hoist_invariants: applied \d+",
        r"full +eager .* 100.0%",
        r"reuse +eager",
        r"memo_schedule +eager",
        r"in 6 slots",
    ):
        assert re.search(line, text), line


def test_explanation_says_why_a_pass_did_nothing():
    twice = f"{RECIPE}, cache{{region=model}}"
    text = ditopt.explain(tiny_sampler.model(), twice, example_inputs=tiny_sampler.example(), target="eager")
    assert "cache{region=model}: changed nothing" in text
    assert "refused: model is cached already" in text
