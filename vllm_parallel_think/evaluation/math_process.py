"""Compares mathematics with math-verify in a process of its own, under a time limit.

math-verify parses for up to half a second and more, sets signals, and can hang in an expression;
none of that may touch the process that waits for answers. This module is both: ``MathGrader`` for
the caller, and the program that it starts.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ..core.fork_join.vote import extract

MODULE = "vllm_parallel_think.evaluation.math_process"
SECONDS = 10.0
START_SECONDS = 120.0
ORPHAN_SECONDS = 60
"""After so long in one comparison the process ends by itself: whoever would stop it was killed."""
MOST_BYTES = 4 << 30
TAIL_CHARACTERS = 2000
"""Where no box marks an answer, it is looked for in so much of the end of a text."""


@dataclass(frozen=True)
class Comparison:
    """What math-verify said.

    Attributes:
        right: Whether both are equal; ``None`` where it did not come to an end.
        found: What it took for the answer.
        note: ``timeout``, ``crashed``, or nothing.

    """

    right: bool | None
    found: str | None = None
    note: str = ""


class MathGrader:
    """A process with math-verify, started when first asked and again after it had to be killed."""

    def __init__(self, seconds: float = SECONDS, program: tuple[str, ...] = ()) -> None:
        self._seconds = seconds
        self._program = program or (sys.executable, "-m", MODULE)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> MathGrader:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the process."""
        self.close()

    def compare(self, gold: str, text: str) -> Comparison:
        """Compare the answer that a text ends with to the right one; from any thread."""
        question = json.dumps({"gold": gold, "text": text}).encode() + b"\n"
        with self._lock:
            try:
                process = self._started()
                assert process.stdin is not None
                process.stdin.write(question)
                process.stdin.flush()
                reply = self._line(process, self._seconds)
            except TimeoutError:
                self.close()
                return Comparison(None, note="timeout")
            except (BrokenPipeError, EOFError):
                self.close()
                return Comparison(None, note="crashed")
        found = json.loads(reply)
        return Comparison(found["right"], found["found"], found.get("note", ""))

    def close(self) -> None:
        """End the process; the next comparison starts another one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                self._program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
            self._line(self._process, START_SECONDS)
        return self._process

    @staticmethod
    def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """Return the next line, which the process writes at once, or raise."""
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], seconds)[0]:
            raise TimeoutError
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return line


def _compare(gold: str, text: str) -> dict[str, Any]:
    from math_verify import parse, verify

    boxed = extract(text) if "\\boxed" in text else None
    said = text[-TAIL_CHARACTERS:] if boxed is None else f"\\boxed{{{boxed.rstrip('. ')}}}"
    wanted = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    answer = parse(said, parsing_timeout=None)
    right = bool(wanted and answer and verify(wanted, answer, timeout_seconds=None))
    return {"right": right, "found": str(answer[-1]) if answer else None}


def serve() -> None:
    """Answer comparisons, one JSON line each, until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    from math_verify import grader, parser

    # They warn that their own time limits are off, which is meant here.
    for module in (grader, parser):
        module.logger.setLevel("ERROR")
    # Whatever a library prints must not stand between our lines.
    out = os.dup(1)
    os.dup2(2, 1)
    os.write(out, b"ready\n")
    for line in sys.stdin:
        question = json.loads(line)
        signal.alarm(ORPHAN_SECONDS)
        try:
            reply = _compare(question["gold"], question["text"])
        except (Exception, RecursionError) as error:
            reply = {"right": None, "found": None, "note": f"{type(error).__name__}"}
        signal.alarm(0)
        os.write(out, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    serve()
