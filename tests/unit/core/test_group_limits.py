"""Refused forks, limits, lost K/V, and random abuse."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.player import EOS, STOP, Player
from tests.support.random_trees import RANDOM, paths, write
from tests.support.samples import (
    DEEP,
    MULTIVERSE,
    NESTED,
    NPR_TOY,
    OUTLINE_TOY,
    R1_TOY,
    TOY,
    TOYS,
    VISIBLE,
)
from tests.support.vocabularies import ALL, tags
from vllm_parallel_think.core.branch_graph import Kind, State
from vllm_parallel_think.core.config.loading import load_profile
from vllm_parallel_think.core.fork_join.budget import MIN_CONCLUSION_TOKENS, MIN_PATH_TOKENS
from vllm_parallel_think.core.interface import Finish


class TestFallbacks:
    """A fork that may not be: the model goes on sequentially, and the reason is counted (INV-4)."""

    @pytest.mark.parametrize(
        ("reason", "changes"),
        [
            ("max_depth", {"max_depth": 0}),
            ("max_paths", {"max_paths": 1, "outline": MULTIVERSE}),
            ("fewer_than_two_paths", {"outline": "<Parallel><Goal><Outline>1: p</Outline></Goal>"}),
            ("not_opened", {"outline": MULTIVERSE.removeprefix("<Parallel>\n")}),
            ("max_tokens", {"max_tokens": 50}),
            ("max_model_len", {"index_blocks": 27}),
            ("held_kv_fraction", {"has_room": lambda blocks: blocks < 14}),
        ],
    )
    def test_reason_is_counted_and_the_text_goes_on(self, reason, changes):
        outline = changes.pop("outline", MULTIVERSE)
        player = Player("multiverse", {"0.0": outline + "\n on"}, **changes).run()
        assert player.summary["fallbacks"] == {reason: 1}
        assert player.text == outline + "\n on"
        assert not player.group.branched

    def test_limits_that_just_suffice_fork(self):
        seen = []
        for changes in (
            {"max_depth": 1},
            {"max_paths": 2},
            {"max_tokens": 53},
            {"index_blocks": 30},
            {"has_room": lambda blocks: seen.append(blocks) or blocks <= 14},
        ):
            player = Player("multiverse", TOY, **changes).run()
            assert player.summary["forks"] == 1 and not player.summary["fallbacks"]
        assert seen == [14], "two paths of sixteen tokens, what is forced, and their ends"

    def test_depth_of_the_grammar_counts_whatever_the_request_asks(self):
        scripts = {**NPR_TOY, "0.1/0.0": NPR_TOY["0.0"] + "</step>"}
        player = Player("npr", scripts, max_depth=8).run()
        assert player.summary["depth"] == 1
        assert player.summary["fallbacks"] == {"max_depth": 1}

    def test_minimum_of_the_grammar_counts(self):
        length = len(tags().encode(NPR_TOY["0.0"]))
        for max_tokens, forks in ((length + 1023, 0), (length + 1024, 1)):
            player = Player("npr", NPR_TOY, max_tokens=max_tokens).run()
            assert player.summary["forks"] == forks

    def test_unnamed_paths_are_capped_instead(self):
        profile = load_profile("parallel-r1")
        four = replace(profile, fork=replace(profile.fork, num_paths=4))
        assert Player(four, R1_TOY).run().summary["paths"] == 4
        assert Player(four, R1_TOY, max_paths=3).run().summary["paths"] == 3
        player = Player(four, R1_TOY, max_paths=1).run()
        assert player.summary["fallbacks"] == {"fewer_than_two_paths": 1}

    def test_forks_are_counted_over_the_whole_answer(self):
        player = Player("multiverse", {**TOY, "0.2": MULTIVERSE}, max_forks=1).run()
        assert player.summary["forks"] == 1
        assert player.summary["fallbacks"] == {"max_forks": 1}

    @pytest.mark.parametrize(("max_forks", "forks", "refused"), [(2, 1, 2), (4, 3, 0)])
    @pytest.mark.parametrize("pick", [0, -1])
    def test_what_is_left_is_shared_out_at_the_fork_INV2(self, max_forks, forks, refused, pick):
        """Which path asks first must not decide which one forks."""
        scripts = {**TOY, "0.1/0.0": NESTED, "0.1/1.0": NESTED}
        player = Player("multiverse", scripts, max_forks=max_forks).run(lambda nodes: nodes[pick])
        assert player.summary["forks"] == forks
        assert player.summary["fallbacks"] == ({"max_forks": refused} if refused else {})

    def test_duplicate_names_open_one_path_each(self):
        outline = MULTIVERSE.replace("</Goal>", "<Outline>\n2: again\n</Outline>\n</Goal>")
        player = Player("multiverse", {**TOY, "0.0": outline}).run()
        assert player.summary["paths"] == 2
        only = MULTIVERSE.replace("2:", "1:")
        player = Player("multiverse", {"0.0": only}).run()
        assert player.summary["fallbacks"] == {"fewer_than_two_paths": 1}

    def test_unclosed_tags_fork_nothing(self):
        player = Player("multiverse", {"0.0": MULTIVERSE.removesuffix("</Goal>")}).run()
        assert not player.group.branched and not player.summary["fallbacks"]


def tightest(profile, scripts: dict, block_size: int, num_forks: int) -> Player:
    """Play with the smallest index space in which so many forks happen, checking limits."""
    smallest = 60 * num_forks // block_size  # far too small, so that the first try cannot succeed
    for index_blocks in range(smallest, 900):
        player = Player(profile, scripts, block_size=block_size, index_blocks=index_blocks)
        while player.finish is None:
            player.step(player.running[-1])
            player.check_limits()
        if player.summary["forks"] == num_forks:
            assert index_blocks > smallest
            return player
    raise AssertionError("no index space is large enough")


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("after", ["\n", "\n\n\n\n\n"])
def test_tight_fork_leaves_the_promised_room_INV4(block_size, after):
    """The smallest index space that forks still leaves paths and conclusion their tokens."""
    rules = load_profile("multiverse")
    rules = replace(rules, fork=replace(rules.fork, after=(after,)))
    scripts = {**TOY, "0.1/0.0": " p" * 99, "0.1/1.0": " q" * 99, "0.2": " c" * 99}
    player = tightest(rules, scripts, block_size, num_forks=1)
    for address in ("0.1/0.0", "0.1/1.0"):
        sampled = player.node(address).num_sampled + 1  # one was handed to the node behind it
        assert sampled >= MIN_PATH_TOKENS
    assert player.node("0.2").num_sampled >= MIN_CONCLUSION_TOKENS
    assert player.finish == Finish("length")


@pytest.mark.parametrize("block_size", [1, 3])
def test_tight_fork_inside_a_path_leaves_the_promised_room_INV4(block_size):
    scripts = {**DEEP, "0.1/0.1/0.0": " p" * 99, "0.1/0.1/1.0": " q" * 99}
    scripts |= {"0.1/0.2": " c" * 99, "0.2": " c" * 99}
    player = tightest("multiverse", scripts, block_size, num_forks=2)
    for address in ("0.1/0.1/0.0", "0.1/0.1/1.0"):
        assert player.node(address).num_sampled + 1 >= MIN_PATH_TOKENS
    assert player.node("0.1/0.2").num_sampled + 1 >= MIN_CONCLUSION_TOKENS
    assert player.node("0.2").num_sampled >= MIN_CONCLUSION_TOKENS


def test_long_titles_are_counted_as_forced_text_INV4():
    """A heading repeats a title of any length; the index space must hold it."""
    title = " ".join(["word"] * 60)
    scripts = {**OUTLINE_TOY, "0.0": f" {title}\n2. {title}\n\n"}
    profile = load_profile(VISIBLE)
    patient = replace(profile, fork=replace(profile.fork, max_outline_tokens=None))
    for index_blocks in range(20, 160, 3):
        player = Player(patient, scripts, index_blocks=index_blocks, block_size=4)
        while player.finish is None:
            player.step(player.running[0])
            player.check_limits()
    assert player.summary["forks"] == 1, "the widest of them forks"


def test_lost_blocks_are_computed_again_in_order_and_only_when_needed():
    player = Player("multiverse", TOY)
    player.run_until(lambda: len(player.running) == 2)
    group, (first, second) = player.group, list(player.running)
    trunk, head = player.node("0.0"), player.node("0.1")
    group.sealed(head, kept=False)
    group.sealed(trunk, kept=False)
    assert group.ready() == [trunk], "the node behind it waits for its prefix"
    group.started(trunk)
    assert group.ready() == [], "asked for once"
    group.sealed(trunk, kept=True)
    assert group.ready() == [head]
    group.started(head)
    group.sealed(head, kept=True)
    assert group.ready() == []
    assert (first.state, second.state) == (State.LIVE, State.LIVE)


def test_replay_lost_in_turn_is_asked_for_again():
    player = Player("multiverse", TOY)
    player.run_until(lambda: len(player.running) == 2)
    trunk = player.node("0.0")
    for _ in range(3):
        player.group.sealed(trunk, kept=False)
        assert player.group.ready() == [trunk]
        player.group.started(trunk)
        assert trunk.computing
    assert trunk.state is State.DONE


def test_join_waits_until_every_path_is_in_the_cache_again():
    player = Player("multiverse", TOY)
    player.run_until(lambda: "0.1/0.1" in {n.address for n in player.group.nodes})
    path, closing = player.node("0.1/0.0"), player.node("0.1/0.1")
    player.run_until(lambda: closing.sealed)
    player.group.sealed(path, kept=False)
    assert player.group.ready() == [path]
    player.run_until(lambda: player.node("0.1/1.0").state is State.DONE)
    player.run()
    assert player.text == Player("multiverse", TOY).run().text
    assert player.num_starts[path] == 2


def test_parked_branch_comes_back_behind_its_prefix_and_counts_once():
    player = Player("multiverse", TOY)
    player.run_until(lambda: len(player.running) == 2)
    node, head = player.running[0], player.node("0.1")
    reused = player.summary["reused_kv_tokens"]
    node.parked = True
    player.group.sealed(head, kept=False)
    assert node not in player.group.ready()
    player.group.sealed(head, kept=True)
    assert player.group.ready() == [node]
    player.group.started(node)
    assert player.group.ready() == [] and not node.parked
    assert player.summary["reused_kv_tokens"] == reused


def test_paths_copied_by_a_join_are_never_computed_again():
    player = Player("threadweaver", TOYS["threadweaver"])
    player.run_until(lambda: player.group.nodes[-1].kind is Kind.CONCLUSION)
    retired = [node for node in player.group.nodes if node.retired]
    assert len(retired) == 2 and not any(node.sealed for node in retired)
    assert [player.num_starts[node] for node in retired] == [1, 1]
    assert not set(player.group.ready()) & set(retired)
    needed = player.group.blocks_needed
    kept = [node for node in player.group.nodes if not node.retired]
    assert needed == sum(map(player.group.blocks_of, kept)) + 1


@RANDOM
@given(paths("", 0), st.randoms(use_true_random=False), st.sampled_from(ALL), st.integers(1, 4))
def test_any_schedule_gives_the_same_text_and_figures_INV2(body, random, vocabulary, num_chunk):
    scripts: dict[str, tuple] = {}
    expected = write(body, ("0", 0), scripts, ())
    plain = Player("multiverse", scripts, vocabulary=vocabulary()).run()
    assert plain.text == expected
    other = Player("multiverse", scripts, vocabulary=vocabulary(), num_chunk=num_chunk)
    other.run(random.choice)
    assert other.text == expected
    assert other.summary == plain.summary
    assert other.placed() == plain.placed()
    assert set(other.num_starts.values()) == {1}, "INV-3: one request for each node"


@RANDOM
@given(
    paths("", 0),
    st.randoms(use_true_random=False),
    st.integers(1, 200),
    st.integers(1, 4),
    st.none() | st.integers(1, 60),
)
def test_any_schedule_is_cut_at_the_same_place_INV2_INV4(
    body, random, max_tokens, num_chunk, path_tokens
):
    scripts: dict[str, tuple] = {}
    write(body, ("0", 0), scripts, ())
    runs = []
    for choose in (lambda nodes: nodes[0], lambda nodes: nodes[-1], random.choice):
        player = Player(
            "multiverse",
            scripts,
            max_tokens=max_tokens,
            num_chunk=num_chunk,
            path_tokens=path_tokens,
        )
        player.run(choose)
        player.check_limits()
        runs.append((player.text, len(player.visible), player.finish))
    assert runs[0] == runs[1] == runs[2]
    _, length, finish = runs[0]
    assert length == max_tokens if finish == Finish("length") else length <= max_tokens


@RANDOM
@given(paths("", 0), st.randoms(use_true_random=False))
def test_lost_blocks_change_nothing_that_is_seen_INV2(body, random):
    scripts: dict[str, tuple] = {}
    expected = write(body, ("0", 0), scripts, ())
    player = Player("multiverse", scripts)
    for _ in range(5_000):
        if player.finish is not None:
            break
        sealed = [node for node in player.group.nodes if node.sealed and not node.computing]
        if sealed and random.random() < 0.1:
            player.group.sealed(random.choice(sealed), kept=False)
            player.advance()
        player.step(random.choice(player.running))
    assert player.text == expected
    assert player.summary["forks"] == Player("multiverse", scripts).run().summary["forks"]


WORDS = [" w", "\n", "\n\n", "1. a\n", "2. b\n", "1:", "2:", EOS, STOP]
WORDS += ["<Parallel>", "</Parallel>", "<Goal>", "</Goal>", "<Outline>1:", "<Outline>2:"]
WORDS += ["<Path>", "</Path>", "</Conclusion>", "<guideline>", "<plan>1:", "<plan>2:"]
WORDS += ["</guideline>", "<step>", "</step>", "<Outlines>", "</Outlines>", "</Thread>"]
WORDS += ["1. a\n2. b\n\n", MULTIVERSE, NPR_TOY["0.0"], TOYS["threadweaver"]["0.0"]]


class Babble(dict):
    """A script for every address: random words, the same for the same place."""

    def __init__(self, seed: int, words: list) -> None:
        super().__init__()
        self._seed, self._words = seed, words

    def get(self, address: str, default: object = None) -> list:
        return Random(f"{self._seed} {address}").choices(self._words, k=60)


@settings(RANDOM, max_examples=150)
@given(
    profile=st.sampled_from(list(TOYS)),
    seed=st.integers(0, 2**32),
    vocabulary=st.sampled_from(ALL),
    block_size=st.integers(1, 17),
    index_blocks=st.integers(8, 400),
    max_tokens=st.integers(10, 400),
    max_forks=st.integers(1, 4),
    max_paths=st.integers(1, 3),
    max_depth=st.integers(0, 3),
    num_chunk=st.integers(1, 4),
    budgets=st.tuples(*[st.none() | st.integers(1, 50)] * 2),
    join=st.sampled_from([None, "kv", "reprefill"]),
)
def test_babble_never_raises_and_keeps_to_every_limit_INV4_INV5(
    profile, seed, vocabulary, budgets, **rest
):
    words = WORDS if profile != "npr" else [*WORDS, NPR_TOY["0.0"]]
    rules = load_profile(profile)
    eager = replace(rules, fork=replace(rules.fork, min_tokens_left=0))
    player = Player(
        eager,
        Babble(seed, words),
        vocabulary=vocabulary(),
        path_tokens=budgets[0],
        critical_tokens=budgets[1],
        **rest,
    )
    random = Random(seed)
    for _ in range(20_000):
        if player.finish is not None:
            break
        player.step(random.choice(player.running))
        player.check_limits()
    assert player.finish is not None
    text = [t for n in player.group.nodes for t in n.tokens[n.num_hidden :]]
    shown = [token for token in player.visible if token != EOS]
    assert shown == text[: len(shown)], "the visible text is the tree, read from left to right"


def test_babble_does_fork():
    """The random test above would prove nothing on text that never branches."""
    seen: Counter[str] = Counter()
    for seed in range(25):
        player = Player("multiverse", Babble(seed, WORDS), max_tokens=300).run()
        seen["forks"] += player.summary["forks"]
        seen["deep"] += player.summary["depth"] == 2
        seen["stops"] += player.finish == Finish("stop", STOP)
    assert min(seen["forks"], seen["deep"], seen["stops"]) > 0


def test_deep_sample_is_what_it_says():
    assert Player("multiverse", DEEP).run().summary["depth"] == 2
