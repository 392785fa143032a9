"""The registry of claims: every file is found by itself, and every kernel is somebody's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import fx

from ditopt._torch import masked_softmax
from ditopt.codegen import claims

FOLDER = Path(claims.__file__).parent


def test_all_files_are_found():
    entries = claims.registry()
    assert len(entries) >= 7
    assert {op.namespace for op in entries} == {"ditopt", "aten"}
    assert [op for op in entries if op.namespace == "aten"] == [masked_softmax]  # what everybody runs is not claimed


def test_every_kernel_of_the_folder_is_put_in_place_by_an_entry():
    kernels = {f.stem for f in (FOLDER.parent / "triton").glob("*.py") if not f.stem.startswith("_")}
    installed = {e.install.__module__.rpartition(".")[2] for e in claims.registry().values() if e.install}
    assert installed == kernels


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A second folder of the registry, empty."""
    monkeypatch.setattr(claims, "__path__", [*claims.__path__, str(tmp_path)])
    claims.registry.cache_clear()
    yield tmp_path
    claims.registry.cache_clear()
    for name in [n for n in sys.modules if n.startswith("ditopt.codegen.claims.new_")]:
        del sys.modules[name]


SQUARE = """
import torch
from ditopt.codegen.claims._entry import Entry
aten = torch.ops.aten
ENTRIES = (Entry(aten.square.default, lambda node, target: ("written out", "a product"),
                 lambda emit, node, target: emit(aten.mul.Tensor, node.args[0], node.args[0])),)
"""


def test_a_file_is_all_that_a_new_operator_needs(folder):
    (folder / "new_square.py").write_text(SQUARE)
    node = fx.Graph().call_function(torch.ops.aten.square.default)
    assert claims.claim(node, "inductor") == claims.Claim("square", "written out", "a product")


def test_two_files_of_one_operator_are_an_error(folder):
    for name in ("new_one", "new_other"):
        (folder / f"{name}.py").write_text(SQUARE)
    with pytest.raises(ValueError, match="another file does too"):
        claims.registry()
