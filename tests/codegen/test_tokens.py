"""ditopt::gather_tokens and ditopt::scatter_tokens against loops over samples and tokens."""

from __future__ import annotations

import operator

import pytest
import torch

from ditopt.codegen.build import build, export, inductor
from ditopt.codegen.claims import claims
from ditopt.codegen.lower import lower
from ditopt.ir.cost import step_flops
from ditopt.ir.example import Builder
from ditopt.ir.interpret import random_inputs, run_program
from ditopt.ir.parse import parse_program
from ditopt.ir.text import print_program
from ditopt.ir.verify import verify
from ditopt.ops import gather_tokens, scatter_tokens
from ditopt.ops.gather_tokens import reference as gather_reference
from ditopt.ops.scatter_tokens import reference as scatter_reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [F32, BF16, F16, torch.bool, torch.complex64, torch.int8]


def case(trial, one=False, dtype=None):
    """Index, geometry and values of a random call: every rank, place, dtype and layout. ``one``: with values that are
    the same for all samples."""
    g = torch.Generator().manual_seed(trial)

    def number(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=g))

    samples, tokens = number(1, 3), number(1, 9)
    count = number(1, tokens)
    index = torch.rand(samples, tokens, generator=g).argsort(1)[:, :count]
    values, dims, batches, starts = [], [], [], []
    for k in range(number(1, 5)):
        rank = number(2, 4)
        places = torch.randperm(rank, generator=g).tolist()
        dim, batch = places[0], places[1] if samples > 1 or number(0, 1) else -1
        before, behind = (number(0, 3) if number(0, 1) else 0 for _ in range(2))
        shape = [number(1, 5) for _ in range(rank)]
        shape[dim] = before + tokens + behind
        if batch >= 0:
            shape[batch] = 1 if one and k % 2 else samples
        order = torch.randperm(rank, generator=g).tolist() if number(0, 1) else list(range(rank))
        value = torch.randn([shape[d] for d in order], generator=g)
        value = value.permute([order.index(d) for d in range(rank)])
        chosen = dtype or DTYPES[number(0, len(DTYPES) - 1)]
        values.append(value > 0 if chosen is torch.bool else (value * 9).to(chosen))
        dims.append(dim)
        batches.append(batch)
        starts.append(before)
    return values, index, dims, batches, starts, tokens


def rows_of(index, start, tokens, size, sample):
    chosen = [start + int(i) for i in index[sample]]
    return [*range(start), *chosen, *range(start + tokens, size)]


def loops(values, index, dims, batches, starts, tokens):
    out = []
    for value, dim, batch, start in zip(values, dims, batches, starts, strict=True):
        made = []
        for sample in range(index.shape[0]):
            at = rows_of(index, start, tokens, value.shape[dim], sample)
            own = value if batch < 0 else value.select(batch, sample if value.shape[batch] > 1 else 0).unsqueeze(batch)
            made.append(torch.stack([own.select(dim, i) for i in at], dim))
        out.append(made[0] if batch < 0 else torch.cat(made, batch))
    return out


def strides(x):
    """Those that mean something."""
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@pytest.mark.parametrize("trial", range(40))
def test_gathered_by_loops(trial):
    args = case(trial, one=True)
    for found, wanted in zip(gather_tokens(*args), loops(*args), strict=True):
        assert torch.equal(found, wanted)
        assert found.is_contiguous()


@pytest.mark.parametrize("trial", range(40))
def test_scattered_is_gathered_again(trial):
    """The chosen tokens of the result are the rows, the others are the base's, and the layout is the base's."""
    bases, *where = case(trial)
    changed = [~b if b.dtype is torch.bool else b + 1 for b in bases]
    rows = gather_tokens(changed, *where)
    before = [b.clone() for b in bases]
    made = scatter_tokens(bases, rows, *where)
    index, dims, batches, starts, tokens = where
    for k, (base, change, found) in enumerate(zip(before, changed, made, strict=True)):
        assert torch.equal(bases[k], base)
        assert strides(found) == strides(torch.empty_like(base))
        assert found.data_ptr() != bases[k].data_ptr()
        for sample in range(index.shape[0]):
            at = set(rows_of(index, starts[k], tokens, base.shape[dims[k]], sample))
            for i in range(base.shape[dims[k]]):
                parts = [t if batches[k] < 0 else t.select(batches[k], sample) for t in (found, change, base)]
                dim = dims[k] - (0 <= batches[k] < dims[k])
                got, new, old = (t.select(dim, i) for t in parts)
                assert torch.equal(got, new if i in at else old)


@pytest.mark.parametrize("trial", range(0, 60, 7))
def test_types_are_those_of_the_reference(trial):
    args = case(trial, one=True)
    with torch._subclasses.FakeTensorMode() as mode:
        faked = [mode.from_tensor(v) for v in args[0]]
        types = gather_tokens(faked, mode.from_tensor(args[1]), *args[2:])
    for fake, real in zip(types, gather_tokens(*args), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def given(**change):
    values = {"values": [torch.zeros(2, 8, 4)], "index": torch.zeros(2, 3, dtype=torch.int64)}
    return {**values, "dims": [1], "batches": [0], "starts": [0], "tokens": 8, **change}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"index": torch.zeros(2, 3, dtype=torch.int32)}, "int64"),
        ({"index": torch.zeros(2, 9, dtype=torch.int64)}, "1 to 8"),
        ({"dims": [1, 1]}, "for each of its tensors"),
        ({"values": []}, "for each of its tensors"),
        ({"starts": [1]}, "no 8 tokens from 1"),
        ({"dims": [2]}, "no 8 tokens"),
        ({"batches": [-1]}, "not that of 2 samples"),
        ({"batches": [1]}, "not that of 2 samples"),
        ({"values": [torch.zeros(3, 8, 4)]}, "not that of 2 samples"),
    ],
)
def test_operands_that_do_not_fit(change, said):
    with pytest.raises(ValueError, match=said):
        gather_reference(**given(**change))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([torch.zeros(2, 4, 4)], r"takes rows \[2, 3, 4\]"),
        ([torch.zeros(2, 3, 4, dtype=F16)], "of torch.float32"),
        ([], "given 0 for 1"),
    ],
)
def test_rows_that_do_not_fit(rows, said):
    args = given()
    with pytest.raises(ValueError, match=said):
        scatter_reference(args.pop("values"), rows, **args)


def program(samples):
    """Hidden states, a table of positions and keys behind text are gathered, and states and keys put back."""
    b = Builder()
    hidden, keys = b.input("hidden", "latent", samples, 7, 6), b.input("keys", "latent", samples, 3, 9, 4)
    table = b.input("table", "shape", 1, 7, 3)
    index = b.input("index", "latent", samples, 4, dtype=torch.int64)
    batch = 0 if samples > 1 else -1
    given = index, [1, 2, 1], [batch] * 3, [0, 2, 0], 7
    short = b(gather_tokens, [hidden, keys, table], *given)
    parts = [b(operator.getitem, short, k) for k in range(3)]
    more = [b(torch.ops.aten.mul.Tensor, p, 2.0) for p in parts]
    full = b(scatter_tokens, [hidden, keys], more[:2], index, [1, 2], [batch] * 2, [0, 2], 7)
    return b.program(*parts, *(b(operator.getitem, full, k) for k in range(2)))


def called(samples):
    made = program(samples)
    values = random_inputs(made)
    values["index"] = torch.tensor([[6, 0, 3, 2], [1, 5, 4, 0]])[:samples]
    return made, values, run_program(made, values)[0]


SAMPLES = pytest.mark.parametrize("samples", [1, 2])


@SAMPLES
@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_targets_agree(samples, target):
    made, values, wanted = called(samples)
    (run,) = build(made, target).run.values()
    (step,) = lower(made)
    found = run([values[f.ref] for f in step.graph.inputs])
    assert all(map(torch.equal, found, wanted))


@SAMPLES
def test_inductor_calls_what_is_not_written_out(samples):
    made, values, wanted = called(samples)
    (step,) = lower(made)
    found = inductor(step)([values[f.ref] for f in step.graph.inputs])
    assert all(map(torch.equal, found, wanted))


@SAMPLES
def test_onnx_agrees_and_copies_whole_rows(samples, tmp_path):
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    made, values, wanted = called(samples)
    export(made, tmp_path / "dit.onnx", None)
    session = onnxruntime.InferenceSession(tmp_path / "dit.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {i.name: values[i.name].numpy() for i in session.get_inputs()})
    assert all(torch.equal(torch.from_numpy(f), w) for f, w in zip(found, wanted, strict=True))
    kinds = {n.op_type for n in onnx.load(tmp_path / "dit.onnx").graph.node}
    assert kinds >= {"Gather", "ScatterND"}
    assert not kinds & {"GatherElements", "ScatterElements"}


def test_the_text_is_read_back_and_moves_cost_nothing():
    made = program(2)
    verify(made)
    assert print_program(parse_program(print_program(made), made.params)) == print_program(made)
    assert step_flops(made) == (0, 0)


@pytest.mark.parametrize(("target", "form"), [("eager", "kernel"), ("inductor", "written out")])
def test_claims(target, form):
    found = {c.op: c for c in claims(program(2), target)}
    assert set(found) == {"gather_tokens", "scatter_tokens"}
    assert all(c.form == form and "no Triton for cpu" in c.reason for c in found.values())
