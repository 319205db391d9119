"""Workers that see each other write, through a real server: text, stream, figures, reasoning."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import FRUITS, MODEL_NAME, Answer, Server

WORKERS = {"parallel_think": "hogwild", "pt_num_workers": 3, "pt_worker_tokens": 60}
HEADING = re.compile(r"\*\*(Alice|Bob|Carol) \[(\d+)\]:\*\* ")


@pytest.fixture(scope="module")
def together(server: Server) -> Answer:
    """A greedy answer of three workers, in one piece."""
    (answer,) = server.ask(vllm_xargs=WORKERS, max_tokens=600)
    return answer


def test_steps_carry_their_workers_names(together: Answer) -> None:
    found = HEADING.findall(together.text)
    figures = together.summary["hogwild"]
    assert together.text.startswith("**")
    assert {name for name, _ in found} == {"Alice", "Bob", "Carol"}
    # A small model also writes such headings by itself: there may be more.
    for worker in figures["workers"]:
        numbers = {int(number) for name, number in found if name == worker["name"]}
        assert numbers >= set(range(1, worker["steps"] + 1))
    assert len(found) >= figures["steps"] == sum(w["steps"] for w in figures["workers"])
    assert "assistants work on this problem" not in together.text, "the rules are not the answer"


def test_figures_add_up(together: Answer) -> None:
    summary = together.summary
    tokens = [worker["tokens"] for worker in summary["hogwild"]["workers"]]
    assert max(tokens) == min(tokens) <= 60, "workers step together"
    answer = summary["critical_path_tokens"] - max(tokens)
    assert summary["generated_tokens"] == sum(tokens) + answer
    assert together.num_reported == len(together.tokens)
    ratio = summary["generated_tokens"] / summary["critical_path_tokens"]
    assert summary["parallelism_ratio"] == round(ratio, 4) > 1
    assert summary["fallbacks"] == {}


def test_streamed_equals_whole(server: Server, together: Answer) -> None:
    (streamed,) = server.ask(vllm_xargs=WORKERS, max_tokens=600, stream=True)
    assert (streamed.text, streamed.tokens) == (together.text, together.tokens)
    assert streamed.summary["hogwild"] == together.summary["hogwild"]
    assert streamed.finish == together.finish


@pytest.mark.parametrize("layout", ["interleaved", "contiguous"])
def test_other_layouts(server: Server, layout: str) -> None:
    (answer,) = server.ask(vllm_xargs={**WORKERS, "pt_layout": layout}, max_tokens=600)
    assert HEADING.findall(answer.text)
    assert answer.summary["hogwild"]["layout"] == layout


def test_checks_are_put_and_counted(server: Server) -> None:
    xargs = {"parallel_think": "short-steps", "pt_worker_tokens": 70}
    (answer,) = server.ask(vllm_xargs=xargs, max_tokens=600)
    figures = answer.summary["hogwild"]
    asked = answer.text.count("Am I doing redundant work? (yes/no): ")
    # 210 tokens, a question every 50, the last steps ended by the budget.
    assert asked >= figures["checks_yes"] + figures["checks_no"] >= 2
    assert figures["steps"] == 3 * 4
    assert answer.text.count("The answer is") >= 1


def test_max_tokens_cuts_exactly(server: Server, together: Answer) -> None:
    (cut,) = server.ask(vllm_xargs=WORKERS, max_tokens=150)
    assert len(cut.tokens) <= 150
    assert "the final answer is \\boxed{" in cut.text, "room for the answer is kept"
    server.wait_idle()


def test_live_chunks_show_all_workers(server: Server, together: Answer) -> None:
    views, text = server.live(WORKERS, max_tokens=600)
    assert text == together.text
    assert any(all(worker["tokens"] for worker in view) for view in views)
    assert [worker["path"] for worker in views[-1]] == ["Alice", "Bob", "Carol"]


def test_many_at_once(server: Server, together: Answer, plain: Answer) -> None:
    """Groups beside each other, beside plain requests and paths: the text stays the same."""

    def ask(number: int) -> Answer:
        xargs: dict[str, Any] = [WORKERS, {"parallel_think": "off"}][number % 2]
        (answer,) = server.ask(vllm_xargs=xargs, **({"max_tokens": 600} if number % 2 == 0 else {}))
        return answer

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(6)))
    for number, answer in enumerate(answers):
        assert answer.text == (plain if number % 2 else together).text
    server.wait_idle()


def test_a_client_that_leaves(server: Server) -> None:
    body = {"model": MODEL_NAME, "messages": FRUITS, "max_tokens": 1500, "stream": True}
    body["vllm_xargs"] = {**WORKERS, "pt_worker_tokens": 400}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    server.wait_idle()


def test_steps_are_exported(server: Server, together: Answer) -> None:
    assert server.metric("vllm_pt_hogwild_steps_total") >= together.summary["hogwild"]["steps"]


@pytest.mark.slow
def test_thinking_goes_where_a_reasoning_parser_puts_it(model: Path, tmp_path: Path) -> None:
    server = Server(
        model,
        tmp_path / "server.log",
        {"profile": "hogwild-think"},
        *("--reasoning-parser", "olmo3"),
    )
    try:
        server.wait_ready()
        body = {"messages": FRUITS, "max_tokens": 500, "temperature": 0, "model": MODEL_NAME}
        body["vllm_xargs"] = {"pt_worker_tokens": 50}
        message = server.post("/v1/chat/completions", **body).json()["choices"][0]["message"]
        thought = message.get("reasoning") or message.get("reasoning_content")
        assert HEADING.findall(thought)
        assert message["content"].strip().startswith("The final answer is \\boxed{")
    finally:
        server.stop()
