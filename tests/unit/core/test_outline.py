"""Answers whose outline the client does not see: where lists begin, their titles, their points."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.player import EOS, Player
from tests.support.vocabularies import ALL, Pieces, chars, tags
from vllm_parallel_think.core.branch_graph import Kind
from vllm_parallel_think.core.config.loading import load_profile, parse_profile
from vllm_parallel_think.core.errors import OptionError
from vllm_parallel_think.core.interface import Finish
from vllm_parallel_think.core.trace import GrammarError, trace

LIST = {
    "0.0": "Try this:\n\n",
    "0.1": "1. **Eat well**: much",
    "0.2": " Sleep - long",
    "0.3": "Enough.",
    "0.4/0.0": " Fruit.\n\n2. **Sleep**",
    "0.4/1.0": " Long.\n\nMore",
    "0.5": " do it.\n\nMore",
}
"""Two titles, whatever stands behind them, and their points."""
TEXT = "1. **Eat well**: Fruit.\n\n2. **Sleep**: Long.\n\nIn short, do it.\n\n"


def merged() -> Pieces:
    """Line breaks in pairs, and one token of a sentence's end and a blank line."""
    return Pieces(r"[.:]?\n\n|\n| ?\w+|.")


def drafted(first: str, *others: str, **options: Any) -> Player:
    """Play an answer in which these items are what the model writes in the draft."""
    scripts: dict[str, Any] = {"0.0": "So:\n\n", "0.1": first}
    scripts |= {f"0.{number + 2}": text for number, text in enumerate(others)}
    return Player("skeleton", scripts, vocabulary=merged(), **options).run()


def titles(player: Player) -> list[str]:
    return [n.lane.title for n in player.group.nodes if n.kind is Kind.PATH]


@pytest.mark.parametrize("num_chunk", [1, 3, 50])
def test_list_is_written_by_paths_behind_a_draft_nobody_sees(num_chunk):
    player = Player("skeleton", LIST, vocabulary=merged(), num_chunk=num_chunk).run()
    assert player.text == "Try this:\n\n" + TEXT
    assert player.finish == Finish("stop")
    summary = player.summary
    assert (summary["forks"], summary["paths"], summary["cut_paths"]) == (1, 2, 0)
    kinds = [node.kind.value for node in player.group.nodes]
    assert kinds == ["trunk", *["outline"] * 3, "close", "path", "path", "conclusion"]
    drafts = [node for node in player.group.nodes if node.kind is Kind.OUTLINE]
    assert all(draft.retired and draft.num_visible == 0 for draft in drafts)
    given = [player.vocabulary.text(draft.tokens[: draft.num_given]) for draft in drafts]
    assert given == [":\n\n", ":\n\n1. Eat well\n2.", ":\n\n1. Eat well\n2. Sleep\n"]
    sampled = sum(n.num_sampled for n in player.group.nodes)
    assert summary["generated_tokens"] == sampled, "the draft is paid for"


@pytest.mark.parametrize("vocabulary", ALL)
def test_points_do_not_depend_on_the_split(vocabulary):
    player = Player("skeleton", LIST, vocabulary=vocabulary()).run()
    assert player.text == "Try this:\n" + TEXT


def test_paths_see_the_text_in_front_of_the_list_and_no_draft_INV2():
    player = Player("skeleton", LIST, vocabulary=merged()).run()
    trunk, close = player.node("0.0"), player.node("0.4")
    for path in (player.node("0.4/0.0"), player.node("0.4/1.0")):
        assert path.prefix == (trunk, close)
        assert path.start == close.end == trunk.end + 1
    conclusion = player.node("0.5")
    assert not any(node.kind is Kind.OUTLINE for node in conclusion.prefix)


PLAIN = {
    "no list": "Hello! How are you?",
    "one paragraph behind the other": "A b.\n\nC d.\n\nE f.",
    "code": "Here:\n\n```py\na = 1\n\n\nb = 2\n```\n\nIt works:\n\n1. **A**: b\n\n2. **C**: d",
    "json": 'Sure:\n\n{\n "a": 1\n}',
    "sum": "We add:\n\n12 + 3 = 15\n\nSo 15.",
    "steps of a sum": "We add:\n\n1. 12 - 5 = 7: seven\n2. 7 + 9 = 16: sixteen\n",
    "line that begins with a number": "It was:\n\n17 is prime.\n\n3.5 is not.",
    "one item": "This:\n\n1. **Rest**: enough",
}


@pytest.mark.parametrize("text", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("vocabulary", [*ALL, merged])
def test_answer_without_a_list_is_what_the_model_writes(text, vocabulary):
    vocabulary = vocabulary()
    tokens = vocabulary.encode(text)
    player = Plain("skeleton", {}, vocabulary=vocabulary, answer=tokens).run()
    assert player.text == text
    assert player.finish == Finish("stop")
    assert player.summary["forks"] == 0 and player.visible[-1] == EOS
    assert not player.group.has_paths
    if "\n" not in text:
        assert not player.group.branched, "it costs nothing"


class Plain(Player):
    """Samples one answer wherever the trunk stands in it; a draft goes on the same way."""

    def __init__(self, *args: Any, answer: list[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._answer = answer

    def _next_token(self, node: Any) -> int:
        seen = [t for n in (*node.prefix, node) for t in n.tokens[n.num_hidden :]]
        if seen != self._answer[: len(seen)]:  # an item that was written for the model
            return EOS
        return self._answer[len(seen)] if len(seen) < len(self._answer) else EOS


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (("1. A: x", " B\n", "3. C. d", "Done"), ["A", "B", "C"]),
        (("- A: x", " **B**: y", "3. **C:** d", "4. c"), ["A", "B", "C"]),
        (("### A\n", " B\n", "### 3. C\n", "4. a  B"), ["A", "B", "C", "a  B"]),
        (("1. **Спать**: x", " Есть: y", "3. Есть: z"), ["Спать", "Есть"]),
        (("1. 睡眠：x", "饮食。y", "3. 运动：z", ""), ["睡眠", "饮食", "运动"]),
        (("1. Use `EXPLAIN`: x", " Node.js - y", "3. 7 hours: z", ""), None),
        (("1. A: x", " **A**: y"), []),
        (("1. A: x", " a.\n"), []),
        (("2. A: x",), []),
        (("1. A: x", [" B", EOS]), ["A", "B"]),
        (("1. " + "word " * 40,), []),
    ],
)
def test_titles_are_headings_without_marks_each_once(items, expected):
    player = drafted(*items)
    if expected is None:
        expected = ["Use `EXPLAIN`", "Node.js", "7 hours"]
    assert titles(player) == expected
    assert player.summary["forks"] == (len(expected) > 1)


def test_draft_stops_where_the_client_allows_no_more_paths():
    player = drafted("1. A: x", " B: y", "3. C: z", "4. D: z", max_paths=3)
    assert titles(player) == ["A", "B", "C"]


def test_request_that_may_not_fork_pays_for_no_draft():
    player = drafted("never", max_paths=1)
    assert not player.group.branched or player.summary["forks"] == 0
    assert player.summary["fallbacks"] == {"max_paths": 1}
    assert not any(node.kind is Kind.OUTLINE for node in player.group.nodes)


def test_behind_a_paragraph_the_first_number_is_written_for_the_model():
    scripts = {"0.0": "Health matters.\n\n", "0.1": " Eat: x", "0.2": " Sleep: y", "0.3": "no"}
    player = Player("skeleton", scripts, vocabulary=merged()).run()
    assert titles(player) == ["Eat", "Sleep"]
    draft = player.node("0.1")
    assert player.vocabulary.text(draft.tokens[: draft.num_given]) == ".\n\n1."


def point(text: str, vocabulary: Pieces | None = None, **options: Any) -> str:
    """Return the first point's text, if this is what its path would go on to write."""
    scripts = {**LIST, "0.4/0.0": text}
    player = Player("skeleton", scripts, vocabulary=vocabulary or merged(), **options).run()
    body = player.text.partition("1. **Eat well**:")[2]
    return body.partition("2. **Sleep**:")[0]


@pytest.mark.parametrize("vocabulary", [*ALL, merged])
@pytest.mark.parametrize(
    "text",
    [
        " Fruit.",
        "\n   - apples\n   - pears\n",
        " The area is:\n\n$$\na = b\n\n$$\n\nas you see.",
        " The area is:\n\n\\[ a = b\n\n1. \\]\n\nas you see.",
        " Like this:\n\n```sql\nSELECT 1;\n\n1. x\n```",
        " So many:\n12 a day.",
        "\n\nBehind its heading.",
    ],
)
def test_point_ends_at_a_blank_line_or_the_next_heading(text, vocabulary):
    for behind in ("\n\nMore.", "\n2. **Next**: x", "\n\n2. **Next**"):
        assert point(text + behind, vocabulary()).strip("\n") == text.strip("\n")


def test_heading_of_the_next_point_is_never_shown():
    for vocabulary in ALL:
        player = Player(
            "skeleton", {**LIST, "0.4/1.0": " Long.\n3. **Run**: far"}, vocabulary=vocabulary()
        ).run()
        assert player.text == "Try this:\n" + TEXT
        assert player.summary["cut_paths"] == 0


def test_long_point_ends_with_its_sentence_within_its_budget():
    text = " It is so." * 40
    assert point(text, tags(), path_tokens=40).rstrip() == " It is so." * 8
    wide = "它很好。" * 40
    assert point(wide, chars(), path_tokens=40).rstrip() == "它很好。" * 8


def test_block_of_code_is_closed_where_a_budget_ends_it():
    text = "\n```py\n" + "a = 1\n" * 40
    shown = point(text, tags(), path_tokens=20)
    assert shown.count("```") == 2 and shown.endswith("\n```\n\n")


@pytest.mark.parametrize(
    ("intro", "first", "second", "start"),
    [
        ("Tips:\n\n", "1. Eat: x", " Sleep: y", "In short,"),
        ("Советы:\n\n", "1. Сон: x", " Еда: y", "Итак,"),
        ("建议：\n\n", "1. 睡眠：x", "饮食：y", "总之，"),
        ("Ein Garten ist gut:\n\n", "1. Luft: x", " Ruhe: y", "Kurz gesagt:"),
    ],
)
def test_conclusion_begins_in_the_language_of_the_list(intro, first, second, start):
    scripts = {"0.0": intro, "0.1": first, "0.2": second, "0.3": "x", "0.5": " gut."}
    player = Player("skeleton", scripts, vocabulary=merged()).run()
    assert player.text.endswith(f"\n\n{start} gut.")


def test_conclusion_ends_in_front_of_a_list_of_its_own():
    player = Player("skeleton", {**LIST, "0.5": " do it.\n3. **Run**"}, vocabulary=tags()).run()
    assert player.text.endswith("In short, do it.\n")
    assert player.finish == Finish("stop")


@pytest.mark.parametrize("join", ["kv", "reprefill"])
@pytest.mark.parametrize("order", [0, -1])
def test_text_does_not_depend_on_order_or_join_INV2(join, order):
    player = Player("skeleton", LIST, vocabulary=merged(), join=join)
    player.run(lambda nodes: nodes[order])
    assert player.text == "Try this:\n\n" + TEXT
    player.check_limits()


def test_answer_is_cut_where_its_budget_ends_whatever_the_draft_took():
    full = Player("skeleton", LIST, vocabulary=tags()).run()
    for max_tokens in range(6, len(full.visible)):
        player = Player("skeleton", LIST, vocabulary=tags(), max_tokens=max_tokens).run()
        assert player.finish == Finish("length")
        assert len(player.visible) == max_tokens


def test_trace_reads_the_points_and_not_the_draft():
    player = Player("skeleton", LIST, vocabulary=merged(), prompt="").run()
    result = trace(player.text, load_profile("skeleton"), player.vocabulary)
    labels = [branch.label for branch in result.branches]
    assert labels == ["trunk", "path 1", "path 2", "conclusion"]
    paths = {n.lane.title: n for n in player.group.nodes if n.kind is Kind.PATH}
    assert [b.start for b in result.branches[1:3]] == [n.start for n in paths.values()]
    assert trace("A.\n\nB.", load_profile("skeleton")).summary["forks"] == 0
    with pytest.raises(GrammarError, match="the conclusion is missing"):
        trace(player.text.partition("In short")[0], load_profile("skeleton"))


OUTLINE = """
name = "mine"
summary = "mine"
max_depth = 1
[outline]
[path]
start = "{name}. {title}:"
[join]
start = "So"
"""
SO = 'start = "So"'


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max_depth = 1", "max_depth = 2", r"\[outline\] needs max_depth = 1"),
        ("[outline]", "[fork]\ntrigger = 'x'\n[outline]", "only min_tokens_left is allowed"),
        ("[outline]", "[outline]\ntries = 0", r"\[outline\] tries must be at least 1, got 0"),
        ("[outline]", "[outline]\nmax_title_tokens = 0", "max_title_tokens must be at least 1"),
        ("[join]", "end = 'x'\n[join]", "points end by themselves"),
        ("[join]", "stride = 3\n[join]", "stride, num_tags, open and first_only"),
        ("[join]", "close = 3\n[join]", "close must be text"),
        (SO, f"{SO}\nstarts = 3", "expected tables with match and start"),
        (
            SO,
            f"{SO}\nstarts = [{{match = '(', start = 'x'}}]",
            "match must be a regular",
        ),
        (SO, f"{SO}\nstarts = [{{match = 'x', start = ''}}]", "must not be empty"),
        (SO, f"{SO}\nstarts = [{{match = 'x'}}]", "missing key 'start'"),
    ],
)
def test_profile_says_what_is_wrong_beside_an_outline(old, new, said):
    parse_profile(OUTLINE, "mine")
    with pytest.raises(OptionError, match=said):
        parse_profile(OUTLINE.replace(old, new, 1), "mine")


def test_client_who_wants_more_tokens_gets_the_heading_behind_a_conclusion(monkeypatch):
    monkeypatch.setattr(
        "vllm_parallel_think.core.fork_join.group.ForkJoinGroup._may_conclude", lambda *_: False
    )
    player = Player("skeleton", {**LIST, "0.5": " do it.\n3. **Run**: x"}, vocabulary=tags()).run()
    assert player.text.endswith("In short, do it.\n3. **Run**: x")
