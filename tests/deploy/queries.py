"""The queries of the dashboard and of the rules, and what they name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.prometheus import FOLDER
from tests.support.repository import ROOT

DASHBOARD = ROOT / "deploy" / "grafana" / "parallel-think.json"
ADDED = {"job": "vllm", "instance": "127.0.0.1:8000"}
"""Labels that Prometheus adds to every series it scrapes."""


@dataclass(frozen=True)
class Query:
    """One query, with Grafana's variables filled in.

    Attributes:
        place: Panel or rule.
        text: PromQL.
        legend: Grafana's name for its series.

    """

    place: str
    text: str
    legend: str = ""


def fill(text: str, window: str = "1m", whole: str = "10m") -> str:
    """Put values in place of Grafana's variables: all jobs, all servers."""
    text = text.replace("$__rate_interval", window).replace("$__range", whole)
    text = re.sub(r"\$(job|instance)\b", ".*", text)
    assert "$" not in text, text
    return text


def dashboard() -> dict[str, Any]:
    """Return the dashboard."""
    return json.loads(DASHBOARD.read_text())


def panels() -> Iterator[dict[str, Any]]:
    """Yield the panels that have queries."""
    return (panel for panel in dashboard()["panels"] if panel["type"] != "row")


def of_dashboard(**variables: str) -> list[Query]:
    """Return every query of the dashboard."""
    return [
        Query(panel["title"], fill(target["expr"], **variables), target["legendFormat"])
        for panel in panels()
        for target in panel["targets"]
    ]


def of_rules(file: Path = FOLDER / "rules.yaml") -> list[Query]:
    """Return every query of the rules."""
    return [
        Query(rule.get("record") or rule["alert"], rule["expr"])
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
    ]


def recorded() -> set[str]:
    """Return the names that the recording rules make."""
    return {query.place for query in of_rules() if ":" in query.place}


@dataclass(frozen=True)
class Selector:
    """A metric that a query names, its conditions, and the labels that must come with it."""

    name: str
    conditions: tuple[tuple[str, str, str], ...]
    grouped: frozenset[str]


def selectors(text: str) -> list[Selector]:
    """Return what a query selects.

    Raises:
        ValueError: The query is not valid.

    """
    import promql_parser  # from the extra `deploy`; other targets only collect these tests

    return list(_walk(promql_parser.parse(text), frozenset()))


def _walk(node: Any, grouped: frozenset[str]) -> Iterator[Selector]:
    kind = type(node).__name__
    if kind == "VectorSelector":
        operators = {"Equal": "=", "NotEqual": "!=", "Re": "=~", "NotRe": "!~"}
        conditions = tuple(
            (m.name, operators[str(m.op).rpartition(".")[2]], m.value)
            for m in node.matchers.matchers
        )
        yield Selector(node.name, conditions, grouped)
    elif kind == "AggregateExpr":
        inner = grouped
        if node.modifier is not None and str(node.modifier.type).endswith("By"):
            inner = frozenset(node.modifier.labels)
        yield from _walk(node.expr, inner)
    elif kind == "BinaryExpr":
        yield from _walk(node.lhs, grouped)
        yield from _walk(node.rhs, grouped)
    elif kind == "Call":
        for argument in node.args:
            yield from _walk(argument, grouped)
    elif kind == "MatrixSelector":
        yield from _walk(node.vector_selector, grouped)
    elif kind in ("ParenExpr", "UnaryExpr", "SubqueryExpr"):
        yield from _walk(node.expr, grouped)
    else:
        assert kind in ("NumberLiteral", "StringLiteral"), f"a kind of query not known here: {kind}"
