"""What the parser refuses: one fault a case in a text that is good otherwise; the error names the line."""

from __future__ import annotations

import pytest
import torch

from ditopt.errors import TextError
from ditopt.ir.text import parse_program
from ditopt.ir.verify import verify

GOOD = """\
# ditopt program 1
inputs = [Input("x", "latent", f32[2, 3])]
outputs = ["y"]
params = [Param("w", f32[3])]
def step(
    x: f32[2, 3] = Input("x"),
    w: f32[3] = Param("w"),
):
    v0: f32[2, 3] = aten.add.Tensor(x, w)
    return (v0,)
entry = "step"
"""


def test_the_good_text_is_good():
    verify(parse_program(GOOD, {"w": torch.zeros(3), "other": torch.zeros(1)}))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("program 1", "program 2", "line 1: expected '# ditopt program 1'"),
        ("outputs", "outputs =", "line 3: not valid Python"),
        ("(x, w)", "(x, w)\0", "line"),
        ("(x, w)", "(" * 300 + "x, w)", "line"),
        ("(x, w)", "(x, " + "-" * 5000 + "1)", "line"),
        ("aten.add.Tensor(x, w)", "x" + ".x" * 5000 + "(x)", "line"),
        ('["y"]', '"y"', 'line 3: expected a list, found `"y"`'),
        ('["y"]', "[1]", "line 3: expected a value of type str, found `1`"),
        ('["y"]', "[*y]", "line 3: expected a literal"),
        ('"latent"', '"noise"', "line 2: expected one of 'latent', 'timestep', 'prompt', 'shape', found `\"noise\"`"),
        ('Input("x", "latent", f32[2, 3])', 'Input("x")', "line 2: expected Input with the argument 'role'"),
        ('"latent"', "role=1", "line 2"),
        ('("x", "latent"', '("x", "latent", f32[1], 1', "line 2: expected at most 3 arguments"),
        ('Input("x", ', 'Inputs("x", ', r"line 2: expected Input(...), found `Inputs("),
        ("f32[2, 3])]", "f33[2, 3])]", "line 2: expected a tensor type such as f32[2, 3], found `f33[2, 3]`"),
        ("f32[2, 3])]", "f32[2, -3])]", "line 2: expected a size, found `-3`"),
        ("f32[2, 3])]", "f32[2, True])]", "line 2: expected a size"),
        ("v0: f32[2, 3]", f"v0: f32[{2**47}, {2**47}]", "line 9: expected a tensor type that can exist"),
        ("v0: f32[2, 3]", "v0: f32[2, 3] @ strides(1)", "line 9: expected 2 strides"),
        ("outputs =", "output =", "line 3: expected one of inputs, outputs"),
        ('outputs = ["y"]', "", "expected `outputs = ...`, found the end"),
        ('entry = "step"', 'entry = "stop"', "line 11: expected the entry to be a function"),
        ('entry = "step"', "import os", "line 11: expected `name = ...` or a function definition, found `import os`"),
        ('entry = "step"', '__import__("os").getcwd()', "line 11: expected `name = ...`"),
        ('entry = "step"', 'entry = "step"\nentry = "step"', "line 12: expected entry to be given once"),
        ('Param("w", f32[3])]', 'Param("v", f32[3])]', "line 4: expected a tensor named 'v' among the 1 given ones"),
        (
            'Param("w", f32[3])]',
            'Param("w", f64[3])]',
            "line 4: expected the type of the given tensor, torch.float32[3]",
        ),
        ('Param("w", f32[3])]', 'Param("w", f32[4])]', "line 4: expected the type of the given tensor"),
        ('Param("w", f32[3])]', 'Const("w", f32[3])]', "line 4: expected Param"),
        ('Param("w", f32[3])]', 'Const("w", f32[3], sha256="00")]', "line 4: expected the constant"),
        ("= Param", "= Params", "line 7: expected Input(...) or Param(...)"),
        (' = Param("w")', "", "line"),
        (
            "aten.add.Tensor",
            "aten.add.Tenser",
            "line 9: expected an operator <namespace>.<op>.<overload> that exists in",
        ),
        ("aten.add.Tensor", "aten.__class__.mro", "line 9: expected an operator"),
        ("aten.add.Tensor", "aten.add.__class__", "line 9: expected an operator"),
        ("aten.add.Tensor", "aten.add", "line 9: expected an operator"),
        ("aten.add.Tensor", "inductor.add.Tensor", "line 9: expected an operator"),
        ("aten.add.Tensor", "torch.ops.aten.add.Tensor", "line 9: expected an operator"),
        ("aten.add.Tensor", "aten.add_.Tensor", "line 9: expected an operator that does not write"),
        ("aten.add.Tensor(x, w)", "eval('1')", "line 9: expected a call of a function that stands above"),
        ("aten.add.Tensor(x, w)", "step(x, w)", "line 9: expected a call of a function that stands above"),
        ("aten.add.Tensor(x, w)", "x + w", "line 9: expected an operator, a call or an index, found `x + w`"),
        ("aten.add.Tensor(x, w)", "x[w]", "line 9"),
        ("aten.add.Tensor(x, w)", "x[0:1]", "line 9"),
        ("(x, w)", "(x)", "line 9: expected arguments that fit aten::add.Tensor(Tensor self, Tensor other"),
        ("(x, w)", "(x, w, 1)", "line 9: expected arguments that fit"),
        ("(x, w)", "(x, other=w, beta=1)", "line 9: expected arguments that fit"),
        ("(x, w)", "(x, w, self=x)", "line 9: expected arguments that fit"),
        ("(x, w)", "(x, w, **w)", "line 9: expected keyword arguments"),
        ("(x, w)", "(x, v0)", "line 9: expected a value that an earlier line defines, found `v0`"),
        ("(x, w)", "(x, [i for i in w])", "line 9: expected a literal"),
        ("(x, w)", "(x, lambda: 0)", "line 9: expected a literal"),
        ("(x, w)", "(x, f'{w}')", "line 9: expected a literal"),
        ("(x, w)", "(x, b'w')", "line 9: expected a literal"),
        ("(x, w)", "(x, open('w'))", "line 9: expected device(...) or slice(...) or complex(...)"),
        ("(x, w)", "(x, device('nowhere'))", "line 9: expected a literal"),
        ("v0: f32[2, 3] =", "v0 =", "line 9: expected `name: type = operator(...)`"),
        ("v0: f32[2, 3] =", "x: f32[2, 3] =", "line 9: expected a new name"),
        ("return (v0,)", "return (v1,)", "line 10: expected a value that an earlier line defines, found `v1`"),
        ("return (v0,)", "return v0", "line 10: expected a tuple of values"),
        ("return (v0,)", "return", "line 10: expected `return (...)`"),
        ("return (v0,)", 'return (v0,), {"a": v0, "a": v0}', "line 10: expected the slot 'a' to be written once"),
        ("return (v0,)", "return (v0,), {**v0}", "line 10"),
        ("def step(", "def step(*,", "line 5: expected plain parameters"),
        ("def step(", "@step\ndef step(", "expected plain parameters"),
        ("x: f32[2, 3] =", "x =", "line 6: expected a parameter with its type"),
    ],
)
def test_refusals(old, new, says):
    assert old in GOOD
    with pytest.raises(TextError) as caught:
        parse_program(GOOD.replace(old, new, 1), {"w": torch.zeros(3)})
    assert says in str(caught.value)
    assert str(caught.value).startswith("line ")
