"""What clients get from a server whose requests branch: texts, counts, ends."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import pytest

from tests.support.repository import VISIBLE_OUTLINE
from tests.support.server import (
    FRUITS,
    MODEL_NAME,
    XARGS,
    Answer,
    Server,
    outline_of,
    wait_until,
)

OFF = {"parallel_think": "off"}
POINT = re.compile(r"(?m)^[ ]*([0-9]{1,2})[.)][ ]+([^\s:][^\n:.]*)")
CONCLUSION = "In short,"
NUM_OPENING = 6
"""Tokens the engine writes in front of such an answer; shorter answers stay plain."""


def headings(answer: Answer) -> list[tuple[int, int]]:
    """Return where in the text each path's heading starts and ends, in the order of the outline."""
    found, at = [], 0
    for number, title in POINT.findall(answer.text)[: answer.summary["paths"]]:
        heading = f"**{number}. {title.strip()}**"
        at = answer.text.index(heading, at)
        found.append((at, at + len(heading)))
        at += len(heading)
    return found


def detokenize(server: Server, answer: Answer) -> str:
    prompt = server.post("/detokenize", tokens=list(answer.tokens)).json()["prompt"]
    return prompt.removesuffix("<|im_end|>")


def test_one_request_branches(server: Server, whole: Answer) -> None:
    assert whole.summary["forks"] == 1
    assert whole.summary["widest_fork"] == whole.summary["paths"] == 3
    assert whole.summary["parallelism_ratio"] > 1
    assert len(whole.ids) == 1
    assert whole.finish == "stop"
    assert len(headings(whole)) == 3
    assert whole.text.index(CONCLUSION, headings(whole)[-1][1]) > 0


def test_text_is_that_of_the_tokens_in_order(server: Server, whole: Answer) -> None:
    assert detokenize(server, whole) == whole.text


def test_every_visible_token_counts_once(whole: Answer) -> None:
    assert whole.num_reported == len(whole.tokens) == len(whole.logprobs)
    assert sum(logprob == 0 for logprob in whole.logprobs) >= whole.summary["forced_tokens"]
    assert sum(logprob < 0 for logprob in whole.logprobs) > 0
    # An end-of-sequence token is visible to vLLM's counts, and nobody's text.
    counted = whole.summary["generated_tokens"] + whole.summary["forced_tokens"]
    assert len(whole.tokens) - counted in (0, 1)


def test_streamed_equals_whole(server: Server, whole: Answer) -> None:
    (streamed,) = server.ask(stream=True)
    assert len(streamed.ids) == 1
    assert streamed.ids != whole.ids
    assert streamed.text == whole.text
    assert streamed.tokens == whole.tokens
    assert streamed.logprobs == pytest.approx(whole.logprobs, abs=1e-4)
    assert streamed.finish == whole.finish
    assert streamed.num_reported == whole.num_reported
    assert streamed.summary == whole.summary


def test_stream_arrives_while_it_is_written(server: Server, whole: Answer) -> None:
    body = {"model": MODEL_NAME, "messages": FRUITS, "max_tokens": 120, "temperature": 0}
    body |= {"stream": True, "vllm_xargs": XARGS}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    first, *middle, last = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert len(middle) > whole.summary["critical_path_tokens"] / 2
    assert all(chunk["choices"] for chunk in (first, *middle, last))
    assert all("parallel_think" not in chunk for chunk in middle)
    assert last["choices"][0]["finish_reason"] == whole.finish
    assert last["parallel_think"] == [whole.summary]
    for key in ("id", "object", "created", "model"):
        assert last[key] == first[key]
    assert "usage" not in last


def test_completions_of_several_prompts(server: Server) -> None:
    body = {"prompt": ["Three fruits?\n", "Three towns?\n"], "max_tokens": 20, "temperature": 0}
    body |= {"n": 1, "return_token_ids": True, "vllm_xargs": {"pt_path_tokens": 16}}
    whole = server.post("/v1/completions", **body).json()
    summaries = whole["kv_transfer_params"]["parallel_think"]
    assert [summary["profile"] for summary in summaries] == ["visible-outline"] * 2
    counted = [len(choice["token_ids"]) for choice in whole["choices"]]
    assert whole["usage"]["completion_tokens"] == sum(counted)
    with server.http.stream(
        "POST",
        "/v1/completions",
        json={
            "model": MODEL_NAME,
            **body,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    (usage,) = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert usage.items() <= whole["usage"].items()
    ends = [chunk["parallel_think"] for chunk in chunks if "parallel_think" in chunk]
    assert len(ends) == 2
    assert ends[-1] == summaries


def test_responses_and_messages(server: Server) -> None:
    """Two APIs with streams of their own: the summary where there is a place, usage untouched."""
    body = {"model": MODEL_NAME, "input": "Three fruits?", "temperature": 0, "stream": True}
    body |= {"max_output_tokens": 24}
    with server.http.stream("POST", "/v1/responses", json=body) as response:
        events = [line for line in response.iter_lines() if line.startswith("data: {")]
    last = json.loads(events[-1].removeprefix("data: "))
    assert last["type"] in ("response.completed", "response.incomplete")  # by vLLM's version
    assert last["response"]["kv_transfer_params"]["parallel_think"]["profile"] == "visible-outline"
    body = {"model": MODEL_NAME, "messages": FRUITS[-1:], "max_tokens": 24, "stream": True}
    with server.http.stream("POST", "/v1/messages", json=body) as response:
        events = [line for line in response.iter_lines() if "message_delta" in line]
    (delta,) = [json.loads(e.removeprefix("data: ")) for e in events if e.startswith("data: ")]
    assert delta["usage"]["output_tokens"] == 24


def test_stop_string_inside_a_path(server: Server, whole: Answer) -> None:
    start, end = headings(whole)[1]
    stop = whole.text[start : end + 8]
    cut = whole.text.index(stop)
    assert cut == start, "the text in front of the second path has the stop string too"
    for stream in (False, True):
        (answer,) = server.ask(stop=stop, stream=stream)
        assert answer.text == whole.text[:cut]
        assert (answer.finish, answer.stop_reason) == ("stop", stop)
        assert answer.summary["forks"] == 1
        server.wait_idle()


def test_stop_string_in_front_of_the_fork(server: Server, whole: Answer) -> None:
    opening = "Short outline:\n1."
    stop = whole.text[len(opening) : len(opening) + 4]
    for stream in (False, True):
        (answer,) = server.ask(stop=stop, stream=stream)
        assert answer.text == whole.text[: whole.text.index(stop)]
        assert answer.summary["forks"] == 0
        assert answer.summary["parallelism_ratio"] == 1.0


def test_max_tokens_cuts_exactly(server: Server, whole: Answer) -> None:
    cuts = [NUM_OPENING + 1, len(whole.tokens) // 2, len(whole.tokens) - 2]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda cut: server.ask(max_tokens=cut)[0], cuts))
    for cut, answer in zip(cuts, answers, strict=True):
        assert answer.tokens == whole.tokens[:cut]
        assert answer.num_reported == len(answer.logprobs) == cut
        assert answer.finish == "length"
    server.wait_idle()


def test_stop_token_inside_a_branch(server: Server, whole: Answer) -> None:
    """A sampled token whose first occurrence is behind the fork; a forced one must not stop."""
    _, behind = headings(whole)[0]
    ends = list(accumulate(map(len, whole.pieces)))
    at = next(
        i
        for i, token in enumerate(whole.tokens)
        if ends[i] > behind and whole.logprobs[i] < 0 and whole.tokens.index(token) == i
    )
    assert at < len(whole.tokens) - 1, "only the end of the answer has a token of its own"
    (answer,) = server.ask(stop_token_ids=[whole.tokens[at]])
    assert answer.tokens == whole.tokens[: at + 1]
    assert (answer.finish, answer.stop_reason) == ("stop", whole.tokens[at])
    assert answer.summary["forks"] == 1
    server.wait_idle()


def test_ignore_eos_runs_to_the_limit(server: Server, plain: Answer) -> None:
    limit = len(plain.tokens) + 15
    assert plain.finish == "stop"
    for xargs in (OFF, {**XARGS, "parallel_think": "endless"}):
        (answer,) = server.ask(ignore_eos=True, max_tokens=limit, vllm_xargs=xargs)
        assert len(answer.tokens) == answer.num_reported == limit
        assert answer.finish == "length"
    assert answer.summary["forks"] == 1


@pytest.mark.slow
def test_penalties_act(server: Server) -> None:
    """On a text long enough to repeat itself where nothing holds it back."""
    penalties = {"presence_penalty": 2.0, "frequency_penalty": 1.0, "repetition_penalty": 1.1}
    body = {"vllm_xargs": {**XARGS, "parallel_think": "endless"}, "max_tokens": 110}
    with ThreadPoolExecutor() as pool:
        free = pool.submit(server.ask, **body)
        held = {
            name: pool.submit(server.ask, **body, **{name: penalties[name]}) for name in penalties
        }
        for name, future in held.items():
            (answer,) = future.result()
            assert answer.tokens != free.result()[0].tokens, name
            assert answer.summary["forks"] == 1
            assert answer.num_reported == len(answer.tokens) == len(answer.logprobs)


def test_seed_and_choices(server: Server) -> None:
    with ThreadPoolExecutor() as pool:
        asked = [
            pool.submit(server.ask, temperature=1.0, **more)
            for more in (
                {"seed": 7},
                {"seed": 7},
                {"seed": 8},
                {"seed": 7, "n": 2},
                {"seed": 7, "n": 2, "stream": True},
            )
        ]
        (one,), (again,), (other,), whole, streamed = [future.result() for future in asked]
    assert one.tokens == again.tokens
    assert one.tokens != other.tokens
    assert [answer.tokens for answer in whole] == [answer.tokens for answer in streamed]
    assert [answer.summary for answer in whole] == [answer.summary for answer in streamed]
    assert len(whole) == 2
    assert whole[0].tokens == one.tokens, "a child's seed is the request's plus its index"
    assert whole[1].tokens == other.tokens
    assert whole[0].num_reported == sum(len(answer.tokens) for answer in whole)
    for answer in (one, other, *whole, *streamed):
        if answer.finish == "stop":
            counted = answer.summary["generated_tokens"] + answer.summary["forced_tokens"]
            assert len(answer.tokens) - counted in (0, 1)
    server.wait_idle()


@pytest.mark.slow
def test_sampled_branches_differ(server: Server) -> None:
    (answer,) = server.ask(temperature=1.2, seed=3, max_tokens=200)
    assert answer.summary["paths"] >= 2
    starts = headings(answer)
    ends = [start for start, _ in starts[1:]] + [answer.text.index(CONCLUSION, starts[-1][1])]
    bodies = {answer.text[start:end] for (_, start), end in zip(starts, ends, strict=True)}
    assert len(bodies) == len(starts)


def test_off_has_no_branches(plain: Answer, whole: Answer) -> None:
    assert plain.summary is None
    assert plain.num_reported == len(plain.tokens)
    assert plain.tokens != whole.tokens


def test_tags_in_a_prompt_trigger_nothing(server: Server) -> None:
    """The model writes ``</Goal>`` itself, which would fork if the prompt's tags counted."""
    block = "<Parallel>\n<Goal>\n<Outline>1: one</Outline>\n<Outline>2: two</Outline>\n</Goal>"
    chat = server.post(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": f"Repeat: {block}\n<Path>\n1: x</Path>"}],
        max_tokens=48,
        temperature=0,
        vllm_xargs={"parallel_think": "multiverse"},
    )
    text = server.post(
        "/v1/completions",
        prompt=block,
        max_tokens=48,
        temperature=0,
        vllm_xargs={"parallel_think": "multiverse"},
    )
    for response in (chat.json(), text.json()):
        summary = response["kv_transfer_params"]["parallel_think"]
        assert summary["profile"] == "multiverse"
        assert summary["forks"] == 0
    text_written = text.json()["choices"][0]["text"]
    assert "<Parallel>" not in text_written


def test_client_that_leaves(server: Server, whole: Answer) -> None:
    body = {"model": MODEL_NAME, "messages": FRUITS, "temperature": 0, "stream": True}
    # Left alone this would write for more than a minute: an idle server was told to stop.
    body |= {"max_tokens": 1500, "ignore_eos": True}
    body |= {"vllm_xargs": {**XARGS, "parallel_think": "endless"}}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        text = ""
        lines = response.iter_lines()  # kept: once nothing holds it, httpx hangs up
        for line in lines:
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            if text.count("**") >= 4:
                break
        assert not server.is_idle()
    server.wait_idle()
    assert server.ask()[0].tokens == whole.tokens


def test_a_worker_inside_the_engine_process(model: Path, tmp_path: Path, whole: Answer) -> None:
    """As vLLM runs a single GPU: the worker shares the engine's configuration, which changes.

    Asked twice, because blocks that are used again hold what another branch has left in them.
    """
    changes = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    server = Server(model, tmp_path / "server.log", {"profile": VISIBLE_OUTLINE}, **changes)
    try:
        server.wait_ready()
        for _ in range(2):
            assert server.ask()[0].tokens == whole.tokens
    finally:
        server.stop()


@pytest.mark.slow
def test_many_at_once(server: Server, whole: Answer, plain: Answer) -> None:
    with ThreadPoolExecutor(16) as pool:
        branched = [pool.submit(server.ask, stream=i % 2 == 0) for i in range(4)]
        alone = [pool.submit(server.ask, vllm_xargs=OFF, stream=i % 2 == 0) for i in range(4)]
        others = [
            pool.submit(server.ask, outline_of(f"Three {topic}?"), temperature=1, max_tokens=60)
            for topic in ("animals", "towns", "tools", "songs")
        ]
        wait_until(
            lambda: server.metric("vllm:num_requests_running") >= 8 or branched[0].done(),
            "requests run together",
        )
        for future in branched:
            assert future.result()[0].tokens == whole.tokens
        for future in alone:
            assert future.result()[0].tokens == plain.tokens
        for future in others:
            assert future.result()[0].finish in ("stop", "length")
    server.wait_idle()


def test_live_chunks_show_all_paths_grow(server: Server, whole: Answer) -> None:
    """``pt_live``: later paths are seen before their turn in the text; the text stays the same."""
    views, text = server.live(XARGS, max_tokens=120)
    assert any(all(path["tokens"] for path in view) and not view[0]["done"] for view in views)
    assert all(path["done"] and path["tail"] for path in views[-1])
    assert text == whole.text
    body = {"model": MODEL_NAME, "messages": FRUITS, "max_tokens": 120, "temperature": 0}
    body["vllm_xargs"] = {**XARGS, "pt_live": True}
    answer = server.post("/v1/chat/completions", **body).json()
    assert list(answer["kv_transfer_params"]) == ["parallel_think"]


def test_paths_behind_the_prompt(server: Server) -> None:
    """ParaThinker's form with any model: paths at once, a summary; streamed as it is whole."""
    xargs = {"parallel_think": "parathinker-text", "pt_num_paths": 3, "pt_path_tokens": 16}
    xargs |= {"pt_summary_tokens": 12}
    (whole,) = server.ask(vllm_xargs=xargs)
    (streamed,) = server.ask(vllm_xargs=xargs, stream=True)
    assert streamed.tokens == whole.tokens
    assert streamed.text == whole.text
    assert [whole.text.count(f"<think>\nAttempt {i}:") for i in (1, 2, 3)] == [1, 1, 1]
    assert whole.text.startswith("<think>\nAttempt 1:")
    assert whole.summary["paths"] == whole.summary["widest_fork"] == 3
    assert whole.num_reported == len(whole.tokens)
    server.wait_idle()


def test_majority_of_independent_answers(server: Server) -> None:
    xargs = {"parallel_think": "parathinker-text", "pt_num_paths": 3, "pt_vote": True}
    (answer,) = server.ask(vllm_xargs=xargs, max_tokens=24)
    (plain,) = server.ask(vllm_xargs={"parallel_think": "off"}, max_tokens=24)
    assert answer.text == plain.text, "greedy answers are all alike"
    assert answer.summary["votes"]["paths"] == 3
    assert answer.summary["generated_tokens"] == 3 * len(answer.tokens)
    server.wait_idle()
