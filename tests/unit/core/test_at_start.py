"""Answers that fork right behind the prompt: ParaThinker's form."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.player import EOS, Player
from vllm_parallel_think.core.config.loading import load_profile
from vllm_parallel_think.core.interface import Finish
from vllm_parallel_think.core.trace import GrammarError, trace

SUMMARY = "<summary>By analyzing multiple reasoning processes above, I concluded that: "
SUMMARY += "The final answer is"
SCRIPTS = {
    "0.0/0.0": " a a</think1>",
    "0.0/1.0": " b b b b</think2>",
    "0.0/2.0": " c</think3>",
    "0.1": " 4.",
}


def play(num_paths: int = 3, **kwargs: object) -> Player:
    kwargs = {"scripts": SCRIPTS, "prompt": "Q Q", **kwargs}
    return Player("parathinker", num_paths=num_paths, **kwargs)  # type: ignore[arg-type]


def test_paths_start_behind_the_prompt_and_the_summary_behind_the_longest_INV2():
    player = play().run()
    assert player.text == (
        "<think1> a a</think1><think2> b b b b</think2><think3> c</think3>" + SUMMARY + " 4."
    )
    prompt = len(player.group.trunk.tokens)
    assert [player.node(f"0.0/{i}.0").start for i in range(3)] == [prompt] * 3
    assert player.node("0.1").start == prompt + 6, "one opening tag, four words, one closing tag"
    assert player.node("0.1").prefix == (player.group.trunk, *player.group.nodes[1:4])
    assert player.group.trunk.num_sampled == 0
    assert player.summary["forks"] == 1
    assert player.summary["reused_tags"] == 0


def test_one_path_is_a_block_too():
    player = play(1).run()
    assert player.text == "<think1> a a</think1>" + SUMMARY + " 4."


def test_more_paths_than_tags_reuse_them_in_order_and_say_so():
    scripts = {f"0.0/{i}.0": f" p</think{i % 8 + 1}>" for i in range(12)}
    player = play(12, scripts=scripts, max_paths=16).run()
    heads = [f"<think{i % 8 + 1}> p</think{i % 8 + 1}>" for i in range(12)]
    assert player.text == "".join(heads) + SUMMARY
    assert player.summary["reused_tags"] == 4


def test_path_that_ends_itself_is_closed_with_its_own_tag():
    scripts = {**SCRIPTS, "0.0/1.0": [" b", EOS]}
    assert "<think2> b</think2>" in play(scripts=scripts).run().text


def rounds(player: Player) -> Player:
    """Run engine steps in which every branch is scheduled."""
    while player.finish is None:
        player.round()
    return player


@pytest.mark.parametrize(
    ("termination", "expected"),
    [
        (0.0, "<think1> a a</think1><think2> b b</think2><think3> c</think3>"),
        (0.1, "<think1> a a</think1><think2> b b</think2><think3> c</think3>"),
        (0.5, "<think1> a a</think1><think2> b b b</think2><think3> c</think3>"),
        (1.0, "<think1> a a</think1><think2> b b b b</think2><think3> c</think3>"),
    ],
)
def test_others_are_cut_when_enough_paths_have_ended(termination: float, expected: str):
    player = rounds(play(termination=termination))
    assert player.text == expected + SUMMARY + " 4."
    assert player.summary["cut_paths"] == {0.0: 2, 0.1: 2, 0.5: 1, 1.0: 0}[termination]


def test_a_path_that_used_up_its_budget_counts_as_ended():
    player = rounds(play(2, termination=0.5, path_tokens=1))
    assert player.text == "<think1> a</think1><think2> b</think2>" + SUMMARY + " 4."


def test_summary_has_a_budget_of_its_own():
    player = play(summary_tokens=2, scripts={**SCRIPTS, "0.1": " 1 2 3 4 5"}).run()
    assert player.text.endswith(SUMMARY + " 1 2")
    assert player.finish == Finish("length")


def test_no_room_to_fork_is_a_plain_answer():
    player = play(scripts={"0.0": " four."}, has_room=lambda _: False).run()
    assert player.text == " four."
    assert player.summary["fallbacks"] == {"held_kv_fraction": 1}


def test_words_can_be_those_of_any_reasoning_model():
    scripts = {"0.0/0.0": " a</think>", "0.0/1.0": [" b", EOS], "0.1": " 4."}
    player = Player("parathinker-text", scripts, num_paths=2).run()
    assert player.text == (
        "<think>\nAttempt 1: a</think>\n<think>\nAttempt 2: b\n</think>\n"
        "\nComparing these attempts, the final answer is 4."
    )


def test_trace_reads_what_the_engine_writes():
    text = play().run().text
    result = trace(text, load_profile("parathinker"))
    assert [branch.label for branch in result.branches] == [
        "trunk", "path 1", "path 2", "path 3", "conclusion",
    ]  # fmt: skip
    assert [branch.start for branch in result.branches[1:4]] == [0, 0, 0]
    assert result.summary["paths"] == 3
    with pytest.raises(GrammarError, match="the conclusion is missing"):
        trace(text.replace("<summary>", "So "), load_profile("parathinker"))


def test_trace_reads_reused_tags():
    profile = load_profile("parathinker")
    profile = replace(profile, path=replace(profile.path, num_tags=2))
    text = "<think1>a</think1><think2>b</think2><think1>c</think1>" + SUMMARY + " d"
    assert trace(text, profile).summary["reused_tags"] == 1
