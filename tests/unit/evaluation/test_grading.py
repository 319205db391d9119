"""Graders on answers that are equal and on answers that are not."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_parallel_think.evaluation.grading import (
    Grader,
    chosen_letter,
    code_of,
    plainly_equal,
    states_an_answer,
)
from vllm_parallel_think.evaluation.math_process import MathGrader
from vllm_parallel_think.evaluation.set_forms import ExamProblem

EQUAL = [
    ("18", "18"), ("18", "18.0"), ("1234", "1,234"), ("1000000", "1{,}000{,}000"),
    ("-7", "-7"), ("0.5", "\\frac{1}{2}"), ("\\frac{1}{2}", "0.5"), ("\\frac12", "\\frac{1}{2}"),
    ("\\frac{3}{4}", "\\dfrac{3}{4}"), ("\\frac{3}{4}", "3/4"), ("\\frac{6}{8}", "\\frac{3}{4}"),
    ("2\\sqrt{2}", "\\sqrt{8}"), ("\\sqrt{12}", "2\\sqrt{3}"), ("\\pi", "\\pi"),
    ("2\\pi", "\\pi \\cdot 2"), ("\\frac{\\pi}{2}", "\\pi/2"), ("x^2+2x+1", "(x+1)^2"),
    ("p - q", "-q+p"), ("(a+b)^2", "a^2+2ab+b^2"), ("(3,4)", "(3, 4)"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)"), ("\\{1,2,3\\}", "\\{3,2,1\\}"),
    ("[0,1]", "\\left[0,1\\right]"), ("(0,1]", "(0, 1]"), ("\\text{Evelyn}", "Evelyn"),
    ("5", "x=5"), ("90^\\circ", "90"), ("50\\%", "50"), ("\\$32", "32"), ("10", "10\\text{ cm}"),
    ("2^{10}", "1024"), ("10^3", "1000"), ("3!", "6"), ("\\log_2 8", "3"), ("e^0", "1"),
    ("\\sin(0)", "0"), ("i", "i"), ("3+4i", "4i+3"), ("\\frac{-1}{3}", "-\\frac{1}{3}"),
    ("0.25", ".25"), ("17", "017"), ("\\frac{14}{3}", "14/3"), ("11\\sqrt2", "11\\sqrt{2}"),
    ("6", "3 \\times 2"), ("\\frac{9}{7}", "9/7"), ("x+1", "1+x"), ("27", "27."),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"), ("70", "\\text{70}"), ("100", "10^2"),
]  # fmt: skip
DIFFERENT = [
    ("18", "17"), ("18", "-18"), ("1234", "12.34"), ("1000000", "100000"), ("-7", "7"),
    ("0.5", "\\frac{1}{3}"), ("\\frac{1}{2}", "0.6"), ("\\frac12", "12"), ("\\frac{3}{4}", "34"),
    ("\\frac{3}{4}", "4/3"), ("\\frac{6}{8}", "\\frac{2}{3}"), ("2\\sqrt{2}", "\\sqrt{6}"),
    ("\\sqrt{12}", "3\\sqrt{2}"), ("\\pi", "3.15"), ("2\\pi", "\\pi"), ("\\frac{\\pi}{2}", "2\\pi"),
    ("x^2+2x+1", "(x-1)^2"), ("p - q", "q-p"), ("(a+b)^2", "a^2+b^2"), ("(3,4)", "(4,3)"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi)"), ("\\{1,2,3\\}", "\\{1,2\\}"),
    ("[0,1]", "(0,1)"), ("(0,1]", "[0, 1)"), ("\\text{Evelyn}", "Carla"), ("5", "x=6"),
    ("90^\\circ", "60"), ("50\\%", "5"), ("\\$32", "320"), ("10", "1"), ("2^{10}", "1023"),
    ("10^3", "100"), ("3!", "3"), ("\\log_2 8", "4"), ("e^0", "0"), ("\\sin(0)", "1"),
    ("i", "1"), ("3+4i", "3-4i"), ("\\frac{-1}{3}", "\\frac{1}{3}"), ("0.25", "25"),
    ("17", "71"), ("\\frac{14}{3}", "\\frac{3}{14}"), ("11\\sqrt2", "11"), ("6", "5"),
    ("\\frac{9}{7}", "\\frac{7}{9}"), ("x+1", "x-1"), ("27", "2.7"),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{2}"), ("70", "\\text{seventy-one}"), ("100", "1000"),
]  # fmt: skip


@pytest.fixture(scope="module")
def mathematics() -> Iterator[MathGrader]:
    """Return one process for all comparisons."""
    with MathGrader() as grader:
        yield grader


def graded(mathematics: MathGrader, gold: str, text: str) -> bool:
    """Return whether a text is right."""
    return Grader(mathematics).grade("math", ExamProblem("k", "q", gold), text).right


def test_a_hundred_pairs(mathematics: MathGrader) -> None:
    assert len(EQUAL) == len(DIFFERENT) == 50
    boxed = "We find \\boxed{%s}."
    assert [pair for pair in EQUAL if not graded(mathematics, pair[0], boxed % pair[1])] == []
    assert [pair for pair in DIFFERENT if graded(mathematics, pair[0], boxed % pair[1])] == []


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("She makes 9 * 2 = 18 dollars. The answer is 18.", True),
        ("First \\boxed{4}, but then \\boxed{18}.", True),
        ("First \\boxed{18}, but then \\boxed{4}.", False),
        ("The answer is 18, and that took 3 steps: so \\boxed{18}", True),
        ("", False),
        ("I do not know.", False),
        ("So far 16 - 3", False),
    ],
)
def test_what_a_text_ends_with_counts(mathematics: MathGrader, text: str, right: bool) -> None:
    assert graded(mathematics, "18", text) is right


def test_disagreement_with_a_plain_comparison_is_kept(mathematics: MathGrader) -> None:
    problem = ExamProblem("k", "q", "x^2+2x+1")
    grade = Grader(mathematics).grade("math", problem, "\\boxed{(x+1)^2}")
    assert (grade.right, grade.plain, grade.by) == (True, False, "math-verify")


@pytest.mark.parametrize(
    ("gold", "found", "equal"),
    [
        ("3", "3.0", True), ("1234", "1,234", True), ("\\frac{1}{2}", "1/2", True),
        ("0.5", "\\frac12", True), ("5", "6", False), ("A", "a", True), ("1/0", "1/0", True),
        ("1/0", "2", False), ("5", None, False), ("\\text{No}", "no", True),
    ],
)  # fmt: skip
def test_plain_comparison(gold: str, found: str | None, equal: bool) -> None:
    assert plainly_equal(gold, found) is equal


HANGS = """
import sys, time
print("ready", flush=True)
for line in sys.stdin:
    if "hang" in line:
        time.sleep(60)
    if "die" in line:
        sys.exit(1)
    print('{"right": true, "found": "1"}', flush=True)
"""


def test_a_comparison_that_hangs_or_dies_ends() -> None:
    with MathGrader(0.3, (sys.executable, "-c", HANGS)) as mathematics:
        grader, problem = Grader(mathematics), ExamProblem("k", "q", "18")
        start = time.monotonic()
        grade = grader.grade("math", problem, "hang: \\boxed{18}")
        assert time.monotonic() - start < 20
        assert (grade.right, grade.by, grade.note) == (True, "plain", "timeout")
        assert grader.grade("math", problem, "die: \\boxed{17}").note == "crashed"
        assert not grader.grade("math", problem, "die: \\boxed{17}").right
        assert grader.grade("math", problem, "\\boxed{2}").by == "math-verify"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: B", "B"), ("**Answer: (C)**", "C"), ("The answer is D.", "D"),
        ("answer: A\nNo wait. Answer: B", "B"), ("\\boxed{C}", "C"), ("\\boxed{\\text{A}}", "A"),
        ("A is wrong", None), ("Answer: Because", None), ("Answer: 4", None), ("", None),
        ("Answer: A good choice", "A"),
    ],
)  # fmt: skip
def test_letters(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


def test_choices_are_graded() -> None:
    problem = ExamProblem("k", "q", "B")
    assert Grader(None).grade("choice", problem, "Answer: B").right
    assert not Grader(None).grade("choice", problem, "Answer: A").right
    assert not Grader(None).grade("choice", problem, "").right


@pytest.mark.parametrize(
    ("kind", "text", "states"),
    [
        ("math", "\\boxed{4} and", True), ("math", "12 + 3", False), ("math", "\\boxed{", False),
        ("choice", "Answer: B", True), ("choice", "Let", False),
    ],
)  # fmt: skip
def test_whether_a_cut_text_has_its_answer(kind: str, text: str, states: bool) -> None:
    assert states_an_answer(kind, text) is states  # type: ignore[arg-type]


HEAD = 'from typing import List\n\n\ndef total(values: List[int]) -> int:\n    """Sum."""\n'
FUNCTION = ExamProblem(
    "k",
    HEAD,
    "",
    {
        "prompt": HEAD,
        "test": "def check(f):\n    assert f([1, 2]) == 3\n",
        "entry_point": "total",
    },
)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (
            "```python\ndef total(values: List[int]) -> int:\n    return sum(values)\n```\nDone.",
            True,
        ),
        ("```\nimport math\ndef total(values):\n    return int(math.fsum(values))\n```", True),
        ("    return sum(values)\n", True),
        ("```python\ndef total(values):\n    return 0\n```", False),
        ("```python\ndef total(values):\n    while True: pass\n```", False),
        ("I cannot.", False),
    ],
)
def test_functions_run_against_their_tests(text: str, right: bool) -> None:
    assert Grader(None, run_code=True).grade("function", FUNCTION, text).right is right


def test_code_does_not_run_unasked() -> None:
    with pytest.raises(PermissionError, match="--run-code"):
        Grader(None).grade("function", FUNCTION, "    return sum(values)\n")


def test_programs_read_standard_input(tmp_path: Path) -> None:
    tests = [{"input": "1 2\n", "output": "3\n"}, {"input": "4 5", "output": "9"}]
    problem = ExamProblem("k", "q", "", {"tests": tests, "method": None})
    grader = Grader(None, run_code=True)
    right = "```python\nprint(sum(map(int, input().split())))\n```"
    assert grader.grade("program", problem, right).right
    guarded = "if __name__ == '__main__':\n    a, b = map(int, input().split())\n    print(a + b)"
    assert grader.grade("program", problem, f"```python\n{guarded}\n```").right
    assert not grader.grade("program", problem, "```python\nprint(3)\n```").right
    assert not grader.grade("program", problem, "```python\nexit(0)\n```").right


def test_programs_may_be_methods() -> None:
    test = {"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}
    problem = ExamProblem("k", "q", "", {"tests": [test], "method": "add"})
    text = "```python\nclass Solution:\n    def add(self, xs, y):\n        return sum(xs) + y\n```"
    assert Grader(None, run_code=True).grade("program", problem, text).right
    wrong = text.replace("+ y", "- y")
    assert not Grader(None, run_code=True).grade("program", problem, wrong).right


def test_the_last_code_block_counts() -> None:
    assert code_of("```python\na\n```\n```py\nb\n```") == "b\n"
    assert code_of("```python\nunfinished") == "unfinished" and code_of("plain") == "plain"
