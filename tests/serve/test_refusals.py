"""What a server says to requests it cannot serve: HTTP 400 and a sentence, never a dead engine."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.support.server import FRUITS, MODEL_NAME, Answer, Server

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ASKS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": FRUITS, "max_tokens": 8},
    COMPLETIONS: {"prompt": "Three fruits?", "max_tokens": 8},
    RESPONSES: {"input": "Three fruits?", "max_output_tokens": 8},
}
SCHEMA = {"name": "thing", "schema": {"type": "object", "properties": {"a": {"type": "string"}}}}
OFF = 'vllm_xargs {"parallel_think": "off"}'

WRONG_XARGS = [
    ({"pt_max_paths": 99}, "pt_max_paths must be a whole number between 1 and 8, got 99"),
    ({"pt_max_paths": 0}, "between 1 and 8"),
    ({"pt_max_paths": "3"}, "whole number between 1 and 8, got '3'"),
    ({"pt_max_paths": [2, 3]}, "whole number between 1 and 8, got [2, 3]"),
    ({"pt_max_depth": 3}, "pt_max_depth must be a whole number between 0 and 2"),
    ({"pt_max_depth": 1.5}, "whole number between 0 and 2, got 1.5"),
    ({"pt_path_tokens": 0}, "pt_path_tokens must be a whole number of at least 1"),
    ({"pt_critical_tokens": -1}, "pt_critical_tokens must be a whole number of at least 1"),
    ({"pt_join": "zip"}, "pt_join must be kv or reprefill"),
    ({"pt_paths": 3}, "pt_paths is unknown; allowed: parallel_think, pt_max_paths"),
    ({"pt_num_workers": 3}, "pt_num_workers needs a profile with workers (hogwild, hogwild-think"),
    ({"parallel_think": "hogwild", "pt_num_workers": 9}, "whole number between 2 and 8, got 9"),
    ({"parallel_think": "hogwild", "pt_layout": "spiral"}, "pt_layout must be one of combined"),
    ({"parallel_think": "hogwild", "pt_join": "kv"}, "pt_join means nothing to the workers"),
    ({"parallel_think": "nobody"}, "parallel_think must be one of"),
    ({"parallel_think": 1}, "parallel_think must be one of"),
    ({"parallel_think": ["skeleton"]}, "parallel_think must be one of"),
]
WRONG_COMBINATIONS = [
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": SCHEMA}},
        "structured output",
    ),
    (CHAT, {"response_format": {"type": "json_object"}}, "structured outputs"),
    (COMPLETIONS, {"structured_outputs": {"choice": ["a", "b"]}}, "structured outputs"),
    (
        RESPONSES,
        {"text": {"format": {"type": "json_schema", **SCHEMA}}},
        "structured outputs",
    ),
    (COMPLETIONS, {"echo": True, "logprobs": 1}, "prompt_logprobs"),
    (CHAT, {"use_beam_search": True, "n": 2}, "beam search"),
    (CHAT, {"repetition_detection": {"max_pattern_size": 4, "min_count": 3}}, "repetition_det"),
]


def refused(server: Server, path: str, stream: bool, **body: Any) -> str:
    """Return the message of a refusal; fail if the request was not refused properly."""
    response = server.post(path, **{**ASKS[path], "stream": stream, **body})
    assert response.status_code == 400, response.text
    return response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ASKS)
@pytest.mark.parametrize(("xargs", "says"), WRONG_XARGS, ids=lambda value: str(value)[:40])
def test_wrong_keys(
    server: Server, path: str, stream: bool, xargs: dict[str, Any], says: str
) -> None:
    assert says in refused(server, path, stream, vllm_xargs=xargs)


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        (CHAT, {"prompt_logprobs": 1}, "prompt_logprobs"),
        (COMPLETIONS, {"use_beam_search": True, "n": 2}, "beam search"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_vllm_never_streams(
    server: Server, path: str, body: dict[str, Any], says: str
) -> None:
    message = refused(server, path, False, **body)
    assert says in message
    assert OFF in message


def test_profiles_are_listed(server: Server) -> None:
    message = refused(server, CHAT, True, vllm_xargs={"parallel_think": "nobody"})
    for name in ("multiverse", "skeleton", "hogwild", "off"):
        assert name in message


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("path", "body", "says"), WRONG_COMBINATIONS, ids=lambda value: str(value)[:40]
)
def test_wrong_combinations(
    server: Server, path: str, stream: bool, body: dict[str, Any], says: str
) -> None:
    message = refused(server, path, stream, **body)
    assert says in message
    assert OFF in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"response_format": {"type": "json_object"}}),
        (CHAT, {"prompt_logprobs": 1}),
        (CHAT, {"use_beam_search": True, "n": 2}),
        (COMPLETIONS, {"use_beam_search": True, "n": 2}),
        (COMPLETIONS, {"echo": True, "logprobs": 1}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_way_out_works(server: Server, path: str, body: dict[str, Any]) -> None:
    response = server.post(path, **ASKS[path], **body, vllm_xargs={"parallel_think": "off"})
    assert response.status_code == 200, response.text
    assert "parallel_think" not in (response.json().get("kv_transfer_params") or {})


def test_openai_client_sees_a_bad_request(server: Server) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="between 1 and 8"):
            server.openai.chat.completions.create(
                model=MODEL_NAME,
                messages=FRUITS,  # type: ignore[arg-type]
                stream=stream,
                extra_body={"vllm_xargs": {"pt_max_paths": 99}},
            )


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ASKS)
def test_odd_values_are_refused(server: Server, path: str, stream: bool) -> None:
    """By vLLM or by us, but never by a traceback."""
    for key in ("pt_max_paths", "parallel_think", "pt_join", "pt_"):
        for value in (
            None,
            {},
            {"a": {"b": 1}},
            [[1]],
            [None],
            [],
            10**30,
            -1.5,
            "\x00",
            "é" * 999,
        ):
            body = {**ASKS[path], "stream": stream, "vllm_xargs": {key: value}}
            response = server.post(path, **body)
            assert response.status_code == 400, f"{key!r}: {value!r}: {response.text}"


def test_keys_of_others_pass(server: Server) -> None:
    xargs = {"somebody_elses": [1, "a", 2.5], "ptolemy": 3}
    assert server.post(CHAT, **ASKS[CHAT], vllm_xargs=xargs).status_code == 200


def test_engine_lives_on(server: Server, whole: Answer) -> None:
    server.wait_idle()
    assert server.ask()[0].tokens == whole.tokens
