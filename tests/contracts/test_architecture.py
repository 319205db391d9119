"""ARCHITECTURE.md and CONTRIBUTING.md name files, classes and invariants that are there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("vllm_parallel_think", "attention_kernels", "spec_decode", "tests", "deploy")
PAGES = ("ARCHITECTURE.md", "CONTRIBUTING.md")
EXAMPLES = {"utils.py", "vllm_parallel_think/profiles/NAME.toml"}
"""What there is not to be, and what somebody is to write."""
ASKED = ("a block header is written", "a path's budget", "a draft token is judged")
ASKED += ("a Hogwild step ends", "HTTP 400 is decided")


def in_code(text: str) -> Iterator[str]:
    """Yield what stands in backticks, outside blocks of code; braces are spelled out."""
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```$", "", text)):
        brace = re.fullmatch(r"(.*)\{([\w,]+)\}(.*)", code)
        if brace is None:
            yield code
        else:
            before, names, after = brace.groups()
            yield from (before + name + after for name in names.split(","))


@cache
def sources() -> dict[Path, str]:
    """Return all modules."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {path: path.read_text("utf-8") for path in files}


@cache
def definitions() -> set[str]:
    """Return the names of all classes and functions, methods also behind their class."""
    found = set()
    for source in sources().values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.add(node.name)
            if isinstance(node, ast.ClassDef):
                inner = [each for each in node.body if isinstance(each, ast.FunctionDef)]
                found |= {f"{node.name}.{each.name}" for each in inner}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_files_are_there(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    paths = [c for c in in_code(text) if re.fullmatch(r"[\w./]+(\.py|\.toml|\.md|/)", c)]
    assert len(paths) > 15
    folders = (ROOT, ROOT / "vllm_parallel_think")
    missing = {p for p in paths if not any((folder / p).exists() for folder in folders)}
    assert missing - EXAMPLES == set()


@pytest.mark.parametrize("page", PAGES)
def test_classes_are_there(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    vllms = {"Request", "SamplingParams", "SchedulerOutput", "EngineCoreOutput", "Scheduler"}
    vllms |= {"AsyncScheduler", "CommonAttentionMetadata", "AttentionCGSupport", "VllmConfig"}
    names = {c.partition("(")[0] for c in in_code(text)}
    ours = {n for n in names if re.fullmatch(r"[A-Z][a-z]+[A-Za-z]*(\.[a-z_]+)?", n)}
    ours = {n for n in ours if n.partition(".")[0] not in vllms and "_" not in n.partition(".")[0]}
    assert ours - definitions() - {"None"} == set()


def test_a_newcomer_finds_the_file() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    table = text.partition("\n## Where is it?\n")[2].partition("\n## ")[0]
    for question in ASKED:
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {question}")]
        assert re.search(r"`\w+/[\w/]+\.py`", row)


def test_tests_cite_invariants_that_are_written_down() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    written = set(re.findall(r"^- \*\*(INV-\d)\*\*", text, re.M))
    assert written == {f"INV-{number}" for number in range(1, 6)}
    cited = {name for s in sources().values() for name in re.findall(r"INV-\d", s)}
    assert cited <= written
