"""Keys and values of a condition, once a request: against a loop that keeps them by hand, and where there are none."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt.errors import DitoptWarning
from ditopt.ir.cost import is_attention, is_matmul
from ditopt.ir.program import formal, is_call
from ditopt.pipeline import Context, PassManager
from ditopt.recipe import Recipe
from tests.foreign import ZOO
from tests.foreign.base import BATCH, STEPS, randn, sinusoid, times
from tests.foreign.conditioned import Conditioned
from tests.foreign.video import heads, merged, normed
from tests.tiny_models import ZOO as TINY
from tests.tiny_models import captured, noise

DEPTH, LATENT, CONDITION = 3, 16, 8


@functools.cache
def model() -> Any:
    return ZOO["conditioned"].model()


def call(step: int, condition: int = 99) -> dict[str, Tensor]:
    cond = randn(BATCH, CONDITION, 6, seed=condition)
    return {"z": randn(BATCH, LATENT, 6, seed=step), "t": times(step, 1000), "cond": cond}


class Kept:
    """EasyControl's loop: the first step runs the condition through all blocks and keeps its keys and values; the
    others join them to those of the latent."""

    def __init__(self, m: Any, cond: Tensor) -> None:
        self.m = m
        still, c = m.time(sinusoid(torch.zeros(BATCH), m.width)), m.refer(cond)
        self.keys: list[tuple[Tensor, Tensor]] = []
        for block in m.stack:
            t1, h1, t2, h2 = block.mod(still)[:, None].chunk(4, dim=-1)
            d = normed(c) * (1 + t1)
            q, k, v = (heads(z) for z in (block.qkv(d) + block.lora(d)).chunk(3, dim=-1))
            self.keys.append((k, v))
            halves = [(slice(None), slice(None), slice(a, a + 4)) for a in (0, 4)]
            seen = [torch.softmax(q[i] @ k[i].mT * q.shape[-1] ** -0.5, -1) @ v[i] for i in halves]
            c = c + h1 * block.out(merged(torch.cat(seen, dim=2)))
            c = c + h2 * block.mlp(normed(c) * (1 + t2))

    def step(self, z: Tensor, t: Tensor) -> Tensor:
        emb, x = self.m.time(sinusoid(t, self.m.width)), self.m.embed(z)
        for block, (kc, vc) in zip(self.m.stack, self.keys, strict=True):
            s1, g1, s2, g2 = block.mod(emb)[:, None].chunk(4, dim=-1)
            q, k, v = (heads(y) for y in block.qkv(normed(x) * (1 + s1)).chunk(3, dim=-1))
            k, v = torch.cat([k, kc], dim=2), torch.cat([v, vc], dim=2)
            x = x + g1 * block.out(merged(torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v))
            x = x + g2 * block.mlp(normed(x) * (1 + s2))
        return self.m.head(x)


@torch.no_grad()
def test_it_is_the_loop_that_keeps_them_by_hand():
    fast = ditopt.optimize(model(), "condition_kv", example_inputs=call(0), target="eager", steps=STEPS)
    for request, condition in enumerate((99, 55)):
        by_hand = Kept(model(), call(0, condition)["cond"])
        before = fast.stats.flops
        with fast.session(steps=STEPS):
            for step in range(STEPS):
                given = call(step, condition)
                got = fast(**given)
                assert torch.equal(got, model()(**given)), "bit for bit what the model gives"
                assert (got - by_hand.step(given["z"], given["t"])).norm() < 1e-5 * got.norm()
        spent = fast.stats.flops - before
        request_memo = next(g for g in fast.compiled.plan.manifest.every_graph if g.name == "memo_request")
        (full,) = fast.compiled.plan.manifest.graphs
        fills = {g.name: g.flops for g in fast.compiled.plan.manifest.every_graph}
        tables = 0 if request else fills["memo_constant"] + STEPS * fills["memo_timestep"]
        assert spent == STEPS * full.flops + request_memo.flops + tables, "the condition is computed once a request"


def test_the_loop_holds_nothing_of_the_condition_but_its_keys_and_values():
    program = PassManager(Recipe.parse("condition_kv")).run(_flat(model()))[-1].program
    read = [p for p in program.step.placeholders if formal(p).kind == "memo"]
    tokens = [p for p in read if CONDITION in p.meta["val"].shape]
    assert len(tokens) == 2 * DEPTH
    assert all(p.meta["val"].numel() == BATCH * CONDITION * model().width for p in tokens)
    assert not any(p.users for p in program.step.placeholders if formal(p).ref == "cond")
    for name in {program.entry, *(str(n.args[1]) for n in program.calls())}:
        for node in program.functions[name].graph.nodes:
            if node.op == "call_function" and not is_call(node) and (is_matmul(node) or is_attention(node)):
                assert node.meta["val"].shape[-2] != CONDITION, f"{node} still works on the condition"
    notes = PassManager(Recipe.parse("condition_kv")).run(_flat(model()))[-1].notes
    assert f"{DEPTH} of {DEPTH} attentions read keys that are computed once a request" in notes


def _flat(m: nn.Module) -> Any:
    from ditopt.capture import bind as bind_call
    from ditopt.capture import capture

    spec, tensors = bind_call(m, (), call(0))
    return capture(m, spec, tensors).program


class Timed(Conditioned):
    """The condition is modulated by the time of the step."""

    def forward(self, z: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        emb = self.time(sinusoid(t, self.width))
        x, c = self.embed(z), self.refer(cond)
        for block in self.stack:
            x, c = block(x, c, emb, emb, self.own)
        return self.head(x)


def test_a_condition_that_knows_the_time_is_refused():
    said = "in each of the 3 attentions all keys see the latent or the timestep: the tokens of a condition attend to"
    with pytest.warns(DitoptWarning, match=said):
        fast = ditopt.optimize(noise(Timed()), "condition_kv", example_inputs=call(0), target="eager")
    assert not fast.program.memos


def test_of_a_condition_that_sees_the_latent_the_first_keys_are_kept_and_it_is_said():
    last = PassManager(Recipe.parse("condition_kv")).run(_flat(noise(Conditioned(see=True))))[-1]
    # of both streams, without the condition's first one, which has not seen it yet, and the last, which nobody reads
    assert f"1 of {2 * DEPTH - 2} attentions read keys that are computed once a request" in last.notes


def test_a_model_without_condition_is_refused_and_lossless_is_not():
    tiny = TINY["plain"]
    with pytest.warns(DitoptWarning, match="hoist_invariants{need=keys} changed nothing: in each of the 4 attentions"):
        fast = ditopt.optimize(tiny.model(), "condition_kv", example_inputs=tiny.inputs(), target="eager")
    assert not fast.program.memos
    lossless = PassManager(Recipe.parse("lossless"), Context("eager")).run(captured("plain")[1].program)
    assert lossless[-1].applied > 0


def test_a_condition_that_counts_as_a_latent_can_be_named():
    class Unnamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model()

        def forward(self, z: Tensor, t: Tensor, other: Tensor) -> Tensor:
            return self.inner(z, t, other)

    given = {**call(0)}
    given["other"] = given.pop("cond")
    with pytest.warns(DitoptWarning, match=r"if one of z, other stays the same within a request, say so with roles="):
        ditopt.optimize(Unnamed().eval(), "condition_kv", example_inputs=given, target="eager")
    roles: Any = {"other": "prompt"}
    fast = ditopt.optimize(Unnamed().eval(), "condition_kv", example_inputs=given, target="eager", roles=roles)
    assert {m.name for m in fast.program.memos} >= {"request"}


def test_keys_of_a_text_are_the_same_case():
    history = PassManager(Recipe.parse("condition_kv"), Context("eager")).run(captured("pixart")[1].program)
    assert "3 of 6 attentions read keys that are computed once a request" in history[-1].notes
