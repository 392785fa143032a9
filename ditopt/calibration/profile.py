"""What calibration measures: the values of some regions of a model, over all steps of some requests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditopt.errors import ArtifactError, RecipeError, require
from ditopt.pipeline import suggest

Array = NDArray[np.float32]

VERSION = 2


@dataclass(frozen=True, eq=False)
class Profile:
    """Values of regions in N recordings of T steps; a recording is one guidance branch of one request.

    ``key``: what was recorded (ditopt/fitted.py). ``times``: the model's time at each step, (T,) float64. ``values``:
    by name (N, T, P, C) float32 arrays: P positions of tokens over all batch rows (the same at each step), C channels.
    ``regions``: each recorded selector -> the names of its values. A selector of modules (``blocks.*.attn``) has one
    for each block (``blocks.3.attn``), one of a run of blocks has one of its own text; where a region leaves several
    values (streams), the later ones are called ``<name>/1``, ``<name>/2``. ``flops``: of one call, by name without
    that number. ``sigmas``: (T + 1,) float64, one a step and that of the end, where a scheduler has them.
    ``recordings``: what each of the N is.
    """

    key: Mapping[str, str]
    times: NDArray[np.float64]
    values: Mapping[str, Array]
    regions: Mapping[str, tuple[str, ...]]
    flops: Mapping[str, int] = field(default_factory=dict)
    sigmas: NDArray[np.float64] | None = None
    recordings: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """T."""
        return len(self.times)

    def of(self, selector: str) -> dict[str, Array]:
        """The values of a recorded selector, by name, in order. RecipeError where it was not recorded."""
        if selector not in self.regions:
            raise RecipeError(f"region {selector!r} was not recorded; {suggest(selector, self.regions)}")
        return {name: self.values[name] for name in self.regions[selector]}

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(v.nbytes for v in self.values.values())

    def save(self, path: str | Path) -> Path:
        """Write one .safetensors file, data only; its path."""
        arrays: dict[str, Any] = {f"values/{name}": np.ascontiguousarray(v) for name, v in self.values.items()}
        arrays["times"] = self.times
        if self.sigmas is not None:
            arrays["sigmas"] = self.sigmas
        said = {
            "ditopt_profile": VERSION,
            "key": dict(self.key),
            "regions": {s: list(names) for s, names in self.regions.items()},
            "flops": dict(self.flops),
            "recordings": list(self.recordings),
        }
        path = Path(path)
        require("safetensors.numpy", None).save_file(arrays, path, metadata={"profile": json.dumps(said)})
        return path

    @staticmethod
    def load(path: str | Path) -> Profile:
        """The reverse; ArtifactError where the file is missing, damaged or of another version."""
        try:
            with require("safetensors", None).safe_open(path, framework="numpy") as file:
                said = json.loads((file.metadata() or {})["profile"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            version = said["ditopt_profile"]
            if version != VERSION:
                raise ArtifactError(f"{path} has profile version {version}, this ditopt reads version {VERSION}")
            regions = {s: tuple(names) for s, names in said["regions"].items()}
            values = {name: arrays[f"values/{name}"] for names in regions.values() for name in names}
            return Profile(
                key={str(k): str(v) for k, v in said["key"].items()},
                times=arrays["times"],
                values=values,
                regions=regions,
                flops=said["flops"],
                sigmas=arrays.get("sigmas"),
                recordings=tuple(said["recordings"]),
            )
        except ArtifactError:
            raise
        except Exception as error:  # safetensors has an exception of its own
            raise ArtifactError(f"{path} is no profile that Profile.save wrote ({error!r}); record it again") from error
