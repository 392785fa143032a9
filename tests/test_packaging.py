"""What is installed is what is in the tree, and the static checks read all of it."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import ditopt

ROOT = Path(__file__).parents[1]
MAPPED = ("codegen", "passes", "runtime")
"""Top-level folders that import as ``ditopt.<name>``."""

TOP_LEVEL = {"pyproject.toml", "ditopt", *MAPPED, "tests", "examples", "README.md", "LICENSE", ".ci", ".gitignore"}
HEAVY = {"triton", "onnx", "onnxscript", "onnxruntime", "diffusers", "transformers", "sklearn"}


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources(root: Path = ROOT) -> dict[str, Path]:
    """Every Python file that is to be installed: its path in the wheel -> the file."""
    found = {}
    for folder in ("ditopt", *MAPPED):
        prefix = "" if folder == "ditopt" else "ditopt/"
        for base, below, files in os.walk(root / folder):  # does not follow the links
            below[:] = [d for d in below if d != "__pycache__"]
            for file in files:
                path = Path(base, file)
                if path.suffix == ".py":
                    found[prefix + path.relative_to(root).as_posix()] = path
    return found


def run(*command: str, cwd: Path, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """A command in a fresh process, its output wide and plain; it finds ditopt by installation or in ``cwd`` only."""
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"COLUMNS": "400", "NO_COLOR": "1"}
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=timeout)


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, *arguments, cwd=cwd)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the checkout that a test may break."""
    caches = ("__pycache__", ".*_cache", ".hypothesis")
    leave = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", *caches)
    return shutil.copytree(ROOT, tmp_path / "tree", symlinks=True, ignore=leave)


# --- the layout


def test_top_level_holds_the_fixed_folders_only() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to it")
    listing = run("git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard", cwd=ROOT)
    assert listing.returncode == 0, listing.stderr
    top = {Path(line).parts[0] for line in listing.stdout.splitlines()}
    assert top - TOP_LEVEL == set()
    assert TOP_LEVEL - top == set()


@pytest.mark.parametrize("name", MAPPED)
def test_static_tools_reach_the_folder_through_a_relative_link(name: str) -> None:
    link = ROOT / "ditopt" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


def test_every_package_is_listed() -> None:
    in_tree = {str(Path(name).parent).replace("/", ".") for name in sources() if name.endswith("/__init__.py")}
    folders = {str(Path(name).parent).replace("/", ".") for name in sources()}
    settings = pyproject()["tool"]["setuptools"]
    assert folders == in_tree, "a folder with Python files and without __init__.py"
    assert sorted(in_tree) == settings["packages"]
    assert settings["package-dir"] == {"ditopt": "ditopt", **{f"ditopt.{name}": name for name in MAPPED}}


@pytest.mark.parametrize("name", MAPPED)
def test_folder_refuses_to_be_a_package_of_its_own(name: str) -> None:
    result = python("-c", f"import {name}", cwd=ROOT)
    assert result.returncode == 1
    assert f"ImportError: import this package as ditopt.{name}" in result.stderr


def test_installed_package_imports_from_elsewhere(tmp_path: Path) -> None:
    folders = ", ".join(f"ditopt.{name}" for name in MAPPED)
    result = python("-c", f"import {folders}; print(ditopt.__version__)", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == pyproject()["project"]["version"]


@pytest.mark.parametrize("group", ["console_scripts", "torch_dynamo_backends"])
def test_entry_points_load(group: str) -> None:
    found = [e for e in entry_points(group=group) if e.value.startswith("ditopt.")]
    assert found, f"no entry point of ditopt in {group}"
    assert all(callable(entry.load()) for entry in found)


# --- what an import costs


def test_public_names_resolve() -> None:
    assert sorted(ditopt.__all__) == sorted({*ditopt._HOME, *ditopt._MODULES, "__version__"})
    for name in ditopt.__all__:
        assert getattr(ditopt, name) is not None
    assert set(ditopt.__all__) <= set(dir(ditopt))
    unknown = "nothing"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(ditopt, unknown)


def test_import_is_lazy_and_cheap(tmp_path: Path) -> None:
    code = """
import sys, time
import ditopt
assert "torch" not in sys.modules
for name in [n for n in sys.modules if n.partition(".")[0] == "ditopt"]:
    del sys.modules[name]
import torch
before, begin = set(sys.modules), time.perf_counter()
import ditopt
print(time.perf_counter() - begin, *sorted({m.partition(".")[0] for m in set(sys.modules) - before}))
"""
    result = python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    seconds, *loaded = result.stdout.split()
    assert float(seconds) < 0.5
    assert "ditopt" in loaded
    assert HEAVY.isdisjoint(loaded)


def test_facade_loads_no_optional_package(tmp_path: Path) -> None:
    code = f"""
import sys, torch
before = set(sys.modules)
import ditopt
ditopt.optimize, ditopt.Recipe, ditopt.measure, ditopt.zoo
loaded = {{m.partition(".")[0] for m in set(sys.modules) - before}}
assert "ditopt" in loaded
print(*sorted(loaded & {HEAVY!r}))
"""
    result = python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


# --- rules of the source that no linter knows


def private_torch_names(code: str) -> Iterator[str]:
    """Names below ``torch`` with a leading underscore that ``code`` imports or reaches; operators (torch.ops) are not
    modules and keep their names."""
    tree = ast.parse(code)
    torch_modules = {}  # local name -> the torch module it stands for

    def private(dotted: str) -> bool:
        parts = dotted.split(".")
        hidden = any(p.startswith("_") and not p.startswith("__") for p in parts)
        return parts[0] == "torch" and parts[1:2] != ["ops"] and hidden

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    torch_modules[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    if private(alias.name):
                        yield alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                torch_modules[alias.asname or alias.name] = name
                if private(name):
                    yield name
    for node in ast.walk(tree):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id in torch_modules:
            name = ".".join([torch_modules[inner.id], *reversed(parts)])
            if private(name):
                yield name


@pytest.mark.parametrize(
    "code",
    [
        "import torch._dynamo",
        "import torch._inductor.config as config",
        "from torch._guards import detect_fake_mode",
        "from torch import _guards",
        "from torch.fx import _pytree",
        "import torch\ntorch._dynamo.reset()",
        "from torch import fx as graphs\ngraphs._symbolic_trace",
    ],
)
def test_private_names_are_recognised(code: str) -> None:
    assert list(private_torch_names(code))


@pytest.mark.parametrize("code", ["torch.ops.aten._softmax.default", "torch.__version__", "model._parameters"])
def test_other_names_are_not(code: str) -> None:
    assert list(private_torch_names(f"import torch\n{code}")) == []


def test_only_one_file_imports_private_torch_names() -> None:
    files = {**sources(), **{f"examples/{p.name}": p for p in (ROOT / "examples").rglob("*.py")}}
    using = {name for name, path in files.items() if any(private_torch_names(path.read_text()))}
    assert using == {"ditopt/_torch.py"}


# --- the wheel


def test_wheel_holds_the_tree(tree: Path, tmp_path: Path) -> None:
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path))
    result = python("-m", "pip", "wheel", *options, str(tree), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        meta = {Path(n).name: n for n in archive.namelist() if ".dist-info/" in n}
        assert "LICENSE" in meta
        declared = configparser.ConfigParser()
        declared.read_string(archive.read(meta["entry_points.txt"]).decode())
        assert set(declared.sections()) == {"console_scripts", "torch_dynamo_backends"}
    assert {n for n in names if n.endswith(".py")} == set(sources(tree))
    models = [p.parent.name for p in (tree / "ditopt/zoo").glob("*/config.json")]
    recipes = [p.name for p in (tree / "ditopt/recipes").glob("*.toml")]
    assert models
    assert recipes
    data = {"ditopt/py.typed", *(f"ditopt/recipes/{name}" for name in recipes)}
    for model in models:
        weights = {p.name for p in (tree / "ditopt/zoo" / model).glob("*.safetensors")}
        assert weights >= {"model.safetensors", "classifier.safetensors"}
        data |= {f"ditopt/zoo/{model}/{f}" for f in ("config.json", *weights)}
    assert {n for n in names if not n.endswith(".py")} == data


# --- the static checks, each with an error planted where a wrong configuration would not look


def plant(tree: Path, folder: str, code: str) -> str:
    (tree / folder / "planted.py").write_text(f'"""Planted."""\n\n{code}\n')
    return f"{folder}/planted.py"


def test_type_checker_reads_every_file(tree: Path) -> None:
    folders = ("ditopt", "ditopt/ir", *MAPPED, "codegen/onnx", "examples", "tests")
    for folder in folders:
        plant(tree, folder, 'number: int = "planted"')
    result = python("-m", "mypy", "--cache-dir", str(tree / "cache"), cwd=tree)
    for folder in folders:
        seen = f"ditopt/{folder}" if folder.split("/")[0] in MAPPED else folder
        assert f"{seen}/planted.py:3: error: Incompatible types in assignment" in result.stdout, result.stderr
    files = len(sources(tree)) + sum(len(list((tree / folder).rglob("*.py"))) for folder in ("examples", "tests"))
    (checked,) = re.findall(r"checked (\d+) source files", result.stdout)
    assert int(checked) == files


def test_linter_bans_relative_imports_everywhere(tree: Path) -> None:
    folders = ("ditopt", *MAPPED, "codegen/onnx", "examples", "tests")
    planted = {plant(tree, folder, "from . import other\n\nprint(other)") for folder in folders}
    options = ("--no-cache", "--select", "TID252", "--output-format", "concise")
    result = python("-m", "ruff", "check", *options, cwd=tree)
    assert {line.split(":")[0] for line in result.stdout.splitlines() if "TID252" in line} == planted


@pytest.mark.parametrize(
    ("folder", "target"),
    [
        ("passes", "codegen"),
        ("passes", "runtime"),
        ("passes", "artifact"),
        ("codegen", "passes"),
        ("codegen", "runtime"),
        ("codegen/onnx", "pipeline"),
        ("runtime", "passes"),
        ("runtime", "codegen"),
        ("runtime", "ir.edit"),
        ("ditopt/ir", "passes"),
        ("ditopt/ops", "cli"),
    ],
)
def test_import_contracts_break(tree: Path, folder: str, target: str) -> None:
    plant(tree, folder, f"import ditopt.{target}")
    result = run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo", cwd=tree)
    importer = ".".join([*([] if folder.startswith("ditopt") else ["ditopt"]), *folder.split("/"), "planted"])
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{importer} -> ditopt.{target}" in result.stdout
