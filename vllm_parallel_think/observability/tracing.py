"""OpenTelemetry spans of a request's group, branches and joins, where vLLM's tracing is on.

They hang below the client's own trace, beside vLLM's ``llm_request``, and are written when the
request ends, with the times of its parts.
"""

from __future__ import annotations

import time
from itertools import groupby
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind, Status, StatusCode
from vllm.config import VllmConfig
from vllm.tracing import extract_trace_context, init_tracer

from ..core.errors import short_id
from ..core.timeline import TimelineSegment, segments
from .observed_group import ObservedGroup, Viewer

MAX_BRANCHES = 512
"""Branch spans of one request; the group's span says how many there were."""


_FIGURES = (
    *("profile", "forks", "paths", "widest_fork", "generated_tokens", "critical_path_tokens"),
    *("parallelism_ratio", "reused_kv_tokens"),
)


class SpanWriter(Viewer):
    """Writes a request's spans when it has ended."""

    def __init__(self, config: VllmConfig) -> None:
        endpoint = config.observability_config.otlp_traces_endpoint
        if not isinstance(trace.get_tracer_provider(), TracerProvider):
            # With several API servers vLLM starts engines before it sets tracing up.
            init_tracer("vllm.parallel_think", endpoint)
        self._tracer = trace.get_tracer("vllm.parallel_think")
        self._offset = time.time_ns() - time.monotonic_ns()

    def ended(self, observed: ObservedGroup, outcome: str) -> None:
        """Write the spans of a request that branched; of others vLLM's own says all there is."""
        if not observed.group.branched:
            return
        parts = [part for part in segments(observed.group) if part.started is not None]
        summary = observed.group.summary()
        now = time.monotonic()
        group = self._tracer.start_span(
            "parallel_think.group",
            context=extract_trace_context(observed.trace_headers),
            kind=SpanKind.INTERNAL,
            start_time=self._at(min(_started(part) for part in parts)),
            attributes={
                "vllm_pt.request_id": short_id(observed.request_id),
                "vllm_pt.outcome": outcome,
                **{f"vllm_pt.{key}": getattr(summary, key) for key in _FIGURES},
            },
        )
        if outcome == "failed":
            group.set_status(Status(StatusCode.ERROR, observed.error or "failed"))
        try:
            self._write_branches(group, parts, now)
        finally:
            group.end(self._at(now))

    def _write_branches(self, group: Any, parts: list[TimelineSegment], now: float) -> None:
        spans: dict[str, Any] = {}
        ends: dict[str, float] = {}
        parents: dict[str, str] = {}
        order = sorted(parts, key=lambda part: (part.depth, part.lane))
        for lane, own in groupby(order, key=lambda part: part.lane):
            if len(spans) == MAX_BRANCHES:
                break
            runs = list(own)
            parents[lane] = runs[0].parent
            ends[lane] = max(now if part.ended is None else part.ended for part in runs)
            spans[lane] = self._tracer.start_span(
                "parallel_think.branch",
                context=trace.set_span_in_context(spans.get(runs[0].parent, group)),
                start_time=self._at(min(_started(part) for part in runs)),
                attributes={
                    "vllm_pt.lane": lane,
                    "vllm_pt.kind": runs[0].kind,
                    "vllm_pt.path": runs[0].name,
                    "vllm_pt.tokens": sum(part.tokens for part in runs),
                },
            )
            self._mark_tokens(spans[lane], runs)
        for lane in reversed(spans):  # an inner path may outlive what was written of its parent
            parent = parents[lane]
            if parent in ends:
                ends[parent] = max(ends[parent], ends[lane])
        self._write_joins(group, spans, ends, parts)
        for lane, span in spans.items():
            span.end(self._at(ends[lane]))

    def _mark_tokens(self, span: Any, runs: list[TimelineSegment]) -> None:
        for part in runs:
            if part.first is not None:
                span.add_event(f"first token of {part.kind}", timestamp=self._at(part.first))

    def _write_joins(
        self,
        group: Any,
        spans: dict[str, Any],
        ends: dict[str, float],
        parts: list[TimelineSegment],
    ) -> None:
        """Write a span for each join: from the first path that waits to the branch after it."""
        forks: dict[str, list[str]] = {}
        for lane in spans:
            if "/" in lane:
                forks.setdefault(lane.rpartition("/")[0], []).append(lane)
        for fork, lanes in forks.items():
            parent = fork.rpartition(".")[0]
            last = max(ends[lane] for lane in lanes)
            after = [
                _started(part)
                for part in parts
                if part.lane == parent and part.kind == "conclusion" and _started(part) >= last
            ]
            if after:
                span = self._tracer.start_span(
                    "parallel_think.join",
                    context=trace.set_span_in_context(spans.get(parent, group)),
                    start_time=self._at(min(ends[lane] for lane in lanes)),
                    attributes={"vllm_pt.lane": parent, "vllm_pt.paths": len(lanes)},
                )
                span.end(self._at(min(after)))

    def _at(self, clock: float) -> int:
        return int(clock * 1e9) + self._offset


def _started(part: TimelineSegment) -> float:
    assert part.started is not None
    return part.started
