"""After a load nothing is left over, and the metrics are what the clients saw."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.deploy.watched import LEAVING, STEADY, Watched
from tests.support.scrape import FIGURES, growth, total


def test_the_load_was_mixed(watched: Watched) -> None:
    """The rest of this file says something only if everything occurred."""
    seen = watched.steady + watched.leaving
    assert len(watched.steady) == STEADY and len(watched.leaving) == LEAVING
    kinds = Counter(one.ask.kind for one in seen)
    assert min(kinds["parallel"], kinds["plain"], kinds["refused"]) >= 2, kinds
    gone = [one for one in watched.leaving if one.ask.leave_after and one.finish is None]
    assert gone, "nobody went away"
    assert any(one.ask.stream for one in seen) and any(not one.ask.stream for one in seen)
    assert sum(bool(one.summary and one.summary["forks"]) for one in seen) >= 8


def test_every_client_got_what_it_asked_for(watched: Watched) -> None:
    for one in watched.steady + watched.leaving:
        if one.ask.kind == "refused":
            assert one.status == 400
        elif one.ask.leave_after is None:
            assert one.status == 200
            assert one.finish in ("stop", "length")
            assert (one.summary is not None) == (one.ask.kind == "parallel")


def test_nothing_is_left_over(watched: Watched) -> None:
    after = watched.after
    for gauge in ("active_groups", "active_branches", "held_blocks"):
        assert after.sum(f"vllm_pt_{gauge}") == 0, gauge
    assert after.sum("vllm:num_requests_running") == after.sum("vllm:num_requests_waiting") == 0
    assert after.sum("vllm:kv_cache_usage_perc") == 0
    assert after.sum("vllm_pt_requests_total", outcome="failed") == 0


def test_sums_are_exact_while_all_clients_stay(watched: Watched) -> None:
    grown = growth(watched.before, watched.between)
    answers = [one for one in watched.steady if one.ask.kind != "refused"]
    summaries = [one.summary for one in answers if one.summary is not None]
    branched = [summary for summary in summaries if summary["forks"]]
    for name, key in FIGURES.items():
        assert grown(name) == total(summaries, key), name
    assert grown("vllm_pt_requests_total", outcome="branched") == len(branched)
    assert grown("vllm_pt_requests_total") == len(summaries)
    assert grown("vllm_pt_fork_width_sum") == total(branched, "widest_fork")
    assert grown("vllm_pt_parallelism_ratio_sum") == pytest.approx(
        total(branched, "parallelism_ratio")
    )
    assert grown("vllm_pt_fallbacks_total") == sum(sum(s["fallbacks"].values()) for s in summaries)
    refused = sum(one.ask.kind == "refused" for one in watched.steady)
    assert grown("vllm_pt_refused_requests_total", reason="options") == refused
    # vLLM's own counters go on beside ours.
    assert grown("vllm:generation_tokens_total") == sum(one.tokens for one in answers)
    assert grown("vllm:request_success_total") == len(answers)


def test_clients_that_go_away_are_counted(watched: Watched) -> None:
    """A client may leave when its answer is complete already: then it counts as what it was."""
    grown = growth(watched.between, watched.after)
    parallel = [one for one in watched.leaving if one.ask.kind == "parallel"]
    gone = [one for one in parallel if one.finish is None]
    aborted = grown("vllm_pt_requests_total", outcome="aborted")
    assert grown("vllm_pt_requests_total") == len(parallel)
    assert aborted <= len(gone)
    ended = [one.summary for one in parallel if one.summary is not None and one.finish]
    branched = sum(bool(summary["forks"]) for summary in ended)
    late = len(gone) - aborted
    assert 0 <= grown("vllm_pt_requests_total", outcome="branched") - branched <= late
    assert (
        0 <= grown("vllm_pt_requests_total", outcome="unbranched") - (len(ended) - branched) <= late
    )
    for name, key in FIGURES.items():
        assert grown(name) >= total(ended, key), name


def test_the_log_is_clean(watched: Watched) -> None:
    log = watched.server.log.read_text()
    for bad in ("Traceback", "not exported", "stand still", "shows no"):
        assert bad not in log, watched.server.log_tail()
