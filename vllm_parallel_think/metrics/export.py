"""How metrics of engine processes get into vLLM's own ``/metrics``.

vLLM's single front end keeps its metrics in memory and does not read those of other processes, so
ours lie as prometheus_client's memory-mapped values in a directory of their own, which a collector
in the front end's registry reads. Setting ``PROMETHEUS_MULTIPROC_DIR`` instead would make vLLM's
own metrics vanish. Where vLLM set it itself (several API servers), ours go there, too.
"""

from __future__ import annotations

import atexit
import functools
import logging
import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, values
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

logger = logging.getLogger("vllm.parallel_think")

DIRECTORY = "VLLM_PT_METRICS_DIR"
"""Names the front end's directory to the processes that it starts."""

VLLM_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_PREFIX = "vllm-parallel-think-"


def prepare() -> None:
    """Give this front end a directory for metrics and serve what lies in it; safe to call again.

    Engine processes inherit the directory. A process that somebody else started (a replica beside
    another one) makes its own: a front end must not serve another one's requests as its own.
    """
    if VLLM_DIRECTORY in os.environ:
        return
    inherited = os.environ.get(DIRECTORY)
    if inherited is not None and (
        multiprocessing.parent_process() is not None or _owner(Path(inherited)) == os.getpid()
    ):
        return
    try:
        _remove_stale(Path(tempfile.gettempdir()))
        directory = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")
    except OSError as error:
        os.environ.pop(DIRECTORY, None)
        logger.warning(
            "vllm_pt_ metrics are not exported: no temporary directory (%s); set TMPDIR to a "
            "writable one",
            error,
        )
        return
    os.environ[DIRECTORY] = directory
    REGISTRY.register(DirectoryCollector(directory))
    atexit.register(_remove_own, directory, os.getpid())


def directory() -> Path | None:
    """Return where this server's processes leave what the front end shows, or ``None``."""
    found = os.environ.get(VLLM_DIRECTORY) or os.environ.get(DIRECTORY)
    return Path(found) if found and os.path.isdir(found) else None


class DirectoryCollector(Collector):
    """Reads all processes' values when Prometheus asks; never raises: vLLM's own come with it."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._warned = False

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the names are not known before engines write them."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Return the sums over all processes."""
        try:
            forget_the_dead(Path(self._directory))
            return list(MultiProcessCollector(None, path=self._directory).collect())
        except Exception as error:
            if not self._warned:
                logger.warning(
                    "vllm_pt_ metrics are not exported: %s cannot be read (%r)",
                    self._directory,
                    error,
                )
            self._warned = True
            return []


def forget_the_dead(directory: Path) -> None:
    """Remove gauges of processes that are gone: what they held, they hold no longer."""
    for file in directory.glob("gauge_live*_*.db"):
        pid = file.stem.rpartition("_")[2]
        if pid.isdecimal() and not is_alive(int(pid)):
            file.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Return whether a process of this machine runs, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Home:
    """Where one process's metrics are created, so that the front end finds them."""

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)
        self.pid = os.getpid()
        known = values.ValueClass
        # A second class of memory-mapped values would write into the same files as vLLM's.
        shared = getattr(known, "_multiprocess", False) and VLLM_DIRECTORY in os.environ
        self._value_class: Any = known if shared else values.MultiProcessValue()
        # Runs in multiprocessing's children, too, where `atexit` does not.
        Finalize(None, self._leave, exitpriority=0)

    @contextmanager
    def creating(self) -> Iterator[None]:
        """Let prometheus_client create values here; it asks where only then."""
        value_class, set_directory = values.ValueClass, os.environ.get(VLLM_DIRECTORY)
        values.ValueClass = self._value_class
        os.environ[VLLM_DIRECTORY] = self._directory
        try:
            yield
        finally:
            values.ValueClass = value_class
            if set_directory is None:
                del os.environ[VLLM_DIRECTORY]
            else:
                os.environ[VLLM_DIRECTORY] = set_directory

    def _leave(self) -> None:
        if os.getpid() == self.pid and os.path.isdir(self._directory):
            mark_process_dead(self.pid, self._directory)


_homes: dict[int, Home] = {}


def home() -> Home | None:
    """Return this process's home, or ``None`` where nothing can be exported."""
    found = directory()
    if found is None:
        _say_why_not()
        return None
    pid = os.getpid()
    if pid not in _homes:  # a forked process must not write into its parent's files
        _homes.clear()
        _homes[pid] = Home(found)
    return _homes[pid]


@functools.cache
def _say_why_not() -> None:
    logger.warning(
        "vllm_pt_ metrics are not exported: process %d was not started by a front end on this "
        "machine that could show them (%s is not set to a directory); engines of other machines "
        "and Ray's data-parallel engines have no front end beside them",
        os.getpid(),
        DIRECTORY,
    )


def _owner(directory: Path) -> int | None:
    """Return the process that made a directory, by its name."""
    match = re.fullmatch(rf"{_PREFIX}([0-9]+)-.*", directory.name)
    return int(match[1]) if match else None


def _remove_own(directory: str, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(directory, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    """Remove directories of front ends that were killed."""
    for directory in parent.glob(f"{_PREFIX}*"):
        owner = _owner(directory)
        if owner is None or is_alive(owner) or directory.is_symlink():
            continue
        if directory.stat().st_uid == os.getuid():
            shutil.rmtree(directory, ignore_errors=True)
