"""How metrics of engine processes get into vLLM's own ``/metrics``.

vLLM's single front end keeps its metrics in memory and does not read those of other processes, so
ours lie as prometheus_client's memory-mapped values in a directory of their own, which a collector
in the front end's registry reads. Setting ``PROMETHEUS_MULTIPROC_DIR`` instead would make vLLM's
own metrics vanish. Where vLLM set it itself (several API servers), ours go there, too.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize
from pathlib import Path

from prometheus_client import REGISTRY, values
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from ...compat.logger import init_logger
from . import folders
from .files import Files, Value
from .outage import Outage

logger = init_logger(__name__)

DIRECTORY = "VLLM_PT_METRICS_DIR"
"""Names the front end's directory to the processes that it starts."""

VLLM_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"

_served: tuple[int, str] | None = None
"""The process that made a directory here, and the directory."""


def prepare() -> None:
    """Give this front end a directory for metrics and serve what lies in it; safe to call again.

    Engine processes inherit the directory. A process that somebody else started (a replica beside
    another one) makes its own: a front end must not serve another one's requests as its own.
    """
    global _served
    if VLLM_DIRECTORY in os.environ:
        return
    inherited = os.environ.get(DIRECTORY)
    if inherited is not None and (
        multiprocessing.parent_process() is not None or _served == (os.getpid(), inherited)
    ):
        return
    try:
        parent = Path(tempfile.gettempdir())
        folders.remove_left_behind(parent)
        directory = str(folders.make(parent))
    except OSError as error:
        os.environ.pop(DIRECTORY, None)
        logger.warning(
            "vllm_pt_ metrics are not exported: no temporary directory (%s); set TMPDIR to a "
            "writable one with room, and start again",
            error,
        )
        return
    os.environ[DIRECTORY] = directory
    _served = os.getpid(), directory
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
        self._outage = Outage()

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the names are not known before engines write them."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Return the sums over all processes."""
        try:
            forget_the_dead(Path(self._directory))
            found = list(MultiProcessCollector(None, path=self._directory).collect())
        except Exception as error:
            if self._outage.failed():
                logger.warning(
                    "vllm_pt_ metrics are not exported: %s cannot be read (%r)",
                    self._directory,
                    error,
                )
            return []
        if self._outage.ended():
            logger.info("vllm_pt_ metrics are exported again: %s can be read", self._directory)
        return found


def forget_the_dead(directory: Path) -> None:
    """Remove gauges of processes that are gone: what they held, they hold no longer."""
    for file in directory.glob("gauge_live*_*.db"):
        owner = re.search(r"_([0-9]+)-pt$", file.stem)
        if owner is not None and not folders.is_alive(int(owner[1])):
            file.unlink(missing_ok=True)


class Home:
    """Where one process's metrics are created, so that the front end finds them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = Files(directory)
        self._value_class = functools.partial(Value, self._files)
        self.pid = os.getpid()
        # Runs in multiprocessing's children, too, where `atexit` does not.
        Finalize(None, self._leave, exitpriority=0)

    @contextmanager
    def creating(self) -> Iterator[None]:
        """Let prometheus_client create values here; it asks where only then."""
        value_class = values.ValueClass
        values.ValueClass = self._value_class
        try:
            yield
        finally:
            values.ValueClass = value_class

    def _leave(self) -> None:
        if os.getpid() == self.pid and self._directory.is_dir():
            mark_process_dead(self._files.owner, str(self._directory))


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


def _remove_own(directory: str, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(directory, ignore_errors=True)
