"""Hogwild's pure parts: recipes, steps' ends, what a row sees, the life of a group."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.support.hogwild_player import GOOD, Play
from tests.support.vocabularies import Bytes, chars
from vllm_parallel_think.core.branch_graph import State
from vllm_parallel_think.core.config import hogwild_profile as recipe_module
from vllm_parallel_think.core.config.hogwild_profile import Check, Ending, HogwildProfile, Workers
from vllm_parallel_think.core.config.loading import load_profile, parse_profile
from vllm_parallel_think.core.config.request_options import RequestOptions, parse_request
from vllm_parallel_think.core.config.server_options import ServerOptions
from vllm_parallel_think.core.errors import OptionError
from vllm_parallel_think.core.hogwild.cache_layout import ANSWER, OTHERS, OWN, CacheLayout, Run
from vllm_parallel_think.core.hogwild.prompts import HogwildPrompts
from vllm_parallel_think.core.hogwild.step_boundary import StepText
from vllm_parallel_think.core.interface import Finish


@pytest.mark.parametrize("name", ["hogwild", "hogwild-think"])
def test_built_in_recipes_load(name: str) -> None:
    recipe = load_profile(name)
    assert isinstance(recipe, HogwildProfile)
    assert recipe.name == name
    assert len(recipe.workers.names) == recipe_module.MAX_WORKERS


def test_every_key_of_a_recipe_is_documented() -> None:
    folder = Path(recipe_module.__file__).parents[2] / "profiles"
    text = (folder / "README.md").read_text("utf-8").partition("## Profiles with workers")[2]
    for kind in (HogwildProfile, Workers, Check, Ending):
        for field in fields(kind):
            assert f"`{field.name}`" in text or f"`[{field.name}]`" in text, field.name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('names = ["A", "B", "C"]', 'names = "A"', "names must list between num_workers"),
        ('names = ["A", "B", "C"]', "names = [1, 2]", "names must be texts"),
        ('step = "{name}{number}:"', "", "step must not be empty"),
        ("every = 12", "every = -1", r"\[check\] every must be at least 0"),
        ("every = 12", "every = true", "every must be a whole number"),
        ('text = "?"', "", "text must not be empty"),
        ('forced = "="', "", "missing key"),
        ('forced = "="', "forced = [1.5]", "forced must be text or token ids"),
        ("max_tokens = 3", "max_tokens = 0", r"\[answer\] max_tokens must be at least 1"),
        ("[check]", 'layout = "spiral"\n[check]', "layout must be one of combined, interleaved"),
        ("[check]", "colour = 1\n[check]", "unknown key 'colour'"),
        ("[answer]", "[other]", r"table \[answer\] is missing"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(old: str, new: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_profile(GOOD.replace(old, new), "toy.toml")


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    recipe = parse_profile(GOOD.replace('forced = "="', "forced = [999]"), "toy.toml")
    with pytest.raises(OptionError, match="token id 999 is outside the vocabulary of 500"):
        HogwildPrompts(recipe, chars()).check(500)


def test_an_end_of_several_tokens_is_refused() -> None:
    recipe = parse_profile(GOOD.replace("[check]", 'end = "ab"\n[check]'), "toy.toml")
    with pytest.raises(OptionError, match="'ab' is not one token"):
        HogwildPrompts(recipe, chars())


PROFILES = {"toy": parse_profile(GOOD, "toy.toml"), "multiverse": load_profile("multiverse")}


def parse(server: ServerOptions | None = None, **extra: Any) -> RequestOptions:
    return parse_request(
        {"parallel_think": "toy", **extra}, server or ServerOptions(), PROFILES, "off"
    )


def test_keys_of_workers() -> None:
    options = parse(pt_num_workers=3, pt_layout="contiguous", pt_check_every=0, pt_worker_tokens=5)
    assert (options.num_workers, options.layout) == (3, "contiguous")
    assert (options.check_every, options.worker_tokens) == (0, 5)
    assert parse().num_workers is None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"pt_num_workers": 1}, "pt_num_workers must be a whole number between 2 and 3"),
        ({"pt_num_workers": 4}, "between 2 and 3"),
        ({"pt_layout": "spiral"}, "pt_layout must be one of combined, interleaved, contiguous"),
        ({"pt_check_every": -1}, "pt_check_every must be a whole number"),
        ({"pt_worker_tokens": 0}, "pt_worker_tokens must be a whole number"),
        ({"pt_path_tokens": 5}, "pt_path_tokens means nothing to the workers of 'toy'"),
        ({"pt_vote": True}, "pt_vote needs a profile that forks at the start"),
        ({"parallel_think": "multiverse", "pt_layout": "combined"}, "needs a profile with workers"),
    ],
)
def test_wrong_keys_say_what_is_allowed(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse(**extra)


def test_a_server_that_cannot_run_workers_says_why() -> None:
    with pytest.raises(OptionError, match="drop --speculative-config"):
        parse_request(
            {"parallel_think": "toy"},
            ServerOptions(),
            PROFILES,
            "off",
            no_workers="drop --speculative-config",
        )


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("So it is 4.\n\n", True),
        ("So it is 4.\n \n", True),
        ('He said "no".\n\n', True),
        ("**Done.**\n\n", True),
        ("Is it?\n\n", True),
        ("The cases:\n\n", True),
        ("是的。\n\n", True),
        ("So it is 4.\n", False),
        ("So it is\n\n", False),
        ("\n\n", False),
        ("```\na = 1.\n\n", False),
        ("```\na = 1.\n\n```\n\n", True),
        ("$$ a = 1.\n\n", False),
        ("$$ a = 1 $$\n\n", True),
        ("\\[ a = 1.\n\n", False),
        ("\\[ a = 1 \\]\n\n", True),
        ("It costs $5.\n\n", True),
    ],
)
def test_a_step_ends_at_a_blank_line_behind_a_sentence(text: str, ends: bool) -> None:
    for size in (1, 2, 3, len(text)):
        step = StepText()
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        seen = [step.feed(piece) for piece in pieces]
        assert seen[-1] is ends, size


def lengths(team: CacheLayout, role: int, live: dict[int, int]) -> list[tuple[int, int, int]]:
    turned = team.view(role, lambda r: Run((r,), live.get(r, 0), r))
    return [(part.run.role, part.run.length, part.shift) for part in turned]


def test_layouts_place_every_run() -> None:
    history = (Run((1,), 5, 0), Run((2,), 7, 1), Run((3,), 2, 0))
    headers = {OTHERS: Run((4,), 3, OTHERS), OWN: Run((5,), 4, OWN)}
    team = CacheLayout("combined", Run((0,), 10), history, headers, {0: "a", 1: "b", 2: "c"})
    live = {0: 6, 1: 8, 2: 9}
    order = [(ANSWER, 10), (0, 5), (1, 7), (0, 2), (OTHERS, 3), (0, 6), (2, 9), (OWN, 4), (1, 8)]
    seen = lengths(team, 1, live)
    assert [(role, length) for role, length, _ in seen] == order
    place = 0
    for _, length, shift in seen:
        assert shift == sum(n for _, n in order[:-1]) - place or length == 8
        place += length
    assert seen[-1][2] == 0

    team.layout = "interleaved"
    order = [(ANSWER, 10), (0, 5), (1, 7), (0, 2), (1, 8)]
    assert [part[:2] for part in lengths(team, 1, live)] == order

    team.layout = "contiguous"
    order = [(ANSWER, 10), (OTHERS, 3), (0, 5), (0, 2), (0, 6), (2, 9), (OWN, 4), (1, 7), (1, 8)]
    assert [part[:2] for part in lengths(team, 1, live)] == order


def test_headers_see_the_prompt_and_empty_runs_are_left_out() -> None:
    team = CacheLayout("combined", Run((0,), 10), (), {}, {OTHERS: "h", 0: "a", 1: "b"})
    assert lengths(team, OTHERS, {OTHERS: 3}) == [(ANSWER, 10, 10), (OTHERS, 3, 0)]
    assert [p[0] for p in lengths(team, 0, {OTHERS: 3, 0: 2})] == [ANSWER, OTHERS, 0]


def test_steps_are_shown_in_order_of_completion() -> None:
    play = Play()
    play.say("yes it is so.", "ok.\n\nand more")
    assert play.seen == "B1:ok.\n\n"
    play.say("\n\n", "s.")
    assert play.seen == "B1:ok.\n\nA1:yes it is so.\n\n"
    roles = [play.group.roles[node] for node in play.group.history]
    assert roles == [1, 0]
    carried = play.group.live[0].tokens[0]
    assert play.vocabulary.text([carried]) == "\n", "the token without K/V starts the next step"


@pytest.mark.parametrize("order", [(0, 1, ANSWER), (1, 0, ANSWER)])
def test_steps_that_end_together_are_ordered_by_worker(order: tuple[int, ...]) -> None:
    play = Play()
    for one in "a.\n\n":
        play.step(order, w0=one, w1=one)
    assert play.seen == "A1:a.\n\nB1:a.\n\n"


def test_the_check_goes_to_the_next_that_ends_a_step() -> None:
    play = Play()
    play.say("abc.\n\n", "someth")
    assert play.group.live[0].tokens[-1:] == play.vocabulary.encode("?"), "12 tokens were written"
    play.say("no. well", "yes i am")
    assert play.group.summary().as_dict()["hogwild"]["checks_no"] == 1
    assert play.group.summary().as_dict()["hogwild"]["checks_yes"] == 0


def test_a_mark_ends_the_work() -> None:
    play = Play()
    play.say("it is 15!.\n\n"[:9], "never see")
    play.say(".\n\n", "n ?") if play.group.finish is None else None
    group = play.group
    assert group.finished
    assert group.finish is not None and group.finish.reason == "stop"
    assert play.seen == "A1:it is 15!.\n\n"
    assert group.live == {}


def test_a_mark_ends_the_work_in_the_same_step_as_another_ones_end() -> None:
    play = Play()
    play.say("ab!\n", "it i")
    play.step(w0=" ", w1="s")
    play.step(w0="\n", w1=None)
    assert play.seen == "A1:ab!\n \nB1:it is"
    assert play.group.finished


def test_a_worker_that_ends_its_text_without_a_mark_only_stops() -> None:
    """The others go on, and what they write is not glued to its unfinished step."""
    play = Play(worker_tokens=40, check_every=0)
    play.say("ab.\n\n it is", "it is 4 and")
    play.step(w0=None, w1=" ")
    assert not play.group.finished
    assert play.seen == "A1:ab.\n\nA2: it is\n\n"
    play.step(w1="5")
    assert list(play.group.live) == [1], "what closes a step is one more step of the engine"
    for char in ".\n\nok.\n\n":
        play.step(w1=char)
    assert play.seen == "A1:ab.\n\nA2: it is\n\nB1:it is 4 and 5.\n\nB2:ok.\n\n"
    play.step(w1=None)
    assert play.seen.endswith("B2:ok.\n\nB3:="), "all stopped: the answer is forced"
    play.step(answer="5")
    play.step(answer=None)
    assert play.group.finish == Finish("stop")


def test_without_marks_whoever_ends_the_text_has_answered() -> None:
    play = Play(recipe=GOOD.replace('marks = ["!"]', ""))
    play.say("ab.", "it ")
    play.step(w0=None, w1="i")
    assert play.group.finished and play.seen == "A1:ab."


def test_a_mark_in_an_unfinished_step_counts_where_the_text_ends() -> None:
    play = Play()
    play.say("ab!", "it ")
    play.step(w0=None, w1="i")
    assert play.group.finished and play.seen == "A1:ab!"


def test_the_budget_forces_an_answer_over_everything() -> None:
    play = Play(worker_tokens=4)
    play.say("abcd", "efgh")
    assert [node.state for node in play.group.live.values()] == [State.CLOSING] * 2
    play.step()
    assert play.seen == "A1:abcd\n\n"
    play.step()
    assert play.seen == "A1:abcd\n\nB1:efgh="
    texts = [play.vocabulary.text(node.tokens) for node in play.group.history]
    assert texts == ["A1:abcd", "\n\n", "B1:efgh"], "in the K/V as in the text"
    play.step(answer="1")
    play.step(answer="5")
    play.step(answer=None)
    assert play.seen == "A1:abcd\n\nB1:efgh=15"
    summary = play.group.summary().as_dict()
    assert summary["generated_tokens"] == 10
    assert summary["critical_path_tokens"] == 6
    assert summary["hogwild"]["workers"][1] == {"name": "B", "steps": 1, "tokens": 4}


def test_a_step_that_is_cut_by_its_own_limit_is_closed_and_goes_on() -> None:
    play = Play(recipe=GOOD.replace("[check]", "max_step_tokens = 3\n[check]", 1))
    for _ in range(12):
        play.step()
    assert play.seen.startswith("A1:xxx\n\nB1:xxx\n\nA2:")
    assert "xA" not in play.seen and "xB" not in play.seen
    history = [play.vocabulary.text(node.tokens) for node in play.group.history]
    assert history[:4] == ["A1:xx", "x\n\n", "B1:xx", "x\n\n"]


@pytest.mark.parametrize("close", ['"|"', '""'])
def test_a_recipe_says_what_closes_a_step(close: str) -> None:
    play = Play(recipe=GOOD.replace("[check]", f"close = {close}\n[check]", 1), worker_tokens=2)
    play.say("ab", "cd")
    play.step()
    if ANSWER not in play.group.live:
        play.step()
    assert play.seen == f"A1:ab{close[1:-1]}B1:cd="


def test_answers_of_workers_are_as_long_as_was_asked_for() -> None:
    for bounds in ({"min_tokens": 60}, {"ignore_eos": True}):
        play = Play(max_tokens=80, worker_tokens=12, **bounds)
        play.say("it is !.\n\n", "so it is !")
        assert not play.group.finished, "a mark does not end it"
        while ANSWER not in play.group.live:
            play.step()
        node = play.group.live[ANSWER]
        shown = len(play.seen)
        assert node.least == max(0, play.limits.min_tokens - shown)
        for _ in range(200):
            if play.group.finished:
                break
            play.step()
        assert len(play.seen) == (60 if "min_tokens" in bounds else 80)
        assert play.group.finish == Finish("length")


def test_a_mark_counts_once_the_answer_is_long_enough() -> None:
    play = Play(min_tokens=20, check_every=0)
    text = "it is!.\n\n12 so!.\n\n"
    play.say(text, "x" * len(text))
    assert play.group.finished
    assert play.seen == "A1:it is!.\n\nA2:12 so!.\n\n"


@pytest.mark.parametrize("budget", range(1, 10))
def test_workers_are_cut_between_characters(budget: int) -> None:
    text = "é€😀".encode()
    play = Play(worker_tokens=budget, vocabulary=Bytes())
    while ANSWER not in play.group.live:
        live = play.group.live
        play.step(**{f"w{w}": text[(len(live[w].tokens) - 3) % 9] for w in (0, 1) if w in live})
    assert "\ufffd" not in play.seen
    for worker in play.group.writers:
        assert budget <= worker.num_sampled <= budget + 3


def test_a_sentence_may_end_with_a_character_of_several_tokens() -> None:
    play = Play(vocabulary=Bytes())
    for byte in "是。\n\n".encode():
        play.step(w0=byte, w1="x")
    assert play.group.writers[0].num_steps == 1


@pytest.mark.parametrize("limits", [{"max_tokens": 60}, {"context": 96}])
def test_room_for_the_answer_is_kept(limits: dict[str, int]) -> None:
    play = Play(worker_tokens=500, **limits)
    for _ in range(200):
        if play.group.finished:
            break
        play.step()
    group = play.group
    assert group.finished and "=" in play.seen
    assert len(play.seen) <= limits.get("max_tokens", 96)
    tokens = sum(len(n.tokens) for n in group.nodes if n.state is not State.DROPPED)
    assert tokens <= limits.get("context", 1024)
