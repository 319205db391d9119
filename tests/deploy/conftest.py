"""One server, one Prometheus and one load for all tests of this folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deploy import load
from tests.deploy.collector import Collector
from tests.deploy.prometheus import Prometheus
from tests.serve.conftest import model, pytest_runtest_makereport
from tests.support.scrape import Scrape
from tests.support.server import Server

__all__ = ["model", "pytest_runtest_makereport"]

STEADY, LEAVING = 14, 26
"""Requests whose clients all stay, and requests of which a tenth go away."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder: they need programs and services of their own."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.deploy)
            item.add_marker(pytest.mark.timeout(900))  # the first one waits for the whole load


@dataclass(frozen=True)
class Watched:
    """A server that was under load, and everything that watched it.

    Attributes:
        server: Still running.
        prometheus: Has scraped it all the time.
        collector: Has its spans.
        before: The metrics before the load.
        between: The metrics after the part in which all clients stayed.
        after: The metrics at the end.
        steady: What clients saw who all stayed.
        leaving: What clients saw of whom some went away.
        began: Time before the load.
        ended: Time after it.

    """

    server: Server
    prometheus: Prometheus
    collector: Collector
    before: Scrape
    between: Scrape
    after: Scrape
    steady: list[load.Seen]
    leaving: list[load.Seen]
    began: float
    ended: float


@pytest.fixture(scope="package")
def watched(
    model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Watched]:
    """A server as people start it, with everything on that can be watched, after the load."""
    folder = tmp_path_factory.mktemp("deploy")
    with Collector() as collector:
        server = Server(
            model,
            folder / "server.log",
            load.options(folder),
            *("--otlp-traces-endpoint", collector.url, "--api-key", "secret"),
            VLLM_PLUGINS="parallel_think,parallel_think_page",
            OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="http/protobuf",
            OTEL_BSP_SCHEDULE_DELAY="500",
        )
        prometheus = None
        try:
            server.wait_ready()
            prometheus = Prometheus(server.url.removeprefix("http://"), folder)
            prometheus.wait_ready()
            yield watch(server, prometheus, collector)
        except BaseException:
            print(server.log_tail())
            raise
        finally:
            if prometheus is not None:
                prometheus.stop()
            server.stop()


def scrape(server: Server) -> Scrape:
    """Read the server's metrics."""
    return Scrape(server.http.get("/metrics").text)


def watch(server: Server, prometheus: Prometheus, collector: Collector) -> Watched:
    """Put the server under load and wait until it has nothing left to do."""
    began = time.time()
    before = scrape(server)
    steady = load.run(server.url, STEADY, seed=1, api_key="secret")
    server.wait_idle()
    between = scrape(server)
    leaving = load.run(server.url, LEAVING, leaving=0.1, seed=7, api_key="secret")
    server.wait_idle()
    time.sleep(3)  # a few more scrapes, and spans on their way
    return Watched(
        server,
        prometheus,
        collector,
        before,
        between,
        scrape(server),
        steady,
        leaving,
        began,
        time.time(),
    )
