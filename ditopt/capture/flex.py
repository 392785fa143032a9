"""``flex_attention`` as plain operators: what PyTorch itself computes where it is not compiled.

The operator carries two small graphs, one that changes a score and one that says whether it counts. Both are mapped
over batch, heads, queries and keys. Its block mask only tells a compiled kernel which blocks it may leave out, and is
not read here, as PyTorch's own uncompiled operator does not read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from ditopt._torch import fake_mode_of, flex_attention

_LOG2 = math.log(2)


def expand(module: fx.GraphModule) -> int:
    """Replace each flex attention in the graph of ``module``, in place; returns how many there were."""
    found = [n for n in module.graph.nodes if n.op == "call_function" and n.target is flex_attention]
    for node in found:
        with module.graph.inserting_before(node):
            outputs = _operators(module, node)
        for user in list(node.users):  # the results are read by getitem
            user.replace_all_uses_with(outputs[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
    for node in module.graph.find_nodes(op="get_attr"):
        if not node.users:
            module.graph.erase_node(node)
    return len(found)


def _operators(module: fx.GraphModule, node: fx.Node) -> Any:
    """The operators of one flex attention, where the graph inserts; its results as nodes."""
    names = ("query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options", "scored", "masked")
    given: dict[str, Any] = {"scored": (), "masked": (), **dict(zip(names, node.args, strict=False)), **node.kwargs}
    score_mod, mask_mod = (module.get_submodule(g.target) for g in (given["score_mod"], given["block_mask"][-1]))
    scored, read = len(given["scored"]), [given[k] for k in names[:3]] + [*given["scored"], *given["masked"]]

    def attend(*tensors: Tensor) -> tuple[Tensor, ...]:
        buffers = tensors[3:]
        scoring = _mapped(score_mod, (0,), buffers[:scored])
        counting = _mapped(mask_mod, (), buffers[scored:])
        query, key, value = tensors[:3]
        return _attend(query, key, value, given["scale"], scoring, counting)

    fakes = [a.meta["val"] for a in read]
    with fake_mode_of(fakes), torch.no_grad():
        traced = make_fx(attend)(*fakes).graph
    made: dict[fx.Node, Any] = dict(zip(traced.find_nodes(op="placeholder"), read, strict=True))
    outputs = module.graph.graph_copy(traced, made)
    for new in set(made.values()) - set(read):
        new.meta |= {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    return outputs


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    scoring: Callable[..., Tensor],
    counting: Callable[..., Tensor],
) -> tuple[Tensor, ...]:
    """query (batch, heads, queries, width), key and value (batch or 1, heads or fewer, keys, width)."""
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, 1).expand(query.shape[0], -1, -1, -1)
    value = value.repeat_interleave(groups, 1).expand(query.shape[0], -1, -1, -1)
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    scores = ((query.to(dtype) @ key.to(dtype).transpose(-2, -1)) * scale).to(dtype)
    places = [torch.arange(size, device=query.device) for size in scores.shape]
    scores = torch.where(counting(*places), scoring(scores, *places), -torch.inf)
    empty = (scores == -torch.inf).all(-1)
    total = torch.where(empty, -torch.inf, scores.logsumexp(-1))
    weights = torch.ops.aten._safe_softmax(scores, -1)
    output = _laid_out_like(query, weights.to(query.dtype) @ value.to(query.dtype))
    return output, total / _LOG2, scores.amax(-1) / _LOG2


def _laid_out_like(query: Tensor, output: Tensor) -> Tensor:
    """``output`` with its dimensions in memory in the order of those of ``query``."""
    stride = query.stride()
    order = sorted(range(4), key=lambda d: -stride[d])
    return output.permute(order).contiguous().permute([order.index(d) for d in range(4)])


def _mapped(
    function: Callable[..., Tensor], before: tuple[int, ...], buffers: Sequence[Tensor]
) -> Callable[..., Tensor]:
    """``function`` of four numbers (batch, head, query, key) and ``buffers`` as one of four vectors."""
    for place in reversed(range(4)):
        dims = tuple(0 if i == place else None for i in range(4))
        function = torch.vmap(function, in_dims=(*before, *dims, *(None for _ in buffers)))
    return lambda *args: function(*args, *buffers)
