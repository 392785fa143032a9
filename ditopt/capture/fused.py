"""The fused kernels of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``, as the operators they consist of.

Without gradients these modules are one operator of PyTorch, which rounds otherwise than the forward that they write
out. A trace sees the latter, for the modules step aside wherever a mode watches. Inside ``reached`` they do not, and
``expand`` writes the operator out as its CPU kernel computes it, bit for bit (native/transformers/attention.cpp and
transformer.cpp among the sources of PyTorch). On other devices a trace keeps the forward of the modules.

``nn.TransformerEncoder`` moreover packs the tokens that its mask keeps, where those are the first of each row, and
gives zeros for the others. In a trace all tokens run, and those become zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import activation, transformer

from ditopt._torch import fake_mode_of, masked_softmax

aten = torch.ops.aten


@contextlib.contextmanager
def reached() -> Iterator[None]:
    """Inside, those modules run their fused operators in a trace, too, on a CPU and under PyTorch's own conditions."""
    seen: Any = _Torch()
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (activation, "torch", seen),
            (activation, "_is_make_fx_tracing", lambda: False),
            (transformer, "torch", seen),
            (nn.TransformerEncoder, "forward", _unpacked(nn.TransformerEncoder.forward)),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


class _Like:
    """Another module of Python, apart from what a subclass defines."""

    def __init__(self, other: Any) -> None:
        self._other = other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)


class _Overrides(_Like):
    def has_torch_function(self, tensors: Iterable[Tensor]) -> bool:
        return any(t.device.type != "cpu" for t in tensors)


class _Compiler(_Like):
    def is_compiling(self) -> bool:
        return False


class _Torch(_Like):
    """``torch`` as the files of those modules see it: nothing watches."""

    overrides = _Overrides(torch.overrides)
    compiler = _Compiler(torch.compiler)

    def __init__(self) -> None:
        super().__init__(torch)
        self.packing: list[Tensor] = []  # what nn.TransformerEncoder keeps of its tokens, each time it asks

    def _nested_tensor_from_mask_left_aligned(self, values: Tensor, kept: Tensor) -> bool:
        """Whether tokens are packed: never, for a trace cannot look at a mask."""
        self.packing.append(kept)
        return False


def _unpacked(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``nn.TransformerEncoder.forward`` without packing."""

    def run(self: nn.TransformerEncoder, src: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        seen: _Torch = vars(transformer)["torch"]
        asked, norm = len(seen.packing), self.norm
        self.norm = None
        try:
            out = forward(self, src, mask, *args, **kwargs)
        finally:
            self.norm = norm
        if seen.packing[asked:] and mask is None and src.device.type == "cpu" and not torch.is_autocast_enabled():
            kept = seen.packing[asked]
            packed = (kept[:, 1:] <= kept[:, :-1]).all()
            out = out.masked_fill((packed & ~kept)[..., None], 0.0)
        return out if norm is None else norm(out)

    return run


def expand(graph: fx.Graph) -> None:
    """Write out each such operator in a functional graph on numbers, in place."""
    for node in list(graph.nodes):
        if node.target in _WRITTEN:
            schema: Any = node.target
            given = {a.name: a.default_value for a in schema._schema.arguments if a.has_default_value()}
            given |= dict(zip((a.name for a in schema._schema.arguments), node.args, strict=False)) | node.kwargs
            mode = fake_mode_of([n.meta["val"] for n in node.all_input_nodes])
            with graph.inserting_before(node), mode, torch.no_grad():
                _WRITTEN[node.target](_At(graph, node), **given)
            graph.erase_node(node)


class _At:
    """Appends operators in the place of ``node``."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self._graph = graph
        self.node = node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = self._graph.call_function(target, args, kwargs)
        given, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        made.meta = {**self.node.meta, "val": target(*given, **named)}
        return made

    def results(self, *values: fx.Node | None) -> None:
        """These are the results of the operator, which are read by number."""
        for user in list(self.node.users):
            new = values[user.args[1]]  # type: ignore[index]
            assert new is not None or not user.users, "a result that the operator does not give is read"
            if new is not None:
                user.replace_all_uses_with(new)
            self._graph.erase_node(user)


def _attention(
    emit: _At,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    num_head: int,
    need_weights: bool,
    average_attn_weights: bool,
    **more: Any,
) -> None:
    assert query is key is value, "modules fuse self-attention alone"
    out, weights = _attend(emit, query, num_heads=num_head, **more)
    shape = [query.meta["val"].shape[0], num_head, *weights.meta["val"].shape[1:]]
    full = emit(aten.view.default, weights, shape) if need_weights else None
    if full is not None and average_attn_weights:
        full = emit(aten.div.Tensor, emit(aten.sum.dim_IntList, full, [1]), num_head)
    emit.results(out, full)


def _attend(
    emit: _At,
    x: fx.Node,
    embed_dim: int,
    num_heads: int,
    qkv_weight: fx.Node,
    qkv_bias: fx.Node,
    proj_weight: fx.Node,
    proj_bias: fx.Node,
    mask: fx.Node | None,
    mask_type: int | None,
) -> tuple[fx.Node, fx.Node]:
    """What comes out for x (B, N, D), and the weights (B * heads, N, N)."""
    batch, tokens, _ = x.meta["val"].shape
    width = embed_dim // num_heads
    dtype = x.meta["val"].dtype
    computed = torch.float64 if dtype is torch.float64 else torch.float32
    number = (1 / torch.tensor(float(width), dtype=computed, device="cpu").sqrt()).item()  # rounded as there

    def rows(value: fx.Node, size: int) -> fx.Node:
        whole = emit(aten.clone.default, value, memory_format=torch.contiguous_format)
        return emit(aten.view.default, whole, [batch * num_heads, tokens, size])

    def cast(value: fx.Node, to: torch.dtype) -> fx.Node:
        return value if to is dtype is computed else emit(aten._to_copy.default, value, dtype=to)

    joined = cast(emit(aten.linear.default, x, qkv_weight), computed)
    joined = emit(aten.add.Tensor, joined, cast(qkv_bias, computed))
    parts = emit(aten.view.default, joined, [batch, tokens, 3, num_heads, width])
    parts = emit(aten.permute.default, parts, [2, 0, 3, 1, 4])
    q, k, v = (emit(aten.select.int, parts, 0, i) for i in range(3))
    q, k, v = (cast(part, dtype) for part in (emit(aten.mul.Tensor, q, number), k, v))
    scores = emit(aten.bmm.default, rows(q, width), emit(aten.transpose.int, rows(k, width), 2, 1))
    if mask is None:
        weights = emit(aten.softmax.int, scores, -1)
    else:
        hidden = emit(aten._to_copy.default, mask, dtype=torch.bool)
        if mask_type == _KEYS:
            hidden = emit(aten.view.default, hidden, [batch, 1, 1, tokens])
        hidden = emit(aten.expand.default, hidden, [batch, num_heads, tokens, tokens])
        weights = emit(masked_softmax, scores, rows(hidden, tokens), -1, _SCORES)
    out = emit(aten.view.default, emit(aten.bmm.default, weights, rows(v, width)), [batch, num_heads, tokens, width])
    out = emit(aten.clone.default, emit(aten.permute.default, out, [0, 2, 1, 3]), memory_format=torch.contiguous_format)
    out = emit(aten.view.default, out, [batch, tokens, embed_dim])
    return emit(aten.linear.default, out, proj_weight, proj_bias), weights


_KEYS, _SCORES = 1, 2
"""What a mask of PyTorch's kernels is given for: each key, each score."""


def _layer(
    emit: _At,
    src: fx.Node,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: fx.Node,
    norm_bias_1: fx.Node,
    norm_weight_2: fx.Node,
    norm_bias_2: fx.Node,
    ffn_weight_1: fx.Node,
    ffn_bias_1: fx.Node,
    ffn_weight_2: fx.Node,
    ffn_bias_2: fx.Node,
    **attention: Any,
) -> None:
    def norm(x: fx.Node, *weights: fx.Node) -> fx.Node:
        return emit(aten.layer_norm.default, x, [attention["embed_dim"]], *weights, eps)

    def mlp(x: fx.Node) -> fx.Node:
        inner = emit(aten.linear.default, x, ffn_weight_1, ffn_bias_1)
        inner = emit(aten.gelu.default if use_gelu else aten.relu.default, inner)
        return emit(aten.linear.default, inner, ffn_weight_2, ffn_bias_2)

    first, second = (norm_weight_1, norm_bias_1), (norm_weight_2, norm_bias_2)
    out, _ = _attend(emit, norm(src, *first) if norm_first else src, **attention)
    out = emit(aten.add.Tensor, src, out)
    out = out if norm_first else norm(out, *first)
    out = emit(aten.add.Tensor, out, mlp(norm(out, *second) if norm_first else out))
    out = out if norm_first else norm(out, *second)
    emit.node.replace_all_uses_with(out)


_WRITTEN: dict[Any, Any] = {
    aten._native_multi_head_attention.default: _attention,
    aten._transformer_encoder_layer_fwd.default: _layer,
}
