"""Values of engine processes in the front end's registry, in every form vLLM starts them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from tests.support.logs import times_said
from tests.support.scrape import Scrape
from tests.support.server import environment
from vllm_parallel_think.observability.metrics import export

FRONT_END = """
import multiprocessing, os, signal, sys, time

def engine(number, pipe):
    from vllm_parallel_think.observability.metrics import export
    from vllm_parallel_think.observability.metrics.instruments import instruments
    from vllm_parallel_think.observability.metrics.recorder import Load, Recorder

    if sys.argv[1:] == ["several", "spawn"]:  # then it stands for an API server, too
        from prometheus_client import Counter
        Counter("vllm:own", "").inc(1 - number)
    export.prepare()  # as configure() does in every process
    made = instruments()
    recorder = Recorder(made, str(number))
    recorder.introduce("1", "2", "p", 100, ["p"])
    recorder.load(Load(1, 2, 3, 10 * (number + 1)))
    made.forks.at("p", str(number)).inc(number + 1)
    pipe.send(os.getpid())
    pipe.recv()

def main():
    if sys.argv[1] == "several":  # what vLLM does for several API servers, before its configuration
        from vllm.v1.metrics.prometheus import setup_multiprocess_prometheus
        setup_multiprocess_prometheus()
    from vllm_parallel_think.observability.metrics import export
    from vllm.v1.metrics.prometheus import get_prometheus_registry
    from prometheus_client import Counter, generate_latest

    export.prepare()
    if sys.argv[1] == "one":
        Counter("vllm:own", "").inc()  # must not vanish
    registry = get_prometheus_registry()
    context = multiprocessing.get_context(sys.argv[2])
    pipes, processes = [], []
    for number in range(2):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=engine, args=(number, theirs)))
        processes[-1].start()
        pipes.append(ours)
    pids = [pipe.recv() for pipe in pipes]
    print(generate_latest(registry).decode(), end="=====")
    os.kill(pids[1], signal.SIGKILL)
    processes[1].join()
    pipes[0].send("stop")
    processes[0].join()
    print(generate_latest(registry).decode(), end="=====")
    print(os.environ.get("VLLM_PT_METRICS_DIR"), flush=True)

if __name__ == "__main__":
    main()
"""


def scrapes(tmp_path: Path, servers: str, method: str) -> tuple[Scrape, Scrape, str]:
    """Run two engines beside a front end; scrape it while they live and when they are gone."""
    script = tmp_path / "front_end.py"
    script.write_text(FRONT_END)
    done = subprocess.run(
        [sys.executable, str(script), servers, method],
        env=environment(TMPDIR=str(tmp_path), VLLM_LOGGING_LEVEL="ERROR"),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alive, gone, directory = done.stdout.split("=====")
    return Scrape(alive), Scrape(gone), directory.strip()


@pytest.mark.parametrize(
    ("servers", "method"),
    [
        ("one", "fork"),
        ("several", "spawn"),
        pytest.param("one", "spawn", marks=pytest.mark.slow),
        pytest.param("several", "fork", marks=pytest.mark.slow),
    ],
)
def test_two_engines_in_one_scrape(tmp_path: Path, servers: str, method: str) -> None:
    alive, gone, directory = scrapes(tmp_path, servers, method)
    for scrape in (alive, gone):
        # A forked process keeps its metrics where its parent did: in its own memory.
        assert (servers, method) == ("several", "fork") or scrape.sum("vllm:own_total") == 1
        assert scrape.sum("vllm_pt_forks_total", engine="0", profile="p") == 1
        assert scrape.sum("vllm_pt_forks_total", engine="1", profile="p") == 2
        assert "pid" not in scrape.labels("vllm_pt_forks_total")
    assert alive.sum("vllm_pt_held_blocks") == 30
    assert alive.labels("vllm_pt_held_blocks") == {"engine"}
    assert alive.sum("vllm_pt_info", engine="1", version="1", vllm_version="2", profile="p") == 1
    # An engine that ends takes its gauges along, and where we read them also one that is killed.
    assert not gone.has("vllm_pt_held_blocks", engine="0")
    if servers == "one":
        assert not gone.has("vllm_pt_held_blocks")
        assert directory.startswith(str(tmp_path))
    else:
        assert directory == "None"
    assert not os.path.exists(directory)
    assert not list(tmp_path.glob("vllm-parallel-think-*"))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has no directory yet."""
    for name in (export.DIRECTORY, export.VLLM_DIRECTORY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(export, "_homes", {})
    monkeypatch.setattr(export, "_served", None)
    export._say_why_not.cache_clear()
    return monkeypatch


def test_it_says_when_nothing_can_be_exported(
    fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setattr(logging.getLogger("vllm"), "propagate", True)
    fresh.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    export.prepare()
    assert "not exported: no temporary directory" in caplog.text
    assert "TMPDIR" in caplog.text
    for _ in range(2):
        assert export.home() is None
    assert times_said(caplog, "was not started by a front end on this machine") == 1


def test_a_directory_that_vanishes_costs_only_our_metrics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="vllm.parallel_think")
    registry = CollectorRegistry()
    Gauge("vllm:own", "", registry=registry).set(4)
    registry.register(export.DirectoryCollector(str(tmp_path / "gone")))
    for _ in range(3):
        assert b"vllm:own 4.0" in generate_latest(registry)
    assert times_said(caplog, "cannot be read") == 1
    (tmp_path / "gone").mkdir()
    for _ in range(2):
        assert b"vllm:own 4.0" in generate_latest(registry)
    assert times_said(caplog, "are exported again") == 1


def test_a_front_end_does_not_show_another_ones_requests(
    fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A replica inherits its environment from a process that may be a front end, too."""
    fresh.setattr("tempfile.tempdir", str(tmp_path))
    registry = CollectorRegistry()
    fresh.setattr(export, "REGISTRY", registry)
    other = tmp_path / f"vllm-parallel-think-{os.getppid()}-abc"
    other.mkdir()
    fresh.setenv(export.DIRECTORY, str(other))
    export.prepare()
    own = os.environ[export.DIRECTORY]
    assert own != str(other)
    export.prepare()
    assert os.environ[export.DIRECTORY] == own
    assert len(registry._collector_to_names) == 1
