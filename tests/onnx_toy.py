"""A two-block diffusion transformer as a hand-made artifact: no capture and no pass takes part.

Its second block is cached (Taylor, order 1) and its conditioning is a memo, so every part of a manifest is in use.
"""

import dataclasses
import warnings

import onnxruntime
import torch
from torch.nn.functional import embedding, gelu, layer_norm, linear, scaled_dot_product_attention, silu

from ditopt.artifact import Manifest, Plan, StepGraph, Update
from ditopt.codegen.onnx.export import WeightStore, export_artifact, export_graph
from ditopt.ir.program import Decision, Formal, Input, Interval, Memo, Predictor, StateSlot, TensorType
from ditopt.runtime.policy import fit, table

B, N, D, H = 2, 6, 32, 4
HIDDEN, TIME = TensorType(torch.float32, (B, N, D)), TensorType(torch.float32, (B,))
LABELS = TensorType(torch.int64, (B,))
COND = TensorType(torch.float32, (B, D))


def weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (11, D), "head.weight": (D, D)}
    for k in range(2):
        shapes |= {f"b{k}.mod.weight": (2 * D, D), f"b{k}.qkv.weight": (3 * D, D), f"b{k}.qkv.bias": (3 * D,)}
        shapes |= {f"b{k}.norm.weight": (D,), f"b{k}.fc1.weight": (4 * D, D), f"b{k}.fc2.weight": (D, 4 * D)}
    return {name: torch.randn(shape, generator=g) / shape[-1] ** 0.5 for name, shape in shapes.items()}


def condition(w, time, labels):
    """Of time (B,) and labels (B,), through float64 and an embedding: (B, D)."""
    rate = torch.exp(-torch.arange(D // 2, dtype=torch.float64))
    angle = time[:, None].double() * rate
    return silu(torch.cat([angle.sin(), angle.cos()], -1).float() + embedding(labels, w["embed.weight"]))


def block(w, k, x, c):
    """What block ``k`` adds to x (B, N, D)."""
    shift, scale = linear(c, w[f"b{k}.mod.weight"])[:, None].chunk(2, -1)
    h = layer_norm(x, (D,), w[f"b{k}.norm.weight"], None, 1e-6) * (1 + scale) + shift
    q, k_, v = linear(h, w[f"b{k}.qkv.weight"], w[f"b{k}.qkv.bias"]).view(B, N, 3, H, D // H).unbind(2)
    a = scaled_dot_product_attention(q.transpose(1, 2), k_.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    h = x + a.reshape(B, N, D)
    return h + linear(gelu(linear(h, w[f"b{k}.fc1.weight"]), approximate="tanh"), w[f"b{k}.fc2.weight"]) - x


def model(w, hidden, time, labels):
    """The plain model, eager."""
    c = condition(w, time, labels)
    x = hidden + block(w, 0, hidden, c)
    return linear(x + block(w, 1, x, c), w["head.weight"])


def full(w, hidden, cond):
    x = hidden + block(w, 0, hidden, cond)
    r = block(w, 1, x, cond)
    return linear(x + r, w["head.weight"]), r


def reuse(w, hidden, cond, newest, older, control):
    x = hidden + block(w, 0, hidden, cond)
    return (linear(x + control[0] * newest + control[1] * older, w["head.weight"]),)


def memo(w, time, labels):
    return (condition(w, time, labels),)


def graph_of(fn, w, names, formals, types):
    """(fx module, inputs, examples): weights first, then the formals."""

    class Net(torch.nn.Module):
        def forward(self, *args):
            return tuple(fn(dict(zip(names, args, strict=False)), *args[len(names) :]))

    example = [w[n] for n in names] + [torch.zeros(t.shape, dtype=t.dtype) for t in types]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.export(Net(), tuple(example)).run_decompositions({}).graph_module
    return module, (*(Formal("param", n) for n in names), *formals), example


def eager(module):
    return lambda args: module(*args)


def session(file):
    """The file, loaded by onnxruntime."""
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def one_graph(fn, example, tmp_path, w=None, outputs=1, updates=(), name="g"):
    """Export ``fn(w, *example)`` as one graph; its onnxruntime session."""
    w = w or {}
    formals = [Formal("input", f"in{k}") for k in range(len(example))]
    module, formals, values = graph_of(fn, w, list(w), formals, [TensorType.of(t) for t in example])
    store = WeightStore("w.safetensors")
    graph = StepGraph(name, {}, formals, outputs, updates)
    export_graph(graph, module, w, values, tmp_path / "g.onnx", store)
    store.write(tmp_path)
    return session(tmp_path / "g.onnx")


class Toy:
    """The artifact before it is written: ``manifest``, ``modules``, ``examples``, ``values``, and an eager ``plan``."""

    def __init__(self, interval=None, steps=8):
        self.values = w = weights()
        b0, b1 = ([n for n in w if n.startswith(p)] for p in ("b0", "b1"))
        hidden, cond = Formal("input", "x.hidden"), Formal("memo", "mod.0")
        slots = [Formal("state", "cache.0.0"), Formal("state", "cache.0.1")]
        control = Formal("control", "cache.weights")
        two = TensorType(torch.float32, (2,))
        made = {
            "full": graph_of(full, w, [*b0, *b1, "head.weight"], [hidden, cond], [HIDDEN, COND]),
            "reuse": graph_of(
                reuse, w, [*b0, "head.weight"], [hidden, cond, *slots, control], [HIDDEN, COND, HIDDEN, HIDDEN, two]
            ),
            "mod": graph_of(
                memo, w, ["embed.weight"], [Formal("input", "time"), Formal("input", "labels")], [TIME, LABELS]
            ),
        }
        self.modules = {name: m for name, (m, _, _) in made.items()}
        self.examples = {name: e for name, (_, _, e) in made.items()}
        updates = (Update("cache.0.1", -1, "cache.0.0"), Update("cache.0.0", 1))
        interval = interval or Interval(every=3, first=2, last=1)
        decision = Decision(
            "cache", ("blocks.1",), interval, Predictor("taylor", 1), (("cache.0.0", "cache.0.1"),), "cache.weights"
        )
        self.manifest = Manifest(
            inputs=(
                Input("x.hidden", "latent", HIDDEN),
                Input("time", "timestep", TIME),
                Input("labels", "prompt", LABELS),
            ),
            outputs=("sample",),
            state=(StateSlot("cache.0.0", HIDDEN), StateSlot("cache.0.1", HIDDEN)),
            decisions=(decision,),
            memos=(Memo("mod", "mod", ("time", "labels"), ("mod.0",), "schedule"),),
            graphs=(
                StepGraph("full", {"cache": "compute"}, made["full"][1], 1, updates, flops=100),
                StepGraph("reuse", {"cache": "reuse"}, made["reuse"][1], 1, flops=60),
            ),
            memo_graphs=(StepGraph("mod", {}, made["mod"][1], 1, flops=1),),
            structure=("sample",),
            steps=steps,
            extra={
                "constants": {"return_dict": True, "mode": "plain", "sizes": [1, 2], "opts": {"scale": 1}},
                "device": "cuda",
            },
        )
        rows = table(self.manifest.decisions, steps, graphs=self.manifest.graphs)
        self.schedule = [
            {"graph": fit(r.choices, self.manifest.graphs).name, "weights": {"cache.weights": list(r.weights["cache"])}}
            for r in rows
        ]

    def plan(self):
        """The same graphs, run by torch."""
        manifest = dataclasses.replace(self.manifest, extra={})
        return Plan(manifest, {n: eager(m) for n, m in self.modules.items()}, lambda: self.values)

    def export(self, path):
        return export_artifact(self.manifest, self.modules, self.examples, self.values, path, schedule=self.schedule)


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, N, D, generator=g)
    return {"x.hidden": hidden, "time": torch.full((B,), 700.0), "labels": torch.tensor([3, 10])}
