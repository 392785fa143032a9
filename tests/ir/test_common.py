"""Which operators compute the same."""

from __future__ import annotations

import torch

from ditopt._torch import FakeTensorMode
from ditopt.ir.common import duplicates
from tests.ir.build import Builder

aten = torch.ops.aten


def found(make, **params):
    """What ``make(builder, weights)`` adds to a function with these weights: for each operator whether it is one that
    was there before."""
    b = Builder("step", FakeTensorMode())
    x = b.formal("input", "x", 2, 3)
    given = [b.formal("param", name.replace("const_", "const."), *t.shape, dtype=t.dtype) for name, t in params.items()]
    nodes = make(b, x, *given)
    same = duplicates(b.function(*nodes), nodes, {k.replace("const_", "const."): t for k, t in params.items()})
    return [n in same for n in nodes]


def test_constants_are_told_apart_by_type_and_sign():
    assert found(lambda b, x: [b.op(aten.mul.Tensor, x, c) for c in (1, 1.0, True, 0.0, -0.0, 1.0, 1)]) == [
        *[False] * 5,
        *[True] * 2,
    ]


def test_operators_are_told_apart_by_target_keywords_and_operands():
    def make(b, x):
        a, c = b.op(aten.cos.default, x), b.op(aten.sin.default, x)
        casts = [b.op(aten._to_copy.default, x, dtype=d) for d in (torch.float16, torch.bfloat16, torch.float16)]
        return [a, c, *casts, b.op(aten.add.Tensor, a, c), b.op(aten.add.Tensor, c, a)]

    assert found(make) == [False] * 4 + [True] + [False] * 2


def test_equal_operands_make_equal_results():
    def make(b, x):
        a, c = b.op(aten.cos.default, x), b.op(aten.cos.default, x)
        return [a, c, b.op(aten.cat.default, [a, x], 1), b.op(aten.cat.default, [c, x], 1)]

    assert found(make) == [False, True, False, True]


def test_weights_are_one_tensor_and_constants_the_same_bits():
    one, zero = torch.ones(3), torch.zeros(3)
    both = lambda b, x, p, q: [b.op(aten.mul.Tensor, x, p), b.op(aten.mul.Tensor, x, q)]  # noqa: E731
    assert found(both, p=one, q=one) == [False, True]
    assert found(both, p=one, q=one.clone()) == [False, False]
    assert found(both, const_p=one, const_q=one.clone()) == [False, True]
    assert found(both, const_p=one, q=one.clone()) == [False, False]
    assert found(both, const_p=zero, const_q=-zero) == [False, False]
    assert found(both, const_p=zero, const_q=zero.double()) == [False, False]
    with FakeTensorMode():
        assert found(both, const_p=torch.ones(3), const_q=torch.ones(3)) == [False, False]  # not known to be
        assert found(both, const_p=(fake := torch.ones(3)), const_q=fake) == [False, True]
