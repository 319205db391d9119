"""Timelines of recent requests: from the engine, by a file, to whoever serves the page.

Bounded in every direction: so many ended requests, so many live ones, so many parts of each.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...compat.logger import init_logger
from ...core.errors import short_id
from ...core.timeline import segments
from ..metrics.folders import is_alive
from ..metrics.outage import Outage
from ..observed_group import ObservedGroup, Viewer

logger = init_logger(__name__)

MAX_ENDED = 32
MAX_LIVE = 16
MAX_SEGMENTS = 96
MAX_TITLE = 80

_FIGURES = (
    *("profile", "forks", "paths", "generated_tokens", "critical_path_tokens"),
    *("parallelism_ratio", "reused_kv_tokens", "fallbacks"),
)
_FILE = "vllm-pt-timeline-{pid}.json"


class TimelineWriter(Viewer):
    """Keeps one engine's recent requests in one file, replaced as a whole."""

    def __init__(self, directory: Path, engine: str) -> None:
        self._file = directory / _FILE.format(pid=os.getpid())
        self._engine = engine
        self._ended: deque[str] = deque(maxlen=MAX_ENDED)
        self._offset = time.time() - time.monotonic()
        self._outage = Outage()

    def ended(self, observed: ObservedGroup, outcome: str) -> None:
        """Keep a request that came to its end."""
        self._ended.appendleft(self._text(observed, outcome))

    def write(self, groups: Iterable[ObservedGroup]) -> None:
        """Replace the file by how things stand; a full disk is tried again later."""
        if not self._outage.due():
            return
        live: list[str] = []
        for observed in groups:
            if len(live) == MAX_LIVE:
                break
            live.append(self._text(observed, None))
        requests = ",".join([*reversed(live), *self._ended])
        text = f'{{"engine":{json.dumps(self._engine)},"requests":[{requests}]}}'
        try:
            self._replace(text)
        except OSError as error:
            if self._outage.failed():
                logger.warning("the page of recent requests stands still for now: %s", error)
            return
        if self._outage.ended():
            logger.info("the page of recent requests goes on")

    def _replace(self, text: str) -> None:
        partly = self._file.with_suffix(".tmp")
        try:
            partly.write_text(text, encoding="utf-8")
            partly.replace(self._file)
        except OSError:
            partly.unlink(missing_ok=True)  # what did fit of it would take the room from others
            raise

    def _text(self, observed: ObservedGroup, outcome: str | None) -> str:
        summary = observed.group.summary()
        parts = segments(observed.group)
        shown = []
        for part in parts[:MAX_SEGMENTS]:
            values = asdict(part)
            values["title"] = part.title[:MAX_TITLE]
            values["name"] = part.name[:MAX_TITLE]
            for key in ("started", "first", "ended"):
                values[key] = self._epoch(values[key])
            shown.append(values)
        return json.dumps(
            {
                "id": short_id(observed.request_id),
                "outcome": outcome,
                "arrived": round(observed.arrival_time, 3),
                "ended": None if outcome is None else round(time.time(), 3),
                **{key: getattr(summary, key) for key in _FIGURES},
                "segments": shown,
                "more_segments": len(parts) - len(shown),
            },
            ensure_ascii=False,
        )

    def _epoch(self, clock: float | None) -> float | None:
        return None if clock is None else round(clock + self._offset, 3)


def read(directory: Path | None) -> dict[str, Any]:
    """Return all engines' recent requests, the newest first; files of ended engines are removed."""
    requests: list[dict[str, Any]] = []
    for file in sorted(directory.glob(_FILE.format(pid="*"))) if directory is not None else []:
        pid = file.stem.rpartition("-")[2]
        if not pid.isdecimal() or not is_alive(int(pid)):
            file.unlink(missing_ok=True)
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            logger.debug("%s: %r", file, error)
            continue
        requests += [{**request, "engine": found["engine"]} for request in found["requests"]]
    requests.sort(key=lambda request: request["arrived"], reverse=True)
    return {"now": time.time(), "exported": directory is not None, "requests": requests}
