"""Fitted systems whose schedules are published rules of a recording: each is its own rule, and no other's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from safetensors.numpy import load_file

from ditopt.calibration import Profile, fit
from ditopt.errors import RecipeError

STEPS, BLOCKS = 12, 4
RNG = np.random.default_rng(0)


def drift(scale: float) -> np.ndarray:
    """A recording (1, STEPS, 5, 3) that wanders, faster in the middle of the request."""
    pace = scale * (0.2 + np.sin(np.linspace(0, np.pi, STEPS)) ** 2)
    return (1 + np.cumsum(RNG.normal(size=(1, STEPS, 5, 3)) * pace[None, :, None, None], 1)).astype(np.float32)


MODULES = {f"blocks.{i}.{role}": drift(0.1 * (i + 1)) for i in range(BLOCKS) for role in ("attn", "mlp")}
RUNS = {"blocks.1:-1": drift(0.3), "blocks.:-1": drift(0.3)}


def profile() -> Profile:
    regions = {f"blocks.*.{role}": tuple(n for n in MODULES if n.endswith(role)) for role in ("attn", "mlp")}
    regions |= {name: (name,) for name in RUNS}
    return Profile({"steps": str(STEPS)}, np.arange(STEPS, dtype=np.float64), {**MODULES, **RUNS}, regions)


def masks(recipe: str) -> dict[str, str]:
    """The mask of each region that a fitted recipe caches."""
    found: dict[str, str] = {}
    for step in fit(recipe, profile()).steps:
        if step.name == "cache":
            found |= dict.fromkeys(str(step.options["region"]).split("|"), str(step.options["mask"]))
    return found


def anchored(values: np.ndarray, computed: tuple[int, ...], distance) -> float:
    """What reusing the newest computed step costs over a request."""
    held = [max(c for c in computed if c <= t) for t in range(STEPS)]
    return sum(distance(values[0, h], values[0, t]) for t, h in enumerate(held))


def cheapest(values: np.ndarray, count: int, distance) -> str:
    """The mask of ``count`` computed steps, step 0 among them, by brute force."""
    options = ((0, *rest) for rest in itertools.combinations(range(1, STEPS), count - 1))
    best = min(options, key=lambda c: anchored(values, c, distance))
    return "".join("1" if t in best else "0" for t in range(STEPS))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return 1 - float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def token_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([cosine(x, y) for x, y in zip(a, b, strict=True)]))


def l1(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).sum())


def test_bac_gives_each_module_its_own_best_steps():
    found = masks("bac{refreshes=4,volatile=0}")
    assert found == {name: cheapest(values, 4, cosine) for name, values in MODULES.items()}
    assert len(set(found.values())) > 1


def test_bac_refreshes_volatile_mlps_with_those_behind_them():
    alone, joined = masks("bac{refreshes=4,volatile=0}"), masks("bac{refreshes=4,volatile=1}")
    changed = [name for name in alone if alone[name] != joined.get(name, "1" * STEPS)]
    assert all(name.endswith(".mlp") for name in changed)
    for name in changed:  # only ever more computed steps
        assert all(b >= a for a, b in zip(alone[name], joined[name], strict=True))


def test_cachequant_groups_are_half_to_twice_the_interval():
    (mask,) = masks("cachequant{interval=3}").values()
    runs = [len(part) + 1 for part in mask[1:].split("1")]
    assert mask.count("1") == 4
    assert all(2 <= n <= 6 for n in runs)
    fits = []
    for rest in itertools.combinations(range(1, STEPS), 3):
        cuts = (0, *rest, STEPS)
        if all(2 <= b - a <= 6 for a, b in itertools.pairwise(cuts)):
            fits.append((anchored(RUNS["blocks.1:-1"], (0, *rest), l1), rest))
    assert mask == "".join("1" if t in (0, *min(fits)[1]) else "0" for t in range(STEPS))


def test_cachequant_writes_the_correction_of_its_reused_steps(tmp_path):
    table = tmp_path / "table.safetensors"
    made = fit(f"cachequant{{interval=3,table={table}}}", profile())
    (step,) = [s for s in made.steps if s.name == "cache"]
    assert step.options["correction"] == str(table)
    mask, tables = str(step.options["mask"]), load_file(table)
    values = RUNS["blocks.1:-1"][0].astype(np.float64)
    for t in range(STEPS):
        held = values[max(s for s in range(t + 1) if mask[s] == "1")]
        for c in range(3):
            if mask[t] == "1":
                slope, shift = 1.0, 0.0
            else:
                slope = float(np.cov(values[t, :, c], held[:, c], bias=True)[0, 1] / held[:, c].var())
                slope = min(max(slope, 0.0), 2.0)
                shift = float(values[t, :, c].mean() - slope * held[:, c].mean())
            assert tables["scale"][t, c] == pytest.approx(slope, abs=1e-4)
            assert tables["shift"][t, c] == pytest.approx(shift, abs=1e-3)


def test_ddt_shares_the_steps_that_represent_the_others_best():
    (mask,) = masks("ddt_sharing{rate=3}").values()
    assert mask == cheapest(RUNS["blocks.:-1"], 4, token_cosine)


def test_routers_are_read_in_their_own_order(tmp_path):
    scores = RNG.random((STEPS, 2 * BLOCKS))
    np.save(tmp_path / "router.npy", scores)
    given = f"table={tmp_path / 'router.npy'},threshold=0.5,logits=false"
    forward, backward = masks(f"harmonica{{{given}}}"), masks(f"learning_to_cache{{{given}}}")
    for block, (column, role) in itertools.product(range(BLOCKS), enumerate(("attn", "mlp"))):
        bits = scores[:, 2 * block + column] > 0.5
        name = f"blocks.{block}.{role}"
        assert forward[name] == "1" + "".join(str(int(b)) for b in bits[1:])
        assert backward[name] == "".join("1" if t % 2 == 0 else str(int(b)) for t, b in enumerate(bits[::-1]))


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"refreshes=13.*has 12 steps"):
        fit("bac{refreshes=13}", profile())
    with pytest.raises(RecipeError, match=r"interval=13.*has 12 steps"):
        fit("cachequant{interval=13}", profile())
    with pytest.raises(RecipeError, match=r"rate=13.*has 12 steps"):
        fit("ddt_sharing{rate=13}", profile())
    with pytest.raises(RecipeError, match="table= is missing"):
        fit("harmonica", profile())
    np.save(tmp_path / "router.npy", np.zeros((STEPS, 6)))
    with pytest.raises(RecipeError, match="is for 3 blocks, this model has 4"):
        fit(f"harmonica{{table={tmp_path / 'router.npy'}}}", profile())
    np.save(tmp_path / "router.npy", np.zeros((STEPS + 1, 8)))
    with pytest.raises(RecipeError, match="13 steps"):
        fit(f"harmonica{{table={tmp_path / 'router.npy'}}}", profile())
