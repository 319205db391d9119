"""What pyproject.toml promises: version, commands, types, extras, an archive with its tests."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from spec_decode import __main__ as training
from tests.support.repository import ROOT
from vllm_parallel_think import __version__
from vllm_parallel_think.__main__ import main

PACKAGES = ("vllm_parallel_think", "attention_kernels", "spec_decode")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    """Return the parsed pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python of its own, from the repository's root."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_the_version_is_in_one_place(pyproject: dict[str, Any]) -> None:
    assert "version" not in pyproject["project"] and "version" in pyproject["project"]["dynamic"]
    source = ROOT / pyproject["tool"]["hatch"]["version"]["path"]
    assert re.findall(r'^__version__ = "(.+)"$', source.read_text("utf-8"), re.M) == [__version__]
    chart = (ROOT / "deploy" / "kubernetes" / "chart" / "Chart.yaml").read_text("utf-8")
    assert f'appVersion: "{__version__}"' in chart


def test_the_command_says_its_version(
    pyproject: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    module, _, function = pyproject["project"]["scripts"]["vllm-parallel-think"].partition(":")
    assert getattr(import_module(module), function) is main
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"vllm-parallel-think {__version__}\n"


def test_types_of_all_packages_are_seen(pyproject: dict[str, Any]) -> None:
    assert tuple(pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == PACKAGES
    assert all((ROOT / package / "py.typed").exists() for package in PACKAGES)


HELP = """
import runpy, sys
sys.argv = ["spec_decode", "--help"]
try:
    runpy.run_module("spec_decode", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
heavy = {"torch", "transformers", "numpy", "safetensors"} & set(sys.modules)
assert not heavy, f"imported for a help text: {heavy}"
"""


def test_help_of_training_imports_no_torch() -> None:
    done = python(HELP)
    assert done.returncode == 0, done.stderr
    for command in training.COMMANDS:
        assert re.search(rf"^ +{command} +\w", done.stdout, re.M), done.stdout


@pytest.mark.parametrize("missing", ["torch", "tqdm"])
def test_training_names_what_is_not_installed(missing: str) -> None:
    arguments = ["distill", "--model", "a", "--data", "b", "--out", "c"]
    done = python(
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"from spec_decode.__main__ import main; sys.exit(main({arguments}))"
    )
    assert done.returncode == 1
    assert re.match(rf"spec_decode: {missing} is missing; .*`train`", done.stderr), done.stderr


def imported(folder: Path) -> set[str]:
    """Return the packages that a folder's modules import, at their top or later."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found


def test_an_extra_has_what_training_imports(pyproject: dict[str, Any]) -> None:
    extras = pyproject["project"]["optional-dependencies"]
    names = {re.split(r"[<>=\[]", line)[0] for line in extras["train"]}
    assert names == training.EXTRA
    needed = imported(ROOT / "spec_decode") - sys.stdlib_module_names
    assert names <= needed
    on_demand = {"datasets"}  # the extra `hub`, asked for by name where it is missing
    assert needed <= names | on_demand


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_archive_can_be_tested(tmp_path: Path) -> None:
    """Every test is found in what the source archive holds."""
    pytest.importorskip("hatchling", reason="no hatchling: make test-slow")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = [each for each in tmp_path.iterdir() if each.is_dir()]
    named = ("README.md", "ARCHITECTURE.md", ".ci/run", "deploy/local/environment.py")
    for path in ("Makefile", "deploy/examples/curl.sh", *named):
        assert (folder / path).exists(), path
    collected = [collect(ROOT), collect(folder)]
    assert collected[0] == collected[1] > 1000


def collect(folder: Path) -> int:
    """Return how many tests a folder has; all of its modules can be imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return int(re.findall(r"^(\d+) tests collected", done.stdout, re.M)[0])
