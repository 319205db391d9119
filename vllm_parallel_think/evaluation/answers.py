"""Answers, a JSON line each, in a folder that one exam at a time may write to."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spec_decode import records

from .errors import ExamError

ANSWERS = "answers.jsonl"
EXAMS = "exams.jsonl"
"""Settings of the exams that wrote to the folder, so that a report can say how it came about."""

AnswerRecord = Mapping[str, Any]
"""A line: what was asked, what came back, what it cost and what it is worth."""


class AnswerFile:
    """The answers in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / ANSWERS

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep others from writing; a line that a killed exam left unfinished is cut off.

        Raises:
            ExamError: Another exam is writing to the folder.

        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ExamError(f"{self.folder}: another exam is writing to it") from None
            records.finished(self.path)
            yield

    def answered(self) -> dict[str, str]:
        """Return the requests that have an answer, by key; failed ones have none."""
        return {record["key"]: record["request"] for record in self.read() if succeeded(record)}

    def read(self) -> list[AnswerRecord]:
        """Return the last line of every key, in the order of keys.

        Raises:
            ExamError: A line is no record.

        """
        try:
            found = {record["key"]: record for record in records.read(self.path)}
        except (ValueError, KeyError) as error:
            raise ExamError(str(error)) from None
        return [found[key] for key in sorted(found)]

    def add(self, record: AnswerRecord) -> None:
        """Add a line, all the way to the disk."""
        records.append(self.path, [dict(record)])


def succeeded(record: AnswerRecord) -> bool:
    """Return whether a record holds an answer, and no failed request."""
    return bool(record["status"] == "ok")


def note_exam(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keep the settings of an exam beside its answers, once."""
    path = folder / EXAMS
    plain = json.loads(json.dumps(settings))
    if plain not in list(records.read(path)):
        records.append(path, [plain])


def exams(folder: Path) -> list[dict[str, Any]]:
    """Return the settings of the exams that wrote to a folder."""
    return list(records.read(folder / EXAMS))
