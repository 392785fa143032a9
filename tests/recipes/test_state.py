"""The state of every recipe that caches: the bytes that are shown before running are held, 8-bit storage included."""

from __future__ import annotations

import re
import warnings

import pytest

import ditopt
from ditopt.recipe import available
from tests.recipes.oracle import STEPS, captures_shared, drive, given, model, on, request, start

GIVEN = {  # where the defaults need more blocks or never reuse here
    "dbcache": "dbcache{F=1,B=1,R=0.3,W=2}",
    "dbprune": "dbprune{F=1,B=1,R=0.2,W=3}",
    "firstblock": "firstblock{threshold=0.3}",
    "easycache": "easycache{threshold=0.3}",
}
RUNS = "cache{region=blocks.1:-1,every=3,"
TEXTS = [
    f"{RUNS}store=int8}}",
    f"{RUNS}store=int8,predictor=taylor,order=2}}",
    "cache{region=blocks.*.attn|blocks.*.mlp,every=3,store=int8}",
    f"{RUNS}predictor=foca}}",
    f"{RUNS}predictor=dmd}}",
    "cache{region=model,every=2,predictor=newton,order=2}",
    "cache{region=blocks.0:2,mask=1000000011111111}, cache{region=blocks.3:5,mask=1111111110000000}",
    "cache{region=blocks.*.mlp,mask=1100000011111111,predictor=newton,order=1}",
    *(
        GIVEN.get(n, n)
        for n, r in sorted(available().items())
        # what recipes about guidance hold depends on how the sampler calls the model
        if not r.calibration and "cache{" in r.passes and "cache_guidance" not in r.passes
    ),
]


def shown(recipe):
    """The bytes of state that ``ditopt.explain`` names for a guidance branch."""
    text = ditopt.explain(model(), recipe, example_inputs=given(start(0), 3.0, 0), steps=STEPS, target="eager")
    (said,) = re.findall(r"([\d.]+) (B|kB|MB) for a guidance branch", text)
    return float(said[0]) * {"B": 1, "kB": 1e3, "MB": 1e6}[said[1]]


@pytest.mark.parametrize("recipe", TEXTS)
def test_predicted_bytes_are_held(recipe):
    with on("flux" if recipe.startswith(("cache", "dbcache", "firstblock")) else "plain"), captures_shared():
        fast = ditopt.optimize(model(), recipe, steps=STEPS, target="eager")
        held = []

        def call(k, x, t, branch):
            out = drive(fast)(k, x, t, branch)
            held.append(fast.engine.session.state_bytes)
            return out

        with warnings.catch_warnings():
            # a window in another unit of time leaves its decision without a hit
            warnings.simplefilter("ignore")
            with fast.session(steps=STEPS):
                request(call)
        assert max(held) > 0
        assert shown(recipe) == pytest.approx(max(held), rel=0.05)
