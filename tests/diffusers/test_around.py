"""The pipeline around an optimized denoiser: what it reads, what restore leaves, bad input, changed weights."""

from typing import Any

import pytest
import torch
from torch import nn

import ditopt
from ditopt.errors import BadInput, CaptureError, RecipeError, SessionError
from tests.diffusers.tiny import make, run
from tests.diffusers.use import FORA, Stop, fresh, plain, shared


def test_what_a_pipeline_reads_of_its_denoiser():
    pipe, own = shared("wan", FORA), make("wan")
    fast = pipe.transformer
    assert fast.config == own.transformer.config
    assert (fast.dtype, fast.device) == (torch.float32, torch.device("cpu"))
    assert pipe.components["transformer"] is fast
    assert pipe.config["transformer"] == own.config["transformer"]
    assert dict(pipe.config) == dict(own.config)
    assert pipe.device == own.device
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in own.transformer.named_parameters()]
    with fast.cache_context("cond", step_index=0, sigma=1.0):
        assert fast.engine.session.clock.context == "cond"
    assert pipe.to("cpu") is pipe


def test_a_pipeline_on_another_dtype_says_to_optimize_again():
    pipe = ditopt.optimize(make("sd3"), FORA, target="eager")
    run(pipe, "sd3")
    pipe.to(torch.float64)
    assert pipe.transformer.original.dtype == torch.float64
    with pytest.raises(SessionError, match=r"optimized as torch\.float32"):
        run(pipe, "sd3")
    pipe.to(torch.float32)
    assert torch.equal(run(pipe, "sd3"), fresh("sd3", FORA))


def test_restore_leaves_no_trace():
    pipe = make("sd3")
    own, scheduler = pipe.transformer, dict(vars(pipe.scheduler))
    attributes, config = dict(vars(pipe)), dict(pipe.config)
    inside = dict(vars(own))
    ditopt.optimize(pipe, FORA, target="eager")
    assert pipe.transformer is not own
    assert ditopt.restore(pipe) is pipe
    assert vars(pipe) == attributes
    assert dict(pipe.config) == config
    assert pipe.transformer is own
    assert vars(own) == inside
    assert vars(pipe.scheduler).keys() == scheduler.keys()
    assert torch.equal(run(pipe, "sd3"), plain("sd3"))
    assert ditopt.restore(pipe) is pipe  # nothing to do
    ditopt.optimize(pipe, FORA, target="eager")
    with pytest.raises(Stop):
        run(pipe, "sd3", callback_on_step_end=stop)
    ditopt.restore(pipe)
    assert torch.equal(run(pipe, "sd3"), plain("sd3"))


def stop(*_):
    raise Stop


def test_bad_input_leaves_the_pipeline_as_it_was():
    pipe = make("sd3")
    before, scheduler = dict(vars(pipe)), set(vars(pipe.scheduler))
    bad = torch.zeros(1, 4, 8, 8)
    cases: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"recipe": "nonsense"}, RecipeError),
        ({"target": "abacus"}, BadInput),
        ({"steps": 0}, BadInput),
        ({"example_inputs": 3}, BadInput),
        ({"example_inputs": {"nothing": bad}}, BadInput),
        ({"example_inputs": {"hidden_states": bad}}, CaptureError),
    ]
    for arguments, error in cases:
        with pytest.raises(error):
            ditopt.optimize(pipe, **{"target": "eager", **arguments})
        assert vars(pipe) == before
        assert set(vars(pipe.scheduler)) == scheduler
    ditopt.optimize(pipe, "lossless", target="eager")
    with pytest.raises(BadInput, match=r"optimized already; call ditopt.restore\(pipe\) first"):
        ditopt.optimize(pipe, "lossless", target="eager")
    ditopt.restore(pipe)
    pipe.transformer = None
    with pytest.raises(BadInput, match=r"no denoiser was found.*vae \(AutoencoderKL\)"):
        ditopt.optimize(pipe, "lossless", target="eager")


def test_an_adapter_loaded_after_optimize_is_not_ignored():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    pipe = ditopt.optimize(make("sd3"), "lossless", target="eager")
    assert torch.equal(run(pipe, "sd3"), plain("sd3"))
    block = pipe.transformer.transformer_blocks[1]
    block.attn.to_q = Adapted(block.attn.to_q)
    with pytest.raises(SessionError, match="modules were exchanged after optimize"):
        run(pipe, "sd3")
    pipe.transformer.refresh()
    adapted = run(pipe, "sd3")
    assert not torch.equal(adapted, plain("sd3"))
    assert torch.equal(run(ditopt.restore(pipe), "sd3"), adapted)


class Scaled(nn.Module):
    """An adapter as peft makes them: its weights can be merged, its scale set."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)
        self.scaling, self.merged_adapters = {"default": 1.0}, []

    def forward(self, x):
        extra = 0 if self.merged_adapters else self.up(self.down(x)) * self.scaling["default"]
        return self.base(x) + extra


def test_an_adapter_scaled_or_fused_after_optimize_is_not_ignored():
    pipe = make("sd3")
    block = pipe.transformer.transformer_blocks[1]
    adapter = block.attn.to_q = Scaled(block.attn.to_q)
    ditopt.optimize(pipe, "lossless", target="eager")
    first = run(pipe, "sd3")
    adapter.scaling["default"] = 0.5
    with pytest.raises(SessionError, match=r"transformer_blocks\.1\.attn\.to_q\.scaling of the model changed"):
        run(pipe, "sd3")
    adapter.scaling["default"] = 1.0
    assert torch.equal(run(pipe, "sd3"), first)
    adapter.merged_adapters.append("default")
    with pytest.raises(SessionError, match="merged_adapters"):
        run(pipe, "sd3")
    adapter.merged_adapters.clear()
    own = block.attn.processor
    block.attn.processor = type(own)()
    with pytest.raises(SessionError, match="processor"):
        run(pipe, "sd3")
    pipe.transformer.refresh()
    assert torch.equal(run(pipe, "sd3"), first)


def test_weights_fused_in_place_are_seen():
    pipe = ditopt.optimize(make("sd3"), "lossless", target="eager")
    run(pipe, "sd3")
    pipe.transformer.transformer_blocks[1].attn.to_q.weight.data += 0.5
    pipe.transformer.transformer_blocks[1].norm1.linear.weight.data += 0.5  # its product is a hoisted table
    fused = run(pipe, "sd3")
    assert not torch.equal(fused, plain("sd3"))
    assert torch.equal(run(ditopt.restore(pipe), "sd3"), fused)


def test_example_inputs_capture_ahead():
    inputs = {
        "hidden_states": torch.zeros(2, 4, 8, 8),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": torch.zeros(2, 16, 32),
        "pooled_projections": torch.zeros(2, 32),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }
    pipe = ditopt.optimize(make("sd3"), FORA, example_inputs=inputs, target="eager")
    assert len(pipe.transformer.engine.compiled) == 1
    assert torch.equal(run(pipe, "sd3"), fresh("sd3", FORA))
    assert len(pipe.transformer.engine.compiled) == 1
