"""One safetensors file that holds the weights of every graph of an ONNX artifact.

ONNX wants external data as (file, offset, length); safetensors is a length, a JSON header and bare bytes. So a
safetensors file *is* a valid external data file, which anybody can also read without ONNX. Offsets depend on all
tensors, hence the two phases: graphs are handed in one after the other, then everything is written at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditopt.errors import BadInput, require

# torch dtype -> (safetensors name, onnx_ir name)
_TYPES: dict[torch.dtype, tuple[str, str]] = {
    torch.float64: ("F64", "DOUBLE"),
    torch.float32: ("F32", "FLOAT"),
    torch.float16: ("F16", "FLOAT16"),
    torch.int64: ("I64", "INT64"),
    torch.int32: ("I32", "INT32"),
    torch.int16: ("I16", "INT16"),
    torch.int8: ("I8", "INT8"),
    torch.uint8: ("U8", "UINT8"),
    torch.bool: ("BOOL", "BOOL"),
}
_ALIGN = 64  # a cache line and the widest vector register


def check_dtype(dtype: torch.dtype, what: str) -> None:
    """BadInput, with the way out, where onnxruntime on CPU has no kernels for ``dtype``."""
    if dtype is torch.bfloat16:
        raise BadInput(
            f"{what} is bfloat16, which onnxruntime does not run on CPU; convert with model.float() and export again"
        )
    if dtype.is_complex:
        raise BadInput(
            f"{what} is {dtype}, and ONNX has no complex numbers; give the model pairs of real ones, or run it in this "
            "process, with target eager or inductor"
        )
    if dtype not in _TYPES:
        raise BadInput(
            f"{what} is {dtype}, which the ONNX target cannot carry; expected one of {', '.join(map(str, _TYPES))}"
        )


@dataclass(frozen=True)
class _Pending:
    path: Path
    model: Any  # onnx_ir.Model
    weights: Mapping[str, Any]  # weight name -> the onnx_ir.Value that stands for it


class WeightStore:
    """Collects tensors by name over several graphs; each is stored once, and names of one tensor share its bytes.

    ``location`` is the file name that the .onnx files refer to; it lies in their folder.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self.tensors: dict[str, Tensor] = {}
        self._same: dict[str, str] = {}  # name -> the name its bytes are stored under
        self._identity: dict[str, tuple[object, ...]] = {}
        self._owner: dict[tuple[object, ...], str] = {}
        self._pending: list[_Pending] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Remember ``tensor`` as ``name``; a second, different tensor of that name is a BadInput."""
        check_dtype(tensor.dtype, f"weight {name!r}")
        tensor = tensor.detach()
        identity = (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if self._identity.setdefault(name, identity) != identity:
            raise BadInput(f"two different tensors are named {name!r}; every weight of an artifact needs its own name")
        owner = self._same[name] = self._owner.setdefault(identity, name)
        self.tensors.setdefault(owner, tensor)

    def defer(self, path: Path, model: Any, weights: Mapping[str, Any]) -> None:
        """Keep ``model`` until the offsets are known. ``weights``: name of an added tensor -> its onnx_ir.Value."""
        self._pending.append(_Pending(path, model, weights))

    def write(self, folder: Path) -> None:
        """Write ``folder/location``, and every deferred model with its initializers pointing into it."""
        ir = require("onnx_ir", None)
        spans = self._write_tensors(folder / self.location)
        for pending in self._pending:
            for name, value in pending.weights.items():
                owner = self._same[name]
                tensor, (begin, length) = self.tensors[owner], spans[owner]
                value.const_value = ir.ExternalTensor(
                    self.location,
                    begin,
                    length,
                    ir.DataType[_TYPES[tensor.dtype][1]],
                    shape=ir.Shape(tensor.shape),
                    name=value.name,
                )
                pending.model.graph.register_initializer(value)
            ir.save(pending.model, pending.path)

    def _write_tensors(self, file: Path) -> dict[str, tuple[int, int]]:
        """Name -> (offset in the file, bytes)."""

        def divisor(name: str) -> int:
            size = _nbytes(self.tensors[name])
            return min(size & -size, _ALIGN) or _ALIGN

        # safetensors allows no holes. Sorted by the power of two that divides their sizes, tensors are aligned without:
        # all that come before one have sizes divisible by at least what divides its own.
        order = sorted(self.tensors, key=lambda name: (-divisor(name), name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        spans: dict[str, tuple[int, int]] = {}
        end = 0
        for name in order:
            tensor = self.tensors[name]
            begin, end = end, end + _nbytes(tensor)
            header[name] = {"dtype": _TYPES[tensor.dtype][0], "shape": list(tensor.shape), "data_offsets": [begin, end]}
            spans[name] = (begin, end - begin)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGN)  # the format permits trailing spaces
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                flat = self.tensors[name].to("cpu").contiguous().reshape(-1)
                out.write(flat.view(torch.uint8).numpy().data)
        return {name: (8 + len(text) + begin, length) for name, (begin, length) in spans.items()}


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
