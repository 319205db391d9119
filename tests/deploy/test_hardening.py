"""What deploy/README.md says of the API key and of a pod's end, on a real server."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.repository import VISIBLE_OUTLINE
from tests.support.server import FRUITS, MODEL_NAME, XARGS, Server, wait_until

KEY = "0123456789abcdef"
CHAT = {"model": MODEL_NAME, "messages": FRUITS, "max_tokens": 120, "temperature": 0}
BEARER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def guarded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an API key that finishes its requests when it ends."""
    log = tmp_path_factory.mktemp("guarded") / "log"
    options = {"profile": VISIBLE_OUTLINE}
    server = Server(model, log, options, "--shutdown-timeout", "60", VLLM_API_KEY=KEY)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def test_v1_asks_for_the_key(guarded: Server) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
        assert guarded.http.post(path, json=CHAT).status_code == 401
    assert guarded.http.get("/v1/models").status_code == 401
    assert guarded.http.get("/v1/models", headers=BEARER).status_code == 200


def test_the_rest_does_not(guarded: Server) -> None:
    """If vLLM closes one of these, README's table has to say so."""
    for path in ("/health", "/ping", "/load", "/version", "/docs", "/openapi.json", "/metrics"):
        assert guarded.http.get(path).status_code == 200, path
    assert guarded.http.post("/invocations", json=CHAT | {"max_tokens": 2}).status_code == 200
    text = {"model": MODEL_NAME, "prompt": "Hi"}
    assert guarded.http.post("/tokenize", json=text).status_code == 200
    for path in ("/detokenize", "/generative_scoring", "/scale_elastic_ep"):
        assert guarded.http.post(path, json={}).status_code == 400, path


def test_a_request_under_way_at_sigterm_is_answered(guarded: Server) -> None:
    answers: list[httpx.Response] = []

    def ask() -> None:
        body = CHAT | {"vllm_xargs": XARGS}
        answers.append(
            httpx.post(
                f"{guarded.url}/v1/chat/completions",
                json=body,
                headers=BEARER,
                timeout=120,
                trust_env=False,
            )
        )

    client = threading.Thread(target=ask)
    client.start()
    wait_until(lambda: guarded.metric("vllm:num_requests_running") > 0, "the request runs")
    os.kill(guarded._process.pid, signal.SIGTERM)
    client.join(120)
    (answer,) = answers
    assert answer.status_code == 200
    assert answer.json()["kv_transfer_params"]["parallel_think"]["paths"] >= 2
    assert guarded._process.wait(60) is not None
