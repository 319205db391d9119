"""Voting: which answer texts end with, and which one wins."""

from __future__ import annotations

import re

import pytest
from player import EOS, STOP, Player

from vllm_parallel_think.core.exchange import Finish
from vllm_parallel_think.core.vote import Vote, extract, vote


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
