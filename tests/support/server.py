"""A real ``vllm serve`` on a random port of the loopback, and one way to ask it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

MODEL_NAME = "smollm2"
START_SECONDS = 240
IDLE_SECONDS = 30

XARGS = {"pt_path_tokens": 24, "pt_max_paths": 3}

ENDLESS = """
name = "endless"
summary = "An outline, and points and a conclusion that no tag of the model's ends"
opening = "Short outline:\\n1."

[fork]
trigger = ["\\n\\n"]
names = '(?m)^[ ]*([0-9]{1,2})[.)][ ]+([^\\s:][^\\n:.]*)'
on_end = true
when_full = true
once = true

[path]
start = "\\n**{name}. {title}**\\n\\n"
end = ["</never>"]
close = "\\n"

[join]
start = "In short,"
"""

SHORT_STEPS = """
name = "short-steps"
summary = "Workers whose steps end after twenty tokens"

[workers]
names = ["Ann", "Ben", "Cem"]
num_workers = 3
step = "**{name} [{number}]:** "
others = "### Others"
own = "### Own"
max_step_tokens = 20

[check]
every = 50
text = "Am I doing redundant work? (yes/no): "

[answer]
forced = "The answer is"
max_tokens = 8
"""


def outline_of(topic: str) -> list[dict[str, str]]:
    """Return a chat whose example makes a small model write an outline of three short points."""
    example = (
        "Short outline:\n1. Red\n2. Green\n3. Blue\n\n**1. Red**\n\nRed is nice.\n\n"
        "**2. Green**\n\nGreen is nice.\n\n**3. Blue**\n\nBlue is nice.\n\nIn short, all are nice."
    )
    return [
        {"role": "user", "content": "Three colours?"},
        {"role": "assistant", "content": example},
        {"role": "user", "content": topic},
    ]


FRUITS = outline_of("Three fruits?")


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a process of its own, free of what tests set for this one."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VLLM_", "OMP_")) or name == "VLLM_PT_CACHE"
    }
    ours = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return {**kept, **ours, **changes}


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def vllm_command(*arguments: str) -> list[str]:
    """Return the ``vllm`` command of the environment that runs the tests."""
    return [str(Path(sys.executable).with_name("vllm")), *arguments]


def run_script(script: str, *arguments: str, **changes: str) -> Any:
    """Run Python code in a process of its own; return the JSON of its last line of output."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment(VLLM_LOGGING_LEVEL="WARNING", **changes),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.strip().splitlines()[-1])


def wait_until(condition: Callable[[], bool], what: str, seconds: float = IDLE_SECONDS) -> None:
    """Poll a condition until it holds; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


@dataclass(frozen=True)
class Answer:
    """One choice of a response, streamed or not.

    Attributes:
        ids: Every id under which the answer came.
        text: What the client reads.
        tokens: Visible token ids.
        pieces: Text of each visible token.
        logprobs: Log-probability of each visible token.
        finish: The finish reason.
        stop_reason: vLLM's stop reason.
        num_reported: ``usage.completion_tokens``, of all choices together.
        summary: What the plugin says about the answer.

    """

    ids: frozenset[str]
    text: str
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    logprobs: tuple[float, ...]
    finish: str
    stop_reason: int | str | None
    num_reported: int
    summary: Any


class Server:
    """A server process; its log is kept for failures."""

    def __init__(
        self,
        model: Path,
        log: Path,
        options: dict[str, Any] | None,
        *arguments: str,
        **changes: str,
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = vllm_command("serve", str(model), "--host", "127.0.0.1", "--port", str(port))
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
        command += ["--served-model-name", MODEL_NAME]
        if options is not None:
            command += ["--additional-config", json.dumps({"parallel_think": options})]
        command += arguments
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command, env=environment(**changes), stdout=out, stderr=out, start_new_session=True
            )

    @property
    def pid(self) -> int:
        """The process that was started; the others are its children."""
        return self._process.pid

    @cached_property
    def http(self) -> httpx.Client:
        """A plain HTTP client."""
        return httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    @cached_property
    def openai(self) -> OpenAI:
        """The OpenAI client."""
        return OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=self.http
        )

    def wait_ready(self) -> None:
        """Wait until the server answers; fail at once if it died."""

        def is_ready() -> bool:
            assert self._process.poll() is None, f"the server died:\n{self.log_tail()}"
            try:
                return self.http.get("/health").status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_until(is_ready, "the server answers", START_SECONDS)
        except AssertionError:
            print(self.log_tail())
            raise

    def stop(self) -> None:
        """End the server and every process it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(20)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def log_tail(self, num_lines: int = 60) -> str:
        """Return the end of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])

    def metric(self, name: str) -> float:
        """Return one of vLLM's gauges."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith((f"{name}{{", f"{name} ")):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"/metrics has no {name}")

    def is_idle(self) -> bool:
        """Return whether no request runs or waits, and no request or group holds a KV block."""
        return not any(
            self.metric(f"vllm:{name}")
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        )

    def wait_idle(self) -> None:
        """Wait until the engine has nothing left of any request."""
        wait_until(self.is_idle, "no running request, empty KV cache")

    def ask(self, messages: list[dict[str, str]] = FRUITS, **body: Any) -> list[Answer]:
        """Send a chat with the OpenAI client; return its choices."""
        extra: dict[str, Any] = {"vllm_xargs": XARGS, "return_token_ids": True}
        known = {"temperature": 0.0, "max_tokens": 120, "logprobs": True}
        for key, value in body.items():
            (known if key in _OPENAI_KEYS else extra)[key] = value
        stream = known.pop("stream", False)
        create: Any = self.openai.chat.completions.create
        call = {"model": MODEL_NAME, "messages": messages, **known, "extra_body": extra}
        if stream:
            return _from_stream(create(**call, stream=True, stream_options={"include_usage": True}))
        return _from_response(create(**call))

    def live(self, xargs: dict[str, Any], **body: Any) -> tuple[list[list[dict[str, Any]]], str]:
        """Stream a chat with ``pt_live``; return the views in order, and the text."""
        body = {"model": MODEL_NAME, "messages": FRUITS, "temperature": 0, "stream": True, **body}
        body["vllm_xargs"] = {**xargs, "pt_live": True}
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        chunks = [json.loads(line) for line in lines[:-1]]
        views = [chunk["parallel_think_live"] for chunk in chunks if "parallel_think_live" in chunk]
        text = "".join(c["delta"].get("content") or "" for k in chunks for c in k["choices"])
        for before, after in itertools.pairwise(views):
            assert all(a["tokens"] >= b["tokens"] for b, a in zip(before, after, strict=True))
        return views, text

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Post a JSON body as it is."""
        return self.http.post(path, json={"model": MODEL_NAME, **body})


_OPENAI_KEYS = frozenset(
    {"temperature", "max_tokens", "logprobs", "stream", "n", "seed", "stop"}
    | {"presence_penalty", "frequency_penalty"}
)


def _from_response(response: Any) -> list[Answer]:
    summaries = (response.kv_transfer_params or {}).get("parallel_think")
    if not isinstance(summaries, list):
        summaries = [summaries]
    return [
        Answer(
            ids=frozenset({response.id}),
            text=choice.message.content,
            tokens=tuple(choice.token_ids),
            pieces=tuple(entry.token for entry in choice.logprobs.content),
            logprobs=tuple(entry.logprob for entry in choice.logprobs.content),
            finish=choice.finish_reason,
            stop_reason=choice.stop_reason,
            num_reported=response.usage.completion_tokens,
            summary=summary,
        )
        for choice, summary in zip(response.choices, summaries, strict=True)
    ]


def _from_stream(stream: Any) -> list[Answer]:
    """Read a stream to its end; nothing may come twice that ends or counts something."""
    ids, parts, ends, extra, summaries = set(), {}, {}, [], []
    for chunk in stream:
        ids.add(chunk.id)
        if not chunk.choices:
            extra.append(chunk)
        for choice in chunk.choices:
            parts.setdefault(choice.index, []).append(choice)
            if choice.finish_reason is not None:
                assert choice.index not in ends
                ends[choice.index] = choice
                summaries += [getattr(chunk, "parallel_think", None)]
    logprobs = {
        index: [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
        for index, choices in parts.items()
    }
    (usage,) = [chunk.usage for chunk in extra if chunk.usage is not None]
    summaries = [summary for summary in summaries if summary is not None][-1:]
    return [
        Answer(
            ids=frozenset(ids),
            text="".join(choice.delta.content or "" for choice in choices),
            tokens=tuple(
                token for choice in choices for token in getattr(choice, "token_ids", None) or ()
            ),
            pieces=tuple(entry.token for entry in logprobs[index]),
            logprobs=tuple(entry.logprob for entry in logprobs[index]),
            finish=ends[index].finish_reason,
            stop_reason=ends[index].stop_reason,
            num_reported=usage.completion_tokens,
            summary=summaries[0][index] if summaries else None,
        )
        for index, choices in sorted(parts.items())
    ]


def thinking_model(model: Path, folder: Path) -> Path:
    """Return a copy of a model that has a token for each of the tags of thinking."""
    tags = {"<jupyter_start>": "<think>", "<jupyter_text>": "</think>"}
    tags |= {"<jupyter_code>": "<tool_call>", "<jupyter_output>": "</tool_call>"}
    for file in model.iterdir():
        if file.name != "tokenizer.json":
            (folder / file.name).symlink_to(file)
    values = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    for token in values["added_tokens"]:
        if token["content"] in tags:
            token["content"] = tags[token["content"]]
            token["special"] = False
    vocabulary = values["model"]["vocab"]
    for old, new in tags.items():
        vocabulary[new] = vocabulary.pop(old)
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    return folder
