"""What onnxruntime's MatMulNBits takes."""

from __future__ import annotations

from typing import Any

import torch


def why_not_nbits(weight: Any, scale: Any) -> str:
    """Why MatMulNBits cannot read a packed ``weight`` with this ``scale`` (nodes); "" where it can."""
    values, scales = weight.meta["val"], scale.meta["val"]
    if values.dtype is not torch.uint8:
        return "MatMulNBits is for 4 bits here"
    group = 2 * values.shape[-1] // scales.shape[-1]
    if group < 16 or group & (group - 1):
        return f"MatMulNBits takes groups of 16 or a larger power of two, not of {group}"
    return ""
