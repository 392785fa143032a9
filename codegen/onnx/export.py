"""Step graphs as ONNX files: one .onnx for each variant and memo function, one weights file, one manifest.

``dit.onnx`` computes everything (the full variant), ``dit.<variant>.onnx`` are the others, ``dit.memo.<name>.onnx`` the
memo functions, ``dit.safetensors`` the weights of them all, ``dit.json`` the manifest. Caches are inputs and outputs of
the graphs; a driver needs the manifest and onnxruntime, nothing of ditopt (examples/onnx_numpy.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ditopt.artifact import Manifest, StepGraph, read_manifest, to_json
from ditopt.codegen.claims import translations
from ditopt.codegen.onnx import bfloat16
from ditopt.codegen.onnx.quantized import fused_attention
from ditopt.codegen.onnx.repairs import (
    alike_factors,
    counted_repeats,
    four_axes,
    full_masks,
    plain_splits,
    runnable_wheres,
    true_squeezes,
    wide_indices,
    widen_half_sums,
)
from ditopt.codegen.onnx.weights import WeightStore, check_dtype
from ditopt.errors import ArtifactError, BadInput, DitoptError, require

__all__ = ["WeightStore", "export_artifact", "export_graph", "opset"]

_BEFORE = (widen_half_sums, four_axes, full_masks, true_squeezes, wide_indices, counted_repeats, alike_factors)
"""Repairs of what torch's exporter is given."""

_INLINE_BYTES = 1024  # constants of a graph up to this size stay inside its .onnx


def export_graph(
    graph: StepGraph,
    module: fx.GraphModule,
    values: Mapping[str, Tensor],
    example: Sequence[Tensor],
    path: Path,
    weights: WeightStore,
    *,
    output_names: Sequence[str] = (),
) -> None:
    """Translate one step graph; ``weights.write(folder)`` then writes ``path`` together with the weights.

    ``module`` is flat ATen (no calls, no selects): placeholders as ``graph.inputs``, output a flat tuple of
    ``graph.results`` results, then one tensor for each update whose ``output`` is >= 0. ``example`` gives types only,
    one (fake) tensor a placeholder; parameters may be anything there, ``values[ref]`` counts.

    In the file, formals of kind "param" that the graph uses are initializers named by their ref; every other formal is
    an input in the order of ``graph.inputs``, named by its ref. Outputs are ``output_names`` (else ``out.<k>``), then
    ``new.<slot>``. Where two names of one graph agree the later gets its kind in front (``state.x``, ``out.x``); go by
    position there. bfloat16 inside becomes rounded float32; among weights, inputs and results it is BadInput, for
    onnxruntime cannot run it on CPU.
    """
    where = f"graph {graph.name!r}"
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    if not len(nodes) == len(graph.inputs) == len(example):
        raise BadInput(
            f"{where} has {len(nodes)} placeholders, {len(graph.inputs)} inputs and {len(example)} examples; "
            "they must be as many"
        )
    missing = [f.ref for f in graph.inputs if f.kind == "param" and f.ref not in values]
    if missing:
        raise BadInput(f"{where} needs weights that were not given: {', '.join(missing)}")
    inputs = [
        values[f.ref].detach()
        if f.kind == "param"
        else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        for f, x in zip(graph.inputs, example, strict=True)
    ]
    for f, x in zip(graph.inputs, inputs, strict=True):
        check_dtype(x.dtype, f"{f.kind} {f.ref!r} of {where}")
    results: Any = module.graph.output_node().args[0]
    for k, result in enumerate(results):
        if "val" in result.meta:
            check_dtype(result.meta["val"].dtype, f"result {k} of {where}")
    model = _translate(bfloat16.widen(module, where), inputs, where)

    formals = dict(zip(graph.inputs, model.graph.inputs, strict=True))
    _name_values(model, graph, formals, output_names)
    used: dict[str, Any] = {}
    for f, value in formals.items():
        if f.kind == "param":
            model.graph.inputs.remove(value)
            if value.uses():
                weights.add(f.ref, values[f.ref])
                used[f.ref] = value
    for value in list(model.graph.initializers.values()):
        if value.const_value.nbytes > _INLINE_BYTES:
            name = f"{graph.name}.{value.name}"
            weights.add(name, torch.from_numpy(value.const_value.numpy().copy()))
            used[name] = value
    weights.defer(path, model, used)


def export_artifact(
    manifest: Manifest,
    modules: Mapping[str, fx.GraphModule],
    examples: Mapping[str, Sequence[Tensor]],
    values: Mapping[str, Tensor],
    path: str | Path,
    *,
    schedule: list[dict[str, Any]] | None = None,
    overwrite: bool = True,
) -> Manifest:
    """Write the family of files described above beside ``path`` (``<stem>.onnx``); the manifest as it was written.

    ``modules`` and ``examples`` are by ``StepGraph.name`` and cover ``Manifest.every_graph``; see export_graph.
    ``schedule`` lists for every step ``{"graph": name, "weights": {control name: [numbers]}}``: a driver without ditopt
    then needs no policy. Graphs get their ``file`` and lose their "param" formals (the file carries the weights);
    ``extra`` gets ``weights_file``, ``sha256`` (by file name) and ``schedule``. Everything is written to a temporary
    folder first: a failure leaves what was there before.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise BadInput(
            f"the path of an ONNX artifact ends in .onnx, {str(path)!r} does not; give for example 'dit.onnx'"
        )
    if not path.parent.is_dir():
        raise BadInput(f"the folder {str(path.parent)!r} does not exist; create it first")
    stem = path.stem
    manifest_file, weights_file = f"{stem}.json", f"{stem}.safetensors"
    files = _file_names(manifest, stem)
    everything = [weights_file, *files.values(), manifest_file]
    present = [name for name in everything if (path.parent / name).exists()]
    if present and not overwrite:
        raise BadInput(f"{', '.join(present)} already in {str(path.parent)!r}; pass overwrite=True or another path")

    scratch = Path(tempfile.mkdtemp(prefix=f".{stem}-", dir=path.parent))  # same file system: moves are renames
    try:
        store = WeightStore(weights_file)
        memo_values = {memo.function: memo.values for memo in manifest.memos}
        for graph in manifest.every_graph:
            names = memo_values.get(graph.name, manifest.outputs)
            export_graph(
                graph,
                modules[graph.name],
                values,
                examples[graph.name],
                scratch / files[graph.name],
                store,
                output_names=names,
            )
        store.write(scratch)
        done = dataclasses.replace(
            manifest,
            graphs=tuple(_written(g, files) for g in manifest.graphs),
            memo_graphs=tuple(_written(g, files) for g in manifest.memo_graphs),
            probe=None if manifest.probe is None else _written(manifest.probe, files),
            target="onnxruntime",
            extra={
                **{k: v for k, v in manifest.extra.items() if k != "device"},  # the files run on any
                "weights_file": weights_file,
                "sha256": {name: _sha256(scratch / name) for name in everything if name != manifest_file},
                **({} if schedule is None else {"schedule": schedule}),
            },
        )
        (scratch / manifest_file).write_text(to_json(done))
        stale = _files_of(path.parent / manifest_file) - set(everything)
        for name in everything:  # the manifest last: until then a reader sees the old one, and hashes tell them apart
            os.replace(scratch / name, path.parent / name)
        for name in stale:
            (path.parent / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return done


def _written(graph: StepGraph, files: Mapping[str, str]) -> StepGraph:
    inputs = tuple(f for f in graph.inputs if f.kind != "param")
    return dataclasses.replace(graph, inputs=inputs, file=files[graph.name])


def _file_names(manifest: Manifest, stem: str) -> dict[str, str]:
    """Graph name -> file name; two graphs never share one."""
    files: dict[str, str] = {}
    probe = (manifest.probe,) if manifest.probe is not None else ()
    for kind, graphs in (("", (*manifest.graphs, *probe)), ("memo.", manifest.memo_graphs)):
        for graph in graphs:
            tag = kind + re.sub(r"[^A-Za-z0-9_.-]+", "_", graph.name)
            name = f"{stem}.onnx" if graph is manifest.graphs[0] else f"{stem}.{tag}.onnx"
            while name in files.values():
                tag += "_"
                name = f"{stem}.{tag}.onnx"
            if graph.name in files:
                raise BadInput(f"two graphs of the manifest are named {graph.name!r}")
            files[graph.name] = name
    return files


def _files_of(manifest_file: Path) -> set[str]:
    """Files that an earlier export of this name wrote; none where there is no readable manifest of ours."""
    try:
        names = read_manifest(manifest_file).extra.get("sha256", {})
    except ArtifactError:
        return set()
    return {name for name in names if Path(name).name == name}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@functools.cache
def opset() -> int:
    """23 (it has Attention and RMSNormalization) where the installed onnxruntime runs it, or none is; else 20."""
    try:
        import onnxruntime
    except ImportError:
        return 23
    helper = require("onnx", None).helper
    info = [helper.make_tensor_value_info(name, 1, [1, 1, 1, 8]) for name in "qkvy"]
    graph = helper.make_graph([helper.make_node("Attention", ["q", "k", "v"], ["y"])], "probe", info[:3], info[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime raises many kinds; each means no
        return 20
    return 23


def _translate(module: fx.GraphModule, inputs: Sequence[Tensor], where: str) -> Any:
    """The onnx_ir.Model of a module, weights as inputs: the exporter then holds no tensor data at all."""
    require("onnxscript", None)
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(module, tuple(inputs), strict=False)
            for repair in _BEFORE:
                repair(exported)
            # The exporter's optimizer drops additions of small numbers (1e-15 in linear attention): 0/0 at run time.
            number = opset()
            program = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                optimize=False,
                opset_version=number,
                custom_translation_table=translations(number),
                verbose=False,
            )
    except Exception as error:
        raise DitoptError(f"{where} cannot be translated to ONNX: {_reason(error)}") from error
    model = program.model  # type: ignore[union-attr]
    for value, node in zip(model.graph.outputs, exported.graph.output_node().args[0], strict=True):
        expected = str(node.meta["val"].dtype)
        if value.dtype is not None and f"torch.{value.dtype.numpy()}" != expected:
            raise DitoptError(
                f"output {value.name!r} of {where} came out of torch.onnx as {value.dtype}, not {expected}"
            )
    for value in _values(model):
        value.metadata_props.clear()
        if value.dtype is not None and value.dtype.name == "BFLOAT16" and not bfloat16.between_casts(value):
            check_dtype(torch.bfloat16, f"a value inside {where}")
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces: long, and paths of the machine that exported
        node.doc_string = None
    model.graph.metadata_props.clear()
    plain_splits(model)
    runnable_wheres(model)
    fused_attention(model)
    importlib.import_module("onnx_ir.passes.common").RemoveUnusedNodesPass()(model)
    return model


def _reason(error: BaseException) -> str:
    """The operator at which the exporter stopped, and why, in one line: its own message is advice to developers of
    torch, and the reason is the cause of a cause."""
    operator = ""
    while error.__cause__ is not None:
        found = re.search(r"target=torch\.ops\.([\w.]+)", str(error))
        operator = f"{found[1]}: " if found else operator
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{operator}{type(error).__name__}: {lines[0]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch says to its own developers: deprecations inside torch.onnx and copyreg (a warning is an error in
    our tests), and a log line for every torchvision operator when torchvision is absent."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logger.setLevel(level)


def _values(model: Any) -> Iterator[Any]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs


def _name_values(model: Any, graph: StepGraph, formals: Mapping[Any, Any], output_names: Sequence[str]) -> None:
    """Give inputs and outputs the names that export_graph promises, and everything else a name apart from these."""
    ir = require("onnx_ir", None)
    outputs = model.graph.outputs
    for k, value in enumerate(outputs):  # an output that is an input, or another output, needs a value of its own
        if value in model.graph.inputs or value.is_initializer() or value in outputs[:k]:
            node = ir.node("Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            model.graph.append(node)
            outputs[k] = node.outputs[0]
    wanted = [(f"{f.kind}.", f.ref, value) for f, value in formals.items()]
    names = list(output_names) if len(output_names) == graph.results else []
    names += [f"out.{k}" for k in range(len(names), len(outputs))]
    for update in graph.updates:
        if update.output >= 0:
            names[update.output] = f"new.{update.slot}"
    wanted += [("out.", name, value) for name, value in zip(names, outputs, strict=True)]

    taken: dict[str, Any] = {}
    for prefix, name, value in sorted(wanted, key=lambda w: w[0] != "param."):  # a weight keeps its name first
        while name in taken:
            name = prefix + name
        taken[name] = value
    ours = set(map(id, taken.values()))
    names_in_use = set(taken) | {v.name for v in _values(model)}
    for value in list(_values(model)):
        if id(value) not in ours and value.name in taken:
            name = value.name
            while name in names_in_use:
                name += "_"
            value.name = name
            names_in_use.add(name)
    for name, value in taken.items():
        value.name = name
