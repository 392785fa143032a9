"""Step graphs of an ONNX artifact, run by onnxruntime without copying tensors in or out."""

from __future__ import annotations

import json
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditopt.artifact import Executable, Manifest, StepGraph
from ditopt.errors import ArtifactError, DitoptWarning, MissingExtra, SessionError, require

# torch dtype -> (numpy name, which onnxruntime's bindings want, and onnxruntime's own name)
_TYPES: dict[torch.dtype, tuple[str, str]] = {
    torch.float64: ("float64", "tensor(double)"),
    torch.float32: ("float32", "tensor(float)"),
    torch.float16: ("float16", "tensor(float16)"),
    torch.int64: ("int64", "tensor(int64)"),
    torch.int32: ("int32", "tensor(int32)"),
    torch.int16: ("int16", "tensor(int16)"),
    torch.int8: ("int8", "tensor(int8)"),
    torch.uint8: ("uint8", "tensor(uint8)"),
    torch.bool: ("bool", "tensor(bool)"),
}
_DTYPES = {ort: dtype for dtype, (_, ort) in _TYPES.items()}


def ort_executables(folder: str | Path, manifest: Manifest) -> dict[str, Executable]:
    """One executable for each graph of ``manifest``, by StepGraph.name; their files lie in ``folder``.

    An executable takes the tensors of ``graph.inputs`` (no weights: the files have their own), of exactly the exported
    dtypes and shapes, and gives new contiguous tensors on the device of the inputs. A graph is loaded when it first
    runs: a variant that no step picks costs nothing. MissingExtra where onnxruntime is absent.
    """
    _onnxruntime()
    return {graph.name: _Graph(Path(folder), graph) for graph in manifest.every_graph}


Kernel = tuple[str, list[int], list[int]]
"""A kernel that ran: its name, the shapes of its first operand and of its first result."""

_PROFILE: ContextVar[list[Kernel] | None] = ContextVar("profile", default=None)


@contextmanager
def profiled() -> Iterator[list[Kernel]]:
    """Inside, graphs run under the profiler of onnxruntime; the list gets each kernel that ran. A run loads its graph
    anew, so times say nothing."""
    events: list[Kernel] = []
    token = _PROFILE.set(events)
    try:
        yield events
    finally:
        _PROFILE.reset(token)


def _read_profile(file: str) -> list[Kernel]:
    """The kernels of a profile that onnxruntime wrote."""
    found = []
    for event in json.loads(Path(file).read_text()):
        args = event.get("args", {})
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time"):
            first = [next(iter(t.values())) for k in ("input", "output") for t in args.get(f"{k}_type_shape", [])[:1]]
            if len(first) == 2:
                found.append((str(args["op_name"]), first[0], first[1]))
    return found


def _onnxruntime() -> Any:
    try:
        return require("onnxruntime", "cpu")
    except MissingExtra as error:
        raise MissingExtra(f"{error} (or, for an NVIDIA GPU, 'ditopt[gpu]'; the two exclude each other)") from error


def _place(name: str, tensor: Tensor, spare: Tensor) -> tuple[Any, ...]:
    """What onnxruntime's bindings want to know of a tensor."""
    address = tensor.data_ptr() or spare.data_ptr()
    device = tensor.device
    return name, device.type, device.index or 0, _TYPES[tensor.dtype][0], list(tensor.shape), address


class _Graph:
    """An Executable. Holds one InferenceSession for each device it met."""

    def __init__(self, folder: Path, graph: StepGraph) -> None:
        self._file = folder / graph.file
        self._name = graph.name
        self._count = len(graph.inputs)
        self._sessions: dict[torch.device, Any] = {}

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if len(tensors) != self._count:
            raise SessionError(f"graph {self._name!r} takes {self._count} tensors, {len(tensors)} given")
        home = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
        events = _PROFILE.get()
        session = self._session(home) if events is None else self._load(home, profile=True)
        on_gpu = session.get_providers()[0] == "CUDAExecutionProvider"
        device = home if on_gpu else torch.device("cpu")
        tensors = [t.detach().to(device).contiguous() for t in tensors]

        spare = torch.empty(1, dtype=torch.float64, device=device)  # a tensor without elements has no address to bind
        binding = session.io_binding()
        for wanted, t in zip(session.get_inputs(), tensors, strict=True):
            if _DTYPES.get(wanted.type) is not t.dtype or list(wanted.shape) != list(t.shape):
                raise SessionError(
                    f"input {wanted.name!r} of graph {self._name!r} is {wanted.type}{wanted.shape}, "
                    f"given is {t.dtype}{list(t.shape)}"
                )
            binding.bind_input(*_place(wanted.name, t, spare))
        outputs = [torch.empty(o.shape, dtype=_DTYPES[o.type], device=device) for o in session.get_outputs()]
        for o, t in zip(session.get_outputs(), outputs, strict=True):
            binding.bind_output(*_place(o.name, t, spare))
        if on_gpu:  # torch and onnxruntime use different streams
            torch.cuda.current_stream(device).synchronize()
        session.run_with_iobinding(binding)
        if on_gpu:
            binding.synchronize_outputs()
        if events is not None:
            file = session.end_profiling()
            events += _read_profile(file)
            Path(file).unlink()
        return outputs if device == home else [t.to(home) for t in outputs]

    def _session(self, device: torch.device) -> Any:
        if device not in self._sessions:
            self._sessions[device] = self._load(device)
        return self._sessions[device]

    def _load(self, device: torch.device, profile: bool = False) -> Any:
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(tempfile.gettempdir()) / f"ditopt-{uuid.uuid4().hex}")
        # Each variant has a thread pool of its own; spinning threads of one would take the cores of the next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        asked: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in ort.get_available_providers():
            asked.insert(0, ("CUDAExecutionProvider", {"device_id": str(device.index or 0)}))
        try:
            session = ort.InferenceSession(str(self._file), options, providers=asked)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise ArtifactError(
                f"{self._file} cannot be loaded by onnxruntime ({error}); export the model again"
            ) from error
        # get_available_providers() lists what was compiled in, not what works here; only the session knows.
        if device.type != "cpu" and session.get_providers()[0] != "CUDAExecutionProvider":
            warnings.warn(
                f"inputs are on {device}, but this onnxruntime runs on {session.get_providers()[0]}: every step "
                "copies through the host; pip install 'ditopt[gpu]' in place of 'ditopt[cpu]'",
                DitoptWarning,
                stacklevel=3,
            )
        return session
