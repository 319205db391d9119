"""Spans of groups, from a real scheduler to an exporter in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.support.schedules import crowd, simulate, simulation_config
from tests.support.tiny import IdGrammar
from vllm_parallel_think.observability.tracing import SpanWriter

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


def by_id(spans: tuple[ReadableSpan, ...]) -> dict[int, ReadableSpan]:
    return {span.context.span_id: span for span in spans}


def test_a_group_is_a_tree_of_spans_in_the_clients_trace(
    exporter: InMemorySpanExporter, tiny_model: Path, tmp_path: Path
) -> None:
    exporter.clear()
    simulation = simulate(tiny_model, tmp_path, IdGrammar(num_paths=4), asynchronous=False)
    simulation.scheduler.observer._viewers = {"spans": SpanWriter(simulation_config(simulation))}
    crowd(simulation, seed=3)
    for state in simulation.scheduler.groups:
        state.root.trace_headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    simulation.run()
    spans = exporter.get_finished_spans()
    groups = [span for span in spans if span.name == "parallel_think.group"]
    summaries = {
        client.request_id: client.summary
        for client in simulation.clients.values()
        if client.parallel and client.summary["forks"]
    }
    assert {span.attributes["vllm_pt.request_id"] for span in groups} == set(summaries)
    known = by_id(spans)
    names: dict[str, Counter[str]] = {}
    tokens: Counter[str] = Counter()
    for span in spans:
        assert span.context.trace_id == int(TRACE, 16)
        above = span
        while above.name != "parallel_think.group":
            outer = known[above.parent.span_id]
            assert outer.start_time <= above.start_time <= above.end_time <= outer.end_time
            above = outer
        assert above.parent.span_id == int(PARENT, 16)
        request = above.attributes["vllm_pt.request_id"]
        names.setdefault(request, Counter())[span.name] += 1
        if span.name == "parallel_think.branch":
            tokens[request] += span.attributes["vllm_pt.tokens"]
    for request, summary in summaries.items():
        assert names[request]["parallel_think.group"] == 1
        # Joins of paths behind the end of the answer never come.
        assert 3 <= names[request]["parallel_think.branch"] <= 1 + summary["paths"]
        assert names[request]["parallel_think.join"] <= summary["forks"]
        assert tokens[request] == summary["generated_tokens"]
    assert sum(count["parallel_think.join"] for count in names.values()) > 2
