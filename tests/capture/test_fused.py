"""PyTorch's own attention modules run fused kernels without gradients; graphs have their bits, and their structure."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import activation, transformer

import ditopt
from ditopt._torch import masked_softmax
from ditopt.errors import CaptureError
from ditopt.ops import attention
from ditopt.pipeline import Context, PassManager
from tests.capture.use import run, same, take
from tests.foreign.base import randn
from tests.tiny_models import noise

TOKENS, WIDTH, HEADS = 6, 24, 2  # a width of 12 a head, whose square root is rounded
STEPS = 3


class Attends(nn.Module):
    """Two blocks of one attention each. ``mask``: "keys", "scores", "both" or none; ``weights``: what it returns."""

    def __init__(self, mask: str = "", weights: str = "") -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(2))
        self.mask, self.weights = mask, weights

    def forward(self, x: Tensor, t: Tensor, lengths: Tensor) -> Any:
        h = self.embed(x) * (1 + t[:, None, None])
        asked = {"need_weights": bool(self.weights), "average_attn_weights": self.weights == "average"}
        found = []
        for block in self.blocks:
            out, weights = block(h, h, h, **masks(self.mask, lengths, "key_padding_mask", "attn_mask"), **asked)
            h = h + out
            found.append(weights)
        return (self.head(h), *found) if self.weights else self.head(h)


def masks(kind: str, lengths: Tensor, keys: str, scores: str) -> dict[str, Tensor]:
    out = {}
    if kind in ("keys", "both"):
        out[keys] = torch.arange(TOKENS) >= lengths[:, None]
    if kind in ("scores", "both"):
        out[scores] = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return out


class Encodes(nn.Module):
    """Layers of PyTorch's encoder, called one by one or as its stack."""

    def __init__(self, mask: str, stack: bool, **options: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True, **options)
        final = nn.LayerNorm(WIDTH) if stack else None
        self.body = nn.TransformerEncoder(layer, 3, final, enable_nested_tensor=not options.get("norm_first"))
        self.mask, self.stack = mask, stack

    def forward(self, x: Tensor, t: Tensor, lengths: Tensor) -> Tensor:
        h = self.embed(x) * (1 + t[:, None, None])
        given = masks(self.mask, lengths, "src_key_padding_mask", "mask" if self.stack else "src_mask")
        if self.stack:
            return self.head(self.body(h, **given))
        for layer in self.body.layers:
            h = layer(h, **given)
        return self.head(h)


def call(seed: int, lengths: tuple[int, int] = (4, TOKENS), dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    x = randn(2, TOKENS, 4, seed=seed).to(dtype)
    return {"x": x, "t": torch.full((2,), 0.9 - 0.1 * seed, dtype=dtype), "lengths": torch.tensor(lengths)}


def exact(model: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """The capture of a model, which gives the model's bits and no others."""
    c = take(model, **call(0, dtype=dtype))
    with torch.no_grad():
        for given in (call(1, dtype=dtype), call(2, (TOKENS, 3), dtype)):
            assert same(run(model, c, **given), model(**given))
            with unfused():
                out = model(**given)
            if dtype is torch.float32:
                assert not same(run(model, c, **given), out), "the fused kernel rounds as the module does"
    return c


@contextlib.contextmanager
def unfused():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def recognized(c: Any) -> list[Any]:
    """The attention operators of a capture, and no softmax beside them."""
    program = PassManager("canonicalize, recognize_attention", Context()).run(c.program)[-1].program
    nodes = [n for f in program.functions.values() for n in f.graph.nodes]
    assert not any(n.target in (masked_softmax, torch.ops.aten.softmax.int) for n in nodes)
    return [n for n in nodes if n.target is attention]


@pytest.mark.parametrize("mask", ["", "keys", "scores", "both"])
def test_attention_is_written_out_bit_for_bit(mask):
    found = recognized(exact(noise(Attends(mask))))
    assert len(found) == 2
    assert all((n.args[3] is None if len(n.args) > 3 else True) == (not mask) for n in found)


@pytest.mark.parametrize("weights", ["average", "each head"])
def test_its_weights_are_results(weights):
    c = exact(noise(Attends("keys", weights)))
    shapes = [list(o.shape) for o in run(noise(Attends("keys", weights)), c, **call(0))[1:]]
    assert shapes == [[2, TOKENS, TOKENS] if weights == "average" else [2, HEADS, TOKENS, TOKENS]] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_numbers_are_rounded_as_the_kernel_does(dtype):
    exact(noise(Attends("keys")).to(dtype), dtype)


@pytest.mark.parametrize("stack", [False, True], ids=["layers", "stack"])
@pytest.mark.parametrize("options", [{"norm_first": True}, {"activation": "gelu"}], ids=["pre", "post, gelu"])
@pytest.mark.parametrize("mask", ["", "keys", "scores"])
def test_layers_are_written_out_bit_for_bit(mask, options, stack):
    packs = stack and mask == "keys" and "norm_first" not in options
    model = noise(Encodes(mask, stack, **options))
    if not packs:
        assert len(recognized(exact(model))) == 3


def test_tokens_that_a_stack_packs_away_are_zeros():
    """Where the mask keeps the first tokens of each row nn.TransformerEncoder computes those alone, else all."""
    model = noise(Encodes("keys", True))
    c = take(model, **call(0))
    assert any("within rounding" in n and "nn.TransformerEncoder" in n for n in c.notes)
    with torch.no_grad():
        for lengths in ((4, TOKENS), (TOKENS, 1)):
            given = call(1, lengths)
            torch.testing.assert_close(run(model, c, **given), model(**given), rtol=1e-5, atol=1e-5)
            hidden = [row[n:] for row, n in zip(run(model, c, **given), lengths, strict=True)]
            assert all(torch.equal(a, hidden[lengths[1] < TOKENS][0].expand_as(a)) for a in hidden)


class Scattered(Encodes):
    """The same, of which the second token is hidden."""

    def forward(self, x: Tensor, t: Tensor, lengths: Tensor) -> Tensor:
        h = self.embed(x) * (1 + t[:, None, None])
        mask = (torch.arange(TOKENS) == 1) | (torch.arange(TOKENS) >= lengths[:, None])
        return self.head(self.body(h, src_key_padding_mask=mask))


def test_tokens_that_it_cannot_pack_are_computed():
    exact(noise(Scattered("", True)))


class Fails(Attends):
    def forward(self, x: Tensor, t: Tensor, lengths: Tensor) -> Any:
        assert vars(activation)["torch"] is not torch, "not in a trace"
        raise RuntimeError("stopped")


def test_the_modules_are_as_before():
    """Also where a model fails in a trace."""
    watched = (nn.TransformerEncoder, "forward"), (activation, "_is_make_fx_tracing"), (activation, "torch")
    before = [getattr(*what) for what in (*watched, (transformer, "torch"))]
    with pytest.raises(CaptureError, match="not in a trace"):  # what the plain run said
        take(Fails().eval(), **call(0))
    assert [getattr(*what) for what in (*watched, (transformer, "torch"))] == before
    assert before[2] is before[3] is torch


def test_a_recording_reaches_them_too():
    """What reads its latent is recorded at the dispatcher."""

    class Looks(Attends):
        def forward(self, x: Tensor, t: Tensor, lengths: Tensor) -> Any:
            return super().forward(x[:, : int(torch.unique(lengths).numel()) + 4], t, lengths)

    model = noise(Looks())
    c = take(model, **call(0))
    assert any("recording a run" in n for n in c.notes)
    with torch.no_grad():
        assert same(run(model, c, **call(1)), model(**call(1)))


def test_the_road_through_dynamo_has_the_same_bits():
    model = noise(Encodes("keys", False, norm_first=True))
    torch._dynamo.reset()
    fast = torch.compile(model, backend="ditopt", options={"recipe": "lossless", "target": "eager"})
    with torch.no_grad():
        assert torch.equal(fast(**call(1)), model(**call(1)))


def test_a_masked_one_runs_on_onnxruntime(tmp_path):
    model = noise(Attends("both"))
    fast = ditopt.optimize(model, "fora", example_inputs=call(0), steps=STEPS)
    ditopt.export_onnx(fast, tmp_path / "dit.onnx")
    loaded = ditopt.load(tmp_path / "dit.onnx")
    with torch.no_grad(), fast.session(), loaded.session(steps=STEPS):
        for step in range(STEPS):
            want = fast(**call(step))
            torch.testing.assert_close(loaded(**call(step)), want, rtol=1e-5, atol=1e-5)
    assert fast.stats.share_block_flops < 1
