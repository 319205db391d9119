"""Figures of the three packages' structure, read off their syntax trees.

python -m tests.contracts.bars
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.support.repository import ROOT

PACKAGES = ("vllm_parallel_think", "attention_kernels", "spec_decode")
BANNER = re.compile(r"^\s*#\s*([-=#*~])\1+.*\1\1\s*$", re.M)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class File:
    """A file of a package.

    Attributes:
        name: Its path from the repository's root.
        text: What it holds.
        tree: Its syntax tree.

    """

    name: str
    text: str
    tree: ast.Module

    @property
    def num_lines(self) -> int:
        """Return the number of its lines."""
        return len(self.text.splitlines())

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        """Yield the nodes of some kinds, wherever they stand."""
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))


@cache
def files() -> tuple[File, ...]:
    """Return all files of the packages."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    texts = [path.read_text("utf-8") for path in paths]
    return tuple(
        File(str(path.relative_to(ROOT)), text, ast.parse(text))
        for path, text in zip(paths, texts, strict=True)
    )


def root_modules() -> list[str]:
    """Return the modules that lie loose in the plugin's folder."""
    return sorted(path.name for path in (ROOT / PACKAGES[0]).glob("*.py"))


def functions() -> dict[str, int]:
    """Return the lines of every function, by where it stands."""
    return {
        f"{file.name}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for file in files()
        for node in file.nodes(ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, Function)
    }


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    """Yield every class with where it stands."""
    for file in files():
        for node in file.nodes(ast.ClassDef):
            assert isinstance(node, ast.ClassDef)
            yield f"{file.name}:{node.lineno} {node.name}", node


def methods() -> dict[str, int]:
    """Return the number of each class's methods, properties included."""
    return {name: sum(isinstance(node, Function) for node in each.body) for name, each in classes()}


def untyped() -> list[str]:
    """Return functions without a return type, but for compiled code, which Numba types."""
    return [
        f"{file.name}:{node.lineno} {node.name}"
        for file in files()
        for node in file.nodes(ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, Function) and node.returns is None and not is_compiled(node, file)
    ]


def is_compiled(node: Function, file: File) -> bool:
    """Return whether a compiler types a function: Numba's or Triton's code, or a part of it."""
    used = "no-untyped-def" in "".join(file.text.splitlines()[:20])
    return used or any("jit" in ast.unparse(each) for each in node.decorator_list)


def public_definitions() -> dict[str, bool]:
    """Return whether each public function, class and method of a public class has a docstring.

    Overrides of vLLM's methods and of protocols count, too.
    """
    found: dict[str, bool] = {}

    def visit(body: Sequence[ast.stmt], where: str) -> None:
        for node in body:
            if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
                continue
            name = f"{where} {node.name}"
            found[f"{name}:{node.lineno}"] = ast.get_docstring(node) is not None
            if isinstance(node, ast.ClassDef):
                visit(node.body, name)

    for file in files():
        visit(file.tree.body, file.name)
    return found


def mixin_depths() -> dict[str, int]:
    """Return how many mixins stand above and in each mixin."""
    bases = {node.name: [ast.unparse(base) for base in node.bases] for _, node in classes()}

    def depth(name: str) -> int:
        above = max((depth(base) for base in bases.get(name, ())), default=0)
        return above + name.endswith("Mixin")

    return {name: depth(name) for name in bases if name.endswith("Mixin")}


def banners() -> list[str]:
    """Return comments that are drawn as lines, in the packages, tests and tools."""
    found = []
    for folder in (*PACKAGES, "tests", "deploy"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text("utf-8")
            found += [
                f"{path.relative_to(ROOT)}: {match[0].strip()}" for match in BANNER.finditer(text)
            ]
    return found


def catch_alls() -> list[Path]:
    """Return modules whose name says nothing."""
    folders = [*PACKAGES, "tests", "deploy"]
    names = ("utils.py", "util.py", "helpers.py", "common.py", "misc.py")
    return [path for each in folders for name in names for path in (ROOT / each).rglob(name)]


def quantile(values: Sequence[int], share: float) -> int:
    """Return the value below or at which a share of the values lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def share_of(values: Sequence[bool]) -> float:
    """Return the share of what is true."""
    return sum(values) / len(values)


def figures() -> dict[str, str]:
    """Return the figures in words."""
    lines, sizes = [file.num_lines for file in files()], list(functions().values())
    most = max(methods().items(), key=lambda item: item[1])
    longest = max(functions().items(), key=lambda item: item[1])
    return {
        "modules loose in the root": str(len(root_modules())),
        "files, lines": f"{len(lines)}, {sum(lines)}",
        "file median / p90 / max": f"{quantile(lines, 0.5)} / {quantile(lines, 0.9)} / "
        f"{max(lines)} ({max(files(), key=lambda file: file.num_lines).name})",
        "function median / p90 / max": f"{quantile(sizes, 0.5)} / {quantile(sizes, 0.9)} / "
        f"{longest[1]} ({longest[0]})",
        "methods of the largest class": f"{most[1]} ({most[0]})",
        "functions without a return type": str(len(untyped())),
        "public docstrings": f"{share_of(list(public_definitions().values())):.0%}",
        "mixins on one another": str(max(mixin_depths().values(), default=0)),
        "banner comments": str(len(banners())),
        "modules named utils": str(len(catch_alls())),
    }


if __name__ == "__main__":
    for label, figure in figures().items():
        print(f"{label:34} {figure}")
