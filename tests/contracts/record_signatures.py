"""Records the parameters of what this package overrides and patches in another vLLM release.

``python -m tests.contracts.record_signatures SITE_PACKAGES`` reads the folder of an unpacked wheel
(``pip download vllm==VERSION --no-deps``, then ``unzip``) and writes ``signatures.json``: names and
parameters only, read from the syntax trees, so that the release need not be installed.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.contracts.overrides import overrides
from vllm_parallel_think.compat.patches import PATCHES

RECORD = Path(__file__).with_name("signatures.json")


class Release:
    """The source of a vLLM release, unpacked somewhere."""

    def __init__(self, site_packages: Path) -> None:
        self._root = site_packages
        self._trees: dict[str, ast.Module | None] = {}

    @property
    def version(self) -> str:
        """Return the release's version, without the build's part."""
        text = (self._root / "vllm" / "_version.py").read_text("utf-8")
        found = re.search(r"version = ['\"](\d+\.\d+\.\d+)", text)
        assert found is not None
        return found[1]

    def parameters(self, path: str) -> str | None:
        """Return the parameters of a function by its dotted path, or ``None`` if it is gone."""
        module, names = self._split(path)
        function = self._find(module, names)
        return None if function is None else _text(function)

    def _split(self, path: str) -> tuple[str, list[str]]:
        """Return the longest part of a dotted path that is a module, and what is left."""
        parts = path.split(".")
        for length in range(len(parts) - 1, 0, -1):
            if self._tree(".".join(parts[:length])) is not None:
                return ".".join(parts[:length]), parts[length:]
        return "", parts

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            stem = self._root.joinpath(*module.split("."))
            files = (stem.with_suffix(".py"), stem / "__init__.py")
            file = next((file for file in files if file.is_file()), None)
            self._trees[module] = None if file is None else ast.parse(file.read_text("utf-8"))
        return self._trees[module]

    def _find(self, module: str, names: list[str]) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
        """Find a function; one that a class does not define is looked for in its bases."""
        tree = self._tree(module)
        if tree is None:
            return None
        head, *rest = names
        for node in _definitions(tree):
            if node.name != head:
                continue
            if isinstance(node, ast.ClassDef):
                return self._in_class(module, node, rest[0]) if len(rest) == 1 else None
            return None if rest else node
        origin = _imported(tree, module).get(head)
        return None if origin is None else self._find(*_joined(origin, rest))

    def _in_class(
        self, module: str, owner: ast.ClassDef, name: str
    ) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
        for node in owner.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                return node
        for base in owner.bases:
            plain = base.value if isinstance(base, ast.Subscript) else base
            found = self._find(module, [*ast.unparse(plain).split("."), name])
            if found is not None:
                return found
        return None


def _definitions(
    tree: ast.Module,
) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _imported(tree: ast.Module, module: str) -> dict[str, tuple[str, str]]:
    """Return where a module's imported names come from: module and name there."""
    found: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                source = ".".join([*module.split(".")[: -node.level], *filter(None, [source])])
            found.update((alias.asname or alias.name, (source, alias.name)) for alias in node.names)
    return found


def _joined(origin: tuple[str, str], rest: list[str]) -> tuple[str, list[str]]:
    module, name = origin
    return module, [name, *rest]


def _text(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return parameters in the form of ``parameters_of``."""
    found = function.args
    positional = [*found.posonlyargs, *found.args]
    required = len(positional) - len(found.defaults)
    parts = [a.arg if i < required else f"{a.arg}=" for i, a in enumerate(positional)]
    if found.vararg is not None:
        parts.append(f"*{found.vararg.arg}")
    elif found.kwonlyargs:
        parts.append("*")
    for argument, default in zip(found.kwonlyargs, found.kw_defaults, strict=True):
        parts.append(argument.arg if default is None else f"{argument.arg}=")
    if found.kwarg is not None:
        parts.append(f"**{found.kwarg.arg}")
    bound = bool(parts) and parts[0] in ("self", "cls")
    return ", ".join(parts[1:] if bound else parts)


def wanted() -> set[str]:
    """Return the paths of vLLM's functions that this package overrides or patches."""
    patched = {patch.target for patch in PATCHES if patch.parameters}
    return patched | {override.theirs for override in overrides()}


def main() -> int:
    """Write the record."""
    release = Release(Path(sys.argv[1]))
    parameters = {path: release.parameters(path) for path in sorted(wanted())}
    record = {"version": release.version, "parameters": parameters}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(f"{RECORD.name}: {len(parameters)} functions of vLLM {release.version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
