"""CPU offload around an optimized denoiser, by accelerate's own hooks. The device is the CPU, the mechanism real."""

from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import ditopt
from ditopt.errors import BadInput, DitoptWarning
from tests.diffusers.tiny import make, run
from tests.diffusers.use import FORA, fresh, plain


class Counting(ModelHook):
    """Counts the calls of the module that it is on."""

    def __init__(self):
        self.before, self.after = 0, 0

    def pre_forward(self, module, *args, **kwargs):
        self.before += 1
        return args, kwargs

    def post_forward(self, module, output):
        self.after += 1
        return output


def hooked(module):
    return [n for n, m in module.named_modules() if "_hf_hook" in vars(m)]


def test_hooks_from_before_run_once_a_call_and_stay():
    pipe = make("sd3")
    own, hook = pipe.transformer, Counting()
    add_hook_to_module(own, hook)
    ditopt.optimize(pipe, FORA, target="eager")
    assert "_hf_hook" not in vars(own)
    assert torch.equal(run(pipe, "sd3"), fresh("sd3", FORA))
    assert pipe.transformer.stats.hits["cache0"] == 4
    assert (hook.before, hook.after) == (6, 6)
    ditopt.restore(pipe)
    assert pipe.transformer is own
    assert own._hf_hook is hook
    assert torch.equal(run(pipe, "sd3"), plain("sd3"))
    assert (hook.before, hook.after) == (12, 12)
    remove_hook_from_module(own)
    assert torch.equal(run(pipe, "sd3"), plain("sd3"))
    assert (hook.before, hook.after) == (12, 12)


def test_hooks_from_after_run_and_move_to_the_original():
    pipe = ditopt.optimize(make("sd3"), FORA, target="eager")
    one, two = Counting(), Counting()
    add_hook_to_module(pipe.transformer, one)
    add_hook_to_module(pipe.transformer, two, append=True)
    assert torch.equal(run(pipe, "sd3"), fresh("sd3", FORA))
    assert pipe.transformer.stats.hits["cache0"] == 4
    assert one.before == two.after == 6
    remove_hook_from_module(pipe.transformer)
    run(pipe, "sd3")
    assert pipe.transformer.stats.hits["cache0"] == 8
    assert one.before == 6
    _, user = cpu_offload_with_hook(pipe.transformer, "cpu")
    run(pipe, "sd3")
    assert pipe.transformer.stats.hits["cache0"] == 12
    user.offload()
    ditopt.restore(pipe)
    assert hooked(pipe.transformer) == [""]
    assert torch.equal(run(pipe, "sd3"), plain("sd3"))


@pytest.mark.parametrize("before", [True, False])
def test_model_offload_of_a_pipeline(before):
    pipe = make("wan")
    if before:
        pipe.enable_model_cpu_offload(device="cpu")
    ditopt.optimize(pipe, FORA, target="eager")
    if not before:
        pipe.enable_model_cpu_offload(device="cpu")
    assert hooked(pipe.transformer) == [""]
    for count in (1, 2):  # the pipeline takes the hooks off and puts them on again after each request
        assert torch.equal(run(pipe, "wan"), fresh("wan", FORA))
        assert pipe.transformer.stats.hits["cache0"] == 8 * count
    pipe.remove_all_hooks()
    assert torch.equal(run(pipe, "wan"), fresh("wan", FORA))
    pipe.enable_model_cpu_offload(device="cpu")
    ditopt.restore(pipe)
    assert torch.equal(run(pipe, "wan"), plain("wan"))
    assert hooked(pipe.transformer) == [""]


def sequential(pipe):
    """What enable_sequential_cpu_offload does; that method asks for device "cpu:0", which accelerate cannot do."""
    pipe.remove_all_hooks()
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            cpu_offload(module, torch.device("cpu"), offload_buffers=len(module._parameters) > 0)


@pytest.mark.parametrize("before", [True, False])
def test_sequential_offload_of_a_pipeline(before):
    pipe = make("wan")  # its denoiser has a weight of its own beside those of its modules
    own = pipe.transformer
    if before:
        sequential(pipe)
    ditopt.optimize(pipe, FORA, target="eager")
    if not before:
        sequential(pipe)
    assert len(hooked(pipe.transformer)) > 10
    assert all(p.is_meta for p in own.parameters())
    with pytest.warns(DitoptWarning, match="offloaded module by module"):
        result = run(pipe, "wan")
    assert torch.equal(result, fresh("wan", FORA))
    assert pipe.transformer.stats.hits["cache0"] == 8
    assert torch.equal(run(pipe, "wan"), result)
    assert all(p.is_meta for p in own.parameters())
    ditopt.restore(pipe)
    assert pipe.transformer is own
    assert torch.equal(run(pipe, "wan"), plain("wan"))
    assert all(p.is_meta for p in own.parameters())
    pipe.remove_all_hooks()
    assert not hooked(own)
    assert not any(p.is_meta for p in own.parameters())


def test_hooks_of_an_unknown_kind_are_refused():
    pipe = make("sd3")
    pipe.transformer._hf_hook = SequentialHook()
    before = dict(vars(pipe))
    with pytest.raises(BadInput, match="remove_all_hooks"):
        ditopt.optimize(pipe, FORA, target="eager")
    assert vars(pipe) == before
    assert "step" not in vars(pipe.scheduler)


def test_caches_of_diffusers_are_refused():
    from diffusers import FirstBlockCacheConfig

    pipe = make("wan")
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(BadInput, match="carries hooks of diffusers"):
        ditopt.optimize(pipe, FORA, target="eager")
    pipe.transformer.disable_cache()
    ditopt.optimize(pipe, FORA, target="eager")
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(BadInput, match="carries hooks of diffusers"):
        run(pipe, "wan")
    pipe.transformer.disable_cache()
    assert torch.equal(run(pipe, "wan"), fresh("wan", FORA))


def test_a_bare_model_whose_modules_are_offloaded():
    model = make("sd3").transformer
    shapes = {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": (1, 6, 32), "pooled_projections": (1, 32)}
    given: dict[str, Any] = {name: torch.randn(shape) for name, shape in shapes.items()}
    given |= {"timestep": torch.full((1,), 500.0), "return_dict": False}
    want = model(**given)[0]
    cpu_offload(model, torch.device("cpu"))
    fast = ditopt.optimize(model, "lossless", target="eager")
    with pytest.warns(DitoptWarning, match="offloaded module by module"):
        assert torch.equal(fast(**given)[0], want)
    assert torch.equal(fast(**given)[0], want)  # and says so once
