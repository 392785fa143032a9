"""Small Programs built by hand: what passes ship as their examples, and what tests start from."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ditopt._torch import FakeTensorMode
from ditopt.ir.edit import Editor
from ditopt.ir.program import Formal, Function, Input, Program, Role, TensorType

aten = torch.ops.aten

WIDTH, TOKENS, ROWS = 8, 6, 2


class Builder:
    """Writes one entry function node by node; types are inferred as in any edit."""

    def __init__(self) -> None:
        graph = fx.Graph()
        graph.output(())
        self._e = Editor(Function("step", graph), "example")
        self._mode = FakeTensorMode()
        self._e.mode = self._mode
        self._inputs: list[Input] = []
        self._params: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)

    def input(self, name: str, role: Role, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        """A model input."""
        self._inputs.append(Input(name, role, TensorType(dtype, shape)))
        return self._formal(name, Formal("input", name), torch.empty(shape, dtype=dtype))

    def param(self, name: str, *shape: int) -> fx.Node:
        """A weight with random content."""
        self._params[name] = torch.randn(shape, generator=self._generator) * 0.4
        return self._formal(name.replace(".", "_"), Formal("param", name), self._params[name])

    def _formal(self, name: str, what: Formal, like: torch.Tensor) -> fx.Node:
        return self._e.placeholder(name, what, self._mode.from_tensor(like))

    def __call__(self, target: object, *args: Any, **kwargs: Any) -> fx.Node:
        """An operator on nodes and constants."""
        return self._e.op(target, *args, **kwargs)

    def program(self, *results: fx.Node) -> Program:
        """The finished Program with these outputs."""
        self._e.set_results(results)
        outputs = tuple(f"out{i}" for i in range(len(results)))
        return Program({"step": self._e.function()}, "step", self._params, tuple(self._inputs), outputs)


def tiny_dit(
    blocks: int = 3, noise: bool = False, attention: bool = True, rotary: bool = False, rates: bool = False
) -> Program:
    """``blocks`` blocks of attention and MLP with adaptive scale and gate on (2, 6, 8) tokens, flat.

    ``noise`` adds operators that change nothing; ``rotary`` turns queries and keys by complex numbers; ``rates``
    embeds the time at rates that are computed. Without ``attention`` it is one linear layer and no block at all.
    """
    b = Builder()
    x = b.input("hidden_states", "latent", ROWS, TOKENS, WIDTH)
    t = b.input("timestep", "timestep", ROWS)
    if not attention:
        return b.program(b(aten.linear.default, x, b.param("head.weight", WIDTH, WIDTH)))
    label = b.input("class_labels", "prompt", ROWS, dtype=torch.int64)
    time = b(aten.unsqueeze.default, t, -1)
    if rates:
        falling = b(aten.mul.Tensor, b(aten.arange.start_step, 0, WIDTH, 1, device="cpu"), -0.5)
        time = b(aten.mul.Tensor, time, b(aten.exp.default, falling))
    time = b(aten.linear.default, b(aten.sin.default, time), b.param("time.weight", WIDTH, WIDTH if rates else 1))
    cond = b(
        aten.silu.default, b(aten.add.Tensor, time, b(aten.embedding.default, b.param("label.weight", 4, WIDTH), label))
    )
    if noise:
        x = b(aten.detach.default, b(aten.view.default, x, [ROWS, TOKENS, WIDTH]))
    turn = None
    if rotary:
        turn = b(aten.view_as_complex.default, b.param("turn", TOKENS, WIDTH // 2, 2))
    for i in range(blocks):
        x = _block(b, x, cond, f"blocks.{i}", turn)
    return b.program(
        b(aten.linear.default, b(aten.layer_norm.default, x, [WIDTH]), b.param("head.weight", WIDTH, WIDTH))
    )


def grid_dit(rows: int = 16, columns: int = 16, blocks: int = 2, masked: bool = False) -> Program:
    """``blocks`` blocks as above on the pixels of a latent (2, 8, rows, columns), whose tokens lie on that grid.

    ``masked``: an input ``mask`` (2, 1, rows, columns) is added to it.
    """
    b = Builder()
    x = b.input("hidden_states", "latent", ROWS, WIDTH, rows, columns)
    t = b.input("timestep", "timestep", ROWS)
    if masked:
        x = b(aten.add.Tensor, x, b.input("mask", "prompt", ROWS, 1, rows, columns))
    time = b(aten.sin.default, b(aten.unsqueeze.default, t, -1))
    cond = b(aten.silu.default, b(aten.linear.default, time, b.param("time.weight", WIDTH, 1)))
    tokens = rows * columns
    x = b(aten.transpose.int, b(aten.reshape.default, x, [ROWS, WIDTH, tokens]), 1, 2)
    x = b(aten.linear.default, x, b.param("embed.weight", WIDTH, WIDTH))
    for i in range(blocks):
        x = _block(b, x, cond, f"blocks.{i}", None, tokens)
    x = b(aten.linear.default, b(aten.layer_norm.default, x, [WIDTH]), b.param("head.weight", WIDTH, WIDTH))
    return b.program(b(aten.reshape.default, b(aten.transpose.int, x, 1, 2), [ROWS, WIDTH, rows, columns]))


def _block(b: Builder, x: fx.Node, cond: fx.Node, name: str, turn: fx.Node | None, tokens: int = TOKENS) -> fx.Node:
    scale = b(aten.unsqueeze.default, b(aten.linear.default, cond, b.param(f"{name}.scale", WIDTH, WIDTH)), 1)
    gate = b(aten.unsqueeze.default, b(aten.linear.default, cond, b.param(f"{name}.gate", WIDTH, WIDTH)), 1)
    y = b(aten.mul.Tensor, b(aten.layer_norm.default, x, [WIDTH]), b(aten.add.Tensor, scale, 1))
    heads = []
    for k in ("q", "k", "v"):
        z = b(aten.linear.default, y, b.param(f"{name}.{k}", WIDTH, WIDTH))
        if turn is not None and k != "v":
            pairs = b(aten.view_as_complex.default, b(aten.view.default, z, [ROWS, tokens, WIDTH // 2, 2]))
            z = b(aten.view_as_real.default, b(aten.mul.Tensor, pairs, turn))
        z = b(aten.view.default, z, [ROWS, tokens, 2, WIDTH // 2])
        heads.append(b(aten.transpose.int, z, 1, 2))
    y = b(aten.transpose.int, b(aten.scaled_dot_product_attention.default, *heads), 1, 2)
    y = b(aten.linear.default, b(aten.reshape.default, y, [ROWS, tokens, WIDTH]), b.param(f"{name}.out", WIDTH, WIDTH))
    x = b(aten.add.Tensor, x, b(aten.mul.Tensor, gate, y))
    y = b(
        aten.gelu.default,
        b(aten.linear.default, b(aten.layer_norm.default, x, [WIDTH]), b.param(f"{name}.up", 2 * WIDTH, WIDTH)),
    )
    y = b(aten.linear.default, y, b.param(f"{name}.down", WIDTH, 2 * WIDTH))
    return b(aten.add.Tensor, x, b(aten.mul.Tensor, gate, y))
