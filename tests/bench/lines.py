"""Lines of a benchmark's table, kept as they come: what is there is not measured again."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from spec_decode import records


@dataclass(frozen=True)
class Result:
    """One rule's answers; ``right`` is ``None`` where they were not marked."""

    name: str
    right: int | None
    answers: int
    tokens: int
    seconds: float | None
    length: float = 1.0
    lossy: int = 0


def checksum(files: Sequence[Path]) -> int:
    """Return a number that changes with the content of files."""
    total = 0
    for file in files:
        total = zlib.crc32(file.read_bytes(), total)
    return total


class Lines:
    """A JSONL file of results.

    Args:
        path: The file.
        about: What all of them depend on, as words.

    """

    def __init__(self, path: Path, about: str) -> None:
        records.finished(path)  # cuts off what an interruption left of a line
        self._path, self._about = path, about
        self._known = {r["key"]: Result(**r["result"]) for r in records.read(path)}

    def line(self, key: str, make: Callable[[], Result]) -> Result:
        """Return a line, made only if it is not there."""
        key = f"{key}, {self._about}"
        if key not in self._known:
            self._known[key] = make()
            records.append(self._path, [{"key": key, "result": asdict(self._known[key])}])
        return self._known[key]
