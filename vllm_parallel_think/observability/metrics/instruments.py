"""The metrics themselves: names, labels, buckets, and one set of them a process.

Every label is bounded: profiles are the server's, engines its data-parallel ranks, and the rest
words of this code; nothing a client sends becomes a label.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ...core.summary import FallbackReason
from .export import Home, home

OUTCOMES = ("branched", "unbranched", "aborted", "failed")
FALLBACKS = tuple(reason.value for reason in FallbackReason)
JUDGED = ("drafted", "accepted_standard", "accepted_rule")
ANSWERS = ("yes", "no")
REFUSALS = (
    "options",
    "structured_outputs",
    "prompt_logprobs",
    "repetition_detection",
    "thinking_token_budget",
    "prompt_embeddings",
    "beam_search",
    "other",
)

RATIO_BUCKETS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 32, 64)
WIDTH_BUCKETS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64)
WAIT_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)


class Instrument:
    """One metric; its series are created where the front end finds them, each once."""

    def __init__(
        self, home: Home, kind: type, name: str, text: str, *labels: str, **how: Any
    ) -> None:
        self._home = home
        self._children: dict[tuple[str, ...], Any] = {}
        with home.creating():
            self._metric = kind(
                f"vllm_pt_{name}", text, labels, registry=CollectorRegistry(), **how
            )

    def at(self, *labels: str) -> Any:
        """Return one series, created with zero at first."""
        child = self._children.get(labels)
        if child is None:
            with self._home.creating():
                child = self._metric.labels(*labels)
            self._children[labels] = child
        return child


class Instruments:
    """All metrics of one process."""

    def __init__(self, home: Home) -> None:
        make, engine, profile = partial(Instrument, home), "engine", "profile"
        self.info = make(
            Gauge,
            "info",
            "Versions of the plugin and of vLLM, and the profile of requests that name none.",
            *("version", "vllm_version", profile, engine),
            multiprocess_mode="livemax",
        )
        self.requests = make(
            Counter,
            "requests_total",
            "Requests that asked for a profile, by how they ended; aborted ones include those that "
            "a stop string ended.",
            *(profile, "outcome", engine),
        )
        self.active_groups = make(
            Gauge,
            "active_groups",
            "Requests that are branched now.",
            engine,
            multiprocess_mode="livesum",
        )
        self.active_branches = make(
            Gauge,
            "active_branches",
            "Branches of those requests that run, or wait for a place or for blocks.",
            *("state", engine),
            multiprocess_mode="livesum",
        )
        self.forks = make(Counter, "forks_total", "Forks.", profile, engine)
        self.paths = make(Counter, "paths_total", "Paths that forks opened.", profile, engine)
        self.fork_width = make(
            Histogram,
            "fork_width",
            "Paths of the widest fork of a request that branched.",
            engine,
            buckets=WIDTH_BUCKETS,
        )
        self.ratio = make(
            Histogram,
            "parallelism_ratio",
            "Generated tokens over critical-path tokens of a request that branched.",
            *(profile, engine),
            buckets=RATIO_BUCKETS,
        )
        self.generated = make(
            Counter,
            "generated_tokens_total",
            "Tokens sampled for requests that asked for a profile.",
            *(profile, engine),
        )
        self.critical = make(
            Counter,
            "critical_path_tokens_total",
            "Sampled tokens on the longest chain of each of those requests.",
            *(profile, engine),
        )
        self.reused = make(
            Counter,
            "reused_kv_tokens_total",
            "Tokens whose K/V a branch took over from its group instead of computing it.",
            *(profile, engine),
        )
        self.join_wait = make(
            Histogram,
            "join_wait_seconds",
            "Time from a path's end to its join.",
            engine,
            buckets=WAIT_BUCKETS,
        )
        self.held_blocks = make(
            Gauge,
            "held_blocks",
            "KV blocks that groups hold beside those of running requests.",
            engine,
            multiprocess_mode="livesum",
        )
        self.pool_blocks = make(
            Gauge, "pool_blocks", "KV blocks of the engine.", engine, multiprocess_mode="livesum"
        )
        self.fallbacks = make(
            Counter,
            "fallbacks_total",
            "Forks that a model asked for and that were not made, by reason.",
            *("reason", engine),
        )
        self.stalls = make(
            Counter,
            "stalls_total",
            "Requests failed because steps without any work followed each other.",
            engine,
        )
        self.refused = make(
            Counter,
            "refused_requests_total",
            "Requests answered with HTTP 400 because of what they ask of this plugin.",
            "reason",
        )
        self.judge = make(
            Counter,
            "judge_tokens_total",
            "Draft tokens verified, accepted by the standard test, and by the judge's rule alone.",
            *("kind", engine),
        )
        self.hogwild_steps = make(
            Counter, "hogwild_steps_total", "Steps in which Hogwild! workers wrote.", engine
        )
        self.hogwild_checks = make(
            Counter,
            "hogwild_checks_total",
            "Checks whether a worker's work is redundant, by the answer.",
            *("answer", engine),
        )


_instruments: dict[Home, Instruments] = {}


def instruments() -> Instruments | None:
    """Return this process's metrics, or ``None`` where they cannot be exported."""
    found = home()
    if found is None:
        return None
    if found not in _instruments:
        _instruments.clear()
        _instruments[found] = Instruments(found)
    return _instruments[found]
