"""Positions, visibility and text of each grammar, as its training code has them (INV-2)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.player import Player
from tests.support.samples import (
    DEEP,
    NPR_TOY,
    OUTLINE_TOY,
    R1_TOY,
    TEXTS,
    THREADS_TOY,
    TOY,
    TOYS,
    VISIBLE,
)
from vllm_parallel_think.core.branch_graph import Kind
from vllm_parallel_think.core.config.loading import load_profile
from vllm_parallel_think.core.config.profile import Profile


def pairs(text: str) -> list[tuple[str, int]]:
    """Read ``piece@position`` pairs; ``NL`` is a line break and ``_`` a blank."""
    items = [item.rsplit("@", 1) for item in text.split()]
    names = {"NL": "\n"}
    return [(names.get(piece, piece.replace("_", " ")), int(at)) for piece, at in items]


def after(player: Player, base: int, *addresses: str) -> list[tuple[str, int]]:
    return [(piece, at - base) for piece, at in player.placed(*addresses)]


def position_of(player: Player, piece: str) -> int:
    (position,) = [at for found, at in player.placed() if found == piece]
    return position


def test_multiverse_toy_has_the_training_positions_INV2():
    player = Player("multiverse", TOY).run()
    g = position_of(player, "</Goal>")
    assert after(player, g, "0.1") == pairs("</Goal>@0 NL@1")
    path = pairs("<Path>@1 NL@2 1@3 :@4 _p@5 NL@6 </Path>@7 NL@8")
    assert after(player, g, "0.1/0.0", "0.1/0.1") == path
    path = pairs("<Path>@1 NL@2 2@3 :@4 _q@5 _r@6 _s@7 NL@8 </Path>@9 NL@10")
    assert after(player, g, "0.1/1.0", "0.1/1.1") == path
    assert after(player, g, "0.2")[:6] == pairs(
        "<Conclusion>@10 NL@11 c@12 NL@13 </Conclusion>@14 NL@15"
    )
    assert after(player, g, "0.2")[6:] == pairs("</Parallel>@16 NL@17 text@18")


def test_multiverse_conclusion_follows_the_longest_path_wherever_it_stands_INV2():
    scripts = {**TOY, "0.1/0.0": " p p p p\n</Path>", "0.1/1.0": " q\n</Path>"}
    player = Player("multiverse", scripts).run()
    g = position_of(player, "</Goal>")
    assert position_of(player, "<Conclusion>") == g + 11
    assert after(player, g, "0.1/1.1") == pairs("</Path>@7 NL@8")


def test_multiverse_nested_conclusion_moves_on_from_the_longest_inner_path_INV2():
    player = Player("multiverse", DEEP).run()
    base = player.node("0.1/0.1").start  # </Goal> of the inner block
    inner = after(player, base, "0.1/0.1/1.0", "0.1/0.1/1.1")
    assert inner[0] == ("<Path>", 1)
    assert inner[-2:] == pairs("</Path>@11 NL@12")
    assert after(player, base, "0.1/0.2")[0] == ("<Conclusion>", 12)
    closing = player.node("0.1/0.3")
    assert player.node("0.2").start == closing.start + 1, "the outer one counts the inner path"


def test_npr_has_the_training_positions_and_no_outer_tag_INV2():
    player = Player("npr", NPR_TOY).run()
    g = position_of(player, "</guideline>")
    head = pairs("<step>@1 NL@2 1@3 :@4 _p@5 _p@6 _p@7 NL@8 </step>@9 NL@10")
    assert after(player, g, "0.1/0.0", "0.1/0.1") == head
    assert after(player, g, "0.1/1.0")[0] == ("<step>", 1)
    assert after(player, g, "0.2")[:3] == pairs("<takeaway>@10 NL@11 c@12")


def test_parallel_r1_has_the_training_positions_INV2():
    player = Player("parallel-r1", R1_TOY, prompt="").run()
    assert player.placed() == [
        *pairs("q@0 _a@1 <Parallel>@2"),
        *pairs("<Path>@3 NL@4 _p@5 NL@6 </Path>@7"),
        *pairs("<Path>@3 NL@4 _r@5 _s@6 _t@7 NL@8 </Path>@9"),
        *pairs("</Parallel>@10 NL@11 <Summary>@12 c@13 </Summary>@14 _end@15"),
    ]


def test_threadweaver_joins_on_one_linear_copy_INV2():
    player = Player("threadweaver", THREADS_TOY).run()
    parent = player.node("0.0")
    second = player.node("0.0/1.0")
    assert second.start == parent.end, (
        "a path starts right behind the outlines, line break included"
    )
    assert second.num_hidden == 1, "only the first thread keeps that line break in the answer"
    joined = player.node("0.1")
    assert joined.prefix == (parent,)
    assert joined.start == parent.end
    copies = player.vocabulary.text(joined.tokens[: joined.num_hidden])
    assert copies == "\n<Thread>\n1: p</Thread><Thread>\n2: q r</Thread>"
    shown = after(player, parent.end, "0.1")
    assert shown == pairs("NL@14 </Parallel>@15 NL@16 _e@17")
    assert all(player.group.nodes[i].retired for i in (1, 2))


def test_outline_paths_follow_the_outline_and_the_conclusion_the_longest_path_INV2():
    player = Player(VISIBLE, OUTLINE_TOY).run()
    end = player.node("0.0").end
    paths = [player.node("0.0/0.0"), player.node("0.0/1.0")]
    assert [path.start for path in paths] == [end, end]
    assert player.node("0.1").start == max(path.end for path in paths)


@pytest.mark.parametrize("name", TOYS)
def test_visible_text_is_the_grammars_own_form(name):
    player = Player(name, TOYS[name]).run()
    assert player.text == TEXTS[name]
    assert player.finish is not None and player.finish.reason == "stop"
    assert player.summary["cut_paths"] == 0


def test_siblings_are_hidden_and_a_conclusion_sees_everything_INV2():
    player = Player("multiverse", DEEP).run()
    nodes = list(player.group.nodes)
    for node in nodes:
        if node.kind is Kind.PATH:
            assert not any(seen.lane.fork is node.lane.fork for seen in node.prefix)
    outer = player.node("0.2")
    assert list(outer.prefix) == [node for node in nodes if node is not outer]
    inner = player.node("0.1/0.2")
    hidden = [node for node in nodes if node not in inner.prefix and node is not inner]
    assert {node.lane for node in hidden} == {player.node("0.1/1.0").lane, outer.lane, inner.lane}
    assert all(node.index > inner.index or node.depth for node in hidden)


@pytest.mark.parametrize("name", ["multiverse", "npr", VISIBLE])
def test_join_can_be_a_causal_copy_for_any_grammar_INV2(name):
    plain = Player(name, TOYS[name]).run()
    linear = Player(name, TOYS[name], join="reprefill").run()
    assert linear.text == plain.text
    conclusion = linear.group.nodes[-1]
    copied = linear.vocabulary.text(conclusion.tokens[: conclusion.num_hidden])
    parent = conclusion.prefix[-1]
    assert conclusion.prefix == (*parent.prefix, parent)
    assert conclusion.start == parent.end
    assert plain.text.startswith(
        linear.vocabulary.text([t for n in conclusion.prefix for t in n.tokens])[1:] + copied
    )
    same = ("generated_tokens", "forced_tokens", "critical_path_tokens")
    assert [linear.summary[key] for key in same] == [plain.summary[key] for key in same]


def test_nested_causal_copies_hold_every_inner_token_once_INV2():
    linear = Player("multiverse", DEEP, join="reprefill").run()
    plain = Player("multiverse", DEEP).run()
    assert linear.text == plain.text
    outer = linear.node("0.2")
    seen = [token for node in outer.prefix for token in node.tokens] + outer.tokens
    assert linear.vocabulary.text(seen) == "Q" + plain.text


def test_figures_of_the_toy():
    summary = Player("multiverse", TOY).run().summary
    assert summary["forks"] == 1 and summary["paths"] == 2 and summary["depth"] == 1
    trunk, short, long, conclusion = 23, 3, 5, 7
    assert summary["generated_tokens"] == trunk + short + long + conclusion
    assert summary["critical_path_tokens"] == trunk + long + conclusion
    assert summary["forced_tokens"] == 1 + 5 + 5 + 2
    assert summary["parallelism_ratio"] == round(38 / 35, 4)


def test_reused_tokens_are_those_in_front_of_each_branch():
    player = Player("multiverse", TOY).run()
    prefixes = (len(seen.tokens) for node in player.group.nodes for seen in node.prefix)
    assert player.summary["reused_kv_tokens"] == sum(prefixes)


def test_padding_of_a_prefix_fills_blocks_and_brings_no_new_token():
    player = Player("multiverse", TOY, block_size=4).run()
    conclusion = player.node("0.2")
    padded = player.group.padded_prefix(conclusion)
    assert len(padded) == 4 * sum(map(player.group.blocks_of, conclusion.prefix))
    assert set(padded) == {token for node in conclusion.prefix for token in node.tokens}


def with_rules(name: str, **rules: dict[str, object]) -> Profile:
    """Return a built-in profile with keys of its [path] or [join] changed."""
    profile = replace(load_profile(name), max_depth=1)
    changed = {table: replace(getattr(profile, table), **keys) for table, keys in rules.items()}
    return replace(profile, **changed)


def test_paths_in_a_stride_start_further_and_further_on_INV2():
    player = Player(with_rules("parallel-r1", path={"stride": 100}), R1_TOY, prompt="").run()
    assert player.node("0.0/0.0").start == 3
    assert player.node("0.0/1.0").start == 103
    assert player.node("0.1").start == player.node("0.0/1.0").end, "behind the furthest one"


def test_conclusion_may_stand_behind_the_total_of_all_paths_INV2():
    profile = with_rules("multiverse", join={"position": "total"})
    player = Player(profile, TOY).run()
    g = position_of(player, "</Goal>")
    # Seven tokens of the first path up to its end tag, nine of the second one.
    assert after(player, g, "0.2")[0] == ("<Conclusion>", 1 + 7 + 9)


@pytest.mark.parametrize(("index_blocks", "forks"), [(58, 0), (80, 1)])
def test_no_fork_whose_last_path_would_leave_the_models_length_INV4(index_blocks: int, forks: int):
    profile = with_rules("parallel-r1", path={"stride": 200})
    scripts = {**R1_TOY, "0.0/1.0": " t" * 500, "0.1": " c" * 500}
    player = Player(profile, scripts, index_blocks=index_blocks).run()
    assert player.summary["forks"] == forks
    assert player.summary["fallbacks"] == ({} if forks else {"max_model_len": 1})
    last = max(position for _, position in player.placed())
    assert last < index_blocks * player.block_size or not forks


def test_positions_of_a_stride_are_no_spent_tokens():
    scripts = {**R1_TOY, "0.1": "c</Summary> q<Parallel>", "0.1/0.0": " p</Path>"}
    profile = with_rules("parallel-r1", path={"stride": 1000})
    player = Player(profile, scripts, max_tokens=500).run()
    assert player.summary["forks"] == 2
    assert player.summary["fallbacks"] == {}
