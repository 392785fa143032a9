"""Load an exported ONNX artifact and call it like the model.

Needs torch, onnxruntime and this package's runtime; not the model's class, not diffusers, no pass and no code
generator. An artifact is data: nothing in it is executed but the graphs, by onnxruntime. Its hashes show damage, not
authorship: load files of people you trust.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditopt.artifact import Manifest, Plan, read_manifest
from ditopt.errors import ArtifactError, BadInput, SessionError
from ditopt.runtime.account import Stats
from ditopt.runtime.ort import ort_executables
from ditopt.runtime.session import Session


class Output(dict[str, Tensor]):
    """The model's outputs by name: ``out["sample"]``, ``out.sample`` or, by position, ``out[0]`` and ``out[:1]``."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}; there are {', '.join(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        return self.to_tuple()[key] if isinstance(key, (int, slice)) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Tensor, ...]:
        """The outputs in order."""
        return tuple(self.values())


class LoadedModel:
    """An exported model: call it as the original was called, once a step.

    Arguments are tensors (or NumPy arrays; Python numbers where the input is a scalar) by the parameter names of the
    model, nested dicts and lists for dotted names, or by position. ``manifest.extra`` may carry ``signature`` (the
    parameter names of the model's forward, for positional arguments; else the order of the inputs) and ``constants``
    (what the export saw for arguments that are no tensors: these may be repeated, not changed).
    """

    def __init__(self, plan: Plan, where: str = "artifact", session: Session | None = None) -> None:
        self.plan = plan
        self.manifest = plan.manifest
        self.session = Session() if session is None else session
        self._where = where
        self._inputs = {i.name: i for i in self.manifest.inputs}
        top = dict.fromkeys(name.split(".")[0] for name in self._inputs)
        self._order = tuple(self.manifest.extra.get("signature") or top)
        self._constants = dict(_leaves(self.manifest.extra.get("constants", {})))
        names = [*self._inputs, *self._constants]
        self._containers = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step. BadInput for arguments the model does not have, SessionError for a shape or dtype it was not
        exported for. An Output, a tuple or (``manifest.structure`` "single") a tensor, as the model gave;
        ``return_dict=False`` gives a tuple in place of an Output."""
        if len(args) > len(self._order):
            raise BadInput(f"{len(args)} positional arguments given, {self._where} takes {self._expected()}")
        named = dict(zip(self._order, args, strict=False))
        twice = named.keys() & kwargs.keys()
        if twice:
            raise BadInput(f"{', '.join(sorted(twice))} given by position and by name")
        named |= kwargs
        plain = self._wants_tuple(named.pop("return_dict", None))
        given = self._tensors(named)
        outputs = self.session.call(self.plan, [given[name] for name in self._inputs])
        if self.manifest.structure == "single":
            return outputs[0]
        if plain or isinstance(self.manifest.structure, str):
            return tuple(outputs)
        return Output(zip(self.manifest.structure, outputs, strict=True))

    def open(
        self, steps: int | None = None, timesteps: Sequence[float] | Tensor | None = None
    ) -> AbstractContextManager[Session]:
        """The calls inside ``with model.open(steps=30):`` are one request; see Session.open."""
        return self.session.open(steps=steps, timesteps=timesteps)

    def reset(self) -> None:
        """Forget the running request; the next call begins one."""
        self.session.reset()

    @property
    def stats(self) -> Stats:
        """What the session did so far: calls, reuses, executed FLOPs."""
        return self.session.stats

    def _wants_tuple(self, return_dict: Any) -> bool:
        if return_dict and isinstance(self.manifest.structure, str):
            raise BadInput(
                f"{self._where} was exported with return_dict=False and gives a tuple; leave return_dict out"
            )
        return return_dict is not None and not return_dict

    def _tensors(self, named: Mapping[str, Any]) -> dict[str, Tensor]:
        """Input name -> checked tensor."""
        given: dict[str, Tensor] = {}
        seen = set()
        for name, value in _leaves(named, containers=self._containers):
            seen.add(name)
            wanted = self._inputs.get(name)
            if wanted is None:
                self._check_constant(name, value)
                continue
            if isinstance(value, (bool, int, float)):
                value = torch.tensor(value, dtype=wanted.type.dtype)
            elif not isinstance(value, Tensor):
                if value is None:
                    continue  # reported below as missing
                try:
                    value = torch.as_tensor(value)
                except (TypeError, ValueError, RuntimeError):
                    raise BadInput(
                        f"{name} is a {type(value).__name__}; {self._where} expects a tensor there"
                    ) from None
            if value.dtype != wanted.type.dtype or tuple(value.shape) != wanted.type.shape:
                raise SessionError(
                    f"{name} is {_describe(value.dtype, value.shape)}, but {self._where} was exported for "
                    f"{_describe(wanted.type.dtype, wanted.type.shape)}; convert it, or export again with such inputs"
                )
            given[name] = value
        missing = [name for name in self._inputs if name not in given]
        if missing:
            raise BadInput(f"{', '.join(missing)} not given; {self._where} takes {self._expected()}")
        for name, saw in self._constants.items():
            if name not in seen and "." in name and name.split(".")[0] in named:
                raise BadInput(f"{name} not given, but {self._where} was exported with {name}={saw!r}; export again")
        return given

    def _check_constant(self, name: str, value: Any) -> None:
        """An argument that is no input: None, an empty container, or what the export saw."""
        if isinstance(value, (Tensor, np.ndarray)):
            raise BadInput(f"unknown input {name!r}; {self._where} takes {self._expected()}")
        value = list(value) if isinstance(value, tuple) else value  # as JSON has it
        if name in self._constants:
            if value != self._constants[name]:
                saw = self._constants[name]
                raise BadInput(
                    f"{name}={value!r} given, but {self._where} was exported with {name}={saw!r}; export again"
                )
        elif value is not None and value != {} and value != []:
            raise BadInput(
                f"{name}={value!r} given, but {self._where} was exported without it; it takes {self._expected()}"
            )

    def _expected(self) -> str:
        return ", ".join(f"{i.name}: {_describe(i.type.dtype, i.type.shape)}" for i in self._inputs.values())


def load_onnx(path: str | Path, session: Session | None = None) -> LoadedModel:
    """The model that an ONNX export wrote; ``path`` is the .onnx, the .json, or their common stem. ``session``: one to
    run in, for a caller who observes its events; else the model makes its own.

    ArtifactError, naming the file, where one is missing or differs from what was exported, and for another version.
    """
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".onnx", ".json") else path
    file = stem.with_name(stem.name + ".json")
    if not file.is_file():
        raise ArtifactError(f"{file} does not exist; give the path that export_onnx wrote, and keep its files together")
    manifest = read_manifest(file)
    _check_files(file, manifest)
    return LoadedModel(Plan(manifest, ort_executables(file.parent, manifest)), str(path), session)


def _check_files(file: Path, manifest: Manifest) -> None:
    if manifest.target != "onnxruntime":
        raise ArtifactError(
            f"{file} is an artifact for target {manifest.target!r}, not for onnxruntime; open it with ditopt.load"
        )
    hashes = manifest.extra.get("sha256")
    graphs = [g.file for g in manifest.every_graph]
    if not graphs or not isinstance(hashes, dict) or not set(graphs) <= set(hashes):
        raise ArtifactError(f"{file} is damaged (files without a hash); export the model again")
    for name, expected in hashes.items():
        if not name or Path(name).name != name:
            raise ArtifactError(
                f"{file} names the file {name!r}, which is not beside it; such an artifact is not loaded"
            )
        try:
            with (file.parent / name).open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise ArtifactError(
                f"{file.parent / name} cannot be read ({error}); keep the files of an export together"
            ) from error
        if found != expected:
            raise ArtifactError(
                f"{file.parent / name} is damaged or of another export (sha256 differs); export the model again"
            )


def _leaves(value: Any, prefix: str = "", containers: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) of nested dicts, lists and tuples; of lists without tensors, and of the attributes of
    objects, where the name is one of ``containers``."""
    if isinstance(value, Mapping) and (value or not prefix):
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key), containers)
    elif isinstance(value, (list, tuple)) and (
        prefix in containers or any(isinstance(v, (Tensor, Mapping)) for v in value)
    ):
        for k, item in enumerate(value):
            yield from _leaves(item, f"{prefix}.{k}", containers)
    elif prefix in containers and hasattr(value, "__dict__") and not isinstance(value, (Tensor, np.ndarray)):
        yield from _leaves(vars(value), prefix, containers)
    else:
        yield prefix, value


def _describe(dtype: torch.dtype, shape: Any) -> str:
    return f"{str(dtype).removeprefix('torch.')}{json.dumps(list(shape))}"
