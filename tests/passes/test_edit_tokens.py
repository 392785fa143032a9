"""Tokens by the mask of an edit, on real classes: by structure alone, exact where all tokens run.

What it computes is checked in tests/recipes/test_hetcache.py, and the mask in tests/ir/test_edit_mask.py.
"""

from __future__ import annotations

import pytest
import torch

import ditopt
from tests.denoisers import REGISTRY
from tests.passes.test_select_tokens import STEPS, request


@pytest.mark.parametrize("name", ["flux", "cogvideox"])  # packed tokens; frames before channels
def test_real_classes(name):
    model, call = REGISTRY[name].build()
    options = f"mask={REGISTRY[name].latent[0]}:0,margin=0,context=0.3,clusters=3,iterations=1,first=2"
    plain = request(name, model, call)
    for ratio in (1.0, 0.95):
        text = f"hoist_invariants, edit_tokens{{{options},ratio={ratio}}}"
        fast = ditopt.optimize(model, text, target="eager", example_inputs=call)
        told = request(name, fast, call, session=True)
        assert fast.stats.graphs == {"full": 2, "reuse": STEPS - 2}
        same = [torch.equal(a, b) for a, b in zip(told, plain, strict=True)]
        assert same == [True, True, ratio == 1, ratio == 1]
