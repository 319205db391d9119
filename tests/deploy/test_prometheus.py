"""Dashboard, rules and metrics fit each other, and a real Prometheus agrees."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.deploy import queries
from tests.deploy.prometheus import FOLDER, promtool
from tests.deploy.watched import Watched

RULES = yaml.safe_load((FOLDER / "rules.yaml").read_text())
NEVER_HERE = {"Draft tokens kept"}
"""Panels without data on a server that has no draft model: a share of nothing."""


def test_rules_are_valid_and_do_what_their_tests_say() -> None:
    assert "SUCCESS" in promtool("check", "rules", "rules.yaml")
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yaml")
    assert "SUCCESS" in promtool("check", "config", "prometheus.yaml")


def test_every_alert_has_a_test_and_a_runbook() -> None:
    tested = yaml.safe_load((FOLDER / "rules_test.yaml").read_text())["tests"]
    fired = {
        case["alertname"]
        for test in tested
        for case in test.get("alert_rule_test", [])
        if case.get("exp_alerts")
    }
    silent = {
        case["alertname"]
        for test in tested
        for case in test.get("alert_rule_test", [])
        if not case.get("exp_alerts")
    }
    evaluated = " ".join(
        case["expr"] for test in tested for case in test.get("promql_expr_test", [])
    )
    for group in RULES["groups"]:
        for rule in group["rules"]:
            if "record" in rule:
                assert rule["record"] in evaluated, rule["record"]
                continue
            assert rule["alert"] in fired & silent, f"{rule['alert']}: fires and stays silent"
            assert rule["labels"]["severity"] in ("critical", "warning", "info")
            assert len(rule["annotations"]["description"]) > 80, "says what to do"


def all_queries() -> list[queries.Query]:
    return queries.of_dashboard() + queries.of_rules()


@pytest.mark.parametrize("query", all_queries(), ids=lambda query: query.place)
def test_queries_name_what_the_server_exports(query: queries.Query, watched: Watched) -> None:
    scrape = watched.after
    for selector in queries.selectors(query.text):
        if selector.name == "up":
            continue
        if selector.name in queries.recorded():
            assert watched.prometheus.query(selector.name) or "judge" in selector.name
            continue
        assert scrape.has(selector.name), f"/metrics has no {selector.name}"
        exported = scrape.labels(selector.name) | set(queries.ADDED)
        assert selector.grouped <= exported, f"{selector.name} has no {selector.grouped - exported}"
        for label, operator, value in selector.conditions:
            assert label in exported, f"{selector.name} has no label {label}"
            known = scrape.values(selector.name, label) or {queries.ADDED.get(label, "")}
            if operator == "=":
                assert value in known, f"{selector.name}: {label} is never {value!r}"
            elif operator == "=~":
                assert any(re.fullmatch(value, one) for one in known), f"{label}=~{value!r}"


def test_every_panel_shows_something(watched: Watched) -> None:
    """Asked right after the load, all queries but those without a cause have series."""
    empty = {
        query.place
        for query in queries.of_dashboard(window="2m")
        if not watched.prometheus.query(query.text, watched.ended)
    }
    assert empty <= NEVER_HERE


def test_prometheus_knows_what_the_clients_did(watched: Watched) -> None:
    value = watched.prometheus.value
    seen = watched.steady + watched.leaving
    parallel = [one for one in seen if one.ask.kind == "parallel"]
    assert value("sum(vllm_pt_requests_total)") == len(parallel)
    refused = sum(one.ask.kind == "refused" for one in seen)
    assert value("sum(vllm_pt_refused_requests_total)") == refused
    widest = max(one.summary["widest_fork"] for one in parallel if one.summary)
    assert value(f'sum(vllm_pt_fork_width_bucket{{le="{widest:.1f}"}})') == value(
        "sum(vllm_pt_fork_width_count)"
    )
    after = watched.after
    ratio = value("sum(vllm_pt_generated_tokens_total) / sum(vllm_pt_critical_path_tokens_total)")
    assert ratio > 1.2
    assert ratio == after.sum("vllm_pt_generated_tokens_total") / after.sum(
        "vllm_pt_critical_path_tokens_total"
    )
    # While requests ran, gauges said so.
    seconds = "10m"
    assert value(f"max(max_over_time(vllm_pt_active_groups[{seconds}]))") >= 1
    assert value(f"sum(max_over_time(vllm_pt_active_branches[{seconds}]))") >= 2
    assert value(f"max(max_over_time(vllm_pt_held_blocks[{seconds}]))") >= 1


def test_rules_run_in_prometheus(watched: Watched) -> None:
    rules = watched.prometheus.rules()
    assert len(rules) == sum(len(group["rules"]) for group in RULES["groups"])
    assert {rule["health"] for rule in rules} == {"ok"}, [r for r in rules if r["health"] != "ok"]
    assert watched.prometheus.value("max(max_over_time(vllm_pt:parallelism_ratio:rate5m[10m]))") > 1
    assert watched.prometheus.value("max(max_over_time(vllm_pt:held_kv:fraction[10m]))") > 0
    firing = watched.prometheus.query('ALERTS{alertstate="firing"}')
    assert not firing, "a healthy server raises no alarm"


def test_the_dashboard_can_be_imported() -> None:
    """What Grafana needs of a file: ids and places that fit, a choice of the data source."""
    board = queries.dashboard()
    assert board["uid"] and board["schemaVersion"] >= 36
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24 and not cells & taken, f"{panel['title']} overlaps"
        taken |= cells
    names = [variable["name"] for variable in board["templating"]["list"]]
    assert names == ["datasource", "job", "instance"]
    for panel in queries.panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert 'instance=~"$instance"' in target["expr"]
    assert queries.DASHBOARD.read_text() == json.dumps(board, indent=2, ensure_ascii=False) + "\n"
    assert Path(queries.DASHBOARD).stat().st_size < 200_000
