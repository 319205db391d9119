"""What the READMEs say of keys, reasons and files is complete, and the first one stays short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from tests.support.repository import ROOT
from vllm_parallel_think.core.config.request_options import REQUEST_KEYS
from vllm_parallel_think.core.config.server_options import ServerOptions
from vllm_parallel_think.core.summary import FallbackReason, Summary

README = ROOT / "README.md"
REFERENCE = ROOT / "vllm_parallel_think" / "README.md"
FOLDERS = ("vllm_parallel_think", "attention_kernels", "spec_decode", "deploy")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md"))),
]
MOST_WORDS = 800
WIDEST = 120


def section(path: Path, title: str) -> str:
    """Return the text below a heading, up to the next one."""
    return path.read_text("utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def keys(text: str) -> list[str]:
    """Return what stands in the first cells of tables, in code."""
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    return [key for row in rows for key in re.findall(r"`(\w+)`", row)]


def prose(text: str) -> Iterator[str]:
    """Yield the lines that are neither code, nor a table, nor a picture."""
    in_code = False
    for line in text.splitlines():
        if line.startswith("```"):
            in_code = not in_code
        elif not in_code and not line.startswith(("|", "![")):
            yield line


def test_the_first_page_is_short() -> None:
    text = README.read_text("utf-8")
    assert len(text.split()) <= MOST_WORDS
    assert [line for line in prose(text) if len(line) > WIDEST] == []


def test_the_first_page_says_what_was_not_run() -> None:
    top = README.read_text("utf-8").partition("## ")[0]
    assert "Nothing has run on a GPU." in top and "not on any package index" in top


def test_every_key_has_a_row() -> None:
    server = keys(section(REFERENCE, "Settings of the server"))
    assert sorted(server) == sorted(field.name for field in fields(ServerOptions))
    request = keys(section(REFERENCE, "Settings of a request"))
    assert sorted(request) == sorted(set(REQUEST_KEYS))


def test_every_reason_has_a_row() -> None:
    reasons = {*FallbackReason} - {FallbackReason.OUT_OF_STEP}  # a fault, and about no fork
    assert set(keys(section(REFERENCE, "Forks that were not made"))) == reasons


def test_every_field_of_the_summary_has_a_row() -> None:
    found = {field.name for field in fields(Summary)} | {"parallelism_ratio"}
    assert set(keys(section(REFERENCE, "The summary"))) == found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
