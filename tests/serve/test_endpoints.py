"""All ways to ask a server whose requests fork by default: summaries, refusals, equal streams.

Every answer starts with forced text here, and vLLM's parsers of reasoning and tool calls listen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import FRUITS, MODEL_NAME, Server, thinking_model

CHAT, BATCH, RESPONSES = "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses"
COMPLETIONS, MESSAGES, TOKENS = "/v1/completions", "/v1/messages", "/inference/v1/generate"
XARGS = {"pt_num_paths": 2, "pt_path_tokens": 16, "pt_summary_tokens": 12}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
OFF = {"parallel_think": "off"}


@pytest.fixture(scope="module")
def thinking(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a model with the tags of thinking, every parser and every endpoint on."""
    folder = tmp_path_factory.mktemp("thinking")
    copy = folder / "model"
    copy.mkdir()
    server = Server(
        thinking_model(model, copy),
        folder / "server.log",
        {"profile": "parathinker-text"},
        *("--reasoning-parser", "deepseek_r1", "--enable-scale-out"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    )
    try:
        server.wait_ready()
        yield server
    except BaseException:
        print(server.log_tail())
        raise
    finally:
        server.stop()


def asked(path: str, xargs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a small request to an endpoint."""
    sampling = {"max_tokens": 100, "temperature": 0}
    body: dict[str, Any] = {"vllm_xargs": xargs, **sampling}
    if path == TOKENS:
        params = {**sampling, "extra_args": xargs, **more.pop("sampling", {})}
        return {"token_ids": [40, 41, 42], "sampling_params": params, **more}
    if path == RESPONSES:
        del body["max_tokens"]
        body |= {"input": "Three fruits?", "max_output_tokens": 100}
    elif path == COMPLETIONS:
        body["prompt"] = "Three fruits?"
    else:
        body["messages"] = [FRUITS, FRUITS] if path == BATCH else FRUITS
    return {**body, **more}


def streamed(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a stream's chunks or events carry."""
    body = {"model": MODEL_NAME, **body, "stream": True}
    with server.http.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def summary_of(values: dict[str, Any]) -> Any:
    return values["kv_transfer_params"]["parallel_think"]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stop": ["never seen"]},
        {"stop": ["Comparing these"]},
        {"stop": ["Attempt 1:"]},
        {"stop": ["1:"], "include_stop_str_in_output": True},
        {"tools": [TOOL], "stop": ["final"]},
        {"stream_options": {"include_usage": True}},
        {"return_token_ids": True, "logprobs": True, "top_logprobs": 3, "stop": ["final"]},
        {"n": 2, "seed": 5, "temperature": 1.0, "stop": ["never seen"]},
    ],
    ids=str,
)
def test_streamed_chat_equals_whole(thinking: Server, more: dict[str, Any]) -> None:
    body = asked(CHAT, XARGS, **more)
    chunks = streamed(thinking, CHAT, body)
    body.pop("stream_options", None)
    whole = thinking.post(CHAT, **body).json()
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for expected in whole["choices"]:
        mine = [choice for choice in choices if choice["index"] == expected["index"]]
        for name in ("reasoning", "content"):
            text = "".join(choice["delta"].get(name) or "" for choice in mine)
            assert text == (expected["message"][name] or ""), name
        assert mine[-1]["finish_reason"] == expected["finish_reason"]
        assert mine[-1].get("stop_reason") == expected["stop_reason"]
        if "return_token_ids" in more:
            tokens = [token for choice in mine for token in choice.get("token_ids") or ()]
            assert tokens == expected["token_ids"]
            entries = [e for c in mine if c.get("logprobs") for e in c["logprobs"]["content"]]
            assert [e["token"] for e in entries] == [
                e["token"] for e in expected["logprobs"]["content"]
            ]
            assert {len(e["top_logprobs"]) for e in entries} == {3}
    summaries = [chunk["parallel_think"] for chunk in chunks if "parallel_think" in chunk][-1]
    assert summaries == (summary_of(whole) if "n" in more else [summary_of(whole)])
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    if "stream_options" in more:
        assert usages[-1]["completion_tokens"] == whole["usage"]["completion_tokens"]
        assert usages[-1]["completion_tokens_details"]["reasoning_tokens"] > 0


@pytest.mark.parametrize("more", [{"echo": True}, {"stop": ["Comparing"]}], ids=str)
def test_streamed_completion_equals_whole(thinking: Server, more: dict[str, Any]) -> None:
    body = asked(COMPLETIONS, XARGS, **more)
    whole = thinking.post(COMPLETIONS, **body).json()
    chunks = streamed(thinking, COMPLETIONS, body)
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert text == whole["choices"][0]["text"]
    assert "<think>\nAttempt 1:" in text
    assert chunks[-1]["parallel_think"] == [summary_of(whole)]


def test_streamed_response_equals_whole(thinking: Server) -> None:
    body = asked(RESPONSES, XARGS)
    whole = thinking.post(RESPONSES, **body).json()
    events = streamed(thinking, RESPONSES, body)
    for item, kind in zip(whole["output"], ("reasoning_text", "output_text"), strict=True):
        deltas = [e["delta"] for e in events if e["type"] == f"response.{kind}.delta"]
        assert "".join(deltas) == item["content"][0]["text"]
    assert summary_of(events[-1]["response"]) == summary_of(whole)


def test_streamed_message_equals_whole(thinking: Server) -> None:
    body = asked(MESSAGES, XARGS)
    whole = thinking.post(MESSAGES, **body).json()
    events = streamed(thinking, MESSAGES, body)
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    for block, key in zip(whole["content"], ("thinking", "text"), strict=True):
        assert "".join(delta.get(key, "") for delta in deltas) == block[key]
    (end,) = [event for event in events if event["type"] == "message_delta"]
    assert end["parallel_think"] == [summary_of(whole)]
    assert end["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_a_chat_with_echo(thinking: Server) -> None:
    """vLLM asks for log-probabilities of the prompt then, whether the client wants them or not."""
    for stream in (False, True):
        refusal = thinking.post(CHAT, **asked(CHAT, XARGS, echo=True), stream=stream)
        assert refusal.status_code == 400
        assert "prompt_logprobs cannot be combined" in refusal.json()["error"]["message"]
        off = thinking.post(CHAT, **asked(CHAT, OFF, echo=True, max_tokens=4), stream=stream)
        assert off.status_code == 200


@pytest.mark.parametrize("mode", ["tokens", "text"])
def test_tokens_in_tokens_out(thinking: Server, mode: str) -> None:
    body = asked(TOKENS, XARGS, sampling={"logprobs": 3}, output_mode=mode)
    body["stream_options"] = {"include_usage": True}
    chunks = streamed(thinking, TOKENS, body)
    del body["stream_options"]
    whole = thinking.post(TOKENS, **body).json()
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    (expected,) = whole["choices"]
    tokens = [token for choice in choices for token in choice["token_ids"] or ()]
    assert tokens == expected["token_ids"]
    if mode == "text":
        assert "".join(choice["text"] for choice in choices) == expected["text"]
    assert {len(e["top_logprobs"]) for e in expected["logprobs"]["content"]} == {3}
    ends = [chunk for chunk in chunks if "parallel_think" in chunk]
    assert [end["parallel_think"] for end in ends] == [[summary_of(whole)]]
    assert ends[0]["choices"][0]["finish_reason"] == expected["finish_reason"]
    assert chunks[-1]["usage"]["completion_tokens"] == len(tokens)
    live = streamed(thinking, TOKENS, asked(TOKENS, {**XARGS, "pt_live": True}, output_mode=mode))
    views = [chunk["parallel_think_live"] for chunk in live if "parallel_think_live" in chunk]
    assert [path["path"] for path in views[-1]] == ["1", "2"]


def test_a_batch_of_conversations(thinking: Server) -> None:
    whole = thinking.post(BATCH, **asked(BATCH, XARGS)).json()
    alone = thinking.post(CHAT, **asked(CHAT, XARGS)).json()
    assert [choice["message"]["content"] for choice in whole["choices"]] == [
        alone["choices"][0]["message"]["content"]
    ] * 2
    for summary in summary_of(whole):
        assert (summary["forks"], summary["paths"]) == (1, 2)
    (summary,) = summary_of(thinking.post(BATCH, **asked(BATCH, XARGS, messages=[FRUITS])).json())
    assert summary["forks"] == 1
    off = thinking.post(BATCH, **asked(BATCH, OFF)).json()
    assert off["kv_transfer_params"] is None


WRONG = [
    ({"pt_max_paths": 99}, "pt_max_paths must be a whole number between 1 and 8, got 99"),
    ({"parallel_think": "nobody"}, "parallel_think must be one of"),
    ({"pt_nothing": 1}, "pt_nothing is unknown"),
    ({"pt_judge": 1}, "pt_judge: this server runs no judge"),
    ({"pt_judge_threshold": 0.5}, "no judge with a threshold"),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES, TOKENS, BATCH])
def test_wrong_keys(thinking: Server, path: str) -> None:
    for stream in (False, True):
        for xargs, says in WRONG:
            response = thinking.post(path, **asked(path, xargs), stream=stream)
            assert response.status_code == 400, response.text
            assert says in response.json()["error"]["message"]
    wrong = asked(TOKENS, {}, sampling={"prompt_logprobs": 1}, stream=True)
    refusal = thinking.post(TOKENS, **wrong)
    assert refusal.status_code == 400
    assert "prompt_logprobs cannot be combined" in refusal.json()["error"]["message"]


def test_requests_that_vllm_makes_itself(thinking: Server) -> None:
    """One token each, without a word of the client's: none of them forks."""
    query, item = "The capital of France", " is"
    ids = [thinking.post("/tokenize", prompt=t).json()["tokens"] for t in (query, item)]
    labels = [thinking.post("/tokenize", prompt=t).json()["tokens"][0] for t in (" Paris", " the")]
    ask = {"query": query, "items": [item], "label_token_ids": labels}
    (score,) = thinking.post("/generative_scoring", **ask).json()["data"]
    body = asked(COMPLETIONS, OFF, prompt=ids[0] + ids[1], logprobs=5, max_tokens=1)
    (plain,) = thinking.post(COMPLETIONS, **body).json()["choices"][0]["logprobs"]["top_logprobs"]
    chances = [math.exp(plain[label]) for label in (" Paris", " the")]
    assert score["score"] == pytest.approx(chances[0] / sum(chances), abs=1e-3)

    beams = asked(CHAT, OFF, use_beam_search=True, n=2, max_tokens=12)
    texts = [c["message"] for c in thinking.post(CHAT, **beams).json()["choices"]]
    assert texts[0] != texts[1]
    assert "Attempt" not in json.dumps(texts)
    forks = thinking.post(COMPLETIONS, **asked(COMPLETIONS, XARGS, max_tokens=40)).json()
    assert summary_of(forks)["forks"] == 1
    before = thinking.metric("vllm_pt_forks_total")
    assert before > 0
    prompt = "The capital of France is"
    for more in ({"max_tokens": 1}, {"max_tokens": 0, "echo": True}):
        body = asked(COMPLETIONS, {}, prompt=prompt, logprobs=2, **more)
        plain = {**body, "vllm_xargs": OFF}
        left, alone = (thinking.post(COMPLETIONS, **b).json()["choices"] for b in (body, plain))
        assert left == alone
        assert all(value < 0 for value in left[0]["logprobs"]["token_logprobs"] if value)
    thinking.wait_idle()
    assert thinking.metric("vllm_pt_forks_total") == before


def test_named_tokens(thinking: Server) -> None:
    """A forced token has an entry for each token that the client names."""
    body = asked(CHAT, XARGS, logprobs=True, logprob_token_ids=[50, 60])
    entries = thinking.post(CHAT, **body).json()["choices"][0]["logprobs"]["content"]
    assert {len(entry["top_logprobs"]) for entry in entries} <= {2, 3}
    assert [top["logprob"] for top in entries[0]["top_logprobs"]] == [0.0, -9999.0, -9999.0]
