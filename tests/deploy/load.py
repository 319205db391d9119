"""A bounded load of plain and parallel requests on one server, some of whose clients go away.

What the clients saw is kept, to be compared with what the server's metrics say.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from tests.support.repository import VISIBLE_OUTLINE
from tests.support.server import ENDLESS, MODEL_NAME, outline_of

TOPICS = (
    *("Three fruits?", "Three colours?", "Three animals?", "Three sports?", "Three trees?"),
    *("Three cities?", "Three tools?", "Three drinks?", "Three planets?", "Three games?"),
)
Kind = Literal["parallel", "plain", "refused"]


def options(folder: Path) -> dict[str, Any]:
    """Return the plugin's options of a server for this load.

    Beside one profile whose paths end where the model likes, it has one whose paths use
    up their budgets.
    """
    profile = folder / "endless.toml"
    profile.write_text(ENDLESS)
    return {"profile": VISIBLE_OUTLINE, "profiles": [str(profile)]}


@dataclass(frozen=True)
class Ask:
    """One request to come.

    Attributes:
        kind: Whether it branches, turns branches off, or asks for what is refused.
        stream: Whether it streams.
        leave_after: Chunks after which the client goes away; ``None`` stays to the end.
        body: The request.

    """

    kind: Kind
    stream: bool
    leave_after: int | None
    body: dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """What one client saw.

    Attributes:
        ask: What it asked.
        status: The HTTP status; 0 if the connection broke.
        tokens: ``usage.completion_tokens``.
        summary: The plugin's figures; ``None`` for plain answers and clients that went away.
        finish: The finish reason, if the answer came to its end.
        seconds: How long it took.

    """

    ask: Ask
    status: int
    tokens: int
    summary: dict[str, Any] | None
    finish: str | None
    seconds: float


def asks(num: int, leaving: float, seed: int) -> Iterator[Ask]:
    """Return so many random requests; a share of the clients goes away."""
    rng = random.Random(seed)
    kinds: list[Kind] = rng.choices(("parallel", "plain"), (62, 38), k=num)
    kinds[4::9] = ["refused"] * len(kinds[4::9])
    answered = [number for number, kind in enumerate(kinds) if kind != "refused"]
    gone = set(rng.sample(answered, round(leaving * num)))
    for number, kind in enumerate(kinds):
        goes = number in gone
        xargs: dict[str, Any] = {
            "parallel": {
                "parallel_think": rng.choice(("visible-outline", "endless")),
                "pt_path_tokens": rng.randrange(12, 48),
                "pt_max_paths": rng.choices((4, 2), (80, 20))[0],
            },
            "plain": {"parallel_think": "off"},
            "refused": {"pt_max_paths": 999},
        }[kind]
        stream = goes or rng.random() < 0.5
        yield Ask(
            kind,
            stream,
            rng.randrange(1, 12) if goes else None,
            {
                "model": MODEL_NAME,
                "messages": outline_of(rng.choice(TOPICS)),
                "temperature": 0.4,
                "seed": number,
                "max_tokens": rng.randrange(60, 160) if kind != "plain" else rng.randrange(16, 80),
                "vllm_xargs": xargs,
                "stream": stream,
                **({"stream_options": {"include_usage": True}} if stream else {}),
            },
        )


def run(
    url: str,
    num: int,
    *,
    leaving: float = 0.0,
    seed: int = 0,
    concurrency: int = 6,
    seconds: float = 240,
    api_key: str = "",
    on_answer: Callable[[Seen], None] = lambda seen: None,
) -> list[Seen]:
    """Send requests to a server and return what the clients saw.

    Args:
        url: The server, on this machine.
        num: Most requests.
        leaving: Share of clients that go away in the middle of their stream.
        seed: Of all random choices.
        concurrency: Clients at a time.
        seconds: No request begins after so long.
        api_key: The server's.
        on_answer: Called for each client, for progress.

    """
    todo = asks(num, leaving, seed)
    deadline = time.monotonic() + seconds
    found: list[Seen] = []

    async def client(http: httpx.AsyncClient) -> None:
        for ask in todo:
            if time.monotonic() > deadline:
                return
            seen = await send(http, ask)
            found.append(seen)
            on_answer(seen)

    async def all_clients() -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        async with httpx.AsyncClient(
            base_url=url, timeout=180, trust_env=False, headers=headers
        ) as http:
            await asyncio.gather(*(client(http) for _ in range(concurrency)))

    asyncio.run(all_clients())
    return found


async def send(http: httpx.AsyncClient, ask: Ask) -> Seen:
    """Send one request; read its answer to the end, or go away."""
    begin = time.monotonic()
    path = "/v1/chat/completions"
    if not ask.stream:
        answer = await http.post(path, json=ask.body)
        body = answer.json()
        choices = body.get("choices") or [{}]
        return Seen(
            ask,
            answer.status_code,
            body.get("usage", {}).get("completion_tokens", 0),
            (body.get("kv_transfer_params") or {}).get("parallel_think"),
            choices[0].get("finish_reason"),
            time.monotonic() - begin,
        )
    tokens, summary, finish, num_chunks = 0, None, None, 0
    async with http.stream("POST", path, json=ask.body) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            num_chunks += 1
            if num_chunks == ask.leave_after:
                return Seen(ask, answer.status_code, 0, None, None, time.monotonic() - begin)
            chunk = json.loads(line.removeprefix("data: "))
            summary = (chunk.get("parallel_think") or [summary])[0]
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
            for choice in chunk["choices"]:
                finish = choice["finish_reason"] or finish
        return Seen(ask, answer.status_code, tokens, summary, finish, time.monotonic() - begin)
