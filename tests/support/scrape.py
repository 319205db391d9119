"""Reading a ``/metrics`` text."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import REGISTRY, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

FIGURES = {
    "vllm_pt_forks_total": "forks",
    "vllm_pt_paths_total": "paths",
    "vllm_pt_generated_tokens_total": "generated_tokens",
    "vllm_pt_critical_path_tokens_total": "critical_path_tokens",
    "vllm_pt_reused_kv_tokens_total": "reused_kv_tokens",
}
"""Metrics that are sums over the summaries which clients get, and the summary's key."""


class Scrape:
    """All series of one scrape."""

    def __init__(self, text: str) -> None:
        self.families: list[Metric] = list(text_string_to_metric_families(text))
        self.series: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in self.families:
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                assert key not in self.series, f"twice in one scrape: {key}"
                self.series[key] = sample.value

    def sum(self, name: str, **labels: str) -> float:
        """Return the sum over all series of a name that have these labels; there must be one."""
        found = self._found(name, labels)
        assert found, f"no {name} with {labels}"
        return sum(found)

    def has(self, name: str, **labels: str) -> bool:
        """Return whether there is such a series."""
        return bool(self._found(name, labels))

    def labels(self, name: str) -> set[str]:
        """Return the label names that occur with a name."""
        return {key for (n, pairs) in self.series if n == name for key, _ in pairs}

    def values(self, name: str, label: str) -> set[str]:
        """Return the values of one label of a name."""
        return {v for (n, pairs) in self.series if n == name for key, v in pairs if key == label}

    def names(self, prefix: str) -> set[str]:
        """Return the names of series that begin so."""
        return {name for name, _ in self.series if name.startswith(prefix)}

    def _found(self, name: str, labels: dict[str, str]) -> list[float]:
        wanted = set(labels.items())
        return [v for (n, pairs), v in self.series.items() if n == name and wanted <= pairs]


def here() -> Scrape:
    """Scrape this process."""
    return Scrape(generate_latest(REGISTRY).decode())


def growth(before: Scrape, after: Scrape) -> Callable[..., float]:
    """Return a function like :meth:`Scrape.sum` for what was added between two scrapes."""

    def grown(name: str, **labels: str) -> float:
        earlier = before.sum(name, **labels) if before.has(name, **labels) else 0.0
        return after.sum(name, **labels) - earlier

    return grown


def total(summaries: Iterable[dict[str, object]], key: str) -> float:
    """Return the sum of one figure over clients' summaries."""
    return sum(float(str(summary[key])) for summary in summaries)
