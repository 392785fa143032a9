"""Optimized models on disk: save and load.

Imports of the compiler stay inside the functions that need it: loading an ONNX artifact works where ditopt's passes and
code generators cannot be imported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ditopt.artifact import Plan, read_manifest, to_json
from ditopt.errors import ArtifactError, BadInput, require
from ditopt.runtime.load import LoadedModel, load_onnx

if TYPE_CHECKING:
    from ditopt.optimized import OptimizedModule

MANIFEST, PROGRAM, WEIGHTS = "manifest.json", "program.txt", "weights.safetensors"


def save(model: OptimizedModule, path: str | Path) -> Path:
    """Write an optimized model as a folder of data: its Program as text, its weights, its manifest. The folder.

    What is written is the signature used last. An earlier save in the folder is replaced whole, or kept after an error.
    """
    from ditopt.capture import seal
    from ditopt.codegen.build import refuse_modules
    from ditopt.ir.text import print_program
    from ditopt.optimized import OptimizedModule
    from ditopt.pacing import refuse_file

    if not isinstance(model, OptimizedModule):
        raise BadInput(f"a {type(model).__name__} was given; save takes what ditopt.optimize returned")
    refuse_modules(model.program, "be written")
    model.release.require_all("saved")
    refuse_file(model.program, "saved")
    compiled, folder = model.compiled, Path(path)
    compiled.captured.refuse_file("saved")
    if folder.exists() and not (folder / MANIFEST).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise BadInput(f"{folder} exists and is not a saved model; give another path, or an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    program = seal(compiled.program, compiled.captured.guard)
    try:
        params = {
            k: v.detach().cpu().contiguous().clone() for k, v in {**program.params, **compiled.plan.params()}.items()
        }
        require("safetensors.torch", None).save_file(params, scratch / WEIGHTS)
        (scratch / PROGRAM).write_text(print_program(program))
        manifest = compiled.plan.manifest
        hashes = {name: _sha256(scratch / name) for name in (PROGRAM, WEIGHTS)}
        manifest = dataclasses.replace(manifest, extra={**manifest.extra, "sha256": hashes})
        (scratch / MANIFEST).write_text(to_json(manifest))
        folder.mkdir(exist_ok=True)
        for name in (WEIGHTS, PROGRAM, MANIFEST):
            os.replace(scratch / name, folder / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def load(path: str | Path, *, target: str = "auto") -> LoadedModel:
    """A model that ``save`` or ``export_onnx`` wrote. ArtifactError where something is missing or damaged.

    An ONNX artifact needs neither ditopt's passes, its code generators, diffusers nor the model's class; a saved folder
    is compiled for ``target`` when it is loaded. No code from an artifact runs.
    """
    folder = Path(path)
    if not folder.is_dir():
        return load_onnx(folder)
    return _load_folder(folder, target)


def _load_folder(folder: Path, target: str) -> LoadedModel:
    from ditopt.codegen.build import build
    from ditopt.errors import DitoptError
    from ditopt.ir.parse import parse_program
    from ditopt.ir.verify import verify
    from ditopt.pipeline import legalize
    from ditopt.rewriting import variants
    from ditopt.target import resolve

    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder} holds no {MANIFEST}; give the folder that ditopt.save wrote")
    manifest = read_manifest(folder / MANIFEST)
    hashes: Any = manifest.extra.get("sha256", {})
    for name in (PROGRAM, WEIGHTS):
        if not (folder / name).is_file() or _sha256(folder / name) != hashes.get(name):
            raise ArtifactError(f"{folder / name} is missing or damaged; save the model again")
    try:
        tensors = require("safetensors.torch", None).load_file(folder / WEIGHTS)
        program = parse_program((folder / PROGRAM).read_text(), tensors)
        verify(program)
    except (DitoptError, OSError, ValueError) as error:
        raise ArtifactError(f"{folder} is damaged ({error}); save the model again") from error
    name = resolve(target, torch.device("cpu"))
    if name == "onnxruntime":
        raise BadInput("a saved folder runs on eager or inductor; for onnxruntime use export_onnx and load its .onnx")
    fields = ("recipe", "structure", "steps", "full_flops", "full_block_flops", "extra")
    for result in legalize(program, name):
        program = result.program
    rows = variants(program, name, manifest.steps or None)
    built = build(program, name, rows, **{f: getattr(manifest, f) for f in fields})
    return LoadedModel(Plan(built.manifest, built.run, lambda: program.params, more=built.more), str(folder))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
