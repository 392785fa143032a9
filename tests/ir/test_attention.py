"""Attention in every spelling: recognised as what it computes, opened to what was written, bit for bit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ditopt.capture import bind as bind_call
from ditopt.capture import capture
from ditopt.codegen.lower import lower, lower_memos
from ditopt.errors import TextError
from ditopt.ir import cost
from ditopt.ir.example import Builder, tiny_dit
from ditopt.ir.interpret import random_inputs, run_program
from ditopt.ir.opening import opened
from ditopt.ir.program import Program, formal
from ditopt.ir.sites import AttentionSite, attention_sites
from ditopt.ir.text import parse_program, print_program
from ditopt.ir.verify import verify
from ditopt.ops import attention, linear_attention
from ditopt.ops.spelling import read, replay
from ditopt.pipeline import PassManager, PassResult
from tests.foreign.base import randn
from tests.tiny_models import ZOO, captured, optimized

aten = torch.ops.aten

B, H, N, D = 2, 3, 8, 4
INF = math.inf

Spelling = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of queries, keys and values (B, H, N, D), what a query may see (B, 1, 1, N) and numbers to add (H, N, N)."""


def ones(v: Tensor) -> Tensor:
    return F.pad(v.mT, (0, 0, 0, 1), mode="constant", value=1.0)


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sana's: everything transposed, the sum of keys in a row of ones."""
    h = (ones(v) @ k.relu()) @ q.mT.relu()
    return (h[:, :, :-1] / (h[:, :, -1:] + 1e-15)).mT


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.mT @ v)) * (1 / (q @ k.sum(dim=-2, keepdim=True).mT + 1e-6))


def merged(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Heads in the batch: (B * H, N, D)."""

    def run(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return f(*(x.reshape(B * H, N, D) for x in (q, k, v)), *more).view(B, H, N, D)

    return run


def behind(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Heads behind tokens: (B, N, H, D)."""
    return lambda q, k, v: f(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """The batch holds windows, of which each has a mask; heads have a bias."""
    scores = q @ k.mT * 0.5 + bias
    scores = (scores.view(1, B, H, N, N) + mask.view(1, B, 1, 1, N)).view(B, H, N, N)
    return scores.softmax(-1) @ v


def numbers(see: Tensor) -> Tensor:
    return torch.zeros(see.shape).masked_fill(~see, -INF)


SOFTMAX: dict[str, Spelling] = {
    "sdpa": lambda q, k, v, see, bias: F.scaled_dot_product_attention(q, k, v),
    "sdpa_scale": lambda q, k, v, see, bias: F.scaled_dot_product_attention(q, k, v, scale=0.3),
    "sdpa_causal": lambda q, k, v, see, bias: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "sdpa_see": lambda q, k, v, see, bias: F.scaled_dot_product_attention(q, k, v, see),
    "sdpa_bias": lambda q, k, v, see, bias: F.scaled_dot_product_attention(q, k, v, bias.expand(B, H, N, N)),
    "scaled_after": lambda q, k, v, see, bias: ((q @ k.mT) * 0.5).softmax(-1) @ v,
    "divided_after": lambda q, k, v, see, bias: ((q @ k.mT) / math.sqrt(D)).softmax(-1) @ v,
    "scaled_before": lambda q, k, v, see, bias: ((q * 0.5) @ k.mT).softmax(-1) @ v,
    "scaled_both": lambda q, k, v, see, bias: ((q * 0.7) @ (k * 0.7).mT).softmax(-1) @ v,
    "scaled_twice": lambda q, k, v, see, bias: ((q @ k.mT) * 3 / 4).softmax(-1) @ v,
    "double": lambda q, k, v, see, bias: (q @ k.mT).double().softmax(-1).to(q.dtype) @ v,
    "softmax_dtype": lambda q, k, v, see, bias: (q @ k.mT).softmax(-1, dtype=torch.float64).float() @ v,
    "dropout": lambda q, k, v, see, bias: F.dropout((q @ k.mT).softmax(-1), 0.5, training=False) @ v,
    "added": lambda q, k, v, see, bias: (q @ k.mT * 0.5 + numbers(see)).softmax(-1) @ v,
    "added_left": lambda q, k, v, see, bias: (bias + q @ k.mT).softmax(-1) @ v,
    "filled": lambda q, k, v, see, bias: (q @ k.mT).masked_fill(~see, -INF).softmax(-1) @ v,
    "filled_with_a_number": lambda q, k, v, see, bias: (q @ k.mT).masked_fill(~see, -1e9).softmax(-1) @ v,
    "where_keep": lambda q, k, v, see, bias: torch.where(see, q @ k.mT, -INF).softmax(-1) @ v,
    "where_drop": lambda q, k, v, see, bias: torch.where(~see, -1e9, q @ k.mT).softmax(-1) @ v,
    "both_masks": lambda q, k, v, see, bias: (q @ k.mT + bias).masked_fill(~see, -INF).softmax(-1) @ v,
    "two_masks": lambda q, k, v, see, bias: (q @ k.mT * 0.5 + bias + numbers(see)).softmax(-1) @ v,
    "windows": lambda q, k, v, see, bias: windows(q, k, v, bias, numbers(see)),
    "bmm": lambda q, k, v, see, bias: merged(lambda q, k, v: torch.bmm((torch.bmm(q, k.mT) * 0.5).softmax(-1), v))(
        q, k, v
    ),
    "baddbmm": lambda q, k, v, see, bias: merged(
        lambda q, k, v, m: torch.bmm(torch.baddbmm(m, q, k.mT, alpha=0.5).softmax(-1), v)
    )(q, k, v, bias.expand(B, H, N, N).reshape(B * H, N, N)),
    "baddbmm_of_nothing": lambda q, k, v, see, bias: merged(
        lambda q, k, v, m: torch.bmm(torch.baddbmm(m, q, k.mT, beta=0, alpha=0.5).softmax(-1), v)
    )(q, k, v, torch.zeros(B * H, N, N)),
    "split_mask": lambda q, k, v, see, bias: merged(
        lambda q, k, v: torch.bmm((torch.bmm(q, k.mT).view(B, H, N, N) + numbers(see)).view(B * H, N, N).softmax(-1), v)
    )(q, k, v),
    "einsum": lambda q, k, v, see, bias: torch.einsum(
        "bhnm,bhme->bhne", torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1), v
    ),
    "einsum_behind": lambda q, k, v, see, bias: behind(
        lambda q, k, v: torch.einsum("bhnm,bmhe->bnhe", torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1), v)
    )(q, k, v),
    "keys_permuted": lambda q, k, v, see, bias: (q @ k.transpose(1, 2).permute(0, 2, 3, 1)).softmax(-1) @ v,
    "one_key_head": lambda q, k, v, see, bias: (q @ k[:, :1].mT).softmax(-1) @ v[:, :1],
    "one_head": lambda q, k, v, see, bias: ((q[:, 0] @ k[:, 0].mT).softmax(-1) @ v[:, 0])[:, None] + 0 * q,
}

LINEAR: dict[str, Spelling] = {
    "linear_summed": lambda q, k, v, see, bias: summed(q, k, v),
    "linear_padded": lambda q, k, v, see, bias: padded(q, k, v),
}

LEFT: dict[str, tuple[Spelling, str]] = {
    "scaled_masks": (
        lambda q, k, v, see, bias: ((q @ k.mT + bias) * 0.5).softmax(-1) @ v,
        "attention in step stays as it is: its scores are scaled after a mask was added",
    ),
    "scores_wanted": (
        lambda q, k, v, see, bias: (s := q @ k.mT).softmax(-1) @ v + s.mean(-1, keepdim=True),
        "attention in step stays as it is: its scores are read by something else too",
    ),
    "capped": (
        lambda q, k, v, see, bias: ((q @ k.mT) / 5).tanh().softmax(-1) @ v,
        "attention in step stays as it is: 2 x aten.matmul.default with no softmax over the keys and no divisor",
    ),
}


class Model(nn.Module):
    """One residual branch for each spelling, all with the same layers."""

    def __init__(self, spellings: list[Spelling]) -> None:
        super().__init__()
        self.spellings = spellings
        self.qkv = nn.Linear(H * D, 3 * H * D)

    def forward(self, latents: Tensor, timestep: Tensor, see: Tensor, bias: Tensor) -> Tensor:
        x = latents * timestep[:, None, None]
        for spelling in self.spellings:
            q, k, v = self.qkv(F.layer_norm(x, (H * D,))).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
            x = x + spelling(q, k, v, see, bias).transpose(1, 2).flatten(2)
        return x


def inputs() -> dict[str, Tensor]:
    see = torch.ones(B, 1, 1, N, dtype=torch.bool)
    see[1, ..., -3:] = False
    return {
        "latents": randn(B, N, H * D, seed=1),
        "timestep": torch.tensor([0.7, 0.7]),
        "see": see,
        "bias": randn(H, N, N, seed=2),
    }


def program_of(*spellings: Spelling) -> Program:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model(list(spellings)).eval()
    roles: Any = {"latents": "latent", "timestep": "timestep", "see": "prompt", "bias": "prompt"}
    spec, tensors = bind_call(model, (), inputs())
    return PassManager("canonicalize").run(capture(model, spec, tensors, roles).program)[-1].program


@functools.cache
def everything() -> tuple[Program, PassResult]:
    """All spellings in one program, and what the pass makes of it."""
    program = program_of(*SOFTMAX.values(), *LINEAR.values())
    return program, PassManager("recognize_attention").run(program)[-1]


def operators(program: Program) -> list[fx.Node]:
    targets = (attention, linear_attention)
    return [n for f in program.functions.values() for n in f.graph.nodes if n.target in targets]


def alike(a: Program, b: Program) -> bool:
    """Whether two flat programs are the same operators on the same operands, in whatever order independent ones are."""

    def keys(program: Program) -> list[Any]:
        seen: dict[fx.Node, Any] = {}
        for node in program.step.graph.nodes:
            if node.op == "placeholder":
                seen[node] = formal(node)
            elif node.op == "call_function":
                mark: Any = lambda n: _Seen(seen[n])  # noqa: E731 - typed as map_arg wants it
                args = fx.map_arg((node.args, dict(sorted(node.kwargs.items()))), mark)
                seen[node] = hash((str(node.target), repr(args), node.meta["region"]))
        return [sorted(v for v in seen.values() if isinstance(v, int)), [seen[r] for r in program.step.results]]

    return keys(a) == keys(b)


class _Seen:
    def __init__(self, key: Any) -> None:
        self.key = key

    def __repr__(self) -> str:
        return f"<{self.key}>"


class _Watch(fx.Interpreter):
    """Runs a graph and keeps what went into attention operators and came out of them."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: list[tuple[tuple[Any, ...], Tensor]] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_function(target, args, kwargs)
        if target in (attention, linear_attention):
            self.seen.append((args, out))
        return out


@functools.cache
def ran() -> list[tuple[tuple[Any, ...], Tensor]]:
    """Operands and result of each operator."""
    program = everything()[1].program
    given = inputs()
    values = [
        given[what.ref] if what.kind == "input" else program.params[what.ref]
        for what in map(formal, program.step.placeholders)
    ]
    watch = _Watch(program.module())
    with torch.no_grad():
        watch.run(*values)
    return watch.seen


def test_every_spelling_is_one_operator():
    _, result = everything()
    assert result.applied == len(SOFTMAX) + len(LINEAR)
    assert result.refused == ()
    found = operators(result.program)
    assert [n.target for n in found] == [attention] * len(SOFTMAX) + [linear_attention] * len(LINEAR)
    left = {n.target for n in result.program.step.graph.nodes}
    assert not left & {aten.matmul.default, aten.bmm.default, aten.softmax.int, aten.baddbmm.default}
    assert not any("einsum" in str(t) or "scaled_dot" in str(t) for t in left)


@pytest.mark.parametrize("name", SOFTMAX)
def test_queries_keys_values_mask_and_scale_say_what_is_computed(name):
    args, out = ran()[list(SOFTMAX).index(name)]
    query, key, value, mask, scale, causal, *_ = [*args, *(None,) * 6][:6]
    scores = query @ key.mT * (D**-0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -INF) if mask.dtype is torch.bool else scores + mask
    if causal:
        scores = scores.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -INF)
    wanted = scores.softmax(-1) @ value
    assert out.shape == wanted.shape
    assert out.shape[-2:] == (N, D)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention(query, key, value, mask, scale, bool(causal)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_features_and_divisor_say_what_is_computed(name):
    (query, key, value, eps, *_), out = ran()[len(SOFTMAX) + list(LINEAR).index(name)]
    scores = query @ key.mT
    wanted = scores @ value / (scores.sum(-1, keepdim=True) + eps)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear_attention(query, key, value, eps), wanted, rtol=1e-4, atol=1e-4)


def test_scales_and_masks():
    found = dict(zip(SOFTMAX, operators(everything()[1].program), strict=False))

    def told(name: str) -> tuple[Any, Any, Any]:
        _, _, _, mask, scale, causal = [*found[name].args, *(None,) * 3][:6]
        return mask is not None, scale, bool(causal)

    assert told("sdpa") == (False, None, False)
    assert told("sdpa_causal") == (False, None, True)
    assert told("scaled_after") == told("divided_after") == told("bmm") == (False, 0.5, False)
    assert told("scaled_before") == (False, 1.0, False), "what is done to queries stays outside"
    assert told("scaled_twice") == (False, 0.75, False)
    assert told("two_masks") == told("windows") == told("baddbmm") == (True, 0.5, False)
    assert told("baddbmm_of_nothing") == (False, 0.5, False)


def test_the_bits_are_the_same_before_with_and_after_the_operators():
    before, result = everything()
    after = opened(result.program)
    verify(after)
    assert not operators(after)
    (a,), (b,), (c,) = (run_program(p, inputs())[0] for p in (before, result.program, after))
    assert a.isfinite().all()
    assert torch.equal(a, b)
    assert torch.equal(a, c)


def test_opening_gives_the_operators_that_were_written():
    before, result = everything()
    assert alike(opened(result.program), before)
    assert not alike(result.program, before)
    assert opened(before) is before


def test_text_and_a_second_run():
    _, result = everything()
    again = parse_program(print_program(result.program), result.program.params)
    assert again == result.program
    assert alike(opened(again), opened(result.program))
    second = PassManager("recognize_attention").run(again)[-1]
    assert second.applied == 0
    assert second.refused == (f"all attention is written as operators already ({result.applied})",)


def test_flops_are_those_of_the_spelling():
    before, result = everything()
    assert cost.step_flops(result.program) == cost.step_flops(before)
    assert cost.step_flops(before)[0] > 0


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_is_told(name):
    spelling, sentence = LEFT[name]
    result = PassManager("recognize_attention").run(program_of(spelling))[-1]
    assert result.applied == 0
    assert result.refused == (sentence,)


def test_a_router_and_a_table_are_no_attention():
    """A softmax over experts, and one that picks from a table of weights."""
    b = Builder()
    x = b.input("x", "latent", B, N, D)
    table, keys = b.param("values", N, D), b.param("keys", D, N)
    b.input("timestep", "timestep", B)
    picked = b(aten.matmul.default, b(aten.softmax.int, b(aten.matmul.default, x, keys), -1), table)
    result = PassManager("recognize_attention").run(b.program(picked))[-1]
    assert result.applied == 0
    assert result.refused == ("nothing attends",)


# -- through the compiler ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "pixart", "joint"])
@pytest.mark.parametrize(
    "recipe", ["outline_blocks", "hoist_invariants", "hoist_invariants, cache{region=blocks.1:-1}"]
)
def test_whatever_follows_is_the_same(name, recipe):
    """Before outlining or after it: the same regions, streams, costs, memos and graphs, and the same bits."""
    recipe = f"outline_blocks, {recipe}".replace("outline_blocks, outline_blocks", "outline_blocks")
    plain = optimized(name, recipe)
    graphs = [*lower(plain), *lower_memos(plain)]
    given = random_inputs(plain)
    (want, *_), _ = run_program(plain, given)
    for order in (f"recognize_attention, {recipe}", f"{recipe}, recognize_attention"):
        program = optimized(name, order)
        assert operators(program)
        assert program.regions == plain.regions
        assert [m.keys for m in program.memos] == [m.keys for m in plain.memos]
        assert {r.id: r.flops for r in program.regions} == {r.id: r.flops for r in plain.regions}
        (got, *_), _ = run_program(program, given)
        assert torch.equal(got, want)
        made = [*lower(program), *lower_memos(program)]
        assert [m.graph.name for m in made] == [g.graph.name for g in graphs]
        assert [m.graph.flops for m in made] == [g.graph.flops for g in graphs]
        assert not any(operators(m.program) for m in made)
        values = [m.values for m in opened(program).memos]
        assert [len(v) for v in values] == [len(m.values) for m in plain.memos]


def test_attention_of_the_blocks():
    """Who attends to whom, without and with the operators."""
    wanted = {
        "sd3": ("joint", False, "sdpa"),
        "dit": ("self", False, "sdpa"),
        "wan": ("self", False, "sdpa"),
        "joint": ("joint", False, "explicit"),
        "flux": ("joint", False, "sdpa"),
    }
    for name, (kind, masked, spelling) in wanted.items():
        sites = attention_sites(optimized(name, "outline_blocks"))
        assert sites == attention_sites(optimized(name, "recognize_attention, outline_blocks"))
        assert len(sites) == len(ZOO[name].blocks(captured(name)[0]))
        for found in sites.values():
            assert (found[0].kind, found[0].masked, found[0].spelling) == (kind, masked, spelling), name
            assert found[0].heads == 2
            assert found[0].queries == found[0].keys > 4
    cross = attention_sites(optimized("pixart", "outline_blocks"))["blocks.0"][1]
    assert (cross.kind, cross.masked) == ("cross", True)
    assert cross.keys < cross.queries


def test_a_site_says_all_of_it():
    sites = attention_sites(PassManager("outline_blocks").run(tiny_dit())[-1].program)
    assert sites == {f"blocks.{i}": (AttentionSite("self", 2, 6, 6, False, False, "sdpa"),) for i in range(3)}


# -- the text of a spelling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "t0 = ",
        "t0",
        "t0 = relu(q)",
        "t0 = relu.default(q.data)",
        "t0 = relu.default(open(1))",
        "t0 = relu_.default(q)",
        "t0 = nothing.default(q)",
        "t0 = torch.ops.aten.relu.default(q)",
        "t0 = relu.default(*q)",
        "t0 = relu.default(**q)",
        "import os",
        "t0 = (lambda: 1).default(q)",
    ],
)
def test_a_spelling_that_is_none_is_refused(text):
    with pytest.raises(TextError, match=r"the spelling '.*cannot be read"):
        read(text)


def test_a_spelling_reads_only_what_is_given():
    with pytest.raises(TextError, match="k is not defined there"):
        replay("t0 = add.Tensor(q, k)", {"q": torch.ones(2)}, lambda f, *a, **k: f(*a, **k))
    out = replay("t0 = add.Tensor(q, q); t1 = mul.Tensor(t0, 3)", {"q": torch.ones(2)}, lambda f, *a, **k: f(*a, **k))
    assert out.tolist() == [6.0, 6.0]


def test_operands_that_do_not_fit_are_one_sentence():
    q, k = torch.ones(2, 3, 4), torch.ones(2, 5, 4)
    with pytest.raises(ValueError, match=r"attention takes .* query, key and value are \[2, 3, 4\], \[2, 5, 4\]"):
        attention(q, k, q)
    with pytest.raises(ValueError, match="a mask of 3 queries and 5 keys ends in these numbers or in 1"):
        attention(q, k, k, torch.zeros(2, 5, 3))
