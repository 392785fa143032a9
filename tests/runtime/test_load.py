import dataclasses
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ditopt.artifact import VERSION, Manifest, StepGraph
from ditopt.codegen.onnx.export import WeightStore, export_artifact, export_graph
from ditopt.errors import ArtifactError, BadInput, DitoptWarning, MissingExtra, SessionError
from ditopt.ir.program import Formal, Input, TensorType
from ditopt.runtime import ort as ort_module
from ditopt.runtime.load import Output, load_onnx
from ditopt.runtime.session import Session
from examples.onnx_numpy import run
from tests.onnx_toy import Toy, graph_of, inputs, model

STEPS = 8


@pytest.fixture(scope="module")
def toy():
    return Toy(steps=STEPS)


@pytest.fixture(scope="module")
def folder(toy, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "dit.onnx"
    toy.export(path)
    return path.parent


@pytest.fixture
def loaded(folder):
    return load_onnx(folder / "dit.onnx")


def call(target, hidden, given, **more):
    return target(x={"hidden": hidden}, time=given["time"], labels=given["labels"], **more)


def sample(step, seed=0):
    """Euler flow matching, as examples/onnx_numpy.py does it; ``step(x, time)`` is the model."""
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, 6, 32), np.float32))
    sigmas = np.append(np.linspace(1, 1e-3, STEPS), 0)
    for k in range(STEPS):
        x = x + torch.tensor(np.float32(sigmas[k + 1] - sigmas[k])) * step(
            x, torch.full((2,), 1000 * sigmas[k]).float()
        )
    return x, sigmas


def test_a_request_equals_the_torch_session(loaded, toy):
    plan, session, labels = toy.plan(), Session(), inputs()["labels"]
    with session.open(steps=STEPS):
        want, _ = sample(lambda x, t: session.call(plan, [x, t, labels])[0])
    for _ in range(2):  # the second request equals the first
        with loaded.session(steps=STEPS):
            got, _ = sample(lambda x, t: loaded(x={"hidden": x}, time=t, labels=labels).sample)
        assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert loaded.stats.graphs == {"full": 2 * 4, "reuse": 2 * 4}
    assert "".join(row.graph[0] for row in loaded.schedule_rows) == "ffrrfrrf"
    assert "".join(s["graph"][0] for s in toy.schedule) == "ffrrfrrf"
    plain, _ = sample(lambda x, t: model(toy.values, x, t, labels))
    assert (got - plain).abs().max() > 1e-3  # reuse steps really predict


def test_a_loop_written_for_an_optimized_model_runs_a_loaded_one(loaded):
    """Whatever a sampling loop needs of an OptimizedModule, a LoadedModel has by the same name and with the same
    arguments."""
    import inspect

    from ditopt.optimized import OptimizedModule

    for name in ("session", "cache_context", "reset"):
        mine, other = (list(inspect.signature(getattr(c, name)).parameters) for c in (type(loaded), OptimizedModule))
        assert mine == [p for p in other if p != "where"]
    with loaded.session(steps=STEPS), loaded.cache_context("cond"):
        sample(lambda x, t: loaded(x={"hidden": x}, time=t, labels=inputs()["labels"]).sample)
    assert loaded.stats.calls == len(loaded.schedule_rows) == STEPS


def test_the_numpy_driver_equals_the_session(loaded, folder):
    labels = inputs()["labels"]
    with loaded.session(steps=STEPS):
        want, sigmas = sample(lambda x, t: loaded(x={"hidden": x}, time=t, labels=labels).sample)
    got = run(folder / "dit.json", 0, sigmas, {"labels": labels.numpy()})
    assert_close(torch.from_numpy(got), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="zip"):
        run(folder / "dit.json", 0, sigmas[:-1], {"labels": labels.numpy()})


def test_the_numpy_driver_from_the_command_line(folder, tmp_path):
    labels = inputs()["labels"].numpy()
    np.savez(tmp_path / "prompt.npz", labels=labels)
    script = Path(__file__).parents[2] / "examples" / "onnx_numpy.py"
    blocked = "import sys; sys.modules['torch'] = sys.modules['ditopt'] = None; import runpy; sys.argv.pop(0); "
    flags = ["--steps", str(STEPS), "--seed", "5", "--out", tmp_path / "x.npy", "--prompt", tmp_path / "prompt.npz"]
    start = [sys.executable, "-c", blocked + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    subprocess.run([*start, script, folder / "dit.json", *flags], check=True)
    sigmas = np.append(np.linspace(1, 1e-3, STEPS), 0)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), run(folder / "dit.json", 5, sigmas, {"labels": labels}))


@pytest.mark.parametrize("name", ["dit.onnx", "dit.json", "dit"])
def test_paths_and_outputs(folder, toy, name):
    loaded, given = load_onnx(folder / name), inputs()
    out = call(loaded, given["x.hidden"], given)
    assert isinstance(out, Output)
    assert_close(out.sample, model(toy.values, *given.values()), atol=1e-5, rtol=1e-5)
    assert out[0] is out["sample"] is out.sample is out.to_tuple()[0] is out[:1][0]
    assert not hasattr(out, "other")
    with pytest.warns(DitoptWarning, match="never reused"):
        loaded.reset()
    plain = loaded({"hidden": given["x.hidden"]}, given["time"], labels=given["labels"].numpy(), return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], out[0])


def test_arguments(loaded):
    given = inputs()
    call(
        loaded,
        given["x.hidden"],
        given,
        mode="plain",
        sizes=(1, 2),
        mask=None,
        extra={},
        return_dict=True,
        opts={"scale": 1},
    )
    with pytest.raises(BadInput, match=r"mode='fancy'.*exported with mode='plain'"):
        call(loaded, given["x.hidden"], given, mode="fancy")
    with pytest.raises(BadInput, match=r"opts\.scale=2"):
        call(loaded, given["x.hidden"], given, opts={"scale": 2})
    with pytest.raises(BadInput, match="other=3"):
        call(loaded, given["x.hidden"], given, other=3)
    with pytest.raises(
        BadInput, match=r"unknown input 'mask'.*x\.hidden: float32\[2, 6, 32\], time: float32\[2\], labels"
    ):
        call(loaded, given["x.hidden"], given, mask=torch.ones(2))
    with pytest.raises(BadInput, match="labels not given"):
        loaded(x={"hidden": given["x.hidden"]}, time=given["time"])
    with pytest.raises(BadInput, match="by position and by name"):
        loaded({"hidden": given["x.hidden"]}, x=1)
    with pytest.raises(BadInput, match="4 positional"):
        loaded(1, 2, 3, 4)
    with pytest.raises(SessionError, match=r"x\.hidden is float32\[2, 7, 32\].*exported for float32\[2, 6, 32\]"):
        call(loaded, torch.zeros(2, 7, 32), given)
    with pytest.raises(SessionError, match=r"x\.hidden is float64"):
        call(loaded, given["x.hidden"].double(), given)
    with pytest.raises(SessionError, match=r"time is float32\[\]"):
        loaded(x={"hidden": given["x.hidden"]}, time=3, labels=given["labels"])


def test_non_contiguous_and_differentiable_inputs(loaded, toy):
    given = inputs()
    hidden = given["x.hidden"].transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    out = call(loaded, hidden, given)[0]
    assert not out.requires_grad
    assert_close(out, model(toy.values, *given.values()), atol=1e-5, rtol=1e-5)


def test_outputs_of_two_calls_are_two_tensors(loaded):
    given = inputs()
    first = call(loaded, given["x.hidden"], given)[0]
    before = first.clone()
    call(loaded, given["x.hidden"] + 1, given)
    assert torch.equal(first, before)


def run_one(fn, example, tmp_path):
    """``fn(w, *example)`` as an artifact of one graph, called once by onnxruntime."""
    types = [TensorType.of(t) for t in example]
    module, formals, values = graph_of(fn, {}, [], [Formal("input", f"i{k}") for k in range(len(types))], types)
    names = tuple(Input(f"i{k}", "latent", t) for k, t in enumerate(types))
    manifest = Manifest(names, ("y",), (), (), (), (StepGraph("full", {}, formals, 1),), structure="single")
    export_artifact(manifest, {"full": module}, {"full": values}, {}, tmp_path / "m.onnx")
    return load_onnx(tmp_path / "m")(*example)


@pytest.mark.parametrize(
    ("fn", "example"),
    [
        (lambda w, x, t, unused: (x * t,), [torch.randn(3), torch.tensor(2.0), torch.tensor([1])]),
        (lambda w, x: (x.sum(),), [torch.randn(3, 4).half()]),
        (lambda w, x: (x.cumsum(0) / x.sum(-1, keepdim=True),), [torch.rand(3, 4).half() + 1]),
        (lambda w, x: (x.any(0),), [torch.tensor([[True, False], [False, False]])]),
        (lambda w, x: (torch.cat([x, x.new_ones(2, 3)], 1),), [torch.randn(2, 0)]),
        (lambda w, x: (x[2:] * 2,), [torch.randn(2, 3)]),
        (lambda w, x: (torch.nn.functional.layer_norm(x, (8,)).softmax(-1),), [torch.randn(2, 8).half()]),
        (lambda w, x: (x.to(torch.int32),), [torch.randn(2, 8, dtype=torch.float64)]),
    ],
)
def test_types_and_shapes(fn, example, tmp_path):
    want = fn({}, *example)[0]
    got = run_one(fn, example, tmp_path)
    assert_close(got, want, atol=2e-3 if want.dtype is torch.half else 1e-6, rtol=1e-5)


def damaged(folder, tmp_path, name, change):
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / name
    change(file)
    return tmp_path / "copy" / "dit.onnx"


@pytest.mark.parametrize("name", ["dit.onnx", "dit.reuse.onnx", "dit.memo.mod.onnx", "dit.safetensors"])
def test_damage_is_named(folder, tmp_path, name):
    def flip(file):
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)

    with pytest.raises(ArtifactError, match=rf"{name} is damaged"):
        load_onnx(damaged(folder, tmp_path, name, flip))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dit.safetensors", lambda f: f.write_bytes(f.read_bytes()[:-100]), r"dit\.safetensors is damaged"),
        ("dit.reuse.onnx", Path.unlink, r"dit\.reuse\.onnx cannot be read"),
        ("dit.json", Path.unlink, r"dit\.json does not exist"),
        ("dit.json", lambda f: f.write_text(f.read_text()[:500]), "not a ditopt manifest"),
        ("dit.json", lambda f: edit(f, ditopt_artifact=VERSION + 1), f"version {VERSION + 1}"),
        ("dit.json", lambda f: edit(f, target="inductor"), "target 'inductor'"),
        ("dit.json", lambda f: edit(f, extra={}), "without a hash"),
        ("dit.json", lambda f: f.write_text(f.read_text().replace("dit.reuse.onnx", "../reuse.onnx")), "not beside it"),
    ],
)
def test_refused_artifacts(folder, tmp_path, name, change, message):
    with pytest.raises(ArtifactError, match=message):
        load_onnx(damaged(folder, tmp_path, name, change))


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_without_onnxruntime(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"ditopt\[cpu\].*ditopt\[gpu\]"):
        load_onnx(folder / "dit.onnx")


def test_graphs_load_when_they_first_run(loaded):
    graphs = loaded.plan.run
    assert all(isinstance(g, ort_module._Graph) and not g._sessions for g in graphs.values())
    given = inputs()
    call(loaded, given["x.hidden"], given)
    assert {name for name, g in graphs.items() if g._sessions} == {"full", "mod"}


def test_the_runtime_needs_neither_compiler_nor_model(folder):
    code = f"""
        import sys
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                for banned in ("ditopt.passes", "ditopt.codegen", "ditopt.pipeline", "ditopt.capture", "diffusers",
                               "onnx", "onnxscript", "onnx_ir", "triton", "torch._inductor"):
                    if name == banned or name.startswith(banned + "."):
                        raise ModuleNotFoundError(f"{{name}} is blocked here")
        sys.meta_path.insert(0, Blocker())
        import torch
        from ditopt.runtime.load import load_onnx
        model = load_onnx({str(folder / "dit.onnx")!r})
        out = model(x={{"hidden": torch.ones(2, 6, 32)}}, time=torch.ones(2), labels=torch.tensor([0, 1]))
        assert out.sample.isfinite().all() and out.sample.shape == (2, 6, 32)
        assert not [m for m in sys.modules if m.startswith(("ditopt.passes", "ditopt.codegen", "diffusers"))]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=Path(__file__).parents[2])


def test_tensors_without_elements_go_in_and_out(tmp_path):
    """As the masked tokens of a prompt without any, which a memo holds."""
    kept, none = TensorType(torch.float32, (2, 3)), TensorType(torch.float32, (0, 3))
    formals = [Formal("input", "kept"), Formal("input", "none")]
    module, formals, values = graph_of(lambda w, a, b: (a + 1, b * 2), {}, [], formals, [kept, none])
    graph = StepGraph("g", {}, formals, 2)
    store = WeightStore("w.safetensors")
    export_graph(graph, module, {}, values, tmp_path / "g.onnx", store)
    store.write(tmp_path)
    step = ort_module._Graph(tmp_path, dataclasses.replace(graph, file="g.onnx"))
    more, empty = step([torch.ones(2, 3), torch.ones(0, 3)])
    assert_close(more, torch.full((2, 3), 2.0))
    assert empty.shape == (0, 3)
