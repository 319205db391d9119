"""What a step of the engine costs a group does not grow with what the group has written."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given

from tests.support.hogwild_player import Play
from tests.support.player import Player
from tests.support.random_trees import RANDOM, paths, write
from tests.support.samples import MULTIVERSE, TOYS
from vllm_parallel_think.core.branch_graph import Node
from vllm_parallel_think.core.fork_join.group import ForkJoinGroup


def walked(group: ForkJoinGroup) -> tuple[int, int, int]:
    """Return sampled, forced and critical tokens by looking at every node."""
    nodes = [*group.nodes, *group.outvoted]
    return (
        sum(node.num_sampled for node in nodes),
        sum(len(node.forced_visible) for node in nodes),
        max(node.critical_before + node.num_sampled for node in nodes),
    )


def check_sums(player: Player) -> None:
    while player.finish is None:
        player.step(player.running[-1])
        found = player.summary
        sums = (found["generated_tokens"], found["forced_tokens"], found["critical_path_tokens"])
        assert sums == walked(player.group)
        for node in player.group.nodes:
            lane = node.lane
            assert lane.num_sampled == sum(n.num_sampled for n in lane.all_nodes)
            assert lane.nodes[node.place] is node


@pytest.mark.parametrize("name", TOYS)
def test_running_sums_are_the_sums_over_all_nodes(name):
    check_sums(Player(name, TOYS[name], max_tokens=45))


@RANDOM
@given(paths("", 0))
def test_running_sums_of_random_trees(body):
    scripts: dict[str, tuple] = {}
    write(body, ("0", 0), scripts, ())
    check_sums(Player("multiverse", scripts))


class Looks(Counter[str]):
    """Counts how often nodes are looked at."""

    def of(self, name: str) -> property:
        plain = vars(Node)[name]

        def look(node: Node) -> object:
            self[name] += 1
            return plain.fget(node)

        return property(look)


@pytest.fixture
def looks(monkeypatch):
    counted = Looks()
    for name in ("num_sampled", "num_visible", "forced_visible", "depth"):
        monkeypatch.setattr(Node, name, counted.of(name))
    return counted


def test_a_token_behind_many_forks_looks_at_few_nodes(looks):
    """Some 250 nodes stand in front of the last tokens."""
    num_forks = 50
    block = {"0.0": MULTIVERSE}
    for fork in range(num_forks):
        trunk = 2 * fork + 1
        block |= {f"0.{trunk}/{lane}.0": " p\n</Path>" for lane in range(2)}
        block[f"0.{trunk + 1}"] = "c\n</Conclusion>\n</Parallel>\n" + (
            MULTIVERSE if fork < num_forks - 1 else " w" * 40
        )
    player = Player("multiverse", block, live=True, max_forks=10**30, max_tokens=10**6)
    player.run_until(lambda: player.summary["forks"] == num_forks and player.text.endswith(" w w"))
    assert len(player.group.nodes) > 5 * num_forks
    for _ in range(20):
        looks.clear()
        player.step(player.running[0])
        player.group.summary(), player.group.live_view()
        assert looks.total() < 40, looks
    assert player.summary["generated_tokens"] == walked(player.group)[0]


def test_a_token_behind_many_steps_of_workers_looks_at_few_nodes(looks):
    play = Play(max_tokens=100_000, context=100_000, live=True, worker_tokens=5000)
    for _ in range(100):
        play.say("ab.\n\n", "cd.\n\n")
    assert len(play.group.history) == 200
    play.group.live_view()
    looks.clear()
    play.step(w0="x", w1="y")
    summary = play.group.summary()
    assert play.group.live_view() is not None
    assert looks.total() < 60, looks
    assert summary.generated_tokens == 1002
    assert summary.forced_tokens == sum(len(n.forced_visible) for n in play.group.history)


def test_a_mark_is_found_wherever_tokens_cut_it():
    play = Play(worker_tokens=5000)
    play.say("x" * 50 + "!", "y" * 51)
    play.say(".\n\n", "yyy")
    assert play.group.finished and play.seen.endswith("x!.\n\n")
