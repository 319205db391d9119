"""The page and the spans of a server that people start."""

from __future__ import annotations

from tests.deploy.collector import attributes
from tests.deploy.watched import Watched


def test_the_page_is_served_without_the_key(watched: Watched) -> None:
    """As documented: vLLM guards only ``/v1``."""
    http = watched.server.http
    assert http.post("/v1/chat/completions", json={}).status_code == 401
    page = http.get("/parallel-think")
    assert page.status_code == 200 and "<title>parallel-think" in page.text
    found = http.get("/parallel-think/requests.json").json()
    assert found["exported"]
    ended = [request for request in found["requests"] if request["outcome"] == "branched"]
    assert ended
    seen = [one.summary for one in watched.steady + watched.leaving if one.summary]
    keys = ("generated_tokens", "critical_path_tokens", "paths", "reused_kv_tokens")
    known = {tuple(summary[key] for key in keys) for summary in seen}
    assert {tuple(request[key] for key in keys) for request in ended} <= known
    complete = 0
    for request in ended:
        # What lies behind the end of the answer is shown, too.
        lanes = {part["lane"] for part in request["segments"]}
        assert 2 <= len(lanes) <= 1 + request["paths"]
        joined = any(part["kind"] == "conclusion" for part in request["segments"])
        complete += joined and len(lanes) == 1 + request["paths"]
    assert complete >= len(ended) / 2


def test_a_request_is_a_tree_of_spans(watched: Watched) -> None:
    collector = watched.collector
    groups = {span.span_id: span for span in collector.named("parallel_think.group")}
    branched = watched.after.sum("vllm_pt_requests_total", outcome="branched")
    outcomes = [attributes(span)["vllm_pt.outcome"] for span in groups.values()]
    assert outcomes.count("branched") == branched
    assert collector.named("llm_request"), "vLLM's own go on"
    branches = {span.span_id: span for span in collector.named("parallel_think.branch")}
    for span in branches.values():
        above = groups.get(span.parent_span_id) or branches[span.parent_span_id]
        assert above.start_time_unix_nano <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= above.end_time_unix_nano
        assert span.trace_id == above.trace_id
    joins = collector.named("parallel_think.join")
    concluded = {
        span.span_id
        for span in branches.values()
        if any(event.name == "first token of conclusion" for event in span.events)
    }
    assert len(concluded) >= 3
    assert concluded <= {span.parent_span_id for span in joins}
    for span in joins:
        assert span.end_time_unix_nano >= span.start_time_unix_nano
