"""The last resort: a real run of the model, recorded operator by operator as it reaches PyTorch's dispatcher.

No symbol stands for a value here, so Python may do with tensors what it likes; what it learned of their values is
noted. Two watches see it: ``Reads`` (functions of torch: ``mask.sum().item()``, ``x[mask]``) and below it the
dispatcher, which nothing in torch passes by (``F.pad(x, (0, mask.sum()))``, ``torch.unique``). Each number that comes
out is a constant of the record; an operator whose result has a size that depends on values is not recorded, and its
results are constants too. The tensors behind them are results of the record, as in ``replay``: a guard compares them in
later calls, and what depends on the latent or the timestep is refused (``guard.split``).

The model runs in inference mode, where composite operators (attention, linear, norms) reach the dispatcher whole. The
record still writes in place where the model does; torch.export makes it functional.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ditopt._torch import TorchDispatchMode, depends_on_values, pytree
from ditopt.capture import fused, where
from ditopt.capture.aside import as_written, forgetful, quiet
from ditopt.capture.flat import Flat, shared_copy
from ditopt.capture.numbers import Numbers
from ditopt.capture.replay import Read, Reads
from ditopt.capture.spec import CallSpec

aten = torch.ops.aten


class Recorded(nn.Module):
    """The record of one run as a module of flat tensors: the model's results, then the tensor behind each of ``reads``.

    ``flat``: the model as it ran, with the packing of its output. Nothing of it is called again.
    """

    def __init__(self, flat: Flat, graph: fx.Graph, constants: Sequence[Tensor], reads: Sequence[Read]) -> None:
        super().__init__()
        self.model = flat.model  # the weights, by the names that they have in other exports
        self.packing = flat.packing
        self.reads = tuple(reads)
        self._record = graph
        for i, tensor in enumerate(constants):
            self.register_buffer(f"constant{i}", tensor)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        values: dict[fx.Node, Any] = {}
        with fx.traceback.preserve_node_meta():
            for node in self._record.nodes:
                if node.op == "output":
                    break
                if node.op == "placeholder":
                    values[node] = next(given)
                elif node.op == "get_attr":
                    path, _, name = str(node.target).rpartition(".")
                    values[node] = getattr(self.get_submodule(path), name)
                else:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                    with fx.traceback.set_current_meta(node):
                        values[node] = node.target(*args, **kwargs)
        (results,) = self._record.output_node().args
        return tuple(values[r] for r in results)  # type: ignore[union-attr, index]


def record(model: nn.Module, spec: CallSpec, tensors: Sequence[Tensor]) -> Recorded:
    """Run ``model`` once for the call of ``spec``. Errors of the model pass through."""
    twin = shared_copy(model, runs=True)
    tracer = _Tracer(twin)
    flat = Flat(twin, spec, tracer.around)
    given = [t.detach().clone() for t in tensors]  # the model may write into them
    for tensor in given:
        tracer.place(tensor, tracer.graph.placeholder("input"))
    with quiet(), as_written(), forgetful(), fused.reached(), tracer.paths(twin), torch.inference_mode():
        results = flat(*given)
    tracer.graph.output(tuple(tracer.node(t) for t in [*results, *tracer.observed]))
    return Recorded(flat, tracer.graph, tracer.constants, tracer.reads)


class _Watch(Reads):
    """Hands every look at a tensor to the tracer."""

    def __init__(self, read: Callable[[Tensor, Callable[[Tensor], Any]], Any]) -> None:
        super().__init__()
        self._read = read

    def read(self, tensor: Tensor, take: Callable[[Tensor], Any]) -> Any:
        return self._read(tensor, take)


class _Tracer(TorchDispatchMode):
    """Writes what reaches the dispatcher into ``graph``. ``reads``: what Python learned of values, ``observed``: the
    tensors behind it, as they were then."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: list[Tensor] = []
        self.reads: list[Read] = []
        self.observed: list[Tensor] = []
        self._nodes = WeakTensorKeyDictionary()
        self._modules: list[str] = []
        self._paused = False
        tables = (model.named_parameters(), model.named_buffers())
        self._weights = {_memory(t): f"model.{name}" for table in tables for name, t in table}

    @contextmanager
    def around(self) -> Iterator[None]:
        """The model runs inside."""
        with ExitStack() as stack:
            for mode in (self, _Watch(self.read), Numbers()):
                stack.enter_context(mode)
            yield

    @contextmanager
    def paths(self, model: nn.Module) -> Iterator[None]:
        """What is recorded inside knows the module of ``model`` that ran it."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._modules.append(name)))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, *_: Any) -> None:
        self._modules.pop()

    def place(self, tensor: Tensor, node: fx.Node) -> None:
        """``tensor`` is computed by ``node``."""
        self._nodes[tensor] = node

    def node(self, tensor: Tensor) -> fx.Node:
        """What computes ``tensor``; a weight, or a constant, where nothing recorded does."""
        if tensor not in self._nodes:
            weight = self._weights.get(_memory(tensor))
            if weight is not None:
                node = self.graph.get_attr(weight)
            else:
                with torch.inference_mode(False), self._pause():
                    self.constants.append(tensor.detach().clone())
                # a copy of it: the model may write into what it made
                node = self.graph.call_function(
                    aten.clone.default, (self.graph.get_attr(f"constant{len(self.constants) - 1}"),)
                )
            self.place(tensor, node)
        return self._nodes[tensor]

    def read(self, tensor: Tensor, take: Callable[[Tensor], Any]) -> Any:
        """What Python gets from ``tensor``, noted."""
        kept = tensor.detach().clone()  # recorded: the model may write into it later
        self.node(kept)
        with self._pause():
            value = kept.cpu()
            answer = take(value)
        self.reads.append(Read(where.of_caller(), value, answer))
        self.observed.append(kept)
        return answer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if self._paused:
            return func(*args, **named)
        if func in (aten.item.default, aten._local_scalar_dense.default):
            with self:
                return self.read(args[0], lambda t: t.item())
        if depends_on_values(func, args, named):
            with self:
                decomposed = func.decompose(*args, **named)
            return self._frozen(func, args, named) if decomposed is NotImplemented else decomposed
        out = func(*args, **named)
        self._write(func, args, named, out)
        return out

    def _frozen(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of an operator as constants, which hold as long as all that it reads is the same."""
        with self:
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self.read(leaf, lambda t: t)
        return func(*args, **kwargs)

    def _write(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        given, named = pytree.tree_map_only(Tensor, self.node, (tuple(args), dict(kwargs)))
        node = self.graph.call_function(func, given, named)
        node.meta["nn_module_stack"] = {str(i): (f"model.{n}", nn.Module) for i, n in enumerate(self._modules)}
        if isinstance(out, Tensor):
            self.place(out, node)
        elif isinstance(out, (list, tuple)):
            for i, part in enumerate(out):
                if isinstance(part, Tensor):
                    self.place(part, self.graph.call_function(_item, (node, i)))

    @contextmanager
    def _pause(self) -> Iterator[None]:
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before


def _item(values: Any, i: int) -> Any:
    return values[i]


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """What tells a tensor from others: ``weight.data`` is the weight."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
