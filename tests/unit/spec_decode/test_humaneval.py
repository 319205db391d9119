"""HumanEval's problems, and running what a model wrote for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spec_decode.tasks.humaneval import CodeProblem, function_of, load_code_problems, passes

PROBLEM = CodeProblem(
    "one",
    'def add(a, b):\n    """Add."""\n',
    "def check(candidate):\n    assert candidate(2, 3) == 5\n",
    "add",
)


def test_the_package_brings_all_problems() -> None:
    problems = load_code_problems()
    assert len({problem.key for problem in problems}) == 164
    assert all(problem.entry_point in problem.prompt for problem in problems)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    record = {"task_id": "one", "prompt": "p", "test": "t", "entry_point": "e"}
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert load_code_problems(path) == [CodeProblem("one", "p", "t", "e")]
    del record["test"]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="a problem lacks 'test'"):
        load_code_problems(path)
    with pytest.raises(ValueError, match="missing"):
        load_code_problems(tmp_path / "missing.jsonl")


def test_a_completion_ends_with_its_function() -> None:
    assert function_of("    return a\n\ndef other():\n") == "    return a\n"
    assert function_of("    x = (\n        1,\n)\n    return x\nprint(1)") == (
        "    x = (\n        1,\n)\n    return x"
    )


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("    return a + b\n\nprint('behind')", True),
        ("    return a - b\n", False),
        ("    return a +\n", False),
        ("    while True: pass\n", False),
        ("    import socket; socket.socket(); return a + b\n", False),
        ("    import os; os.system('true'); return a + b\n", False),
        ("    import subprocess; subprocess.run(['true']); return a + b\n", False),
        ("    x = bytearray(1 << 31); return a + b\n", False),
        ("    import math; return int(math.fsum([a, b]))\n", True),
        ("    raise SystemExit\n", False),
        ("    import os; os._exit(0)\n", False),
        ("    import os; os.posix_spawn('/bin/true', ['true'], {}); return a + b\n", False),
        ("    import os; os.fork(); return a + b\n", False),
        ("    open('file', 'w'); return a + b\n", False),
        ("    import os; os.remove('file'); return a + b\n", False),
        ("    import os; os.open('file', os.O_CREAT); return a + b\n", False),
        ("    import os; os.kill(os.getppid(), 0); return a + b\n", False),
        ("    print('anything'); return a + b\n", True),
    ],
)
def test_completions_are_run_within_limits(text: str, right: bool) -> None:
    assert passes(PROBLEM, text) is right
