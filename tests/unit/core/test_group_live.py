"""What a streaming client may see of paths whose turn in the text has not come."""

from __future__ import annotations

import pytest

from tests.support.player import EOS, Player
from tests.support.samples import DEEP, MULTIVERSE, OUTLINE_TOY, TOY, TOYS, VISIBLE
from tests.support.vocabularies import ALL, chars
from vllm_parallel_think.core.ordered_output import LIVE_TOKENS


def lanes(player: Player) -> list[tuple[str, int, bool]]:
    view = player.group.live_view()
    assert view is not None
    return [(lane["path"], lane["tokens"], lane["done"]) for lane in view]


@pytest.mark.parametrize("name", TOYS)
def test_nothing_is_shown_unless_it_is_asked_for(name):
    player = Player(name, TOYS[name])
    while player.finish is None:
        assert player.group.live_view() is None
        player.step(player.running[0])
    assert player.group.live_view() is None


def test_nothing_is_shown_in_front_of_a_fork():
    player = Player("multiverse", TOY, live=True)
    while not player.group.branched:
        assert player.group.live_view() is None
        player.step(player.running[0])
    never = Player("multiverse", {"0.0": "just text"}, live=True).run()
    assert never.group.live_view() is None


def test_every_path_is_shown_while_only_the_first_is_released():
    player = Player(VISIBLE, OUTLINE_TOY, vocabulary=chars(), live=True)
    player.run_until(lambda: len(player.running) == 2)
    first, second = player.running
    assert lanes(player) == [("1", 0, False), ("2", 0, False)]
    for _ in range(4):
        player.step(second)
    player.step(first)
    assert player.group.live_view() == [
        {"path": "1", "title": "Apples", "tokens": 1, "done": False, "tail": " "},
        {"path": "2", "title": "Pears", "tokens": 4, "done": False, "tail": " is "},
    ]
    assert "Pears**" not in player.text, "its turn has not come"
    player.run_until(lambda: second not in player.running)
    assert lanes(player)[1] == ("2", len(" is green.\n"), True)
    player.run()
    assert player.group.live_view() == [
        {"path": "1", "title": "Apples", "tokens": 13, "done": True, "tail": " one is red.\n"},
        {"path": "2", "title": "Pears", "tokens": 11, "done": True, "tail": " is green.\n"},
    ]


@pytest.mark.parametrize("vocabulary", ALL)
@pytest.mark.parametrize("num_chunk", [1, 5])
def test_counts_only_grow_and_tails_follow_the_text(vocabulary, num_chunk):
    player = Player(VISIBLE, OUTLINE_TOY, vocabulary=vocabulary(), live=True, num_chunk=num_chunk)
    before = [0, 0]
    while player.finish is None:
        player.step(player.running[-1])
        view = player.group.live_view() or []
        for index, lane in enumerate(view):
            script = OUTLINE_TOY[f"0.0/{index}.0"]
            assert lane["tokens"] >= before[index]
            assert script.startswith(lane["tail"])
            assert lane["tokens"] == len(player.vocabulary.encode(lane["tail"]))
            lives = any(node.address == f"0.0/{index}.0" for node in player.running)
            assert lane["done"] == (not lives), "the step behind the last token counts"
            assert lane["tail"] == script or not lane["done"]
            before[index] = lane["tokens"]
    assert all(before)


def test_tail_holds_the_last_tokens_only():
    text = "".join(chr(ord("a") + at % 26) for at in range(100))
    scripts = {**OUTLINE_TOY, "0.0/0.0": text + "\n"}
    player = Player(VISIBLE, scripts, vocabulary=chars(), live=True).run()
    view = player.group.live_view()
    assert view is not None
    assert view[0]["tokens"] == 101
    assert view[0]["tail"] == (text + "\n")[-LIVE_TOKENS:]


def test_path_that_is_closed_for_it_is_done_and_counts_its_own_tokens():
    scripts = {**OUTLINE_TOY, "0.0/0.0": ["abc", EOS], "0.0/1.0": "x" * 50}
    player = Player(VISIBLE, scripts, vocabulary=chars(), live=True, path_tokens=20).run()
    assert lanes(player) == [("1", 3, True), ("2", 20, True)]


def test_path_with_a_block_in_it_is_done_when_the_block_is():
    player = Player("multiverse", DEEP, live=True)
    outer = player.run_until(lambda: player.summary["forks"] == 2).group.live_view()
    assert outer is not None
    assert [lane["path"] for lane in outer] == ["1", "2"], "the trunk's paths, not the inner ones"
    assert not outer[0]["done"]
    player.run()
    inner = [node for node in player.group.nodes if node.lane.address.startswith("0.1/0")]
    assert lanes(player)[0] == ("1", sum(node.num_sampled for node in inner), True)
    second = [node for node in player.group.nodes if node.lane.address == "0.1/1"]
    assert lanes(player)[1] == ("2", sum(node.num_sampled for node in second), True)


def test_latest_block_is_shown():
    again = MULTIVERSE.replace("1: p", "3: p").replace("2: q", "4: q")
    scripts = {**TOY, "0.2": f"c\n</Conclusion>\n</Parallel>\n{again}"}
    scripts |= {"0.3/0.0": " z\n</Path>", "0.3/1.0": " z z\n</Path>", "0.4": "c"}
    player = Player("multiverse", scripts, live=True)
    player.run_until(lambda: player.summary["forks"] == 1)
    player.run_until(lambda: bool(player.running))
    assert [name for name, _, _ in lanes(player)] == ["1", "2"]
    player.run()
    assert player.summary["forks"] == 2
    assert [(name, done) for name, _, done in lanes(player)] == [("3", True), ("4", True)]


def test_released_text_is_the_same_whether_paths_are_shown_or_not():
    for name, scripts in TOYS.items():
        shown, plain = (Player(name, scripts, live=live).run() for live in (True, False))
        assert (shown.visible, shown.finish) == (plain.visible, plain.finish)


@pytest.mark.parametrize(("name", "path_tokens"), [("multiverse", None), (VISIBLE, 3)])
def test_tail_of_a_short_path_holds_every_token_that_is_counted(name, path_tokens):
    player = Player(name, TOYS[name], live=True, path_tokens=path_tokens).run()
    view = player.group.live_view()
    assert view is not None
    counts = [len(player.vocabulary.encode(lane["tail"])) for lane in view]
    assert counts == [lane["tokens"] for lane in view]
