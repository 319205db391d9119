"""A full temporary directory costs new series for as long as it is full, and never a process."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.multiprocess import MultiProcessCollector

from tests.support.logs import times_said
from tests.support.server import environment
from vllm_parallel_think.observability.metrics import outage
from vllm_parallel_think.observability.metrics.export import Home
from vllm_parallel_think.observability.metrics.files import INITIAL_BYTES, AllocatedDict
from vllm_parallel_think.observability.page import timelines

ENGINE = """
import json, logging, os, sys, time
from pathlib import Path

logging.basicConfig(level=logging.INFO, stream=sys.stderr)
from tests.support.scrape import here
from vllm_parallel_think.observability.metrics import export, outage
from vllm_parallel_think.observability.metrics.instruments import instruments
from vllm_parallel_think.observability.metrics.recorder import Load, Recorder

small, when = Path(sys.argv[1]), sys.argv[2]

def fill():
    with open(small / "fill", "wb", 0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            print("full:", error, file=sys.stderr)

export.prepare()
recorder = Recorder(instruments(), "0")
if when == "before the first value":
    fill()
recorder.introduce("1", "2", "p0", 100, ["p0"])
if when == "behind it":
    fill()
for number in range(200):
    name = f"p{number}"
    recorder._show(name)
    recorder._made.forks.at(name, "0").inc(number)
recorder.load(Load(3, 2, 1, 50))
full = here()
(small / "fill").unlink()
recorder.load(Load(3, 2, 1, 51))
early = here()
export.home()._files._outage._clock = lambda: time.monotonic() + outage.FIRST_PAUSE
recorder.load(Load(3, 2, 1, 52))
later = here()
held = "vllm_pt_held_blocks"
print(json.dumps([
    [len(s.values("vllm_pt_forks_total", "profile")), s.sum(held) if s.has(held) else None]
    for s in (full, early, later)
]))
print(json.dumps(later.sum("vllm_pt_forks_total")))
"""
"""What an engine does, on a file system that somebody else fills."""

MOUNT = 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"'


def in_small_file_system(folder: Path) -> list[str]:
    """Return how to run a command that sees a small file system of its own at a folder."""
    program = shutil.which("unshare")
    if program is None:
        pytest.skip("no small file system can be mounted: `unshare` (util-linux) is missing")
    own = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    prefix = [program, "--mount", *own, "sh", "-c", MOUNT, str(folder)]
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {tried.stderr.strip()}")
    return prefix


@pytest.mark.parametrize("when", ["before the first value", "behind it"])
def test_an_engine_outlives_a_full_file_system(when: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [*in_small_file_system(tmp_path), sys.executable, "-c", ENGINE, str(tmp_path), when],
        env=environment(TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "full:" in done.stderr
    (full, held), (early, _), (later, held_later) = json.loads(done.stdout.splitlines()[0])
    assert full < 200 and early == full, "not tried again with every value"
    assert later == 200 and held_later == 52
    assert held == (50 if when == "behind it" else None), "what has its place is still written"
    assert json.loads(done.stdout.splitlines()[1]) == sum(range(200)), "nothing was lost"
    assert done.stderr.count("counted but not exported") == 1
    assert done.stderr.count("exported again") == 1


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Let this process write no file beyond a size: an error as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def owns_its_space(path: Path) -> bool:
    state = path.stat()
    return state.st_blocks * 512 >= state.st_size


def test_files_own_their_space_from_the_start_and_when_they_grow(tmp_path: Path) -> None:
    path = tmp_path / "counter_1-pt.db"
    found = AllocatedDict(path)
    sizes = set()
    for number in range(2000):
        found.write_value(f"key {number} " + "x" * 200, float(number), 0.0)
        sizes.add(path.stat().st_size)
        assert owns_its_space(path)
    assert sorted(sizes) == [INITIAL_BYTES << doubling for doubling in range(4)]
    found.write_value("long " + "x" * (1 << 20), 7.0, 0.0)
    assert path.stat().st_size == INITIAL_BYTES << 5 and owns_its_space(path)
    found.close()
    again = AllocatedDict(path)
    assert again.read_value("key 1999 " + "x" * 200)[0] == 1999
    assert again.read_value("long " + "x" * (1 << 20))[0] == 7


def test_a_file_that_cannot_be_made_leaves_nothing_behind(tmp_path: Path) -> None:
    with largest_file(1000), pytest.raises(OSError):
        AllocatedDict(tmp_path / "counter_1-pt.db")
    assert list(tmp_path.iterdir()) == []


def exported(directory: Path) -> dict[str, float]:
    """Read what a front end would."""
    found = MultiProcessCollector(None, path=str(directory)).collect()
    return {
        sample.name + str(sample.labels.get("x", "")): sample.value
        for metric in found
        for sample in metric.samples
    }


def test_values_without_a_place_are_counted_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="vllm.parallel_think")
    clock = [0.0]
    home = Home(tmp_path)
    home._files._outage = outage.Outage(lambda: clock[0])
    with home.creating():
        counter = Counter("c", "", ["x"], registry=CollectorRegistry())
        histogram = Histogram("h", "", ["x"], registry=CollectorRegistry())
        with largest_file(INITIAL_BYTES):
            for number in range(2000):
                counter.labels(str(number)).inc()
            counter.labels("0").inc()
        known = len(exported(tmp_path))
        assert 100 < known < 2000
        assert exported(tmp_path)["c_total0"] == 2
        counter.labels("1999").inc()  # there would be room, but it is not yet tried again
        histogram.labels("a").observe(3)
        assert len(exported(tmp_path)) == known
        clock[0] += outage.FIRST_PAUSE
        counter.labels("0").inc()
    found = exported(tmp_path)
    assert found["c_total0"] == 3 and found["c_total1999"] == 2
    assert sum(value for name, value in found.items() if name.startswith("c_total")) == 2003
    assert (found["h_counta"], found["h_suma"]) == (1, 3)
    assert times_said(caplog, "counted but not exported") == 1
    assert times_said(caplog, "exported again") == 1


def test_the_page_goes_on_when_there_is_room_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="vllm.parallel_think")
    clock = [0.0]
    writer = timelines.TimelineWriter(tmp_path, "0")
    writer._outage = outage.Outage(lambda: clock[0])
    with largest_file(10):
        for _ in range(3):
            writer.write(())
            clock[0] += 2
    assert list(tmp_path.iterdir()) == []
    clock[0] += outage.FIRST_PAUSE
    writer.write(())
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    assert times_said(caplog, "stands still for now") == 1
    assert times_said(caplog, "goes on") == 1
