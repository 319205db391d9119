"""One server for all tests of this folder, in vLLM's default form of several processes."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.repository import VISIBLE_OUTLINE
from tests.support.server import ENDLESS, SHORT_STEPS, Answer, Server


@pytest.fixture(scope="package")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose requests branch by a visible outline unless they say otherwise."""
    folder = tmp_path_factory.mktemp("serve")
    profile = folder / "endless.toml"
    profile.write_text(ENDLESS)
    workers = folder / "short-steps.toml"
    workers.write_text(SHORT_STEPS)
    options = {"profile": VISIBLE_OUTLINE, "profiles": [str(profile), str(workers)]}
    server = Server(model, folder / "server.log", options)
    try:
        server.wait_ready()
        yield server
    except BaseException:
        print(server.log_tail())
        raise
    finally:
        server.stop()


@pytest.fixture(scope="package")
def whole(server: Server) -> Answer:
    """A greedy answer in one piece, from three paths side by side."""
    (answer,) = server.ask()
    return answer


@pytest.fixture(scope="package")
def plain(server: Server) -> Answer:
    """The greedy answer of a request that turns branches off."""
    (answer,) = server.ask(vllm_xargs={"parallel_think": "off"})
    return answer


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    """Show the end of the server's log beside a failure."""
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and server is not None:
        report.sections.append(("server log", server.log_tail()))
    return report
