"""Load an exported ONNX artifact and call it like the model.

Needs torch, onnxruntime and this package's runtime; not the model's class, not diffusers, no pass and no code
generator. An artifact is data: nothing in it is executed but the graphs, by onnxruntime. Its hashes show damage, not
authorship: load files of people you trust.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from ditopt.artifact import Manifest, Plan, read_manifest
from ditopt.errors import ArtifactError, BadInput
from ditopt.runtime.account import Row, Stats
from ditopt.runtime.arguments import Arguments
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
    model, or by position; nested dicts, lists and tuples as the model takes them. ``manifest.extra`` may carry
    ``signature`` (the parameter names of the model's forward, for positional arguments; else the order of the inputs)
    and ``constants`` (see Arguments). ``requests`` is the Session that runs them.
    """

    def __init__(self, plan: Plan, where: str = "artifact", session: Session | None = None) -> None:
        self.plan = plan
        self.manifest = plan.manifest
        self.requests = Session() if session is None else session
        self._where = where
        self._arguments = Arguments(self.manifest, where)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step. BadInput for arguments that this signature does not have or that are no tensors and differ from
        what was exported, SessionError for a shape or dtype it was not exported for. An Output, a tuple or
        (``manifest.structure`` "single") a tensor, as the model gave; ``return_dict=False`` gives a tuple in place of
        an Output."""
        order = self._arguments.order
        if len(args) > len(order):
            raise BadInput(f"{len(args)} positional arguments given, {self._where} takes {self._arguments}")
        named = dict(zip(order, args, strict=False))
        twice = named.keys() & kwargs.keys()
        if twice:
            raise BadInput(f"{', '.join(sorted(twice))} given by position and by name")
        named |= kwargs
        plain = self._wants_tuple(named.pop("return_dict", None))
        outputs = self.requests.call(self.plan, self._arguments.tensors(named))
        if self.manifest.structure == "single":
            return outputs[0]
        if plain or isinstance(self.manifest.structure, str):
            return tuple(outputs)
        return Output(zip(self.manifest.structure, outputs, strict=True))

    # the names of OptimizedModule, so that a sampling loop need not know which of the two it was given

    def session(
        self, steps: int | None = None, timesteps: Sequence[float] | Tensor | None = None
    ) -> AbstractContextManager[Session]:
        """The calls inside ``with model.session(steps=30):`` are one request; see Session.open."""
        return self.requests.open(steps=steps, timesteps=timesteps)

    def cache_context(self, name: str) -> AbstractContextManager[None]:
        """Calls inside belong to the guidance branch ``name``."""
        return self.requests.context(name)

    def reset(self) -> None:
        """Forget the running request; the next call begins one."""
        self.requests.reset()

    @property
    def stats(self) -> Stats:
        """Calls, reuses and executed FLOPs so far."""
        return self.requests.stats

    @property
    def schedule_rows(self) -> list[Row]:
        """What ran in the running, else in the last request."""
        return self.requests.schedule_rows

    def _wants_tuple(self, return_dict: Any) -> bool:
        if return_dict and isinstance(self.manifest.structure, str):
            raise BadInput(
                f"{self._where} was exported with return_dict=False and gives a tuple; leave return_dict out"
            )
        return return_dict is not None and not return_dict


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
