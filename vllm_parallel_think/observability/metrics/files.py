"""Values of one process in files that the front end reads, without a risk to the process.

prometheus_client maps files into memory that have no space yet. On a full file system the first
write into such memory ends the process with a signal (SIGBUS) that no code can catch. Here a file
gets its space before it is mapped, so that a lack of space is an error: the values that have no
place are counted in memory, and get theirs when there is room.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from pathlib import Path
from threading import Lock
from typing import Any

from prometheus_client.mmap_dict import MmapedDict, mmap_key

from ...compat.logger import init_logger
from .outage import Outage

logger = init_logger(__name__)

INITIAL_BYTES = 1 << 16
_MOST_BESIDE_KEY = 32
"""Bytes of an entry besides its key: length, padding, value, time."""


class AllocatedDict(MmapedDict):
    """A file of values that owns its space; making and growing it raises ``OSError``."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            _allocate(path, 0, max(INITIAL_BYTES, path.stat().st_size))
        else:
            _create(path)
        super().__init__(str(path))

    def _init_value(self, key: str) -> None:
        self._make_room(len(key.encode()) + _MOST_BESIDE_KEY)
        super()._init_value(key)

    def _make_room(self, num_bytes: int) -> None:
        """Grow before prometheus_client would, which leaves the new part without space."""
        capacity = self._capacity
        while self._used + num_bytes > capacity:
            capacity *= 2
        if capacity == self._capacity:
            return
        _allocate(Path(self._fname), self._capacity, capacity)
        self._m = mmap.mmap(self._f.fileno(), capacity)
        self._capacity = capacity


def _create(path: Path) -> None:
    """Make a file of zeros that has its space before anybody can see it."""
    partly = path.with_suffix(".part")
    try:
        partly.touch()
        _allocate(partly, 0, INITIAL_BYTES)
        partly.rename(path)
    except OSError:
        partly.unlink(missing_ok=True)
        raise


def _allocate(path: Path, start: int, end: int) -> None:
    """Give a part of a file its space; what is in it stays."""
    with open(path, "r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), start, end - start)
            return
        size = path.stat().st_size  # macOS has no such call: zeros after the end do the same
        file.seek(size)
        file.write(bytes(max(0, end - size)))


class Files:
    """The files of this process, one for each type of metric."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.owner = f"{os.getpid()}-pt"
        """Ends the files' names: where vLLM's own values lie, too, each has files of its own."""
        self.lock = Lock()
        self._open: dict[str, AllocatedDict] = {}
        self._unplaced: deque[Value] = deque()
        self._outage = Outage()

    def admit(self, value: Value) -> None:
        """Give a new value its place, or let it wait for one."""
        with self.lock:
            self._unplaced.append(value)
            self._place()

    def write(self, value: Value) -> None:
        """Write a value that has changed; the caller holds the lock."""
        if self._unplaced:
            self._place()
        if value.file is not None:
            value.file.write_value(value.key, value.amount, value.timestamp)

    def _place(self) -> None:
        """Give values their places in turn, as far as there is room."""
        if not self._outage.due():
            return
        try:
            while self._unplaced:
                value = self._unplaced[0]
                value.place(self._file(value.kind))
                self._unplaced.popleft()
        except OSError as error:
            if self._outage.failed():
                logger.warning(
                    "new vllm_pt_ metrics of process %d are counted but not exported, until there "
                    "is room in %s (%s); make some, or set TMPDIR to another place",
                    os.getpid(),
                    self._directory,
                    error,
                )
            return
        if self._outage.ended():
            logger.info("all vllm_pt_ metrics of process %d are exported again", os.getpid())

    def _file(self, kind: str) -> AllocatedDict:
        if kind not in self._open:
            self._open[kind] = AllocatedDict(self._directory / f"{kind}_{self.owner}.db")
        return self._open[kind]


class Value:
    """What prometheus_client keeps a number in; see ``prometheus_client.values``."""

    _multiprocess = True

    def __init__(
        self,
        files: Files,
        typ: str,
        metric_name: str,
        name: str,
        labelnames: Any,
        labelvalues: Any,
        help_text: str,
        multiprocess_mode: str = "",
        **_: Any,
    ) -> None:
        self._files = files
        self.kind = f"gauge_{multiprocess_mode}" if typ == "gauge" else typ
        self.key = mmap_key(metric_name, name, labelnames, labelvalues, help_text)
        self.amount = 0.0
        self.timestamp = 0.0
        self.file: AllocatedDict | None = None
        files.admit(self)

    def place(self, file: AllocatedDict) -> None:
        """Move into a file; counters go on from what a process of the same number left there."""
        left, _ = file.read_value(self.key)
        if not self.kind.startswith("gauge"):
            self.amount += left
        file.write_value(self.key, self.amount, self.timestamp)
        self.file = file

    def inc(self, amount: float) -> None:
        """Add to the number."""
        with self._files.lock:
            self.amount += amount
            self.timestamp = 0.0
            self._files.write(self)

    def set(self, value: float, timestamp: float | None = None) -> None:
        """Replace the number."""
        with self._files.lock:
            self.amount = value
            self.timestamp = timestamp or 0.0
            self._files.write(self)

    def get(self) -> float:
        """Return the number."""
        with self._files.lock:
            return self.amount

    def set_exemplar(self, exemplar: Any) -> None:
        """Do nothing: files have no room for exemplars."""

    def get_exemplar(self) -> None:
        """Return nothing: files have no room for exemplars."""
