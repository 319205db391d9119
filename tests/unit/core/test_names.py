"""Reading names costs what is new of a text, however long the text has become."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.support.samples import VISIBLE
from tests.support.vocabularies import Pieces
from vllm_parallel_think.core.branch_graph import PathName
from vllm_parallel_think.core.config.loading import load_profile
from vllm_parallel_think.core.config.profile import Profile
from vllm_parallel_think.core.fork_join.names import NAME_SPAN, READ_EVERY, NameReader
from vllm_parallel_think.core.fork_join.tag_scanner import ForkSeen, Grammar

LINE = "12) and so on, as was said\n"


class CountingPattern:
    """A regular expression that counts the characters it is shown."""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern)
        self.groups = self._pattern.groups
        self.num_shown = self.longest = 0

    def finditer(self, text: str, pos: int, end: int) -> Iterator[re.Match[str]]:
        self.num_shown += max(0, end - pos)
        self.longest = max(self.longest, len(text))
        return self._pattern.finditer(text, pos, end)


def profile(name: str) -> Profile:
    loaded = load_profile(name)
    assert isinstance(loaded, Profile)
    return loaded


def reader(pattern: str, most: int = 8) -> tuple[NameReader, CountingPattern]:
    counting = CountingPattern(pattern)
    made = NameReader(counting, most)  # type: ignore[arg-type]
    made.start("")
    return made, counting


def test_a_million_characters_line_by_line_are_shown_a_few_times_each():
    names, counting = reader(str(profile(VISIBLE).fork.names))
    num_lines = 1_000_000 // len(LINE)
    for _ in range(num_lines):
        names.feed(LINE)
        assert names.read(whole_lines=True) == (PathName("12", "and so on, as was said"),)
    assert counting.num_shown <= num_lines * (len(LINE) + NAME_SPAN)
    assert counting.longest <= len(LINE) + 2 * NAME_SPAN


@pytest.mark.parametrize("piece", ["<Outline>\n", " ", "1.", "\n", "x"])
def test_a_million_characters_without_a_reading_are_searched_in_short_texts(piece):
    """A slow expression of the operator's sees no more than that at once."""
    names, counting = reader(str(profile("multiverse").fork.names))
    for _ in range(1_000_000 // len(piece)):
        names.feed(piece)
    names.read()
    assert counting.num_shown <= 1_200_000
    assert counting.longest <= READ_EVERY + 2 * NAME_SPAN + len(piece)


def test_names_beyond_the_most_are_counted_once_and_read_no_more():
    names, counting = reader(r"\[(\d+)\]", most=3)
    for number in range(10_000):
        names.feed(f"[{number}]\n")
    assert [path.name for path in names.read()] == ["0", "1", "2", "3"]
    assert counting.num_shown <= 2 * READ_EVERY


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_reading_in_parts_finds_what_reading_at_once_finds(size):
    text = "".join(f"{n % 13}. Title {n}: more\n\nplain line {n}.\n" for n in range(600))
    pattern = str(profile(VISIBLE).fork.names)
    whole, _ = reader(pattern, most=1000)
    whole.feed(text)
    parts, _ = reader(pattern, most=1000)
    for start in range(0, len(text), size):
        parts.feed(text[start : start + size])
        if "\n" in text[start : start + size]:
            parts.read(whole_lines=True)
    assert parts.read() == whole.read() and len(whole.read()) == 13


def test_a_name_may_be_begun_in_a_line_that_was_read_before():
    names, _ = reader(r"Point\s+(\d+)\s*:")
    for part in ("Point\n", "\n", "1\n", ": a\nPoint 2", ": b\n"):
        names.feed(part)
        names.read(whole_lines=True)
    assert [path.name for path in names.read()] == ["1", "2"]


def test_a_title_grows_until_its_line_is_complete():
    names, _ = reader(str(profile(VISIBLE).fork.names))
    names.feed("1. Half")
    assert names.read() == (PathName("1", "Half"),)
    names.feed(" a loaf\n1. Other\n")
    assert names.read() == (PathName("1", "Half a loaf"),)


def test_line_starts_are_those_of_the_text_not_of_what_is_kept_of_it():
    names, _ = reader(r"^(\d)\.")
    for _ in range(3 * READ_EVERY):
        names.feed("1.")
    assert [path.name for path in names.read()] == ["1"]
    inner, _ = reader(r"^(\d)\.")
    inner.feed("x")
    for _ in range(3 * READ_EVERY):
        inner.feed("1.")
    assert inner.read() == ()


TOKENS: dict[str, tuple[str, list[str], Callable[[int], int]]] = {
    "skeleton, line breaks": (VISIBLE, [")\n"], lambda i: 0),
    "skeleton, one name again and again": (VISIBLE, ["1. a\n"], lambda i: 0),
    "skeleton, blank lines": (VISIBLE, ["x\n\n"], lambda i: 0),
    "multiverse, an outline without end": (
        "multiverse",
        ["<Parallel>", "<Goal>", "<Outline>1: p"],
        lambda i: min(i, 2),
    ),
    "multiverse, a name without end": (
        "multiverse",
        ["<Goal>", "<Outline>1", ".1"],
        lambda i: min(i, 2),
    ),
}


@pytest.mark.parametrize("case", TOKENS)
def test_time_of_a_token_does_not_grow_with_the_text(case):
    name, pieces, token = TOKENS[case]
    vocabulary = Pieces("|".join(sorted(map(re.escape, pieces), key=len, reverse=True)))
    vocabulary.encode("".join(pieces))

    def seconds(num_tokens: int) -> float:
        scanner = Grammar(profile(name), vocabulary).scanner(in_path=False, max_names=8)
        start = time.process_time()
        for index in range(num_tokens):
            scanner.feed(token(index))
        return time.process_time() - start

    seconds(500)
    assert seconds(32_000) < 4 * 3 * min(seconds(8_000) for _ in range(2)) + 0.05


def test_a_scanner_that_may_not_fork_keeps_no_text():
    scanner = Grammar(profile("multiverse"), Pieces("<Goal>|.")).scanner(
        in_path=True, max_names=8, forks=False
    )
    vocabulary = scanner._grammar.vocabulary
    for token in vocabulary.encode("<Goal>" + "x" * 10_000):
        assert scanner.feed(token) is None
    assert len(scanner._text) <= 2 * len("</Path>")


def test_an_outline_with_too_many_names_is_seen_to_be_too_long():
    rule = replace(profile("npr"), max_depth=1)
    vocabulary = Pieces(r"</?\w+>|.")
    scanner = Grammar(rule, vocabulary).scanner(in_path=False, max_names=4)
    plans = "".join(f"<plan>{n}: x</plan>" for n in range(50))
    seen = [scanner.feed(t) for t in vocabulary.encode(f"<guideline>{plans}</guideline>")]
    (event,) = [event for event in seen if event is not None]
    assert isinstance(event, ForkSeen) and len(event.names) == 5
