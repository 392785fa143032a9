from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ditopt import cli, demo, zoo
from ditopt.errors import BadInput, DitoptWarning
from ditopt.measure import Comparison, Row

ROOT = Path(__file__).parent.parent
TINY = "tests.tiny_sampler:made"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    said = capsys.readouterr()
    return code, said.out, said.err


def shell(*argv: str, **more) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment, **more)


# -- errors are one line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "required: command"),
        (["bogus"], "invalid choice: 'bogus'"),
        (["recipes", "taylorser"], "did you mean 'taylorseer'?"),
        (["demo", "--steps", "0"], "expected a whole number from 1 on"),
        (["demo", "--out", "no/such/folder/r.html"], "does not exist; make it first"),
        (["demo", "--model", "digit", "--out", os.devnull], "did you mean 'digits'?"),
        (["explain", "digit"], "did you mean 'digits'?"),
        (["explain", "no.such.module:f"], "cannot be loaded"),
        (["explain", "tests.tiny_sampler:nothing"], "cannot be loaded"),
        (["explain", "tests.tiny_sampler:example"], "returned dict; expected (an nn.Module"),
        (["show", TINY, "--recipe", "forra"], "did you mean 'fora'?"),
        (["show", TINY, "--recipe", "fora{interval=}"], "expected a value for interval"),
        (
            ["show", TINY, "--after", "hoist"],
            "this recipe runs no pass 'hoist'; there are: canonicalize, outline_blocks, hoist_invariants",
        ),
        (["show", TINY, "--target", "tpu"], "no target is called 'tpu'"),
        (["diff", TINY, "--pass", "cache"], "this recipe runs no pass 'cache'"),
        (["export", TINY, "x.onnx", "--timesteps", "1,b"], "expected numbers"),
        (["export", TINY, "x.onnx", "--recipe", "fora"], "pass steps="),
        (["bench", "--recipes", "lossles"], "did you mean 'lossless'?"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(capsys, argv, said):
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert err.startswith("ditopt: error: ")
    assert err.count("\n") == 1
    assert said in err


def test_debug_shows_the_traceback():
    with pytest.raises(BadInput):
        cli.main(["recipes", "nothing", "--debug"])


def test_an_unexpected_error_is_one_line_too(capsys, monkeypatch):
    def broken(args):
        raise KeyError("x")

    monkeypatch.setattr(cli, "_recipes", broken)
    code, _, err = run(capsys, "recipes")
    assert (code, err.count("\n")) == (2, 1)
    assert "KeyError" in err
    assert "--debug" in err


def test_an_interrupt_is_quiet(capsys, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_recipes", interrupt)
    assert run(capsys, "recipes") == (130, "", "")


def test_a_warning_is_one_line(capsys, monkeypatch):
    def warn(args):
        import warnings

        warnings.warn("first\nsecond", DitoptWarning, stacklevel=1)

    monkeypatch.setattr(cli, "_recipes", warn)
    assert run(capsys, "recipes") == (0, "", "ditopt: warning: first second\n")


# -- from a shell ------------------------------------------------------------------------------------------------------


def test_help_and_recipes_import_neither_torch_nor_diffusers():
    code = (
        "import sys; from ditopt.cli import main; assert main(['recipes']) == main(['--help']) == 0; "
        "sys.exit(bool({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    done = shell(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "taylorseer" in done.stdout
    assert "examples:" in done.stdout


def test_module_form_and_exit_code():
    done = shell(sys.executable, "-m", "ditopt", "recipes", "nothing")
    assert done.returncode == 2
    assert done.stderr.startswith("ditopt: error: no recipe is called 'nothing'")
    assert "Traceback" not in done.stderr
    done = shell(sys.executable, "-m", "ditopt", "--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "ditopt")


def test_a_closed_pipe_is_no_error():
    command = f"'{sys.executable}' -m ditopt recipes taylorseer | true; exit ${{PIPESTATUS[0]}}"
    done = shell("bash", "-c", command)
    assert done.returncode == 0
    assert done.stderr == ""


# -- commands ----------------------------------------------------------------------------------------------------------


def test_recipes_lists_and_describes(capsys):
    code, out, _ = run(capsys, "recipes")
    assert code == 0
    listed = {line.split()[0]: line for line in out.splitlines()}
    assert list(listed) == sorted(listed)
    assert {"dbcache", "fora", "forecast", "lossless", "taylorseer"} < set(listed)
    assert listed["magcache"].endswith("[threshold=0.06, max_skip_steps=3, retention_ratio=0.2; fitted to a model]")
    assert "fitted" not in listed["fora"]
    code, out, _ = run(capsys, "recipes", "taylorseer")
    assert code == 0
    for expected in ("arXiv 2503.06923", "interval=3", "order=3", "cache_interval", "basis=taylor", "newton"):
        assert expected in out


def test_explain_runs_a_step_for_its_kernels(capsys):
    code, out, _ = run(capsys, "explain", TINY, "--recipe", "w8a8", "--kernels")
    assert code == 0
    assert "integer kernels: 100.0% of the" in out
    assert "integer kernels on eager: 100.0% of the" in out.splitlines()[-1]


def test_explain(capsys):
    code, out, err = run(capsys, "explain", TINY, "--recipe", "fora")
    assert (code, err) == (0, "")
    assert "3 blocks" in out
    assert "never sees the latent" in out
    assert "reuse  " in out


def test_show_stops_where_asked(capsys):
    _, captured, _ = run(capsys, "show", TINY, "--after", "capture")
    _, outlined, _ = run(capsys, "show", TINY, "--after", "outline_blocks")
    _, final, _ = run(capsys, "show", TINY)
    assert captured.startswith("# ditopt program")
    assert "def block0(" not in captured
    assert "def block0(" in outlined
    assert "memos = [" not in outlined
    assert "memos = [" in final


def test_diff_of_one_pass(capsys):
    code, out, _ = run(capsys, "diff", TINY, "--recipe", "fora{interval=2}", "--pass", "cache")
    assert code == 0
    assert out.startswith("cache{region=blocks.*.attn|blocks.*.mlp,every=2}: applied 6")
    assert "+state = [" in out
    assert "hoist_invariants: applied" not in out


def test_export_writes_what_it_lists(capsys, tmp_path):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "tiny.onnx"
    code, said, _ = run(capsys, "export", TINY, str(out), "--recipe", "fora{interval=2}", "--steps", "4")
    assert code == 0
    files = [line.partition(":")[0] for line in said.splitlines()]
    assert len(files) >= 3
    for name in files:
        assert (tmp_path / name).is_file()
    assert "(6 of them state)" in said


@pytest.mark.parametrize("name", zoo.names())
def test_a_shipped_model_is_called_as_its_pipeline_calls_it(name):
    pytest.importorskip("diffusers")
    model, kwargs, times = cli._load(name)
    assert times is not None
    assert len(times(7)) == 7
    assert times(7)[0] > times(7)[-1] > 0
    assert kwargs["hidden_states"].shape[0] in (1, 2), "one prompt; guidance may double it"
    given, made = kwargs["hidden_states"].shape, model(**kwargs)[0].shape
    differ = [(a, b) for a, b in zip(made, given, strict=True) if a != b]
    assert len(differ) <= 1, "only the number of channels may differ"
    assert all(a < b for a, b in differ), "it may read more channels than it predicts"


# -- demo and bench: everything but the sampling -----------------------------------------------------------------------


def test_every_target_is_in_the_demo():
    from ditopt.recipe import available

    assert {"lossless", "fora", "taylorseer"} < {r for r, t in demo.DEMO if t == "eager"} <= set(available())
    assert {t for _, t in demo.DEMO} == {"eager", "inductor", "onnxruntime"}


def test_what_cannot_run_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    wanted, why = demo.runnable(demo.DEMO)
    assert {t for _, t in wanted} == {"eager"}
    assert len(why) == 2
    assert "no C++ compiler" in why[0]
    assert "pip install 'ditopt[cpu]'" in why[1]


@pytest.fixture
def sampled(monkeypatch) -> list[dict[str, Any]]:
    """Replaces the measuring; the calls it got."""
    calls: list[dict[str, Any]] = []

    def bench(model, wanted, **named):
        calls.append({"wanted": wanted, **named})
        row = Row("plain", "plain", "eager", named["steps"], 1.0, 1.0, 0.5, 1.0, float("inf"), float("inf"))
        return Comparison((row,), {}, {}, 1)

    monkeypatch.setattr(demo, "bench", bench)
    return calls


def test_bench_writes_csv(capsys, tmp_path, sampled):
    pytest.importorskip("diffusers")
    out = tmp_path / "b.csv"
    argv = [
        "bench",
        "--recipes",
        "fora",
        "lossless",
        "--targets",
        "eager",
        "--steps",
        "8",
        "--fewer",
        "4",
        "--out",
        str(out),
    ]
    code, said, err = run(capsys, *argv)
    assert (code, said) == (0, "")
    assert "plain" in err
    (line,) = csv.DictReader(out.read_text().splitlines())
    assert (line["model"], line["full_steps"], line["name"]) == ("digits", "8", "plain")
    assert sampled[0]["wanted"] == [("fora", "eager"), ("lossless", "eager")]
    assert sampled[0]["fewer"] == [4]


@pytest.mark.parametrize("name", zoo.names())
def test_demo_samples_a_shipped_model(capsys, tmp_path, name):
    """The real thing at four steps and few samples: no compiler, no fidelity worth reading."""
    pytest.importorskip("diffusers")
    out = tmp_path / "r.html"
    code, said, err = run(capsys, "demo", "--model", name, "--quick", "--steps", "4", "--out", str(out))
    assert code == 0, err
    assert f"M parameters; 1 x {zoo.package(name).REQUEST // 2} samples, 4 steps" in said
    lines = {line.split()[0]: line for line in said.splitlines() if line[:1].isalpha()}
    assert {"plain", "fewer", "lossless", "forecast"} <= set(lines)
    assert lines["lossless"].count(" inf ") == 2, "lossless on eager is bit-equal"
    assert out.stat().st_size > 20_000
