"""Who may import whom, read off the syntax trees: in functions, for types only, and by name.

A name in a string counts as an import, whether vLLM, an entry point or ``importlib`` loads it.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "vllm_parallel_think"
PACKAGES = (PLUGIN, "attention_kernels", "spec_decode")

LAYERS: dict[str, tuple[str, str]] = {
    # room: (the rooms it may import, the installed packages it may import)
    #
    # Three grounds, which know nothing of vLLM.
    "core": ("", ""),
    "core.config": ("core", ""),
    "core.fork_join": ("core core.config", ""),
    "core.hogwild": ("core core.config", ""),
    "core.trace": ("core core.config core.fork_join", ""),
    "attention_kernels": ("attention_kernels.provider", "torch numpy"),
    "attention_kernels.reference": ("attention_kernels attention_kernels.provider", "torch"),
    "attention_kernels.cpu": (
        "attention_kernels attention_kernels.provider",
        "torch numpy numba llvmlite",
    ),
    "attention_kernels.triton": ("attention_kernels attention_kernels.provider", "torch triton"),
    "attention_kernels.xformers": (
        "attention_kernels attention_kernels.provider",
        "torch xformers",
    ),
    # Loads an implementation by its name, once it is asked for.
    "attention_kernels.provider": (
        "attention_kernels attention_kernels.reference attention_kernels.cpu "
        "attention_kernels.triton attention_kernels.xformers",
        "torch",
    ),
    "spec_decode": ("", "torch numpy transformers safetensors"),
    "spec_decode.tasks": ("spec_decode", "datasets"),
    "spec_decode.training": (
        "spec_decode spec_decode.tasks",
        "torch numpy transformers safetensors tqdm",
    ),
    "spec_decode.__main__": ("spec_decode spec_decode.training", ""),
    # Services that every process shares.
    "__init__": ("", ""),
    "compat": ("core", "vllm torch packaging"),
    "tokenizer": ("core", "vllm"),
    "scheduler_output": ("core", "vllm"),
    "validation": ("core compat", "vllm"),
    "settings": ("core compat validation", "vllm"),
    "observability": (
        "core compat settings",
        "vllm prometheus_client opentelemetry fastapi",
    ),
    # Processes: the API server, the engine, its workers.
    "frontend": ("core compat observability settings", "vllm"),
    "scheduler": (
        "core compat scheduler_output observability settings tokenizer validation",
        "vllm numpy msgspec",
    ),
    "attention": (
        "attention_kernels scheduler_output core compat validation",
        "vllm torch numpy safetensors",
    ),
    "judge": (
        "spec_decode core compat settings tokenizer observability validation",
        "vllm torch",
    ),
    "worker": (
        "attention_kernels attention judge core compat scheduler_output settings validation",
        "vllm torch numpy",
    ),
    # Who starts it all.
    "configure": (
        "core compat validation settings observability frontend scheduler attention judge worker",
        "vllm packaging",
    ),
    "plugin": ("configure compat", "vllm"),
    "__main__": ("core compat tokenizer configure evaluation", "transformers"),
    # Room that is kept.
    "curation": ("core spec_decode", "torch transformers"),
    "training": ("core spec_decode attention_kernels", "torch transformers"),
    "evaluation": ("core spec_decode", "httpx math_verify matplotlib numpy tqdm datasets"),
}

NEVERS = [
    ("frontend", "scheduler"),
    ("frontend", "worker"),
    ("scheduler", "worker"),
    ("scheduler", "frontend"),
    ("scheduler", "attention"),
    ("worker", "scheduler"),
    ("worker", "frontend"),
    ("observability", "scheduler"),
    ("observability", "judge"),
    ("judge", "attention"),
    ("judge", "spec_decode.training"),
    ("core.fork_join", "core.hogwild"),
    ("core.hogwild", "core.fork_join"),
    ("attention_kernels", "core"),
    ("spec_decode", "core"),
    ("spec_decode", "spec_decode.training"),
]
"""A room, and another that it does not reach, by whichever way round."""

DOORS = {"plugin", "__main__", "observability"}
"""Rooms that entry points may name."""

PATH = re.compile(rf"({'|'.join(PACKAGES)})(\.\w+)+")


@cache
def modules() -> dict[str, Path]:
    """Return the files of our packages by dotted name; a package is its ``__init__``."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(name: str) -> str:
    """Return the room that a dotted name of ours is in: its longest prefix with a row."""
    parts = name.split(".")
    if parts[0] == PLUGIN:
        parts = parts[1:] or ["__init__"]
    for length in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:length])) in LAYERS:
            return prefix
    raise AssertionError(f"{name} is in no room: give {parts[0]} a row in LAYERS")


def module_of(name: str) -> str:
    """Return the module that a dotted name is, or is in."""
    while name not in modules() and "." in name:
        name = name.rpartition(".")[0]
    return name


def imports(source: str, module: str) -> Iterator[str]:
    """Yield every dotted name that a module imports or spells out."""
    path = modules().get(module)
    is_package = path is not None and path.name == "__init__.py"
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")
            base = base[: len(base) + 1 - node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{name}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant | ast.JoinedStr):
            text = spelled(node, package)
            if PATH.fullmatch(text):
                yield text


def spelled(node: ast.Constant | ast.JoinedStr, package: str) -> str:
    """Return a string, or what an f-string begins with."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    text = ""
    for part in node.values:
        if isinstance(part, ast.Constant):
            text += str(part.value)
        elif isinstance(part, ast.FormattedValue) and ast.unparse(part.value) == "__package__":
            text += package
        else:
            break
    return text.rstrip(".")


def allowed(own: str, target: str) -> bool:
    """Whether a room may import another one; whoever may enter a folder may enter its rooms."""
    rooms = LAYERS[own][0].split()
    top = target.partition(".")[0]
    if own.partition(".")[0] == top:
        return target in (own, *rooms)
    return target in rooms or top in rooms or target == "__init__"


def broken(source: str, module: str) -> set[tuple[str, str]]:
    """Return what a module imports and may not: the module, and a room or a package."""
    own, found = room(module), set()
    for name in imports(source, module):
        first = name.partition(".")[0]
        if first in PACKAGES:
            if not allowed(own, target := room(module_of(name))):
                found.add((module, target))
        elif first not in sys.stdlib_module_names and first not in LAYERS[own][1].split():
            found.add((module, first))
    return found


def test_modules_import_what_the_table_allows() -> None:
    found = {
        one for module, path in modules().items() for one in broken(path.read_text("utf-8"), module)
    }
    assert found == set()


def test_the_table_has_no_circle() -> None:
    above: dict[str, set[str]] = defaultdict(set)
    for name, (rooms, _) in LAYERS.items():
        top = name.partition(".")[0]
        above[top] |= {each.partition(".")[0] for each in rooms.split()} - {top}
    while above:
        ground = {name for name, needs in above.items() if not needs & set(above)}
        assert ground, f"a circle among {sorted(above)}"
        above = {name: needs for name, needs in above.items() if name not in ground}


@cache
def arrows() -> dict[str, set[str]]:
    """Return the rooms that each room imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, path in modules().items():
        for name in imports(path.read_text("utf-8"), module):
            if name.partition(".")[0] in PACKAGES:
                found[room(module)].add(room(module_of(name)))
    return found


@pytest.mark.parametrize(("start", "end"), NEVERS)
def test_never_by_whichever_way_round(start: str, end: str) -> None:
    assert {start, end} <= set(map(room, modules()))
    seen, reached = set(), {start}
    while reached:
        seen |= reached
        reached = {target for each in reached for target in arrows()[each]} - seen
    assert end not in seen


def test_names_in_strings_lead_somewhere() -> None:
    """vLLM and ``importlib`` would find out when somebody uses them."""
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and PATH.fullmatch(str(node.value)):
                assert_leads_somewhere(node.value)


def assert_leads_somewhere(name: str) -> None:
    """Check that a dotted name is a module, or something that a module defines or imports."""
    module = module_of(name)
    rest = name.removeprefix(module).lstrip(".")
    if rest:
        names = set()
        for node in ast.parse(modules()[module].read_text("utf-8")).body:
            names |= {each.asname or each.name for each in getattr(node, "names", ())}
            names.add(getattr(node, "name", ""))
        assert rest in names, f"{name}: {module} has no {rest}"


def test_entry_points_lead_through_the_doors() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = [project["scripts"], *project["entry-points"].values()]
    targets = [target for group in groups for target in group.values()]
    assert {room(target.partition(":")[0]) for target in targets} == DOORS
    for target in targets:
        assert_leads_somewhere(target.replace(":", "."))


@pytest.mark.parametrize(
    ("module", "source", "target"),
    [
        ("core.errors", "import torch", "torch"),
        ("core.errors", "def late():\n    from vllm import envs", "vllm"),
        ("core.hogwild.group", "from ..fork_join import group", "core.fork_join"),
        ("frontend.tokenwise", "from .. import scheduler", "scheduler"),
        ("observability.observer", "if TYPE_CHECKING:\n    from ..judge.verifier import Counts",
         "judge"),
        ("scheduler.gang", "import_module('vllm_parallel_think.worker.worker')", "worker"),
        ("scheduler.gang", "path = f'{__package__}.worker.{name}'", None),
        ("frontend.tokenwise", "f'vllm_parallel_think.scheduler.{name}'", "scheduler"),
        ("judge.install", "import attention_kernels.plan", "attention_kernels"),
        ("scheduler.gang", "from ..core.fork_join import group", None),
        ("core.errors", "from .. import __version__", None),
    ],
)  # fmt: skip
def test_what_counts_as_an_import(module: str, source: str, target: str | None) -> None:
    module = f"{PLUGIN}.{module}"
    assert broken(source, module) == ({(module, target)} if target else set())


def test_no_two_public_classes_share_a_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for module, path in modules().items():
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
