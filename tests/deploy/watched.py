"""A server under load, and what watches it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tests.deploy import load
from tests.deploy.collector import Collector
from tests.deploy.prometheus import Prometheus
from tests.support.scrape import Scrape
from tests.support.server import Server

STEADY, LEAVING = 14, 26
"""Requests whose clients all stay, and requests of which a tenth go away."""


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
