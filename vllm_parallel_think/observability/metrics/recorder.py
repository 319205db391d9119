"""Filling the metrics from groups: when something happens to one, and once in a while.

A group counts in plain integers; what is new since the last look is added to the counters. So
counters move while a long request runs, and their sums are those of the summaries that clients get.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from ...core.summary import HogwildFigures, Summary
from ..observed_group import Load, ObservedGroup, Viewer
from .instruments import ANSWERS, FALLBACKS, JUDGED, OUTCOMES, Instruments


@dataclass
class _Seen:
    """What was counted of a group already."""

    totals: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)


class Recorder(Viewer):
    """Counts one engine's groups."""

    def __init__(self, instruments: Instruments, engine: str) -> None:
        self._made = instruments
        self._engine = engine
        self._seen: WeakKeyDictionary[ObservedGroup, _Seen] = WeakKeyDictionary()
        self._profiles: set[str] = set()

    def introduce(
        self, version: str, vllm_version: str, profile: str, pool_blocks: int, profiles: list[str]
    ) -> None:
        """Say what runs here, and show the counters of these profiles at zero."""
        made, engine = self._made, self._engine
        made.info.at(version, vllm_version, profile, engine).set(1)
        made.pool_blocks.at(engine).set(pool_blocks)
        for name in profiles:
            self._show(name)
        for reason in FALLBACKS:
            made.fallbacks.at(reason, engine)
        for answer in ANSWERS:
            made.hogwild_checks.at(answer, engine)
        for kind in JUDGED:
            made.judge.at(kind, engine)
        for instrument in (made.fork_width, made.join_wait, made.hogwild_steps, made.stalls):
            instrument.at(engine)
        self.load(Load(0, 0, 0, 0))

    def started(self, observed: ObservedGroup) -> None:
        """Show the counters of a request's profile."""
        self._show(observed.group.summary().profile)

    def changed(self, observed: ObservedGroup) -> None:
        """Count what is new of a group."""
        self._count(observed, observed.group.summary())

    def ended(self, observed: ObservedGroup, outcome: str) -> None:
        """Count the last of a group, and how it ended."""
        summary = observed.group.summary()
        self._count(observed, summary)
        self._seen.pop(observed, None)
        made, engine, profile = self._made, self._engine, summary.profile
        made.requests.at(profile, outcome, engine).inc()
        if observed.group.has_paths:
            made.fork_width.at(engine).observe(summary.widest_fork)
            made.ratio.at(profile, engine).observe(summary.parallelism_ratio)

    def stalled(self) -> None:
        """Count a request that was failed so that the engine gets on."""
        self._made.stalls.at(self._engine).inc()

    def load(self, load: Load) -> None:
        """Set the gauges."""
        made, engine = self._made, self._engine
        made.active_groups.at(engine).set(load.groups)
        made.active_branches.at("running", engine).set(load.running)
        made.active_branches.at("waiting", engine).set(load.waiting)
        made.held_blocks.at(engine).set(load.held_blocks)

    def _show(self, profile: str) -> None:
        if profile in self._profiles:
            return
        self._profiles.add(profile)
        for outcome in OUTCOMES:
            self._made.requests.at(profile, outcome, self._engine)
        for counter in self._by_profile().values():
            counter.at(profile, self._engine)
        self._made.ratio.at(profile, self._engine)

    def _by_profile(self) -> dict[str, Any]:
        made = self._made
        return {
            "forks": made.forks,
            "paths": made.paths,
            "generated_tokens": made.generated,
            "critical_path_tokens": made.critical,
            "reused_kv_tokens": made.reused,
        }

    def _count(self, observed: ObservedGroup, summary: Summary) -> None:
        seen = self._seen.get(observed)
        if seen is None:
            seen = self._seen[observed] = _Seen()
        engine, profile = self._engine, summary.profile
        for key, counter in self._by_profile().items():
            if new := _new(seen.totals, key, getattr(summary, key)):
                counter.at(profile, engine).inc(new)
        for reason, total in summary.fallbacks.items():
            if new := _new(seen.fallbacks, reason, total):
                self._made.fallbacks.at(reason, engine).inc(new)
        if summary.hogwild is not None:
            self._count_hogwild(seen, summary.hogwild)
        self._observe_waits(observed.group.take_join_waits())

    def _count_hogwild(self, seen: _Seen, figures: HogwildFigures) -> None:
        """Count the steps of workers and their checks, for groups that have workers."""
        made, engine = self._made, self._engine
        if new := _new(seen.totals, "steps", figures.steps):
            made.hogwild_steps.at(engine).inc(new)
        for answer in ANSWERS:
            if new := _new(seen.totals, answer, getattr(figures, f"checks_{answer}")):
                made.hogwild_checks.at(answer, engine).inc(new)

    def _observe_waits(self, waits: Iterable[float]) -> None:
        for wait in waits:
            if math.isfinite(wait):
                self._made.join_wait.at(self._engine).observe(max(wait, 0.0))


def _new(seen: Counter[str], key: str, total: int) -> int:
    """Return how much a total grew since the last look; counters never go back."""
    new = max(0, total - seen[key])
    seen[key] += new
    return new
