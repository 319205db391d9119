"""How tests lie: helpers stand in tests/support, and no test leans on another one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.repository import ROOT

TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("*.py"))
CONFTESTS = [path for path in FILES if path.name == "conftest.py"]


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every module that a file imports, and every name it imports out of one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def scripts(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the trees of programs that a file holds as text and runs elsewhere."""
    for node in ast.walk(tree):
        text = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and "import" in text:
            with suppress(SyntaxError, ValueError):
                yield ast.parse(text)


def is_wrong(name: str) -> bool:
    """Return whether a name belongs to a test or to fixtures, or depends on who imports it."""
    parts = name.split(".")
    tests = [part for part in parts if part.startswith("test_") or part == "conftest"]
    return not parts[0] or (parts[0] == "tests" and bool(tests))


def wrong_imports(source: str) -> list[str]:
    """Return what a file, or a program inside it, imports from tests, conftest or relatively."""
    tree = ast.parse(source)
    found = [name for name in imports(tree) if is_wrong(name)]
    # A program that is run elsewhere has no package: what is relative in a text is an example.
    told = [name for each in scripts(tree) for name in imports(each)]
    return found + [name for name in told if name[0] != "." and is_wrong(name)]


def test_no_test_imports_a_test() -> None:
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in FILES
        if path != Path(__file__).resolve() and (wrong := wrong_imports(path.read_text("utf-8")))
    }
    assert not found, f"what two tests need stands in tests/support: {found}"


@pytest.mark.parametrize(
    ("source", "num_wrong"),
    [
        ("from tests.support.tiny import IdGrammar", 0),
        ("from tests.engine.test_oracle import prompts", 2),
        ("from tests.serve import conftest", 1),
        ("def run():\n    from tests.contracts import test_tests", 1),
        ("from .support import tiny", 2),
        ("CODE = '''\nfrom tests.engine.test_oracle import prompts\n'''", 2),
    ],
)
def test_wrong_imports_are_found(source: str, num_wrong: int) -> None:
    assert len(wrong_imports(source)) == num_wrong


def is_for_pytest(node: ast.stmt) -> bool:
    """Return whether a statement is a fixture, a hook, an import, a docstring or a call."""
    if isinstance(node, ast.FunctionDef):
        decorators = {ast.unparse(each).partition("(")[0] for each in node.decorator_list}
        return node.name.startswith("pytest_") or "pytest.fixture" in decorators
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or ast.unparse(node).startswith("pytest.")
    return isinstance(node, (ast.Import, ast.ImportFrom))


@pytest.mark.parametrize("path", CONFTESTS, ids=lambda path: path.parent.name)
def test_conftest_holds_fixtures_and_hooks_only(path: Path) -> None:
    others = [node for node in ast.parse(path.read_text("utf-8")).body if not is_for_pytest(node)]
    assert not others, [ast.unparse(node).splitlines()[0] for node in others]
