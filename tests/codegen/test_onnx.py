import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from ditopt.artifact import Manifest, StepGraph, Update
from ditopt.codegen.onnx import export
from ditopt.codegen.onnx.export import WeightStore, export_artifact, export_graph, opset
from ditopt.errors import BadInput, DitoptError
from ditopt.ir.program import Formal, Input, TensorType
from tests.onnx_toy import Toy, condition, graph_of, inputs, model, one_graph, session


@pytest.fixture(scope="module")
def toy():
    return Toy()


@pytest.fixture(scope="module")
def folder(toy, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "dit.onnx"
    toy.written = toy.export(path)
    return path.parent


def proto(file):
    return onnx.load(str(file), load_external_data=False)


def initializers(file):
    return {i.name: {e.key: e.value for e in i.external_data} for i in proto(file).graph.initializer}


def test_family(folder, toy):
    assert sorted(f.name for f in folder.iterdir()) == [
        "dit.json",
        "dit.memo.mod.onnx",
        "dit.onnx",
        "dit.reuse.onnx",
        "dit.safetensors",
    ]
    data = json.loads((folder / "dit.json").read_text())
    assert data["target"] == "onnxruntime"
    assert [g["file"] for g in data["graphs"]] == ["dit.onnx", "dit.reuse.onnx"]
    assert data["extra"]["schedule"] == toy.schedule
    assert set(data["extra"]["sha256"]) == {f.name for f in folder.iterdir()} - {"dit.json"}
    assert {f["kind"] for g in data["graphs"] for f in g["inputs"]} == {"input", "memo", "state", "control"}
    assert "device" not in data["extra"]


def test_names(folder):
    full, reuse = session(folder / "dit.onnx"), session(folder / "dit.reuse.onnx")
    assert [i.name for i in full.get_inputs()] == ["x.hidden", "mod.0"]
    assert [o.name for o in full.get_outputs()] == ["sample", "new.cache.0.0"]
    assert [i.name for i in reuse.get_inputs()] == ["x.hidden", "mod.0", "cache.0.0", "cache.0.1", "cache.weights"]
    assert [o.name for o in session(folder / "dit.memo.mod.onnx").get_outputs()] == ["mod.0"]


def test_parity(folder, toy):
    given = inputs()
    mod = session(folder / "dit.memo.mod.onnx").run(None, {k: given[k].numpy() for k in ("time", "labels")})[0]
    assert_close(torch.from_numpy(mod), condition(toy.values, given["time"], given["labels"]), atol=1e-5, rtol=1e-5)
    out = session(folder / "dit.onnx").run(None, {"x.hidden": given["x.hidden"].numpy(), "mod.0": mod})
    assert_close(torch.from_numpy(out[0]), model(toy.values, *given.values()), atol=1e-5, rtol=1e-5)
    feed = {"x.hidden": given["x.hidden"].numpy(), "mod.0": mod, "cache.weights": np.array([2, -1], "f")}
    again = session(folder / "dit.reuse.onnx").run(None, {**feed, "cache.0.0": out[1], "cache.0.1": out[1]})
    np.testing.assert_allclose(again[0], out[0], atol=1e-5)


def test_weights_are_stored_once_and_readable(folder, toy):
    stored = load_file(folder / "dit.safetensors")
    assert stored.keys() == toy.values.keys()
    assert all(torch.equal(stored[k], toy.values[k]) for k in stored)
    full, reuse = initializers(folder / "dit.onnx"), initializers(folder / "dit.reuse.onnx")
    assert {k: full[k] for k in reuse} == reuse  # the same bytes of the same file
    assert {e["location"] for e in full.values()} == {"dit.safetensors"}
    assert all(int(e["offset"]) % 64 == 0 for e in full.values())
    assert sum(int(e["length"]) for e in full.values()) < (folder / "dit.safetensors").stat().st_size
    assert (folder / "dit.onnx").stat().st_size < 60_000


def test_reuse_does_without_the_skipped_block(folder, toy):
    reuse = initializers(folder / "dit.reuse.onnx")
    assert set(reuse) == {k for k in toy.values if k.startswith("b0.") or k == "head.weight"}
    assert b"b1." not in (folder / "dit.reuse.onnx").read_bytes()


def test_unused_weight_stays_out(tmp_path):
    one_graph(lambda w, x: (x * w["a"],), [torch.ones(4)], tmp_path, {"a": torch.ones(4), "unused": torch.ones(4)})
    assert set(initializers(tmp_path / "g.onnx")) == {"a"}
    assert set(load_file(tmp_path / "w.safetensors")) == {"a"}


def test_files_name_no_path_of_this_machine(folder):
    for file in folder.glob("*.onnx"):
        assert str(Path(__file__).parents[2]).encode() not in file.read_bytes()
        assert b".py" not in file.read_bytes()


def test_operators(folder):
    ops = [n.op_type for n in proto(folder / "dit.onnx").graph.node]
    assert proto(folder / "dit.onnx").opset_import[0].version == opset() == 23
    assert ops.count("Attention") == 2
    assert "SplitToSequence" not in ops


def test_an_older_onnxruntime_gets_an_older_opset(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "opset", lambda: 20)
    toy.export(tmp_path / "dit.onnx")
    assert proto(tmp_path / "dit.onnx").opset_import[0].version == 20
    given = inputs()
    mod = condition(toy.values, given["time"], given["labels"]).numpy()
    out = session(tmp_path / "dit.onnx").run(None, {"x.hidden": given["x.hidden"].numpy(), "mod.0": mod})[0]
    assert_close(torch.from_numpy(out), model(toy.values, *given.values()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: tuple(p.sin() for p in x.split([3, 1, 4], -1)),
        lambda w, x: tuple(p.sin() for p in x.chunk(3, -1)),
        lambda w, x: tuple(p.sin() for p in x.unbind(1)),
        lambda w, x: (x.split(3, 1)[-1],),
    ],
)
def test_splits(fn, tmp_path):
    x = torch.randn(2, 5, 8)
    expected = fn({}, x)
    run = one_graph(fn, [x], tmp_path, outputs=len(expected))
    for got, want in zip(run.run(None, {"in0": x.numpy()}), expected, strict=True):
        assert_close(torch.from_numpy(got), want)
    assert not {"SplitToSequence", "SequenceAt"} & {n.op_type for n in proto(tmp_path / "g.onnx").graph.node}


def test_a_tiny_epsilon_survives(tmp_path):
    run = one_graph(lambda w, x: (x / (x.sum() + 1e-15),), [torch.zeros(3)], tmp_path)
    np.testing.assert_array_equal(run.run(None, {"in0": np.zeros(3, "f")})[0], np.zeros(3))


def test_masked_attention(tmp_path):
    q, mask = torch.randn(2, 2, 5, 8), torch.rand(2, 1, 5, 5) > 0.3
    mask[..., 0] = True
    fn = lambda w, q, m: (torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=m, scale=0.2),)  # noqa: E731
    run = one_graph(fn, [q, mask], tmp_path)
    out = run.run(None, {"in0": q.numpy(), "in1": mask.numpy()})[0]
    assert_close(torch.from_numpy(out), fn({}, q, mask)[0], atol=1e-5, rtol=1e-5)


def test_an_output_that_is_an_input_or_another_output(tmp_path):
    def fn(w, x):
        y = x + w["c"]
        return y, y, x, w["c"]

    run = one_graph(fn, [torch.ones(3)], tmp_path, {"c": torch.arange(3.0)}, 3, (Update("slot", 3),))
    assert [o.name for o in run.get_outputs()] == ["out.0", "out.1", "out.2", "new.slot"]
    y, same, x, c = run.run(None, {"in0": np.ones(3, "f")})
    np.testing.assert_array_equal(y, [1, 2, 3])
    np.testing.assert_array_equal(same, y)
    np.testing.assert_array_equal(x, [1, 1, 1])
    np.testing.assert_array_equal(c, [0, 1, 2])


def test_equal_names_are_told_apart(tmp_path):
    module, _, values = graph_of(lambda w, a, b: ((a + b).mul(2),), {}, [], [], [TensorType(torch.float32, (3,))] * 2)
    graph = StepGraph("g", {}, (Formal("input", "add"), Formal("state", "add")), 1)
    store = WeightStore("w.safetensors")
    export_graph(graph, module, {}, values, tmp_path / "g.onnx", store, output_names=["add"])
    store.write(tmp_path)
    run = session(tmp_path / "g.onnx")
    assert [i.name for i in run.get_inputs()] == ["add", "state.add"]
    assert [o.name for o in run.get_outputs()] == ["out.add"]
    np.testing.assert_array_equal(run.run(None, {"add": np.ones(3, "f"), "state.add": np.ones(3, "f")})[0], [4, 4, 4])


def test_tied_weights_share_their_bytes(tmp_path):
    a = torch.randn(4, 4)
    one_graph(lambda w, x: (x @ w["a"] @ w["b"],), [torch.ones(2, 4)], tmp_path, {"a": a, "b": a.detach()})
    e = initializers(tmp_path / "g.onnx")
    assert e["a"] == e["b"]
    assert set(load_file(tmp_path / "w.safetensors")) == {"a"}


def test_dtypes_and_odd_sizes_stay_aligned(tmp_path):
    w = {
        "double": torch.randn(3, dtype=torch.float64),
        "half": torch.randn(5).half(),
        "bool": torch.tensor([True, False, True]),
        "int": torch.tensor([1, -2, 3]),
        "scalar": torch.tensor(1.5),
        "column": torch.randn(3, 4).T[1],
    }

    def fn(w, x):
        y = x + w["double"].float() + w["half"][:3].float() + w["int"] + w["scalar"] + w["column"]
        return (torch.where(w["bool"], y, -y),)

    run = one_graph(fn, [torch.ones(3)], tmp_path, w)
    assert_close(torch.from_numpy(run.run(None, {"in0": np.ones(3, "f")})[0]), fn(w, torch.ones(3))[0])
    stored = load_file(tmp_path / "w.safetensors")
    for name, e in initializers(tmp_path / "g.onnx").items():
        assert torch.equal(stored[name], w[name])
        assert int(e["offset"]) % w[name].element_size() == 0


def test_large_constants_leave_the_graph(tmp_path):
    table, graph = torch.randn(40, 40), torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.mm.default, (x, graph.get_attr("table"))),))
    module = torch.fx.GraphModule({"table": table}, graph)
    store = WeightStore("w.safetensors")
    step = StepGraph("g", {}, (Formal("input", "x"),), 1)
    export_graph(step, module, {}, [torch.ones(2, 40)], tmp_path / "g.onnx", store)
    store.write(tmp_path)
    out = session(tmp_path / "g.onnx").run(None, {"x": np.ones((2, 40), "f")})[0]
    np.testing.assert_allclose(out[0], table.sum(0), rtol=1e-4, atol=1e-5)
    assert [t.shape for t in load_file(tmp_path / "w.safetensors").values()] == [(40, 40)]
    assert (tmp_path / "g.onnx").stat().st_size < 2000


def test_refusals(tmp_path):
    with pytest.raises(BadInput, match=r"bfloat16.*model\.float\(\)"):
        one_graph(lambda w, x: (x * w["a"],), [torch.ones(4)], tmp_path, {"a": torch.ones(4).bfloat16()})
    with pytest.raises(BadInput, match="result 0 of graph 'g' is bfloat16"):
        one_graph(lambda w, x: (x.bfloat16(),), [torch.ones(4)], tmp_path)
    with pytest.raises(BadInput, match="complex64, and ONNX has no complex numbers"):
        one_graph(lambda w, x: (torch.view_as_real(x),), [torch.ones(4, dtype=torch.complex64)], tmp_path)
    with pytest.raises(
        DitoptError, match=r"^graph 'odd' cannot be translated to ONNX: prims\.bessel_j1\.default: \w+: [^\n]+$"
    ):
        one_graph(lambda w, x: (torch.special.bessel_j1(x),), [torch.ones(4)], tmp_path, name="odd")
    store = WeightStore("w")
    store.add("a", torch.ones(2))
    with pytest.raises(BadInput, match="two different tensors"):
        store.add("a", torch.ones(2))


def test_a_failed_export_leaves_what_was_there(toy, tmp_path):
    x = torch.ones(3)
    small = Manifest((Input("x", "latent", TensorType.of(x)),), ("y",), (), (), (), (StepGraph("full", {}, (), 1),))
    module, formals, values = graph_of(lambda w, x: (x + 1,), {}, [], [Formal("input", "x")], [TensorType.of(x)])
    good = dataclasses.replace(small, graphs=(StepGraph("full", {}, formals, 1), StepGraph("spare", {}, formals, 1)))
    args: Any = {"full": module, "spare": module}, {"full": values, "spare": values}, {}, tmp_path / "m.onnx"
    export_artifact(good, *args)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(BadInput, match=r"m\.safetensors"):
        export_artifact(good, *args, overwrite=False)
    bad = dataclasses.replace(good, graphs=(*good.graphs, StepGraph("late", {}, (), 1)))
    with pytest.raises(BadInput, match="placeholders"):
        export_artifact(bad, {**args[0], "late": module}, {**args[1], "late": values}, {}, args[3])
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    export_artifact(dataclasses.replace(good, graphs=good.graphs[:1]), *args)
    assert "m.spare.onnx" not in {f.name for f in tmp_path.iterdir()}  # an old variant does not stay behind
    with pytest.raises(BadInput, match=r"ends in \.onnx"):
        export_artifact(good, {}, {}, {}, tmp_path / "m")


def test_the_caller_keeps_its_warning_filters(toy, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_graph(lambda w, x: (x + 1,), [torch.ones(3)], tmp_path)
        with pytest.raises(FutureWarning):
            warnings.warn("still an error", FutureWarning, stacklevel=1)


@pytest.mark.parametrize("shape", [(2, 1, 1, 6), (1, 1, 5, 6), (1, 6)], ids=str)
@pytest.mark.parametrize("kind", ["added", "boolean"])
def test_a_mask_of_one_row_serves_all_queries(tmp_path, shape, kind):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 4, generator=generator) for n in (5, 6, 6))
    keep = torch.rand(shape, generator=generator) > 0.4
    keep[..., 0] = True
    mask = keep if kind == "boolean" else (~keep).float() * -1e4
    attend = torch.ops.aten.scaled_dot_product_attention.default
    out = one_graph(lambda w, *given: (attend(*given),), [q, k, v, mask], tmp_path).run(
        None, {f"in{i}": t.numpy() for i, t in enumerate((q, k, v, mask))}
    )
    assert_close(torch.from_numpy(out[0]), attend(q, k, v, mask), atol=1e-5, rtol=1e-5)


def test_a_squeeze_of_what_is_longer_than_one_changes_nothing(tmp_path):
    x = torch.randn(3, 4)
    squeeze = torch.ops.aten.squeeze.dim
    run = one_graph(lambda w, x: (squeeze(x, 1), squeeze(x + 1, 0)), [x], tmp_path, outputs=2)
    out = run.run(None, {"in0": x.numpy()})
    assert_close(torch.from_numpy(out[0]), x)
    assert_close(torch.from_numpy(out[1]), x + 1)
