"""What onnxruntime cannot run as torch writes it, and is given in another form."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ditopt.errors import BadInput
from tests.onnx_toy import one_graph

aten = torch.ops.aten


def ran(fn, example: list[Tensor], tmp_path, **more) -> list[Tensor]:
    """What onnxruntime gives for ``fn(w, *example)``."""
    outputs = len(fn(more.get("w", {}), *example))
    run = one_graph(fn, example, tmp_path, outputs=outputs, **more)
    return [torch.from_numpy(y) for y in run.run(None, {f"in{k}": t.numpy() for k, t in enumerate(example)})]


def same(fn, example: list[Tensor], tmp_path, **tolerance) -> None:
    """onnxruntime gives what torch gives, up to a tolerance (default: none)."""
    want, got = fn({}, *example), ran(fn, example, tmp_path)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, **(tolerance or {"atol": 0, "rtol": 0}))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("kind", [torch.bool, torch.int16, torch.int32], ids=str)
def test_choosing_between_values_of_a_type(tmp_path, kind):
    a, b, c = noise(3, 4) > 0, (noise(3, 1) * 9).to(kind), (noise(1, 4) * 9).to(kind)
    same(lambda w, a, b, c: (torch.where(a, b, c), torch.where(a, c, b)), [a, b, c], tmp_path)


@pytest.mark.parametrize("fill", [True, False])
def test_a_mask_filled_with_a_constant(tmp_path, fill):
    """A prompt's mask with its first row opened, as models do before attention."""
    keep, first = noise(2, 1, 5, 5) > 0, torch.arange(5).eq(0)
    fn = lambda w, keep, first: (keep.masked_fill(first, fill), keep.masked_fill(first[:, None], fill).int())  # noqa: E731
    same(fn, [keep, first], tmp_path)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_rows_taken_and_written_at_positions(tmp_path, kind):
    table, rows, columns = noise(6, 5), torch.tensor([[0, 4], [3, 3]], dtype=kind), torch.tensor([1, 0], dtype=kind)

    def fn(w, table, rows, columns):
        taken = aten.index.Tensor(table, [rows, columns]), aten.index.Tensor(table, [None, columns])
        return *taken, aten.index_put.default(table, [columns], table[4:] * 2)

    same(fn, [table, rows, columns], tmp_path)


def test_attention_with_any_number_of_axes_in_front(tmp_path):
    """Windows of an image are axes before the tokens; masks, and keys, are broadcast."""
    attend = torch.nn.functional.scaled_dot_product_attention
    given = []
    for lead in ((), (3,), (2, 3, 2), (2, 3, 2, 2)):
        given.append([noise(*lead, n, 4) for n in (5, 6, 6)])
        given.append([*given[-1], noise(5, 6) > -1])
        given.append([*given[-2], noise(*lead[-1:], 5, 6) > -1, noise(*lead, 5, 6)])
    given.append([noise(2, 3, 1, 5, 4), noise(3, 2, 6, 4), noise(3, 2, 6, 4)])
    flat = [t for one in given for t in one]

    def fn(w, *tensors):
        rest = iter(tensors)
        calls = [[next(rest) for _ in one] for one in given]
        return tuple(attend(q, k, v, mask, scale=0.4) for q, k, v, *masks in calls for mask in masks or [None])

    same(fn, flat, tmp_path, atol=1e-5, rtol=1e-5)


def test_rows_repeated_as_often_as_a_tensor_says(tmp_path):
    def fn(w, x, times):
        rows = aten.repeat_interleave.Tensor(times, output_size=7)
        repeated = torch.repeat_interleave(x, times, dim=0, output_size=7)
        flat = torch.repeat_interleave(x[:, :1], times, output_size=7)
        return aten.index_select.default(x, 0, rows), repeated + torch.ones(7, 4), flat

    same(fn, [noise(3, 4), torch.tensor([2, 0, 5])], tmp_path)


def test_an_outer_product_of_two_types(tmp_path):
    """Rotary angles as people write them: positions in float32, rates in float64."""
    positions, rates = torch.arange(6.0).view(2, 3), torch.tensor([1.0, 0.1, 1e-9], dtype=torch.float64)
    same(lambda w, n, d: (torch.einsum("...n,d->...nd", n, d),), [positions, rates], tmp_path)


# -- bfloat16 inside ---------------------------------------------------------------------------------------------------


def test_a_value_is_rounded_to_bfloat16_as_torch_rounds_it(tmp_path):
    x = torch.cat([noise(3, 50).flatten(), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-40, torch.inf])])
    same(lambda w, x: (x.bfloat16().float(), x.to(torch.bfloat16).type_as(x) * x), [x], tmp_path)
    rounded = ran(lambda w, x: (x.bfloat16().float(),), [x], tmp_path)[0]
    assert not torch.equal(rounded, x)


def test_each_operator_of_a_bfloat16_region_rounds_its_result(tmp_path):
    """Of numbers that bfloat16 holds, each sum and product is exact in float32, so all bits agree."""

    def fn(w, x, y):
        a, b = x.bfloat16(), y.bfloat16()
        left, right = (a * b + a).chunk(2, -1)
        whole = torch.cat([left.transpose(0, 1), right.transpose(0, 1)], -1)
        return (whole * 0.3).float(), (a + y), (a > b), aten.unbind.int(a.sum(0, dtype=torch.float32), 0)[1]

    same(fn, [noise(4, 6), noise(4, 1) * 3], tmp_path)


def test_a_region_as_autocast_writes_it(tmp_path):
    def fn(w, x, weight, bias):
        narrow = torch.nn.functional.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
        heads = narrow.view(2, 5, 2, 4).transpose(1, 2)
        attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return (torch.nn.functional.gelu(attended).transpose(1, 2).flatten(2).float() + x,)

    example = [noise(2, 5, 8), noise(8, 8) / 3, noise(8) / 3]
    want, got = fn({}, *example)[0], ran(fn, example, tmp_path)[0]
    assert_close(got, want, atol=2e-2, rtol=0)
    assert (got - want).abs().median() < 1e-4  # most numbers round alike


def test_the_bits_of_bfloat16_cannot_be_read(tmp_path):
    with pytest.raises(BadInput, match="graph 'g' reinterprets the bits of a bfloat16 value"):
        one_graph(lambda w, x: (x.bfloat16().view(torch.int16),), [noise(4)], tmp_path)
