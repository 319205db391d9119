"""How branches end: tags, end of sequence, budgets, stop tokens, the client's budget."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.player import EOS, STOP, Player
from tests.support.samples import DEEP, MULTIVERSE, NESTED, OUTLINE_TOY, R1_TOY, TOY, TOYS, VISIBLE
from tests.support.vocabularies import ALL, Pieces, chars, odd
from vllm_parallel_think.core.branch_graph import Kind, State
from vllm_parallel_think.core.config.loading import load_profile
from vllm_parallel_think.core.config.profile import Profile
from vllm_parallel_think.core.interface import Cause, Finish, Verdict

TOY_TEXT = Player("multiverse", TOY).run().text


def test_request_that_never_forks_is_released_as_it_came():
    player = Player("multiverse", {"0.0": "just text"}).run()
    assert player.text == "just text"
    assert player.visible[-1] == EOS
    assert player.finish == Finish("stop")
    assert not player.group.branched
    assert player.summary["parallelism_ratio"] == 1.0
    assert player.num_forced == 0


def test_trunk_cut_by_the_engine_finishes_with_length():
    player = Player("multiverse", {"0.0": "a b c d e"}, max_tokens=3).run()
    assert player.text == "a b c"
    assert player.finish == Finish("length")


def test_trunk_stopped_by_a_stop_token_keeps_its_reason():
    player = Player("multiverse", {"0.0": ["a b", STOP, "c"]}).run()
    assert player.visible[-1] == STOP
    assert player.finish == Finish("stop", STOP)


@pytest.mark.parametrize("vocabulary", [*ALL])
@pytest.mark.parametrize("num_chunk", [1, 3])
def test_text_is_the_same_whatever_the_tokens_and_steps_INV2(vocabulary, num_chunk):
    """Forced line breaks stand behind a tag's own tokens, so a merged tail gives one more."""
    player = Player("multiverse", TOY, vocabulary=vocabulary(), num_chunk=num_chunk).run()
    assert player.text == TOY_TEXT


def test_end_tag_merged_with_a_line_break_stays_in_front_of_the_separator():
    scripts = {**TOY, "0.1/0.0": " p\n</Path>\n more"}
    player = Player("multiverse", scripts, vocabulary=odd()).run()
    assert " p\n</Path>\n\n<Path>\n2:" in player.text
    assert "more" not in player.text
    closing = player.node("0.1/0.1")
    assert player.vocabulary.piece(closing.tokens[0]) == ">\n"
    assert (closing.num_pending, closing.num_after) == (1, 1)


def test_end_of_sequence_in_a_path_closes_it_without_counting_as_cut():
    scripts = {**TOY, "0.1/1.0": [" q r", EOS]}
    player = Player("multiverse", scripts).run()
    assert player.text == TOY_TEXT.replace(" q r s\n</Path>", " q r\n</Path>")
    assert player.visible.count(EOS) == 1, "only the one that ends the answer"
    assert player.summary["cut_paths"] == 0
    assert player.node("0.2").start == player.node("0.1/1.1").end - 1


def test_path_over_its_budget_is_closed_and_counted_as_cut():
    player = Player("multiverse", TOY, path_tokens=2).run()
    # " q r" is kept of " q r s"; " p" and its line break use the budget up before the tag.
    assert player.text == TOY_TEXT.replace(" p\n</Path>", " p\n\n</Path>").replace(
        " q r s\n</Path>", " q r\n</Path>"
    )
    assert player.summary["cut_paths"] == 2
    assert player.finish == Finish("stop")
    closing = player.node("0.1/1.1")
    assert player.vocabulary.text(closing.tokens) == " r\n</Path>\n"
    assert player.node("0.2").start == closing.end - 1, "positions follow the forced tag"


def test_tag_with_the_last_token_of_the_budget_is_no_cut():
    player = Player("multiverse", TOY, path_tokens=5).run()
    assert player.text == TOY_TEXT
    assert player.summary["cut_paths"] == 0


def test_profile_sets_a_budget_unless_the_request_does():
    scripts = {**OUTLINE_TOY, "0.0/0.0": " word" * 300}
    lengths = []
    for budget in (None, 7):
        player = Player(VISIBLE, scripts, path_tokens=budget).run()
        lengths.append(player.node("0.0/0.0").num_sampled + 1)
        assert player.summary["cut_paths"] == 1
    assert lengths == [128, 7]


def test_budget_of_a_path_covers_what_happens_inside_it():
    """The critical length of a path counts: its own text, the longest inner path, and so on."""
    budget = Player("multiverse", DEEP).run().summary["critical_path_tokens"]
    for path_tokens in (30, 33, 40, budget):
        player = Player("multiverse", DEEP, path_tokens=path_tokens).run()
        lane = player.node("0.1/0.0").lane
        before = player.node("0.1/0.0").critical_before
        used = max(n.critical_before + n.num_sampled for n in lane.all_nodes) - before
        assert used <= path_tokens + (lane.nodes[-1].critical_before - before == path_tokens)


def test_critical_budget_ends_the_answer_with_length():
    free = Player("multiverse", TOY).run().summary["critical_path_tokens"]
    assert Player("multiverse", TOY, critical_tokens=free + 1).run().text == TOY_TEXT
    player = Player("multiverse", TOY, critical_tokens=free - 3).run()
    assert player.summary["critical_path_tokens"] == free - 3
    assert player.finish == Finish("length")
    assert TOY_TEXT.startswith(player.text)
    cut = Player("multiverse", TOY, critical_tokens=25).run()
    assert cut.summary["cut_paths"] == 2
    assert cut.finish == Finish("length")


def test_critical_budget_holds_before_any_fork():
    player = Player("multiverse", TOY, critical_tokens=4).run()
    assert player.finish == Finish("length")
    assert len(player.visible) == 4
    assert not player.group.branched


@pytest.mark.parametrize("order", [0, -1])
def test_max_tokens_cuts_the_visible_text_at_every_length_INV4(order):
    full = Player("multiverse", DEEP).run()
    length = len(full.visible)
    # Below this the fork itself is refused, and the trunk's script ends.
    floor = len(full.vocabulary.encode(MULTIVERSE)) + 30
    for max_tokens in range(floor, length + 2):
        player = Player("multiverse", DEEP, max_tokens=max_tokens).run(lambda nodes: nodes[order])
        if player.summary["fallbacks"]:
            continue
        assert player.text == full.vocabulary.text(full.visible[:max_tokens])
        assert len(player.visible) == min(max_tokens, length)
        assert player.finish == Finish("length" if max_tokens < length else "stop")
        player.check_limits()
    assert max_tokens >= length, "the loop reached the uncut answer"


def test_chunk_that_max_tokens_cuts_finishes_with_length_INV4():
    """Several tokens of one step, the last of them a stop token that nobody gets to see."""
    scripts = {**TOY, "0.1/0.0": [" p" * 30, STOP]}
    shown = len(Player("multiverse", scripts).run().visible)
    for max_tokens in range(shown - 6, shown + 2):
        player = Player("multiverse", scripts, max_tokens=max_tokens, num_chunk=7)
        player.run(lambda nodes: nodes[0])
        assert len(player.visible) == min(shown, max_tokens)
        stops = max_tokens >= shown
        assert player.finish == (Finish("stop", STOP) if stops else Finish("length"))


def test_branches_behind_the_cut_are_dropped_once():
    player = Player("multiverse", {**TOY, "0.1/0.0": " p" * 500}, max_tokens=60)
    player.run_until(lambda: len(player.running) == 2)
    first, second = player.running
    while player.finish is None:
        player.step(first)
    assert len(player.visible) == 60 and player.finish == Finish("length")
    assert first.state is second.state is State.DROPPED
    assert not player.running
    assert player.group.take_dropped() == []


def test_conclusion_may_write_no_more_than_the_client_sees_INV4():
    player = Player("multiverse", TOY, max_tokens=60)
    player.run_until(lambda: player.group.nodes[-1].kind is Kind.CONCLUSION)
    conclusion = player.group.nodes[-1]
    before = sum(node.num_visible for node in player.group.nodes[:-1])
    assert conclusion.limit == 60 - before - len(player.vocabulary.encode("<Conclusion>\n"))


class TestStopToken:
    """A token of ``stop_token_ids`` ends the answer where it stands in the visible text."""

    SCRIPTS = {**TOY, "0.1/0.0": " p p p p\n</Path>", "0.1/1.0": [" q", STOP, " r"]}  # noqa: RUF012

    @pytest.mark.parametrize("order", [0, -1])
    def test_in_the_second_path_keeps_the_first_one_whole(self, order):
        player = Player("multiverse", self.SCRIPTS).run(lambda nodes: nodes[order])
        assert player.finish == Finish("stop", STOP)
        assert player.text.endswith("<Path>\n1: p p p p\n</Path>\n<Path>\n2: q")
        assert player.visible[-1] == STOP
        assert all(node.kind is not Kind.CONCLUSION for node in player.group.nodes)

    @pytest.mark.parametrize("order", [0, -1])
    def test_in_the_first_path_hides_the_second_one(self, order):
        scripts = {**TOY, "0.1/0.0": [" p", STOP]}
        player = Player("multiverse", scripts).run(lambda nodes: nodes[order])
        assert player.visible[-1] == STOP and player.text.endswith("<Path>\n1: p")
        assert player.finish == Finish("stop", STOP)

    def test_that_is_the_end_tag_itself_ends_the_answer(self):
        player = Player("multiverse", TOY)
        player.run_until(lambda: len(player.running) == 2)
        node = player.node("0.1/0.0")
        (tag,) = player.vocabulary.encode("</Path>")
        player.group.feed(node, tag)
        player.group.end(node, Cause.STOP_TOKEN, tag)
        assert node.tokens[-1] == tag
        assert player.node("0.1/1.0").state is State.DROPPED
        assert player.group.take_dropped() == [player.node("0.1/1.0")]

    @pytest.mark.parametrize("cause", [Cause.VERDICT, Cause.EOS, Cause.STOP_TOKEN])
    def test_branch_dropped_in_the_same_step_opens_nothing(self, cause):
        """Both branches were computed by one engine step; the later one ends behind the stop."""
        player = Player("multiverse", TOY)
        player.run_until(lambda: len(player.running) == 2)
        first, second = player.running
        player.group.feed(first, STOP)
        player.group.end(first, Cause.STOP_TOKEN, STOP)
        for token in player.vocabulary.encode(" q\n</Path>"):
            player.group.feed(second, token)
        player.group.end(second, cause)
        assert player.group.ready() == [first], "the stopped branch's K/V only"
        assert second.state is State.DROPPED

    def test_dropped_branch_stays_dropped_whatever_it_samples(self):
        player = Player("parallel-r1", R1_TOY)
        player.run_until(lambda: len(player.running) == 2)
        first, second = player.running
        player.group.feed(first, STOP)
        player.group.end(first, Cause.STOP_TOKEN, STOP)
        (tag,) = player.vocabulary.encode("</Path>")
        assert player.group.feed(second, tag) is Verdict.END
        assert second.state is State.DROPPED


def test_nested_block_comes_out_in_order_whoever_is_first():
    texts = {Player("multiverse", DEEP).run(lambda nodes, at=at: nodes[at]).text for at in (0, -1)}
    (text,) = texts
    inner = text.index("1.1: x"), text.index("1.2: y y y"), text.index("<Conclusion>\ni")
    assert list(inner) == sorted(inner)
    assert inner[-1] < text.index("<Path>\n2: q") < text.index("<Conclusion>\nc")


def test_paths_that_the_model_writes_itself_do_not_end_the_outer_path():
    """INV-4: at the deepest level a block is plain text, its inner end tags included."""
    sequential = NESTED + "\n<Path>\n1.1: a\n</Path>\n<Path>\n1.2: b\n</Path>\n<Conclusion>\n"
    sequential += "i\n</Conclusion>\n</Parallel>\n</Path>"
    for vocabulary in ALL:
        player = Player(
            "multiverse", {**TOY, "0.1/0.0": sequential}, vocabulary=vocabulary(), max_depth=1
        ).run()
        assert sequential + "\n<Path>\n2: q r s\n</Path>" in player.text
        assert player.summary["fallbacks"] == {"max_depth": 1}
        assert player.summary["forks"] == 1


OUTLINE_PATHS = "\n**1. Apples**\n\nThis one is red.\n\n**2. Pears**\n\nThis is green.\n"


@pytest.mark.parametrize("vocabulary", ALL)
def test_outline_paths_end_at_a_line_break(vocabulary):
    behind = {"0.0/0.0": " one is red.\n\nMore", "0.0/1.0": " is green.\nMore"}
    player = Player(VISIBLE, {**OUTLINE_TOY, **behind}, vocabulary=vocabulary()).run()
    assert player.text.endswith(OUTLINE_PATHS + "\nIn short, fruit.\n")
    assert player.summary["cut_paths"] == 0


def test_outline_path_keeps_what_stands_in_the_token_of_its_line_break():
    merged = Pieces(r"\.\n\n|.")
    scripts = {**OUTLINE_TOY, "0.0/0.0": " one is red.\n\nMore"}
    player = Player(VISIBLE, scripts, vocabulary=merged).run()
    assert "This one is red.\n\n\n**2. Pears**" in player.text
    assert player.summary["cut_paths"] == 0


def test_outline_path_that_ends_without_a_line_break_gets_one():
    scripts = {
        **OUTLINE_TOY,
        "0.0/0.0": [" one is red.", EOS],
        "0.0/1.0": " is green." + "!" * 200,
    }
    player = Player(VISIBLE, scripts, vocabulary=chars()).run()
    assert "This one is red.\n\n**2. Pears**\n\nThis is green.!!!" in player.text
    assert player.text.endswith("!\n\nIn short, fruit.\n")
    assert player.summary["cut_paths"] == 1


def test_outline_forks_at_the_end_of_sequence_and_when_the_outline_is_full():
    ended = {**OUTLINE_TOY, "0.0": [" Apples\n2. Pears", EOS], "0.1": [" fruit.", EOS]}
    player = Player(VISIBLE, ended).run()
    assert "2. Pears\n**1. Apples**\n\nThis one is red." in player.text
    assert player.visible.count(EOS) == 1, "only the one that ends the answer"
    full = {**OUTLINE_TOY, "0.0": " Apples\n2. Pears\n3. Plums\n\n"}
    player = Player(VISIBLE, full, max_paths=2).run()
    assert "2. Pears\n\n**1. Apples**\n\nThis one is red." in player.text
    assert "Plums" not in player.text


def test_grammar_that_forks_once_goes_on_as_text():
    """A conclusion with blank lines and a list of its own is no second outline (INV-4)."""
    scripts = {**OUTLINE_TOY, "0.1": " a:\n\n1. b\n2. c\n\nend"}
    player = Player(without_end(VISIBLE), scripts).run()
    assert player.summary["forks"] == 1
    assert player.summary["fallbacks"] == {}
    assert player.text.endswith("In short, a:\n\n1. b\n2. c\n\nend")


def with_end(name: str, *tags: str) -> Profile:
    """Return a built-in profile in which these tags end a conclusion, and with it the answer."""
    profile = load_profile(name)
    return replace(profile, join=replace(profile.join, end=tags))


def without_end(name: str) -> Profile:
    return with_end(name)


class TestConclusionEnd:
    """A tag of ``[join] end`` ends the answer, in a conclusion of the trunk and nowhere else."""

    @pytest.mark.parametrize("order", [0, -1])
    @pytest.mark.parametrize("num_chunk", [1, 3, 50])
    @pytest.mark.parametrize("vocabulary", ALL)
    def test_ends_the_answer_with_stop_and_nothing_behind_it(self, vocabulary, num_chunk, order):
        scripts = {**OUTLINE_TOY, "0.1": " fruit.\nMore\n\n1. a\n2. b\n\n"}
        player = Player(VISIBLE, scripts, vocabulary=vocabulary(), num_chunk=num_chunk)
        player.run(lambda nodes: nodes[order])
        assert player.text.endswith(OUTLINE_PATHS + "\nIn short, fruit.\n")
        assert player.finish == Finish("stop", None)
        assert EOS not in player.visible
        group = player.group
        assert group.finished and list(group.release()) == []
        assert group.ready() == [] and not player.running
        assert player.summary["forks"] == 1 and player.summary["fallbacks"] == {}

    def test_is_visible_with_all_of_its_token(self):
        scripts = {**OUTLINE_TOY, "0.1": " fruit.\n\nMore"}
        player = Player(VISIBLE, scripts, vocabulary=Pieces(r"\.\n\n|.")).run()
        assert player.text.endswith("In short, fruit.\n\n")
        assert player.finish == Finish("stop")

    def test_end_of_sequence_still_ends_an_answer_without_the_tag(self):
        player = Player(VISIBLE, {**OUTLINE_TOY, "0.1": [" fruit.", EOS]}).run()
        assert player.text.endswith("In short, fruit.")
        assert player.finish == Finish("stop") and player.visible[-1] == EOS

    def test_stop_token_in_front_of_it_keeps_its_reason(self):
        player = Player(VISIBLE, {**OUTLINE_TOY, "0.1": [" fruit", STOP, ".\n"]}).run()
        assert player.finish == Finish("stop", STOP)

    def test_conclusion_cut_in_front_of_it_finishes_with_length(self):
        full = Player(VISIBLE, OUTLINE_TOY).run()
        length = len(full.visible)
        for max_tokens in range(length - 3, length + 2):
            player = Player(VISIBLE, OUTLINE_TOY, max_tokens=max_tokens).run()
            assert player.text == full.vocabulary.text(full.visible[:max_tokens])
            assert player.finish == Finish("length" if max_tokens < length else "stop")
        critical = full.summary["critical_path_tokens"]
        for budget in (critical - 1, critical, critical + 1):
            player = Player(VISIBLE, OUTLINE_TOY, critical_tokens=budget).run()
            assert player.finish == Finish("length" if budget < critical else "stop")

    @pytest.mark.parametrize("vocabulary", ALL)
    def test_in_a_nested_conclusion_or_a_path_ends_nothing(self, vocabulary):
        scripts = {**DEEP, "0.1/1.0": " q\n</Parallel>\n</Path>", "0.2": DEEP["0.2"] + "more"}
        plain = Player("multiverse", scripts, vocabulary=vocabulary()).run()
        ending = with_end("multiverse", "</Parallel>")
        player = Player(ending, scripts, vocabulary=vocabulary()).run()
        assert player.text.rstrip() == plain.text.removesuffix("more").rstrip()
        assert "<Conclusion>\ni\n</Conclusion>\n</Parallel>\n</Path>" in player.text
        assert player.text.rstrip().endswith("<Conclusion>\nc\n</Conclusion>\n</Parallel>")
        assert player.summary["forks"] == 2 and player.summary["cut_paths"] == 0
        assert player.finish == Finish("stop")

    def test_in_the_trunk_ends_nothing(self):
        ending = with_end("multiverse", "\n")
        player = Player(ending, TOY).run()
        assert player.text == TOY_TEXT[: TOY_TEXT.index("\n</Conclusion>") + 1]
        assert TOY_TEXT.index("\n") < TOY_TEXT.index("<Path>"), "the trunk has line breaks"
        text = "a\nb\n"
        assert Player(ending, {"0.0": text}).run().text == text, "an answer that never forks"

    def test_forced_text_does_not_count(self):
        """The conclusion's own start has the tag in it, and a part of it at its end."""
        player = Player(with_end("multiverse", "Conclusion>", ">\nc"), TOY).run()
        assert player.text == TOY_TEXT[: TOY_TEXT.index("</Conclusion>") + len("</Conclusion>")]

    def test_comes_before_a_fork_by_the_same_text(self):
        ending = with_end("multiverse", "</Goal>")
        player = Player(ending, {**TOY, "0.2": f"c {MULTIVERSE} more"}).run()
        assert player.text.endswith(f"<Conclusion>\nc {MULTIVERSE}")
        assert player.summary["forks"] == 1 and player.finish == Finish("stop")

    @pytest.mark.parametrize("join", ["kv", "reprefill"])
    def test_ends_the_answer_however_paths_are_joined(self, join):
        scripts = {**OUTLINE_TOY, "0.1": " fruit.\nMore"}
        player = Player(VISIBLE, scripts, join=join).run()
        assert player.text.endswith(OUTLINE_PATHS + "\nIn short, fruit.\n")
        assert player.finish == Finish("stop")

    @pytest.mark.parametrize("name", [name for name in TOYS if name != VISIBLE])
    def test_profile_without_one_goes_on(self, name):
        """Until the end of sequence, whatever ends its paths."""
        assert load_profile(name).join.end == ()
        (end,) = load_profile(name).path.end
        last = max(at for at in TOYS[name] if "/" not in at)
        scripts = {**TOYS[name], last: f"{TOYS[name][last]}{end} x\n\ny\n"}
        player = Player(name, scripts).run()
        assert player.text == Player(name, TOYS[name]).run().text + f"{end} x\n\ny\n"
        assert player.visible[-1] == EOS and player.finish == Finish("stop")
