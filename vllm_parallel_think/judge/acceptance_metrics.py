"""Counting what the judge accepts, in the worker that runs it."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..compat.logger import init_logger
from ..observability.metrics.instruments import JUDGED, instruments
from .verifier import Counts

logger = init_logger(__name__)

SECONDS_BETWEEN_READS = 1.0
"""Reading the counts waits for the device, so it is not done every step."""


class JudgeCounter:
    """Exports the growth of a verifier's totals."""

    def __init__(self, totals: Callable[[], Counts], engine: str) -> None:
        self._totals = totals
        self._engine = engine
        self._seen = dict.fromkeys(JUDGED, 0)
        self._next_read = 0.0
        self._made = instruments()
        if self._made is not None:
            for kind in JUDGED:
                self._made.judge.at(kind, engine)

    def stepped(self, idle: bool) -> None:
        """Export what is new, if it is time to, or if the engine has nothing else to do.

        A fault here ends the counting, never the engine.
        """
        if self._made is None:
            return
        now = time.monotonic()
        if not idle and now < self._next_read:
            return
        self._next_read = now + SECONDS_BETWEEN_READS
        try:
            counts = self._totals()
            standard = counts.kept - counts.lossy
            for kind, total in zip(JUDGED, (counts.drafts, standard, counts.lossy), strict=True):
                new = total - self._seen[kind]
                self._seen[kind] = total
                if new > 0:
                    self._made.judge.at(kind, self._engine).inc(new)
        except Exception:
            self._made = None
            logger.exception("vllm_pt_judge_tokens_total stands still from now on")
