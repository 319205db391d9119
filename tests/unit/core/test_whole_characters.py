"""Budgets cut between characters, never inside one: byte-level tokens hold parts of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.player import EOS, Player
from tests.support.samples import VISIBLE
from tests.support.vocabularies import Bytes
from vllm_parallel_think.core.branch_graph import Kind
from vllm_parallel_think.core.characters import MAX_REST, Characters
from vllm_parallel_think.core.config.loading import load_profile, parse_profile
from vllm_parallel_think.core.fork_join.tag_scanner import ForkSeen, Grammar
from vllm_parallel_think.core.interface import Finish

TEXT = "aé€😀b😀é€"
ENDS = [len(TEXT[:i].encode()) for i in range(len(TEXT) + 1)]
PROFILE = """
name = "bytes"
summary = "paths of bytes"
max_depth = 1
[fork]
at_start = true
num_paths = 2
[path]
start = "{name}:"
end = "]"
close = "]"
[join]
start = "="
"""


def play(first: str = TEXT, second: str = TEXT, answer: Any = "ok", **options: Any) -> Player:
    scripts = {"0.0/0.0": first, "0.0/1.0": second, "0.1": answer}
    profile = parse_profile(PROFILE, "bytes.toml")
    return Player(profile, scripts, vocabulary=Bytes(), prompt="QQ", **options)  # type: ignore[arg-type]


def cut_at(budget: int) -> int:
    """The first end of a character at or behind a number of bytes."""
    return next(end for end in ENDS if end >= budget)


def sampled_of_first_path(player: Player) -> int:
    return sum(node.num_sampled for node in player.node("0.0/0.0").lane.nodes)


@pytest.mark.parametrize("budget", range(1, ENDS[-1] + 1))
@pytest.mark.parametrize("key", ["path_tokens", "critical_tokens"])
def test_a_path_is_cut_at_the_end_of_a_character(budget: int, key: str) -> None:
    player = play(**{key: budget}).run()
    whole = TEXT.encode()[: cut_at(budget)].decode()
    assert player.text.startswith(f"1:{whole}]2:{whole}]=")
    assert sampled_of_first_path(player) == cut_at(budget) <= budget + MAX_REST


@pytest.mark.parametrize("budget", range(1, ENDS[-1]))
def test_a_summary_is_cut_at_the_end_of_a_character(budget: int) -> None:
    player = play("x]", "y]", TEXT, summary_tokens=budget).run()
    assert player.text == f"1:x]2:y]={TEXT.encode()[: cut_at(budget)].decode()}"
    assert player.finish == Finish("length")


def test_the_clients_own_limit_cuts_where_vllm_does() -> None:
    front = len("1:x]2:y]=a") + 1
    for max_tokens in (front, front + 1):
        player = play("x]", "y]", TEXT, summary_tokens=2, max_tokens=max_tokens).run()
        assert len(player.visible) == max_tokens


@pytest.mark.parametrize("budget", range(1, ENDS[-1]))
def test_an_independent_answer_is_cut_at_the_end_of_a_character(budget: int) -> None:
    player = play(vote=True, path_tokens=budget).run()
    assert player.text == TEXT.encode()[: cut_at(budget)].decode()


@pytest.mark.parametrize("ended", range(1, ENDS[-1]))
def test_siblings_of_a_path_that_ended_finish_their_character(ended: int) -> None:
    player = play("x" * ended + "]", TEXT + "c" * 50, termination=0.5)
    while player.finish is None:
        player.round()
    head = player.text.partition("=")[0]
    assert "\ufffd" not in head
    second = head.split("2:")[1].removesuffix("]")
    assert len(second.encode()) <= ended + 2 + MAX_REST


def test_bytes_of_no_character_are_cut_after_a_few() -> None:
    garbage: Any = [0x80] * 40
    player = play(garbage, garbage, path_tokens=5).run()
    assert 5 <= sampled_of_first_path(player) <= 5 + MAX_REST


@pytest.mark.parametrize("index_blocks", range(30, 46))
def test_a_path_that_runs_out_of_room_is_cut_at_the_end_of_a_character(index_blocks: int) -> None:
    player = play("€" * 90 + "]", "é" * 90 + "]", index_blocks=index_blocks).run()
    assert "\ufffd" not in player.text and "]2:" in player.text
    player.check_limits()
    assert not player.group.fallbacks


def test_an_outline_is_cut_at_the_end_of_a_character() -> None:
    profile = load_profile(VISIBLE)
    vocabulary = Bytes()
    for extra in range(8):
        scanner = Grammar(profile, vocabulary).scanner(  # type: ignore[arg-type]
            in_path=False, max_names=8, seed=""
        )
        start = "1. Caf\u00e9\n2. Tea\n3. "
        limit = profile.fork.max_outline_tokens
        assert limit is not None
        filler = "x" * (limit - len(start.encode()) - extra)
        text = (start + filler + "😀😀😀").encode()
        at = next(i for i, token in enumerate(text) if isinstance(scanner.feed(token), ForkSeen))
        assert text[: at + 1].decode() and limit <= at + 1 <= limit + MAX_REST


def test_characters_are_whole_behind_their_last_byte() -> None:
    characters = Characters(Bytes())
    seen = []
    for token in "é😀".encode():
        seen.append((characters.feed(token), characters.whole))
    assert [text for text, _ in seen] == ["", "é", "", "", "", "😀"]
    assert all(whole == bool(text) for text, whole in seen)


def test_an_answer_that_the_model_ends_is_left_as_it_is() -> None:
    answer: Any = [*"é".encode()[:1], EOS]
    player = play("x]", "y]", answer, summary_tokens=20).run()
    assert player.finish == Finish("stop")
    assert player.group.nodes[-1].kind is Kind.CONCLUSION
