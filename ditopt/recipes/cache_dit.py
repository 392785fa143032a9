"""Settings of cache-dit, from its YAML files and dicts (vipshop/cache-dit 1.5, caching/load_configs.py).

Its own names are kept, so that a file which runs there means the same here: ``DBCacheSettings.system`` says it in
parameters of the recipes ``dbcache`` and ``dbprune``. cache-dit ignores a key it does not know; here that is an error,
since a misspelt key is a setting that has no effect.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditopt.errors import BadInput, DitoptWarning, RecipeError, require
from ditopt.recipes.masks import check
from ditopt.recipes.scm import scm_policy

SECTIONS = ("parallelism_config", "quantize_config", "attention_backend")
"""What a file of cache-dit may hold besides ``cache_config``; none of it is caching."""


@dataclass(frozen=True)
class DBCacheSettings:
    """The keys of cache-dit's ``cache_config`` with its defaults.

    The first ``Fn_compute_blocks`` blocks always compute and give the signal, the last ``Bn_compute_blocks`` always
    compute, the blocks between are reused while the relative change of the signal is below
    ``residual_diff_threshold``. -1 is no limit. ``steps_computation_mask`` is a mask of 1 and 0 ("": none); under the
    policy "static" its zeros are reused whatever the signal says.
    """

    cache_type: str = "DBCache"
    Fn_compute_blocks: int = 8
    Bn_compute_blocks: int = 0
    residual_diff_threshold: float = 0.08
    max_accumulated_residual_diff_threshold: float | None = None
    max_warmup_steps: int = 8
    warmup_interval: int = 1
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    enable_separate_cfg: bool | None = None
    cfg_compute_first: bool = False
    cfg_diff_compute_separate: bool = True
    num_inference_steps: int | None = None
    steps_computation_mask: str = ""
    steps_computation_policy: str = "dynamic"
    force_refresh_step_hint: int | None = None
    force_refresh_step_policy: str = "once"
    enable_taylorseer: bool = False
    enable_encoder_taylorseer: bool = False
    taylorseer_cache_type: str = "residual"
    taylorseer_order: int = 1
    enable_dmd: bool = False
    enable_encoder_dmd: bool | None = None
    dmd_history: int = 6
    dmd_rank: int = 0
    dmd_ridge: float = 1e-8
    dmd_svd_precision: str = "medium"
    enable_foca: bool = False
    enable_encoder_foca: bool = False
    calibrator_cache_type: str = "residual"
    enable_dynamic_prune_threshold: bool = False
    max_dynamic_prune_threshold: float | None = None
    dynamic_prune_threshold_relax_ratio: float = 1.25
    non_prune_block_ids: tuple[int, ...] = ()
    force_reduce_calibrator_vram: bool = False

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise RecipeError(f"cache-dit: {name}={value} given; expected a number from {least:g} on")
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise RecipeError(f"cache-dit: {name}={getattr(self, name)!r} given; expected {' or '.join(words)}")
        if self.enable_taylorseer + self.enable_dmd + self.enable_foca > 1:
            raise RecipeError("cache-dit: enable_taylorseer, enable_dmd and enable_foca exclude each other; choose one")
        if self.steps_computation_mask:
            try:
                check(self.steps_computation_mask, self.num_inference_steps, "cache-dit: steps_computation_mask")
            except BadInput as error:
                raise RecipeError(str(error)) from error

    @property
    def calibrator(self) -> str:
        """What predicts the reused value: "taylorseer", "dmd", "foca", or "hold"."""
        words = {"taylorseer": self.enable_taylorseer, "dmd": self.enable_dmd, "foca": self.enable_foca}
        return next((word for word, enabled in words.items() if enabled), "hold")

    @property
    def warmup_steps(self) -> tuple[int, ...]:
        """The steps that compute whatever the signal says: one in ``warmup_interval`` of the warm-up, which a mask ends
        where it first reuses."""
        mask = self.steps_computation_mask
        leading = len(mask) - len(mask.lstrip("1")) if mask else self.max_warmup_steps
        return tuple(range(0, min(self.max_warmup_steps, leading), self.warmup_interval))

    def system(self, where: str = "the settings") -> tuple[str, dict[str, Any]]:
        """The recipe that does this, ``dbcache`` or ``dbprune``, and its parameters.

        RecipeError where a setting has no counterpart; DitoptWarning where one needs none here.
        """
        for name, why in _MISSING.items():
            if getattr(self, name) != _DEFAULTS[name]:
                raise RecipeError(f"{where}: {name}={getattr(self, name)!r} cannot be followed: {why}")
        for name in ("max_cached_steps", "max_continuous_cached_steps"):
            if getattr(self, name) == 0:
                raise RecipeError(f"{where}: {name}=0 caches nothing; give -1 for no cap, or 1 or more")
        idle = [name for name in _IDLE if getattr(self, name) != _DEFAULTS[name]]
        if idle:
            warnings.warn(
                f"{where}: {', '.join(idle)} has no effect here: guidance is found in the calls, each branch decides "
                "by itself, and every stream that leaves the cached blocks is predicted alike",
                DitoptWarning,
                stacklevel=2,
            )
        values: dict[str, Any] = {"F": str(self.Fn_compute_blocks), "B": str(self.Bn_compute_blocks)}
        mask = self._mask(where)
        if self.steps_computation_policy == "static":
            if not mask:
                raise RecipeError(f"{where}: steps_computation_policy=static needs a steps_computation_mask")
            values |= {"policy": "static", "mask": mask}
        else:
            values |= {
                "threshold": self.residual_diff_threshold,
                "max_cached_steps": max(self.max_cached_steps, 0),
                "max_continuous_cached_steps": max(self.max_continuous_cached_steps, 0),
            }
            if self.max_accumulated_residual_diff_threshold:
                values["max_accumulated_residual_diff_threshold"] = self.max_accumulated_residual_diff_threshold
            if mask:
                values["mask"] = mask
        values["warmup"] = max(1, self.max_warmup_steps)  # nothing can be reused at the first step
        if self.cache_type == "DBPrune":
            odd = next((n for n in ("mask", "policy", "max_accumulated_residual_diff_threshold") if n in values), None)
            if odd or self.calibrator != "hold":
                raise RecipeError(f"{where}: {odd or self.calibrator} goes with cache_type DBCache, not with DBPrune")
            return "dbprune", values
        if self.calibrator != "hold":
            values["predictor"] = self.calibrator
        if self.calibrator == "taylorseer":
            values["order"] = self.taylorseer_order
        return "dbcache", values

    def _mask(self, where: str) -> str:
        """The mask to follow: that of the settings, or one for a warm-up in which some steps may reuse."""
        if self.steps_computation_mask or self.warmup_interval == 1:
            return self.steps_computation_mask
        if self.num_inference_steps is None:
            raise RecipeError(f"{where}: warmup_interval={self.warmup_interval} needs num_inference_steps beside it")
        return "".join("1" if s in self.warmup_steps else "0" for s in range(self.num_inference_steps))

    @staticmethod
    def parse(given: Mapping[str, Any], where: str = "the settings") -> DBCacheSettings:
        """Settings from what a file of cache-dit holds: its keys flat, or below ``cache_config``.

        RecipeError where a key is unknown or a value does not fit it; DitoptWarning where sections that are no caching
        are left out. Keys set to null keep their defaults, as in cache-dit.
        """
        if not isinstance(given, Mapping):
            raise RecipeError(f"{where}: a {type(given).__name__} given; expected keys and values")
        beside = [s for s in SECTIONS if s in given]
        keys: Any = {k: v for k, v in given.items() if k not in SECTIONS}
        if "cache_config" in keys:
            extra = sorted(str(k) for k in set(keys) - {"cache_config"})
            if extra:
                raise RecipeError(
                    f"{where}: {extra[0]} stands beside cache_config; expected {', '.join(SECTIONS)} only"
                )
            keys = keys["cache_config"]
        if not isinstance(keys, Mapping) or not keys:
            raise RecipeError(f"{where}: no cache settings found; expected a section cache_config with keys and values")
        unknown = sorted(str(k) for k in set(keys) - set(_TYPES))
        if unknown:
            raise RecipeError(f"{where}: no setting is called {unknown[0]}; known are {', '.join(_TYPES)}")
        if beside:
            warnings.warn(
                f"{where}: {', '.join(beside)} has no effect here, only cache_config is read",
                DitoptWarning,
                stacklevel=2,
            )
        values = {k: _typed(where, k, v) for k, v in keys.items() if v is not None and k != "steps_computation_mask"}
        mask = keys.get("steps_computation_mask")
        if mask is not None:
            values["steps_computation_mask"] = _mask(where, mask, values.get("num_inference_steps"))
        return DBCacheSettings(**values)

    @staticmethod
    def read(path: str | Path) -> DBCacheSettings:
        """Settings from a YAML file, as ``cache_dit.load_configs`` reads them. MissingExtra without PyYAML, which
        diffusers brings."""
        yaml = require("yaml", "diffusers")
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            # a YAML error spans lines
            raise RecipeError(f"the file {path} cannot be read ({' '.join(str(error).split())})") from error
        return DBCacheSettings.parse(data, str(path))


_LEAST: Mapping[str, float] = {
    "Fn_compute_blocks": 0,
    "Bn_compute_blocks": 0,
    "residual_diff_threshold": 0,
    "max_accumulated_residual_diff_threshold": 0,
    "max_warmup_steps": 0,
    "warmup_interval": 1,
    "max_cached_steps": -1,
    "max_continuous_cached_steps": -1,
    "num_inference_steps": 1,
    "force_refresh_step_hint": 0,
    "taylorseer_order": 0,
    "dmd_history": 1,
    "dmd_rank": 0,
    "dmd_ridge": 0,
    "max_dynamic_prune_threshold": 0,
    "dynamic_prune_threshold_relax_ratio": 0,
}
_WORDS: Mapping[str, Sequence[str]] = {
    "cache_type": ("DBCache", "DBPrune"),
    "steps_computation_policy": ("dynamic", "static"),
    "force_refresh_step_policy": ("once", "repeat"),
    "taylorseer_cache_type": ("residual", "hidden_states"),
    "calibrator_cache_type": ("residual", "hidden_states"),
}
_TYPES = {f.name: str(f.type).removesuffix(" | None") for f in dataclasses.fields(DBCacheSettings)}


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(DBCacheSettings)}
_MISSING: Mapping[str, str] = {
    "force_refresh_step_hint": "open a session (with fast.session(steps=...)) where a request begins",
    "taylorseer_cache_type": "what is predicted is what the cached blocks add (residual)",
    "calibrator_cache_type": "what is predicted is what the cached blocks add (residual)",
    "dmd_history": "dmd reads the last 6 computed steps",
    "dmd_rank": "dmd chooses its rank by itself",
    "enable_dynamic_prune_threshold": "give residual_diff_threshold",
    "non_prune_block_ids": "give Fn_compute_blocks and Bn_compute_blocks",
}
_IDLE = (
    "enable_separate_cfg",
    "cfg_compute_first",
    "cfg_diff_compute_separate",
    "enable_encoder_taylorseer",
    "enable_encoder_dmd",
    "enable_encoder_foca",
    "dmd_ridge",
    "dmd_svd_precision",
    "force_reduce_calibrator_vram",
)
"""Settings that are decided here by what the model and the loop are."""


def _typed(where: str, key: str, value: Any) -> Any:
    kind = _TYPES[key]
    truth = isinstance(value, bool)
    if kind == "bool" and truth:
        return value
    if kind == "int" and isinstance(value, int) and not truth:
        return value
    if kind == "float" and isinstance(value, int | float) and not truth:
        return float(value)
    if kind == "str" and isinstance(value, str):
        return value
    if kind.startswith("tuple") and isinstance(value, list) and all(type(v) is int for v in value):
        return tuple(value)
    words = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}
    raise RecipeError(f"{where}: {key}={value!r} given; expected {words.get(kind, 'a list of whole numbers')}")


def _mask(where: str, value: Any, steps: int | None) -> str:
    """A mask from a list of 0 and 1, or from the name of a preset and a number of steps."""
    if isinstance(value, list) and value and all(type(v) is int and v in (0, 1) for v in value):
        return "".join(map(str, value))
    if not isinstance(value, str):
        raise RecipeError(f"{where}: steps_computation_mask={value!r} given; expected a list of 0 and 1, or a preset")
    if set(value) <= {"0", "1"} and value:
        return value
    if steps is None:
        raise RecipeError(f"{where}: steps_computation_mask={value} needs num_inference_steps beside it")
    try:
        return scm_policy(value, steps)
    except BadInput as error:
        raise RecipeError(f"{where}: {error}") from error
