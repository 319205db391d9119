"""What the exam imports, and when."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vllm_parallel_think.evaluation import command

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "vllm_parallel_think" / "evaluation"

EVERYTHING = """
import importlib, pkgutil, sys
import vllm_parallel_think.evaluation as package
for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f"{package.__name__}.{module.name}")
found = {"vllm", "torch", "transformers", "numba"} & set(sys.modules)
assert not found, found
"""
OTHERS = """
import sys
from vllm_parallel_think.__main__ import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
found = {extra} & set(sys.modules)
assert not found, found
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python of its own."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_no_module_imports_vllm() -> None:
    done = python(EVERYTHING)
    assert done.returncode == 0, done.stderr


def test_other_commands_need_nothing_of_it() -> None:
    done = python(OTHERS.format(extra=set(command.EXTRA)))
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^ +{name} ", done.stdout, re.M) for name in command.COMMANDS)


@pytest.mark.parametrize("missing", ["matplotlib", "numpy", "httpx", "tqdm", "math_verify"])
def test_a_missing_package_is_named(missing: str, tmp_path: Path) -> None:
    ask = ["evaluate", "--base-url", "u", "--sets", "orders", "--methods", "chain"]
    words = {
        "httpx": [*ask, "--budgets", "9", "--out", str(tmp_path)],
        "math_verify": [*ask, "--budgets", "9", "--out", str(tmp_path)],
        "tqdm": [*ask, "--budgets", "9", "--out", str(tmp_path)],
    }.get(missing, ["report", str(tmp_path)])
    done = python(
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"from vllm_parallel_think.__main__ import main; sys.exit(main({words}))"
    )
    assert done.returncode == 1, done.stderr
    name = missing.replace("_", "-")
    assert re.match(rf"{name} is missing; it is in the extra `eval`", done.stderr), done.stderr


def imported() -> set[str]:
    """Return the packages that the exam imports, at a module's top or later."""
    found = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"spec_decode"}


def test_the_extra_has_what_is_imported() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = extras["optional-dependencies"]
    names = {re.split(r"[<>=\[]", line)[0].replace("-", "_") for line in extras["eval"]}
    assert names == command.EXTRA
    on_demand = {"datasets"}  # the extra `hub`, asked for by name where it is missing
    assert imported() == names | on_demand
