"""Schedules that others made, from their files: trained routers, evolved genomes, and masks written by hand.

Every reader returns masks by region, "blocks.3.attn" -> "110100", all of one length. A file that cannot be read, that
has other steps than the run, or that holds NaN is one RecipeError. Nothing is unpickled: a .pt or .pth file is refused.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ditopt.calibration.mask import Floats, check, real
from ditopt.errors import BadInput, RecipeError, require

ROLES = ("attn", "mlp")
"""What the columns of a router are, block by block."""


def read_scores(path: str | Path) -> Floats:
    """An array of scores as float64: from .json (nested lists), .npy, or .safetensors.

    A .safetensors file holds one array, or one a step, whose names carry the number of the step ("3.prob"): these are
    stacked in the order of the numbers.
    """
    path = Path(path)
    if path.suffix == ".json":
        array = np.asarray(_json(path), dtype=object)
    elif path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise RecipeError(f"the table {path} cannot be read ({error})") from error
        if not isinstance(array, np.ndarray):
            raise RecipeError(f"the table {path} is an archive of arrays; save one array with numpy.save")
    elif path.suffix == ".safetensors":
        array = _stacked(path)
    else:
        raise RecipeError(f"the table {path} ends in {path.suffix or 'nothing'}; expected .json, .npy or .safetensors")
    try:
        scores = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"the table {path} is not an array of numbers ({error})") from error
    if not np.isfinite(scores).all():
        raise RecipeError(f"the table {path} holds NaN or infinity; its training or export broke")
    return scores


def _stacked(path: Path) -> Any:
    safetensors = require("safetensors.numpy", None)
    try:
        found = safetensors.load_file(path)
    except Exception as error:  # its own exception class, OSError, KeyError for a dtype that NumPy lacks
        raise RecipeError(f"the table {path} cannot be read ({error})") from error
    if len(found) == 1:
        return next(iter(found.values()))
    numbered = {}
    for name, row in found.items():
        numbers = re.findall(r"\d+", name)
        if len(numbers) != 1 or int(numbers[0]) in numbered:
            raise RecipeError(f"the table {path}: cannot tell the step of {name!r}; expected one array, or one a step")
        numbered[int(numbers[0])] = row
    if sorted(numbered) != list(range(len(numbered))) or len({r.shape for r in numbered.values()}) != 1:
        raise RecipeError(f"the table {path} has steps {sorted(numbered)}; expected 0 to T - 1, all of one shape")
    return np.stack([numbered[i] for i in sorted(numbered)])


# -- trained routers ---------------------------------------------------------------------------------------------------


def harmonica(scores: Floats, threshold: float = 0.1, logits: bool = True, steps: int | None = None) -> dict[str, str]:
    """HarmoniCa's router (arXiv 2410.01723), rows in the order of execution: (T, 2L) -> mask of each module.

    Columns are attention and MLP of each block in turn. A module computes where its score, after a sigmoid if
    ``logits``, is above ``threshold``; at step 0 always.
    """
    return _masks(_above(scores, threshold, logits, steps, "harmonica"))


def learning_to_cache(
    scores: Floats, threshold: float = 0.1, logits: bool = True, steps: int | None = None
) -> dict[str, str]:
    """Learning-to-Cache's router (code: horseee/learning-to-cache): (T, 2L) -> mask of each module.

    Its rows are in the order of the model's time, the last step of the run first, and its columns attention and MLP of
    each block in turn. Every second step, from step 0 on, computes everything; at the steps between, a module computes
    where its score is above ``threshold``.
    """
    bits = _above(scores, threshold, logits, steps, "learning_to_cache")[::-1].copy()
    bits[::2] = True
    return _masks(bits)


def _above(scores: Floats, threshold: float, logits: bool, steps: int | None, what: str) -> Any:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] % 2 or not array.size:
        raise RecipeError(f"{what}: a table of shape {array.shape} given; expected (steps, 2 * blocks)")
    if not np.isfinite(array).all():
        raise RecipeError(f"{what}: the table holds NaN or infinity")
    if not logits and not (array.min() >= 0 and array.max() <= 1):
        raise RecipeError(
            f"{what}: scores from {array.min():g} to {array.max():g} given; expected 0 to 1, or pass logits=True"
        )
    _length(len(array), steps, what)
    level = real("threshold", threshold, 0.0, 1.0)
    return (1 / (1 + np.exp(-np.clip(array, -700, 700))) if logits else array) > level


def _masks(bits: Any) -> dict[str, str]:
    bits[0] = True
    return {f"blocks.{c // 2}.{ROLES[c % 2]}": _text(bits[:, c]) for c in range(bits.shape[1])}


def _text(column: Sequence[Any]) -> str:
    return "".join("1" if bit else "0" for bit in column)


def _length(given: int, steps: int | None, what: str) -> None:
    if steps is not None and given != steps:
        raise RecipeError(f"{what} is for {given} steps and this run has {steps}; run {given}, or use another table")


# -- genomes -----------------------------------------------------------------------------------------------------------


def genome_masks(
    genome: Any, components: Sequence[str], steps: int | None = None, what: str = "genome"
) -> dict[str, str]:
    """A genome of ECAD, or of ``search.nsga2``, (T, L, C) of 0 and 1 -> the mask of each component of each block.

    ``components``: what the last axis is, such as ("attn", "mlp"). Components of one name share a mask that computes
    where any of them does. Step 0 computes, as where nothing is kept yet.
    """
    bits = np.asarray(genome)
    if bits.ndim != 3 or bits.shape[2] != len(components) or not bits.size:
        raise RecipeError(
            f"{what} has shape {bits.shape}; expected (steps, blocks, {len(components)}) for {', '.join(components)}"
        )
    if not np.isin(bits, (0, 1)).all():
        raise RecipeError(f"{what} holds other values than 0 (reuse) and 1 (compute)")
    _length(len(bits), steps, what)
    out: dict[str, Any] = {}
    for block in range(bits.shape[1]):
        for c, name in enumerate(components):
            region, column = f"blocks.{block}.{name}", bits[:, block, c].astype(bool)
            out[region] = column | out[region] if region in out else column
    return {region: "1" + _text(column[1:]) for region, column in out.items()}


def ecad(path: str | Path, names: Mapping[str, str], steps: int | None = None) -> dict[str, str]:
    """A schedule file of ECAD (code: AniAggarwal/ecad, schedules/*.json): -> the mask of each component.

    ``names``: what each component of the file is called here, such as {"attn1": "attn", "ff": "mlp"}; components of
    one name share a mask that computes where any of them does; one named "" is left out. Blocks called "single_<k>"
    follow the others.
    """
    data = _json(Path(path))
    try:
        made = data["cache_schedule"]
        count, given = int(made["num_inference_steps"]), {int(s): blocks for s, blocks in made["schedule"].items()}
        first_single = int(made["num_blocks"])
        rows = [given[s] for s in range(count)]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise RecipeError(f"{path} is not a schedule of ECAD ({error!r})") from error
    _length(count, steps, f"the schedule {path}")
    bits: dict[str, list[bool]] = {}
    for step, blocks in enumerate(rows):
        seen: dict[str, bool] = {}
        for block, parts in blocks.items():
            number = block.removeprefix("single_")
            if not number.isdecimal() or not all(isinstance(bit, bool) for bit in parts.values()):
                raise RecipeError(f"{path}, step {step}, block {block!r}: expected a numbered block of true and false")
            index = int(number) + (first_single if block.startswith("single_") else 0)
            for part, bit in parts.items():
                if part not in names:
                    raise RecipeError(
                        f"{path} has a component {part!r}; say in names= what it is here (named so far: "
                        f"{', '.join(names) or 'none'})"
                    )
                if names[part]:
                    region = f"blocks.{index}.{names[part]}"
                    seen[region] = seen.get(region, False) or bit
        for region, bit in seen.items():
            bits.setdefault(region, []).append(bit)
    short = next((r for r, column in bits.items() if len(column) != count), None)
    if not bits or short:
        raise RecipeError(f"{path}: {short or 'every component'} has no bit at some step; expected one a step")
    return {region: "1" + _text(column[1:]) for region, column in bits.items()}


# -- masks -------------------------------------------------------------------------------------------------------------


def region_masks(path: str | Path, steps: int | None = None) -> dict[str, str]:
    """Masks by region from a .toml or .json file: {"blocks.*.attn": "1101", "blocks.0.mlp": [1, 0, 1, 1]}.

    Nested tables are joined by dots, so that ``[blocks.0]`` with ``attn = "1101"`` is blocks.0.attn. Lists of 0 and 1
    are read as well as text (SmoothCache writes its schedules so).
    """
    path = Path(path)
    if path.suffix == ".toml":
        try:
            data: Any = tomllib.loads(_read(path))
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{path} is not TOML: {error}") from error
    elif path.suffix == ".json":
        data = _json(path)
    else:
        raise RecipeError(f"the masks {path} end in {path.suffix or 'nothing'}; expected .toml or .json")
    flat = dict(_flat(data, "")) if isinstance(data, dict) else {}
    if not flat:
        raise RecipeError(f"{path} holds no masks; expected region = mask, one a region")
    out: dict[str, str] = {}
    for region, mask in flat.items():
        if isinstance(mask, list):
            # a bit that is neither stays visible, and is refused below
            mask = "".join(str(int(b)) if isinstance(b, int) else "?" for b in mask)
        try:
            out[region] = check(mask, None, f"{path}: {region}")
        except BadInput as error:
            raise RecipeError(str(error)) from error
        _length(len(out[region]), steps, f"{path}: {region}")
    lengths = {len(m): r for r, m in out.items()}
    if len(lengths) > 1:
        (a, b), (c, d) = list(lengths.items())[:2]
        raise RecipeError(f"{path}: {b} has {a} digits and {d} has {c}; give one digit a step everywhere")
    return out


def _flat(table: Mapping[str, Any], prefix: str) -> Any:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the file {path} cannot be read ({error})") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise RecipeError(f"{path} is not JSON: {error}") from error
