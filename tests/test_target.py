"""Which backend: the user's word, else the device."""

from __future__ import annotations

import pytest
import torch

from ditopt import target
from ditopt.errors import BadInput, DitoptWarning

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def test_a_word_of_the_user_is_kept(no_compiler):
    assert target.resolve("eager", CUDA) == "eager"
    assert target.resolve("onnxruntime", CPU) == "onnxruntime"
    assert target.resolve("inductor", CUDA) == "inductor"


def test_auto_on_a_cpu_needs_a_compiler(monkeypatch, tmp_path):
    compiler = tmp_path / "my++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert target.resolve("auto", CPU) == "inductor"
    monkeypatch.setenv("CXX", str(tmp_path / "absent++"))
    with pytest.warns(DitoptWarning, match=r"running eager.*absent\+\+"):
        assert target.resolve("auto", CPU) == "eager"


def test_auto_elsewhere(no_compiler):
    assert target.resolve("auto", CUDA) == "inductor"
    with pytest.warns(DitoptWarning, match="'mps'"):
        assert target.resolve("auto", torch.device("mps")) == "eager"


def test_inductor_that_cannot_run_is_an_error(no_compiler):
    with pytest.raises(BadInput, match=r"no C\+\+ compiler was found .* or use target='eager'"):
        target.resolve("inductor", CPU)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("tritn", "there are: auto"),
        ("inductr", "did you mean 'inductor'"),
        ("triton", "not built yet"),
        ("openvino", "not built yet"),
    ],
)
def test_an_unknown_target_is_said(word, said):
    with pytest.raises(BadInput, match=said):
        target.resolve(word, CPU)
