"""What is written to disk: ONNX families and saved folders equal the session that they come from, and break clearly."""

import functools
import json
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open

import ditopt
from ditopt.artifact import VERSION
from ditopt.errors import ArtifactError, BadInput, SessionError
from ditopt.zoo import config
from examples import onnx_numpy
from tests.roads.tiny import digits_pipe, error, example, prompt, sample, sd3, small, times

STEPS = 8
SIGMAS = np.append(np.linspace(1, 1e-3, STEPS), 0)
RUN = "lossless, cache{region=blocks.1:-1,every=3,first=2,predictor=taylor,order=1}"
MODULES = "taylorseer{interval=3,order=2}"


def euler(model, seed, given, shape):
    """What examples/onnx_numpy.py does, by torch."""
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))
    with torch.no_grad():
        for k, sigma in enumerate(SIGMAS[:-1]):
            t = torch.full((shape[0],), 1000 * float(sigma))
            x = x + np.float32(SIGMAS[k + 1] - sigma) * model(x, timestep=t, **given, return_dict=False)[0]
    return x


@functools.cache
def digits_example():
    c = config("digits")["denoiser"]
    x = torch.zeros(2, c["in_channels"], c["sample_size"], c["sample_size"])
    return {"hidden_states": x, "timestep": torch.full((2,), 500.0), "class_labels": torch.tensor([3, 8])}


@functools.cache
def case(name):
    """(model, recipe, example, the inputs that no step changes)."""
    if name == "digits":
        given = {"class_labels": torch.tensor([3, 8])}
        return digits_pipe().transformer, RUN, {**digits_example(), "return_dict": False}, given
    return sd3(), MODULES, example(), prompt(0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """name -> folder with dit.onnx; exported once."""
    root = tmp_path_factory.mktemp("exported")

    @functools.cache
    def export(name):
        model, recipe, inputs, _ = case(name)
        (root / name).mkdir()
        ditopt.export_onnx(model, root / name / "dit.onnx", recipe, example_inputs=inputs, steps=STEPS)
        return root / name

    return export


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that ditopt.save wrote, and the model it came from."""
    fast = ditopt.optimize(small(), MODULES, target="eager", example_inputs=example())
    return ditopt.save(fast, tmp_path_factory.mktemp("saved") / "dit.ditopt"), fast


@pytest.fixture
def damaged(exported, tmp_path):
    """A copy of an export, to break."""
    return shutil.copytree(exported("sd3"), tmp_path / "copy")


# -- ONNX --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "sd3"])
def test_the_graphs_run_under_bare_onnxruntime(exported, name):
    model, recipe, inputs, given = case(name)
    fast = ditopt.optimize(model, recipe, target="eager", steps=STEPS)
    shape = tuple(inputs["hidden_states"].shape)
    with fast.session(steps=STEPS):
        want = euler(fast, 1, given, shape)
    prompts = {k: v.numpy() for k, v in given.items()}
    for _ in range(2):  # a second request is a new run
        got = onnx_numpy.run(exported(name) / "dit.json", 1, SIGMAS, prompts)
        assert error(torch.from_numpy(got), want) < 1e-5
    assert error(euler(model, 1, given, shape), want) > 1e-4  # the cache was in it
    assert fast.stats.hits.total() > 0


@pytest.mark.parametrize("name", ["digits", "sd3"])
def test_the_manifest_holds_the_schedule(exported, name):
    data = json.loads((exported(name) / "dit.json").read_text())
    assert data["ditopt_artifact"] == VERSION
    rows = data["extra"]["schedule"]
    assert [r["graph"] for r in rows] == ["full", "full", *["reuse", "reuse", "full"] * 2]
    order = 1 if name == "digits" else 2
    for row in rows:
        assert row["weights"].keys() == {"cache0.weights"}
        assert len(row["weights"]["cache0.weights"]) == order + 1
    assert rows[2]["weights"]["cache0.weights"][:2] == [2.0, -1.0]  # from steps 1 and 0 to step 2
    names = {g["name"]: {f["ref"] for f in g["inputs"] if f["kind"] == "state"} for g in data["graphs"]}
    full = next(g for g in data["graphs"] if g["name"] == "full")
    # the cache is an output of the one graph and an input of the other, and holds nothing that is not read
    written = {u["slot"] for u in full["updates"]}
    assert written == {s["name"] for s in data["state"]} == names["reuse"] != set()


@pytest.mark.parametrize("name", ["digits", "sd3"])
def test_the_reuse_graph_lacks_the_skipped_weights(exported, name):
    def weights(file):
        return {t.name for t in onnx.load(exported(name) / file, load_external_data=False).graph.initializer}

    full, reuse = weights("dit.onnx"), weights("dit.reuse.onnx")
    inside = {w for w in full if w.startswith("transformer_blocks.")}
    assert len(inside) >= 20
    if name == "digits":  # blocks 1 to 8 of ten
        assert {w.split(".")[1] for w in inside} == set(map(str, range(10)))
        assert {w.split(".")[1] for w in reuse if w.startswith("transformer_blocks.")} == {"0", "9"}
    else:
        assert not any(".attn." in w or ".ff" in w for w in reuse)
    assert {w for w in full if not w.startswith("transformer_blocks.")} - reuse <= full
    stored = exported(name) / "dit.safetensors"
    with safe_open(stored, "np") as f:  # one file, each weight once
        assert {w for w in full | reuse if "." in w} & set(f.keys()) >= inside
    assert sum(f.stat().st_size for f in exported(name).glob("*.onnx")) < stored.stat().st_size + 400_000


def test_a_loaded_export_equals_the_session(exported):
    model, recipe, inputs, _ = case("sd3")
    loaded = ditopt.load(exported("sd3") / "dit.onnx")
    fast = ditopt.optimize(model, recipe, target="eager", example_inputs=inputs)
    for seed in (0, 1):
        assert error(sample(loaded, seed, STEPS), sample(fast, seed, STEPS)) < 1e-5
    assert loaded.stats.hits == fast.stats.hits
    assert loaded.stats.hits.total() == 8
    out = loaded(**{k: v for k, v in inputs.items() if k != "return_dict"})
    assert isinstance(out, tuple)  # exported with return_dict=False


_ALONE = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "transformers", "onnxscript") or name.startswith(
            ("ditopt.passes", "ditopt.codegen")
        ):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
import torch, ditopt
model = ditopt.load(sys.argv[1])
data = torch.load(sys.argv[2])
out = [model(**call, return_dict=False)[0] for call in data["calls"]]
assert not [m for m in sys.modules if m.startswith(("ditopt.passes", "ditopt.codegen", "diffusers"))]
torch.save((out, model.stats.hits.total()), sys.argv[2])
"""


def test_an_export_loads_where_the_compiler_cannot_be_imported(exported, tmp_path):
    calls = [
        {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.full((2,), t), **prompt(0)} for t in times(STEPS)
    ]
    torch.save({"calls": calls}, tmp_path / "x.pt")
    command = [sys.executable, "-W", "error", "-c", _ALONE, str(exported("sd3") / "dit.onnx"), str(tmp_path / "x.pt")]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    out, hits = torch.load(tmp_path / "x.pt")
    model, recipe, _, _ = case("sd3")
    fast = ditopt.optimize(model, recipe, target="eager")
    for got, call in zip(out, calls, strict=True):
        assert error(got, fast(**call, return_dict=False)[0]) < 1e-5
    assert hits == 4


def test_an_optimized_module_exports_what_it_runs(tmp_path):
    fast = ditopt.optimize(small(), "cache{region=model,every=2}", target="eager", example_inputs=example(), steps=4)
    manifest = ditopt.export_onnx(fast, tmp_path / "x.onnx")
    assert [r["graph"] for r in manifest.extra["schedule"]] == ["full", "reuse"] * 2
    assert manifest.recipe == str(fast.engine.recipe)


def test_a_prediction_in_time_needs_the_timesteps(tmp_path):
    with pytest.raises(SessionError, match="predicts in the model's time: pass the timesteps of the 8 steps"):
        ditopt.export_onnx(small(), tmp_path / "x.onnx", "forecast", example_inputs=example(), steps=8)
    assert not list(tmp_path.iterdir())
    manifest = ditopt.export_onnx(
        small(), tmp_path / "x.onnx", "forecast", example_inputs=example(), timesteps=times(4)
    )
    assert [r["graph"] for r in manifest.extra["schedule"]] == ["full", "full", "reuse", "full"]
    with pytest.raises(BadInput, match="steps=3 and 4 timesteps given; they must agree"):
        ditopt.export_onnx(
            small(), tmp_path / "x.onnx", "forecast", example_inputs=example(), timesteps=times(4), steps=3
        )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no steps": (
        {"recipe": "fora"},
        "schedules steps, so the export must know how many: pass steps=",
    ),
    "no example": ({"example_inputs": None}, "export needs example_inputs: a dict of keyword arguments or a tuple"),
    "another suffix": ({"path": "x.bin"}, "ends in .onnx"),
    "no folder": ({"path": "nowhere/x.onnx"}, "does not exist; create it first"),
    "bfloat16": ({"dtype": torch.bfloat16}, "bfloat16"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_export_that_cannot_be_is_refused(tmp_path, what):
    given, says = REFUSED[what]
    dtype = given.get("dtype", torch.float32)
    model = small().to(dtype)
    options = {"recipe": "lossless", "example_inputs": example(dtype=dtype)} | {
        k: v for k, v in given.items() if k not in ("path", "dtype")
    }
    before = model(**example(dtype=dtype))[0]
    with pytest.raises(BadInput, match=says):
        ditopt.export_onnx(model, tmp_path / given.get("path", "x.onnx"), **options)
    assert not list(tmp_path.iterdir())
    assert torch.equal(model(**example(dtype=dtype))[0], before)


def test_changed_weights_are_seen_by_onnxruntime():
    """Its files hold copies of the weights."""
    recipe = "taylorseer{interval=2,order=1}"
    model: Any = small()
    fast = ditopt.optimize(model, recipe, target="onnxruntime")
    sample(fast, 0)
    model.blocks[1].up.weight.data.mul_(1.5)  # a LoRA merge counts no version
    changed = ditopt.optimize(model, recipe, target="eager")
    assert error(sample(fast, 1), sample(changed, 1)) < 1e-5
    assert error(sample(fast, 2), sample(changed, 2)) < 1e-5
    assert len(fast.engine.compiled) == 1
    assert fast.stats.calls == 18


# -- damage ------------------------------------------------------------------------------------------------------------


def another_version(folder):
    data = json.loads((folder / "dit.json").read_text())
    (folder / "dit.json").write_text(json.dumps({**data, "ditopt_artifact": VERSION + 1}))


def no_version(folder):
    (folder / "dit.json").write_text("{}")


def cut(name):
    def damage(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    damage.__name__ = f"cut_{name}"
    return damage


def flip_a_bit(folder):
    whole = bytearray((folder / "dit.safetensors").read_bytes())
    whole[-100] ^= 1
    (folder / "dit.safetensors").write_bytes(whole)


def remove(folder):
    (folder / "dit.reuse.onnx").unlink()


def point_elsewhere(folder):
    data = json.loads((folder / "dit.json").read_text())
    data["extra"]["sha256"]["../x"] = ""
    (folder / "dit.json").write_text(json.dumps(data))


DAMAGE = {
    another_version: rf"dit\.json has artifact version {VERSION + 1}, this ditopt reads version {VERSION}; export",
    no_version: r"dit\.json is not a ditopt manifest .* export the model again",
    cut("dit.json"): r"dit\.json is not a ditopt manifest",
    cut("dit.onnx"): r"dit\.onnx is damaged or of another export",
    cut("dit.safetensors"): r"dit\.safetensors is damaged or of another export",
    flip_a_bit: r"dit\.safetensors is damaged or of another export",
    remove: r"dit\.reuse\.onnx cannot be read .* keep the files of an export together",
    point_elsewhere: r"names the file '\.\./x', which is not beside it",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_a_damaged_export_is_one_error(damaged, damage):
    damage(damaged)
    with pytest.raises(ArtifactError, match=DAMAGE[damage]):
        ditopt.load(damaged / "dit.onnx")


def test_what_is_not_there_is_one_error(tmp_path):
    with pytest.raises(ArtifactError, match=r"x\.json does not exist; give the path that export_onnx wrote"):
        ditopt.load(tmp_path / "x.onnx")
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json; give the folder that ditopt\.save wrote"):
        ditopt.load(tmp_path)


# -- saved folders -----------------------------------------------------------------------------------------------------


def test_a_saved_model_equals_the_one_it_came_from(saved):
    folder, fast = saved
    loaded = ditopt.load(folder, target="eager")
    for seed in (0, 1):
        assert torch.equal(sample(loaded, seed), sample(fast, seed))
    assert loaded.stats.hits == fast.stats.hits
    assert loaded.stats.hits.total() == 6


def test_a_save_holds_the_weights_of_now(tmp_path):
    model = small()
    for target in ("eager", "onnxruntime"):
        fast = ditopt.optimize(model, "lossless", target=target, example_inputs=example())
        model.head.bias.data.add_(1.0)
        ditopt.save(fast, tmp_path / target)
        model.head.bias.data.sub_(1.0)
        out = ditopt.load(tmp_path / target, target="eager")(**example())[0]
        torch.testing.assert_close(out, model(**example())[0] + 1.0)


def other_shape(call):
    return {**call, "hidden_states": torch.zeros(2, 4, 12, 12)}


def other_dtype(call):
    return {**call, "hidden_states": call["hidden_states"].double()}


def too_little(call):
    return {k: v for k, v in call.items() if k != "pooled_projections"}


def too_much(call):
    return {**call, "guidance": torch.ones(2)}


CALLS = {
    other_shape: (
        SessionError,
        r"hidden_states is float32\[2, 4, 12, 12\], but .* was exported for float32\[2, 4, 8, 8\]",
    ),
    other_dtype: (SessionError, r"hidden_states is float64\[2, 4, 8, 8\], but"),
    too_little: (BadInput, r"pooled_projections not given"),
    too_much: (BadInput, r"unknown input 'guidance'"),
}


@pytest.mark.parametrize("change", CALLS, ids=lambda c: c.__name__)
def test_a_loaded_model_refuses_other_calls(saved, change):
    loaded = ditopt.load(saved[0], target="eager")
    kind, says = CALLS[change]
    want = loaded(**example())[0]
    with pytest.raises(kind, match=says):
        loaded(**change(example()))
    assert torch.equal(loaded(**example())[0], want)


@pytest.mark.parametrize("name", ["program.txt", "weights.safetensors", "manifest.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_save_is_one_error(saved, tmp_path, name, how):
    folder = shutil.copytree(saved[0], tmp_path / "copy")
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    if how == "cut":
        (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=rf"{name}.*(missing or damaged|not a ditopt manifest|holds no|give the)"):
        ditopt.load(folder, target="eager")


def test_a_save_of_another_version_is_one_error(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "copy")
    data = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**data, "ditopt_artifact": 99}))
    with pytest.raises(ArtifactError, match=f"artifact version 99, this ditopt reads version {VERSION}"):
        ditopt.load(folder, target="eager")


def test_a_saved_folder_does_not_run_on_onnxruntime(saved):
    with pytest.raises(BadInput, match=r"for onnxruntime use export_onnx and load its \.onnx"):
        ditopt.load(saved[0], target="onnxruntime")


def test_save_takes_what_optimize_returned(tmp_path):
    with pytest.raises(BadInput, match=r"a Small was given; save takes what ditopt\.optimize returned"):
        ditopt.save(small(), tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="nothing is captured yet"):
        ditopt.save(ditopt.optimize(small(), target="eager"), tmp_path / "x")
    assert not list(tmp_path.iterdir())
