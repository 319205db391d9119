"""What the page is given, in the form of ``timelines.read``, with requests of every kind."""

from __future__ import annotations

from typing import Any

NOW = 1_700_000_000.0
LONG_ID = "chatcmpl-" + "x" * 70 + "…" + "x" * 29 + "-0-abcd1234"


def part(
    lane: str, kind: str, times: tuple[float | None, ...], tokens: int, **more: Any
) -> dict[str, Any]:
    """One run of tokens; times count from the request's arrival."""
    depth = lane.count("/")
    return {
        "lane": lane,
        "parent": lane.rpartition("/")[0].rpartition(".")[0],
        "kind": kind,
        "name": more.pop("name", ""),
        "title": more.pop("title", ""),
        "depth": depth,
        "tokens": tokens,
        "cut": more.pop("cut", False),
        "times": times,
        **more,
    }


def request(
    id: str, age: float, outcome: str | None, parts: list[dict[str, Any]], **figures: Any
) -> dict[str, Any]:
    """One request that arrived so many seconds ago."""
    arrived = NOW - age
    segments, ends = [], [0.0]
    for one in parts:
        times = one.pop("times")
        ends += [time for time in times if time is not None]
        shown = [None if time is None else arrived + time for time in times]
        segments.append({**one, **dict(zip(("started", "first", "ended"), shown, strict=True))})
    return {
        "id": id,
        "engine": "0",
        "outcome": outcome,
        "arrived": arrived,
        "ended": None if outcome is None else arrived + max(ends),
        "profile": "skeleton",
        "forks": 1,
        "paths": 3,
        "generated_tokens": sum(one["tokens"] for one in segments),
        "critical_path_tokens": 100,
        "parallelism_ratio": 1.0,
        "reused_kv_tokens": 0,
        "fallbacks": {},
        "segments": segments,
        "more_segments": 0,
        **figures,
    }


def live(step: int) -> dict[str, Any]:
    """A request that runs; it has written more at every step."""
    tokens = 20 + step
    return request(
        "chatcmpl-live-1",
        4.0,
        None,
        [
            part("0", "trunk", (0.0, 0.2, 1.4), 40),
            part("0.0/0", "path", (1.4, 1.6, None), tokens, name="1", title="Sleep"),
            part("0.0/1", "path", (1.4, 1.7, 3.0), 24, name="2", title="A long title " * 5),
            part("0.0/2", "path", (1.4, None, None), 0, name="3", title="<b>not bold</b>"),
        ],
        generated_tokens=64 + tokens,
        critical_path_tokens=40 + tokens,
        parallelism_ratio=(64 + tokens) / (40 + tokens),
        reused_kv_tokens=120,
    )


def requests(step: int = 0) -> list[dict[str, Any]]:
    """All kinds of requests, the newest first."""
    joined = request(
        "cmpl-joined",
        30.0,
        "branched",
        [
            part("0", "trunk", (0.0, 0.3, 2.0), 50),
            part("0.0/0", "path", (2.0, 2.2, 6.0), 96, name="1", title="Eat well"),
            part("0.0/1", "path", (2.0, 2.3, 5.0), 70, name="2", title="Move"),
            part("0.0/2", "path", (2.0, 2.4, 4.1), 48, name="3", title="Rest"),
            part("0", "conclusion", (6.0, 6.2, 8.0), 40),
        ],
        parallelism_ratio=1.64,
        critical_path_tokens=186,
        reused_kv_tokens=700,
    )
    cut = request(
        LONG_ID,
        50.0,
        "branched",
        [
            part("0", "trunk", (0.0, 0.3, 2.0), 50),
            part("0.0/0", "path", (2.0, 2.2, 5.0), 96, name="1", title="Seen"),
            part("0.0/1", "path", (2.0, 2.3, 4.0), 70, name="2", title="Half seen", cut=True),
            part("0.0/2", "path", (2.0, 2.4, 5.0), 48, name="3", title="Unseen", cut=True),
            part("0.0/3", "path", (None, None, 5.0), 0, name="4", title="Not begun", cut=True),
        ],
        paths=4,
        parallelism_ratio=1.81,
        fallbacks={"max_paths": 1},
    )
    plain = {"forks": 0, "paths": 0, "parallelism_ratio": 1.0}
    alone = [part("0", "trunk", (0.0, 0.3, 2.0), 50)]
    failed = [part("0", "trunk", (0.0, 0.1, 0.2), 3)]
    return [
        live(step),
        joined,
        cut,
        request("cmpl-plain", 300.0, "unbranched", alone, **plain),
        request("cmpl-failed", 9000.0, "failed", failed, **plain, more_segments=7),
    ]
