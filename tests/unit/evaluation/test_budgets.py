"""What a method asks for within a budget, and what answers are found to have cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_server import completion
from vllm_parallel_think.core.config.request_options import REQUEST_KEYS
from vllm_parallel_think.evaluation.errors import ExamError
from vllm_parallel_think.evaluation.methods import BUILT_IN, Method, _read, load_methods
from vllm_parallel_think.evaluation.schedule import Closing, waves
from vllm_parallel_think.evaluation.sets import LoadedSet
from vllm_parallel_think.evaluation.token_usage import TokenUsage, summaries, usage_of


def one(name: str) -> Method:
    """Return a built-in method."""
    (method,) = load_methods([name])
    return method


def test_a_vote_of_n_gets_an_nth_each() -> None:
    for name, num in (("vote4", 4), ("vote8", 8), ("vote16", 16)):
        body = one(name).body("m", "p", 1600, 0)
        assert body["max_tokens"] == body["vllm_xargs"]["pt_path_tokens"] == 1600 // num
        assert body["vllm_xargs"]["pt_num_paths"] == num
    for name, num in (("sc4", 4), ("sc8", 8), ("sc16", 16)):
        body = one(name).body("m", "p", 1600, 0)
        assert (body["n"], body["max_tokens"]) == (num, 1600 // num)


def test_no_limit_of_a_built_in_method_is_over_its_budget() -> None:
    for method in load_methods(list(_read(BUILT_IN)["methods"])):
        options = method.engine_options
        assert set(options) <= set(REQUEST_KEYS), method.name
        body = method.body("m", "p", 960, 0)
        limits = body.get("vllm_xargs", {})
        num = options.get("pt_num_paths") or options.get("pt_num_workers") or 1
        branches = limits.get("pt_path_tokens") or limits.get("pt_worker_tokens") or 0
        assert num * branches + limits.get("pt_summary_tokens", 0) <= 960, method.name
        assert body["max_tokens"] * method.num_choices <= 960
    assert one("parathinker4").limits(1000) == {
        "max_tokens": 1000,
        "pt_path_tokens": 187,
        "pt_summary_tokens": 250,
    }


def test_methods_by_name_group_and_change() -> None:
    methods = load_methods(["hogwild", "chain+pt_judge=false", "chain", "chain+top_k=5", "chain"])
    names = ["hogwild2", "hogwild4", "chain+pt_judge=false", "chain", "chain+top_k=5"]
    assert [method.name for method in methods] == names
    assert methods[2].engine_options == {"parallel_think": "off", "pt_judge": False}
    assert methods[3].engine_options == {"parallel_think": "off"}
    assert methods[4].request["top_k"] == 5 and methods[4].request["top_p"] == 0.95
    joined = one("parathinker-text4+pt_join=reprefill")
    assert joined.engine_options["pt_join"] == "reprefill"
    fixed = one("hogwild2+pt_worker_tokens=7").body("m", "p", 100, 0)
    assert fixed["vllm_xargs"]["pt_worker_tokens"] == 7


def test_the_suffix_stands_behind_the_prompt() -> None:
    with_words, without = one("multiverse"), one("multiverse-zero")
    assert with_words.body("m", "p", 9, 0)["messages"][0]["content"].startswith("p\nThink step")
    assert without.body("m", "p", 9, 0)["messages"][0]["content"] == "p"
    assert with_words.request == without.request


def test_methods_of_a_users_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    lines = ["[defaults.request]", "temperature = 1.0", "[methods]"]
    file.write_text("\n".join([*lines, 'mine = { shares = { max_tokens = "1/3" } }']))
    mine, chain = load_methods(["mine", "chain"], file)
    assert mine.limits(100) == {"max_tokens": 33} and chain.request["temperature"] == 1.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[methods]\nm = { shares = { pt_path_tokens = 2 } }", "at most 1, is 2"),
        ("[methods]\nm = { shares = { top_k = 1 } }", "'top_k' is no limit"),
        ('[methods]\nm = { shares = { max_tokens = "x" } }', "shares"),
        ("[methods]\nm = { request = { seed = 1 } }", "'seed' of a request is set by the exam"),
        ("[methods]\nm = { words = 1 }", "unknown key 'words'; allowed: request, shares, suffix"),
        ("[methods", "mine.toml"),
    ],
)
def test_lines_that_are_wrong(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ExamError, match=says):
        load_methods(["m"], file)


@pytest.mark.parametrize("name", ["chains", "chain+x", "chain+seed=3", ""])
def test_names_that_are_wrong(name: str) -> None:
    with pytest.raises(ExamError, match="--methods"):
        load_methods([name])


def summed(generated: int, critical: int, **others: Any) -> dict[str, Any]:
    """Return an engine's summary."""
    return {"generated_tokens": generated, "critical_path_tokens": critical, **others}


@pytest.mark.parametrize(
    ("response", "usage"),
    [
        (completion("a", tokens=7), TokenUsage(7, 7)),
        (
            # A vote shows one path of four: `usage` knows that one only.
            completion(
                "a",
                tokens=20,
                kv_transfer_params={
                    "parallel_think": summed(80, 21, forced_tokens=4, forks=1, paths=4)
                },
            ),
            TokenUsage(80, 21, 4, 1, 4),
        ),
        (completion("a", "b", tokens=7), TokenUsage(14, None, forks=1, paths=2)),
        (
            completion(
                "a",
                "b",
                kv_transfer_params={"parallel_think": [summed(80, 21), summed(30, 30)]},
            ),
            TokenUsage(110, 30, forks=1, paths=2),
        ),
        (
            completion("a", "b", kv_transfer_params={"parallel_think": [summed(80, 21), None]}),
            TokenUsage(20, None, forks=1, paths=2),
        ),
        (completion("a", kv_transfer_params=None), TokenUsage(10, 10)),
    ],
)
def test_tokens_of_canned_responses(response: dict[str, Any], usage: TokenUsage) -> None:
    assert usage_of(response) == usage


def test_choices_whose_tokens_are_known_have_a_critical_path() -> None:
    response = completion("a", "b", tokens=7)
    for choice, length in zip(response["choices"], (4, 10), strict=True):
        choice["token_ids"] = list(range(length))
    assert usage_of(response) == TokenUsage(14, 10, forks=1, paths=2)
    assert summaries(response) == [None, None]


def test_what_follows_adds_to_both() -> None:
    assert TokenUsage(80, 20, 1, 1, 4).then(TokenUsage(5, 5)) == TokenUsage(85, 25, 1, 1, 4)
    assert TokenUsage(80, None).then(TokenUsage(5, 5)) == TokenUsage(85, None)


def test_a_closing_is_paid_from_the_budget(five: LoadedSet) -> None:
    closing = Closing("So: ", 16)
    (wave, *_) = waves([five], [one("sc4")], [400], 1, [1], closing)
    assert wave[0].body("m")["max_tokens"] == (400 - 4 * 16) // 4
    assert Closing().left_of(400, 4) == 400


def test_one_at_a_time_methods_take_turns(five: LoadedSet) -> None:
    methods = load_methods(["greedy", "chain", "sc4"])
    found = [wave for wave in waves([five], methods, [100], 2, [1], Closing())]
    assert all(len(wave) == 1 for wave in found)
    first = [(wave[0].problem.key[-1], wave[0].method.name) for wave in found[:6]]
    assert [problem for problem, _ in first] == list("000111")
    assert [name for _, name in first] == ["greedy", "chain", "sc4", "chain", "sc4", "greedy"]
    # Another seed would not change a greedy answer.
    assert sum(wave[0].method.name == "greedy" for wave in found) == 5
    assert len({wave[0].key for wave in found}) == len(found) == 25


def test_at_more_a_wave_is_of_one_method(five: LoadedSet) -> None:
    methods = load_methods(["chain", "sc4"])
    found = list(waves([five], methods, [100, 200], 1, [16, 1], Closing()))
    assert [len(wave) for wave in found[:4]] == [5, 5, 5, 5]
    assert all(len({task.method.name for task in wave}) == 1 for wave in found)
    assert sum(len(wave) for wave in found) == 2 * 2 * 2 * 5
