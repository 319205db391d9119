"""Voting: which answer texts end with, and which one wins."""

from __future__ import annotations

import random
import re
import time

import pytest

from tests.support.player import EOS, STOP, Player
from tests.support.vocabularies import Pieces
from vllm_parallel_think.core.fork_join.vote import (
    PATTERN_CHARACTERS,
    SHOWN_CHARACTERS,
    VOTE_TOKENS,
    Vote,
    extract,
    vote,
)
from vllm_parallel_think.core.interface import Finish


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{3} or \boxed{4}.", "4"),
        (r"so \boxed{\frac{1}{2}}, not 7", r"\frac{1}{2}"),
        (r"so \boxed{3} and \boxed{4", "3"),
        ("1,234.50 apples", "1234.5"),
        ("from 3 to -2", "-2"),
        ("a range 10-20.", "-20"),
        ("no answer", None),
        (r"\boxed{ }", None),
        ("", None),
    ],
)
def test_final_answers(text: str, answer: str | None):
    assert extract(text) == answer


def test_the_operators_pattern_comes_first():
    pattern = re.compile(r"Answer: *(\w+)")
    assert extract(r"Answer: A, no, Answer: B \boxed{3}", pattern) == "B"
    assert extract(r"\boxed{3}", pattern) == "3"
    assert extract("Answer: 5", re.compile("Answer: [0-9]")) == "Answer: 5"


def boxed_by_counting(text: str) -> str | None:
    """Return the last complete box by the definition, at the cost of the text's square."""
    for start in reversed([m.end() for m in re.finditer(r"\\boxed\{", text)]):
        depth = 1
        for index in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if not depth:
                return text[start:index]
    return None


def test_boxes_are_those_of_the_definition():
    rng = random.Random(7)
    for _ in range(3000):
        text = "".join(rng.choices([r"\boxed{", "{", "}", "a", "b"], k=rng.randrange(12)))
        assert extract(text) == (boxed_by_counting(text) or None), text


@pytest.mark.parametrize(
    "piece", [r"\boxed{", r"\boxed{a}", "{", "}", "1,", "1.", "-", r"\boxed{}"]
)
def test_a_million_characters_cost_what_their_number_says(piece):
    def seconds(num_characters: int) -> float:
        text = piece * (num_characters // len(piece))
        start = time.process_time()
        extract(text)
        return time.process_time() - start

    quarter = min(seconds(250_000) for _ in range(2))
    assert seconds(1_000_000) < 4 * 3 * quarter + 0.05


def test_a_pattern_sees_the_end_of_a_text_only():
    pattern = re.compile(r"Answer: (\w+)")
    tail = " " * (PATTERN_CHARACTERS - len("Answer: A"))
    assert extract("Answer: A" + tail, pattern) == "A"
    assert extract("Answer: A" + tail + " ", pattern) is None


class CountingPieces(Pieces):
    """Counts tokens whose text is asked for together."""

    longest = 0

    def text(self, token_ids):
        self.longest = max(self.longest, len(token_ids))
        return super().text(token_ids)


def test_only_the_end_of_an_answer_is_decoded():
    vocabulary = CountingPieces(".")
    scripts = {f"0.0/{n}.0": "1 " * 8_000 + "5" for n in range(3)}
    limits = {"max_tokens": 30_000, "index_blocks": 50_000}
    player = play(scripts, num_paths=3, vocabulary=vocabulary, num_chunk=500, **limits).run()
    assert player.summary["votes"]["counts"] == {"5": 3}
    assert vocabulary.longest == VOTE_TOKENS


def test_very_long_answers_are_told_apart_and_shown_cut():
    long = "x" * 5000
    found = vote(
        [rf"\boxed{{{long}1}}", rf"\boxed{{{long}2}}", rf"\boxed{{{long}2}}", r"\boxed{7}"]
    )
    shown = "x" * SHOWN_CHARACTERS + "…"
    assert found == Vote(1, shown, {shown: 3, "7": 1})


def test_majority_and_ties():
    assert vote(["7", "5.0", "5", "x"]) == Vote(1, "5", {"5": 2, "7": 1})
    assert vote(["7", "5"]) == Vote(0, "7", {"7": 1, "5": 1})
    assert vote(["x", "y"]) == Vote(0, None, {})


SCRIPTS = {"0.0/0.0": " is 4", "0.0/1.0": " is 5", "0.0/2.0": " it is 5", "0.0/3.0": " no"}


def play(scripts=SCRIPTS, num_paths=4, **kwargs) -> Player:
    return Player("parathinker", scripts, prompt="Q Q", num_paths=num_paths, vote=True, **kwargs)


def test_the_majority_is_the_answer():
    player = play().run()
    assert player.text == " is 5"
    assert player.finish == Finish("stop")
    assert player.summary["votes"] == {"answer": "5", "counts": {"5": 2, "4": 1}, "paths": 4}
    assert player.summary["generated_tokens"] == 8
    assert player.summary["critical_path_tokens"] == 3


def test_answers_are_independent_and_share_the_prompt():
    player = play()
    player.run_until(lambda: len(player.group.nodes) > 1)
    prompt = player.vocabulary.encode("Q Q")
    paths = player.group.nodes[1:]
    assert player.group.trunk.tokens == prompt[:-1]
    assert [path.tokens[:1] for path in paths] == [prompt[-1:]] * 4
    assert {path.start for path in paths} == {len(prompt) - 1}
    assert all(path.prefix == (player.group.trunk,) for path in paths)


def test_budget_and_stop_tokens_end_an_answer_of_their_own():
    scripts = {**SCRIPTS, "0.0/0.0": [" 5", STOP], "0.0/1.0": " 5 5 5 5 5 5"}
    player = play(scripts, num_paths=2, path_tokens=3).run()
    assert player.text.startswith(" 5")
    assert player.finish == Finish("stop", STOP)
    player = play({**scripts, "0.0/0.0": " 4"}, num_paths=3, path_tokens=3).run()
    assert player.text == " 5 5 5"
    assert player.finish == Finish("length")


def test_nothing_is_sent_before_the_vote_and_nothing_is_held_behind_it():
    player = play({**SCRIPTS, "0.0/3.0": [" 9", " 9", " 9", EOS]})
    player.run_until(lambda: player.finish is not None)
    assert player.text == " is 5"
    assert all(not node.sealed for node in player.group.nodes[1:])


def test_the_end_is_told_apart_from_an_answers_last_word():
    """vLLM drops the text of the last token of an output that says ``stop``."""
    player = play()
    player.run_until(lambda: player.group.finish is not None)
    *words, end = player.emissions
    assert [emission.finish for emission in words] == [None] * len(words)
    assert (end.keep, end.finish) == (0, Finish("stop"))
