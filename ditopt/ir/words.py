"""The vocabulary of program text: what ``ir/text.py`` prints and ``ir/parse.py`` accepts."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from ditopt._torch import is_fake
from ditopt.ir.program import Decision, Input, Interval, Memo, Predictor, Raster, Region, Rule, StateSlot, Stream

OpOverload: Any = type(torch.ops.aten.add.Tensor)
OpOverloadPacket: Any = type(torch.ops.aten.add)

HEADER = "# ditopt program 1"
"""First line of every text; the number changes when an older parser would misread a newer text."""

NAMESPACES = ("aten", "prims", "ditopt")
"""Where operators may come from."""

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f8e4m3fn": torch.float8_e4m3fn,
    "f8e5m2": torch.float8_e5m2,
    "f8e4m3fnuz": torch.float8_e4m3fnuz,
    "f8e5m2fnuz": torch.float8_e5m2fnuz,
    "f8e8m0fnu": torch.float8_e8m0fnu,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u64": torch.uint64,
    "u32": torch.uint32,
    "u16": torch.uint16,
    "u8": torch.uint8,
    "bool": torch.bool,
    "c128": torch.complex128,
    "c64": torch.complex64,
    "c32": torch.complex32,
}

WORDS: dict[str, Any] = {
    **DTYPES,
    "inf": math.inf,
    "nan": math.nan,
    "strided": torch.strided,
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
"""Bare names that stand for a value."""

SECTIONS: dict[str, Any] = {
    "inputs": Input,
    "outputs": str,
    "state": StateSlot,
    "memos": Memo,
    "decisions": Decision,
    "regions": Region,
    "relies": Raster,
    "applied": str,
    "pace": float,
}
"""Fields of a Program that print as a list, and what they hold."""

RECORDS: dict[type, int] = {
    Input: 3,
    StateSlot: 2,
    Memo: 1,
    Decision: 1,
    Region: 2,
    Stream: 1,
    Raster: 1,
    Interval: 0,
    Predictor: 1,
    Rule: 1,
}
"""The dataclasses of a text and how many of their fields print without a name."""

FORMALS = {
    "input": "Input",
    "param": "Param",
    "state": "State",
    "memo": "Memo",
    "control": "Control",
    "formal": "Formal",
}
"""How the kind of a formal prints."""

CONST = "const."
"""Prefix of the parameters that capture lifted from the code: their content is part of the program's meaning."""


def fingerprint(tensor: Tensor) -> str:
    """A short hash of a tensor's content; "" for one that has none (fake or meta)."""
    if is_fake(tensor) or tensor.device.type == "meta":
        return ""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    return hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
