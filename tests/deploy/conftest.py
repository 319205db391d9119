"""One server, one Prometheus and one load for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy import load
from tests.deploy.collector import Collector
from tests.deploy.prometheus import Prometheus
from tests.deploy.watched import Watched, watch
from tests.support.server import Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder: they need programs and services of their own."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.deploy)
            item.add_marker(pytest.mark.timeout(900))  # the first one waits for the whole load


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
