"""The tiny denoisers are no identities: what they compute depends on the latent, time, prompt and every block list."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.denoisers import REGISTRY
from tests.tiny_models import leaves


def changed(value: Any, noise: torch.Generator) -> Any:
    """An argument with other content in the same containers; a norm does not undo the change."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value // 2 + 1
        scale, shift = (torch.rand(value.shape, generator=noise) for _ in range(2))
        return value * (0.5 + scale) + 0.3 * shift
    if isinstance(value, dict):
        return {k: changed(v, noise) for k, v in value.items()}
    return type(value)(changed(v, noise) for v in value)


@torch.no_grad()
def difference(model: nn.Module, call: dict[str, Any], reference: list[Tensor]) -> float:
    outputs = leaves(model(**call))
    return max(float((a - b).abs().max()) for a, b in zip(outputs, reference, strict=True))


@torch.no_grad()
def halve(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.mul_(0.5)


@pytest.mark.filterwarnings("ignore")  # what these classes warn of is theirs
@pytest.mark.parametrize("name", REGISTRY)
def test_every_input_and_block_list_matters(name):
    denoiser = REGISTRY[name]
    model, call = denoiser.build()
    with torch.no_grad():
        reference = leaves(model(**call))
    assert reference
    assert all(bool(v.isfinite().all()) for v in reference)
    assert difference(model, call, reference) == 0.0
    noise = torch.Generator().manual_seed(1)
    for argument in (*denoiser.latent, *denoiser.time, *denoiser.prompt):
        assert difference(model, {**call, argument: changed(call[argument], noise)}, reference) > 1e-3, argument
    before = 0.0
    for path in denoiser.blocks:
        blocks = list(model.get_submodule(path).children())
        assert len(blocks) >= 2
        halve(blocks[len(blocks) // 2])
        now = difference(model, call, reference)
        assert now > 1e-3, path
        assert now != before, path
        before = now


def test_the_registry_covers_the_families():
    assert len(REGISTRY) >= 52


def test_a_denoiser_is_the_same_each_time():
    (first, a), (second, b) = REGISTRY["flux"].build(), REGISTRY["flux"].build()
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a[k], b[k]) for k in a)
    _, other = REGISTRY["flux"].build(seed=1)
    assert not torch.equal(a["hidden_states"], other["hidden_states"])
