"""JSONL files that grow a line at a time, so that an interrupted command goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file; a last line that was cut off is left out.

    Raises:
        ValueError: Another line is no JSON object; the message names it.

    """
    if not path.exists():
        return
    lines = path.read_text("utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line else None
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise ValueError(f"{path}, line {number}: {error}") from None
        if record is not None and not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {line[:40]!r}")
        if record is not None:
            yield record


def finished(path: Path) -> set[str]:
    """Return the keys of the records that are there, having cut off an unfinished last line."""
    keys = [record["key"] for record in read(path)]
    if path.exists():
        text = path.read_bytes()
        if text and not text.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(text.rfind(b"\n") + 1)
    return set(keys)


def append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Add records, all the way to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
