"""Weights that left the loop leave memory: what goes, that results stay bit-equal, and that nothing fails silently."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt import zoo
from ditopt.errors import BadInput, DitoptWarning, SessionError
from ditopt.optimized import OptimizedModule
from tests.roads.tiny import Small, example, noise, prompt, small, times

STEPS = 5
ROOT = Path(__file__).parents[2]


class Timed(Small):
    """The small model with modulation that depends on the timestep alone: no request changes its table."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> Any:
        zero = torch.zeros(len(hidden_states), 20)
        return super().forward(hidden_states, timestep, encoder_hidden_states, zero, return_dict=False)


def timed() -> Any:
    torch.manual_seed(0)
    return Timed().eval().requires_grad_(False)


@torch.no_grad()
def request(model: Any, seed: int, steps: int = STEPS, announce: bool = True) -> Tensor:
    """One Euler request; its times are announced as a scheduler's hook would."""
    x, given, known = noise(seed), prompt(seed), times(steps)
    if isinstance(model, OptimizedModule) and announce:
        with model.session(timesteps=known):
            return loop(model, x, given, known)
    return loop(model, x, given, known)


def loop(model: Any, x: Tensor, given: dict[str, Tensor], known: list[float]) -> Tensor:
    for t in known:
        x = x - 0.1 * model(x, timestep=torch.full((len(x),), t), **given, return_dict=False)[0]
    return x


def memo_bytes(fast: Any) -> int:
    """Bytes of the parameters that only memo functions read."""
    manifest = fast.compiled.plan.manifest
    inside = {f.ref for g in manifest.graphs for f in g.inputs}
    outside = {f.ref for g in manifest.memo_graphs for f in g.inputs if f.kind == "param"} - inside
    return sum(p.nbytes for n, p in fast.original.named_parameters() if n in outside)


@pytest.mark.parametrize("announce", [True, False], ids=["announced", "bare calls"])
def test_offloaded_weights_change_no_bit(announce):
    model: Any = small()
    plain = [request(model, seed) for seed in (1, 2)]
    fast = ditopt.optimize(model, "lossless", example_inputs=example(), target="eager", release="offload")
    assert fast.release.bytes == memo_bytes(fast) > 0.2 * sum(p.nbytes for p in model.parameters())
    for seed in (1, 2, 1):
        assert torch.equal(request(fast, seed, announce=announce), plain[seed - 1])
    fills = 2 if announce else 2 * STEPS  # once a prompt, or once a prompt and step
    schedule = next(g for g in fast.compiled.plan.manifest.memo_graphs if g.name == "memo_schedule")
    inside = sum(fast.original.get_parameter(f.ref).nbytes for f in schedule.inputs if f.kind == "param")
    assert fast.release.streamed_bytes >= fills * inside > 0
    assert fast.release.streamed_bytes < (fills + 1) * fast.release.bytes
    assert "out of memory" in str(fast.release)


def test_the_original_refuses_until_restored():
    model: Any = small()
    plain, hooks = request(model, 1), len(model._forward_pre_hooks)
    fast = ditopt.optimize(model, "lossless", example_inputs=example(), target="eager", release="offload")
    with pytest.raises(SessionError, match=r"out of memory \(release='offload'\).*ditopt.restore"):
        request(model, 1)
    assert ditopt.restore(fast) is model
    assert torch.equal(request(model, 1), plain)
    assert len(model._forward_pre_hooks) == hooks
    assert fast.release.bytes == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_falls_by_what_left_the_loop():
    """In a process of its own, whose allocator gives back what is freed."""
    code = "from tests.roads.test_release import falls; print(*falls())"
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    gone, *fell = map(int, done.stdout.split()[-3:])
    assert gone > 30e6
    assert min(fell) > 0.75 * gone


def falls() -> list[int]:
    """Bytes of weights that left memory, and by how much memory fell after each of two requests."""
    torch.manual_seed(0)
    model: Any = Small(width=768, depth=6)
    model.time = nn.Linear(32, 768)
    model.eval().requires_grad_(False)
    request(model, 1)
    ditopt.optimize(small(), "lossless", example_inputs=example(), target="eager")  # imports what capture needs
    before = resident()
    fast = ditopt.optimize(model, "lossless", example_inputs=example(), target="eager", release="offload")
    out = [fast.release.bytes]
    for seed in (1, 2):
        request(fast, seed)
        out.append(before - resident())
    return out


def resident() -> int:
    """Bytes of memory in use, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(x.split()[1]) for x in lines if x.startswith(("RssAnon", "RssFile")))


def test_a_weight_written_while_away_is_seen():
    model: Any = small()
    fast = ditopt.optimize(model, "lossless", example_inputs=example(), target="eager", release="offload")
    request(fast, 1)
    with torch.no_grad():
        model.blocks[1].mod.weight.data.mul_(1.5)
    changed = [request(fast, 1) for _ in range(2)]
    assert torch.equal(changed[0], changed[1])
    assert torch.equal(request(ditopt.restore(fast), 1), changed[0])


def test_freed_weights_are_gone_and_their_table_serves_every_request(tmp_path):
    model = timed()
    plain = [request(model, seed) for seed in (1, 2)]
    fast = ditopt.optimize(model, "lossless", example_inputs=timed_example(), target="eager", release="free")
    away = fast.release.bytes
    timed_only = sum(p.nbytes for m in (model.time, *(b.mod for b in model.blocks)) for p in m.parameters())
    for seed in (1, 2):
        assert torch.equal(request(fast, seed), plain[seed - 1])
    assert fast.release.freed == timed_only
    assert fast.release.freed + fast.release.bytes == away
    assert model.blocks[0].mod.weight.numel() == 0
    with pytest.raises(SessionError, match=r"was freed when the table of its timesteps was full.*release='offload'"):
        request(fast, 1, steps=7)
    assert torch.equal(request(fast, 2), plain[1])
    with pytest.raises(BadInput, match=r"were freed .* load the model again"):
        ditopt.restore(fast)
    with pytest.raises(BadInput, match="cannot be saved: weights were freed"):
        ditopt.save(fast, tmp_path / "m.ditopt")


def timed_example() -> dict[str, Any]:
    call = example()
    del call["pooled_projections"]
    return call


def test_free_keeps_what_a_prompt_changes():
    model: Any = small()
    plain = [request(model, seed) for seed in (1, 2)]
    fast = ditopt.optimize(model, "lossless", example_inputs=example(), target="eager", release="free")
    for seed in (1, 2):
        assert torch.equal(request(fast, seed), plain[seed - 1])
    assert model.time.weight.numel() == 0  # read by no prompt's table
    assert fast.release.bytes > 10 * fast.release.freed > 0
    assert model.blocks[0].mod.weight.numel() > 0


def test_another_signature_brings_the_weights_home_to_be_captured():
    model: Any = small()
    fast = ditopt.optimize(model, "lossless", example_inputs=example(), target="eager", release="offload")
    request(fast, 1)
    wide = {**example(size=12), **prompt(3)}
    with torch.no_grad():
        given = fast(**wide)[0]
        assert fast.release.bytes == memo_bytes(fast)
        assert torch.equal(ditopt.restore(fast)(**wide)[0], given)


def test_explain_leaves_the_weights_where_they_were():
    model: Any = small()
    plain = request(model, 1)
    fast = ditopt.optimize(model, "lossless", example_inputs=example(), target="eager", release="offload")
    away = fast.release.bytes
    assert "weights" in ditopt.explain(fast, example_inputs=example(), target="eager")
    assert fast.release.bytes == away > 0
    assert torch.equal(request(fast, 1), plain)


def test_a_pipeline_with_offloaded_weights_samples_the_same_images():
    pipe = zoo.load("digits")
    settings: dict[str, Any] = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0)}
    plain = pipe([3, 7], **settings)
    ditopt.optimize(pipe, "lossless", target="eager", release="offload")
    settings["generator"].manual_seed(0)
    assert torch.equal(pipe([3, 7], **settings), plain)
    assert pipe.transformer.release.streamed_bytes == pipe.transformer.release.bytes > 1e6
    ditopt.restore(pipe)
    settings["generator"].manual_seed(0)
    assert torch.equal(pipe([3, 7], **settings), plain)


def test_release_without_hoisting_says_that_it_has_no_effect():
    with pytest.warns(DitoptWarning, match="no weight left the loop under recipe 'outline_blocks'"):
        ditopt.optimize(small(), "outline_blocks", example_inputs=example(), target="eager", release="offload")


@pytest.mark.parametrize(
    ("release", "target", "said"),
    [
        ("away", "eager", "release='away' given; expected one of keep, offload, free"),
        ("free", "onnxruntime", "release='free' given with target 'onnxruntime', whose sessions hold weights"),
    ],
)
def test_bad_input(release, target, said):
    with pytest.raises(BadInput, match=said):
        ditopt.optimize(small(), "lossless", example_inputs=example(), target=target, release=release)
