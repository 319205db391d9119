"""Whether an answer is right: mathematics, choices, and code that runs against its tests."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from spec_decode.tasks.humaneval import CodeProblem, passes

from ..core.fork_join.vote import extract
from .math_process import MathGrader
from .set_forms import ExamProblem, Record
from .sets import Kind

CODE = re.compile(r"```[ \t]*(?:python|py|Python)?[ \t]*\n(.*?)(?:```|\Z)", re.S)
LETTER = re.compile(r"(?i:answer)\W{0,4}(?:is\W{0,4})?\(?\b([A-J])\b(?![a-z'])")
BOXED_LETTER = re.compile(r"\\boxed\{\s*(?:\\text(?:bf)?\{)?\(?([A-J])\)?\}?\s*\}")
NOISE = re.compile(r"\\left|\\right|\\[!,;:]|\\\$|\\%|[$%\s]|\^\{?\\circ\}?|\\displaystyle")
MOST_TESTS = 20
"""Of a program: each runs in a process of its own."""


@dataclass(frozen=True)
class Grade:
    """What a grader said.

    Attributes:
        right: Whether the answer is right.
        found: What was taken for the answer.
        by: ``math-verify``, ``plain``, ``choice`` or ``tests``.
        plain: Whether a plain comparison of texts calls it right, beside math-verify.
        note: Why another grader had to decide, if one had.

    """

    right: bool
    found: str | None
    by: str
    plain: bool | None = None
    note: str = ""

    def record(self) -> dict[str, Any]:
        """Return the grade as plain values."""
        return asdict(self)


def plain_form(answer: str) -> str:
    """Write an answer without what typesetting adds."""
    text = NOISE.sub("", answer).replace("dfrac", "frac").replace("tfrac", "frac")
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\frac\{(-?\w+)\}\{(\w+)\}", r"\1/\2", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\1/\2", text)
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    return text.rstrip(".").lower()


def plainly_equal(gold: str, found: str | None) -> bool:
    """Compare two answers as texts, and as numbers where both are."""
    if found is None:
        return False
    left, right = plain_form(gold), plain_form(found)
    try:
        return left == right or Fraction(left) == Fraction(right)
    except (ValueError, ZeroDivisionError):
        return False


def chosen_letter(text: str) -> str | None:
    """Return the last letter that a text calls its answer."""
    found = [match for form in (LETTER, BOXED_LETTER) for match in form.finditer(text)]
    return max(found, key=lambda match: match.start())[1] if found else None


def final_answer(kind: Kind, text: str) -> str | None:
    """Return what a vote at the client counts."""
    if kind == "math":
        return extract(text)
    return chosen_letter(text) if kind == "choice" else (code_of(text) or None)


def states_an_answer(kind: Kind, text: str) -> bool:
    """Return whether a text that was cut has come to its answer."""
    if kind == "math":
        return "\\boxed" in text and extract(text[text.rfind("\\boxed") :]) is not None
    return final_answer(kind, text) is not None


def code_of(text: str) -> str:
    """Return the last code block of a text, or all of it."""
    blocks = CODE.findall(text)
    return str(blocks[-1]) if blocks else text


class Grader:
    """Grades answers of every kind.

    Args:
        mathematics: The process that compares mathematics, or ``None`` for plain comparison alone.
        run_code: Whether programs of a model may run on this machine.

    """

    def __init__(self, mathematics: MathGrader | None, *, run_code: bool = False) -> None:
        self._mathematics = mathematics
        self._run_code = run_code

    def grade(self, kind: Kind, problem: ExamProblem, text: str) -> Grade:
        """Grade a text; from any thread.

        Raises:
            PermissionError: It is code, and that may not run.

        """
        if kind == "math":
            return self._math(problem.answer, text)
        if kind == "choice":
            letter = chosen_letter(text)
            return Grade(letter == problem.answer, letter, "choice")
        if not self._run_code:
            raise PermissionError("answers that are code run only with --run-code")
        code = code_of(text)
        graded = _function_passes if kind == "function" else _program_passes
        return Grade(graded(problem.code, code), None, "tests")

    def _math(self, gold: str, text: str) -> Grade:
        found = extract(text)
        plain = plainly_equal(gold, found)
        if self._mathematics is None:
            return Grade(plain, found, "plain", plain)
        said = self._mathematics.compare(gold, text)
        if said.right is None:
            return Grade(plain, found, "plain", plain, note=said.note)
        return Grade(said.right, said.found, "math-verify", plain)


def _function_passes(code: Mapping[str, Any], text: str) -> bool:
    """Run HumanEval's tests on a whole function, or on the rest of one."""
    head = code["prompt"]
    if f"def {code['entry_point']}" not in text:
        return passes(CodeProblem("", head, code["test"], code["entry_point"]), text)
    # The head's imports and helpers come first; the model's function then replaces the unfinished.
    before = head.rpartition(f"def {code['entry_point']}")[0]
    return passes(CodeProblem("", f"{before}\n{text}\n", code["test"], code["entry_point"]), "")


READS_STDIN = """
import io, sys
SOURCE = {source}
def run(given):
    sys.stdin, sys.stdout = io.StringIO(given), io.StringIO()
    exec(compile(SOURCE, "program", "exec"), {{"__name__": "__main__"}})
    return sys.stdout.getvalue()
"""
CHECKS_OUTPUT = """
def check(run):
    lines = lambda text: [line.rstrip() for line in text.strip().split("\\n")]
    found = run({given})
    sys.stdout = sys.__stdout__
    assert lines(found) == lines({wanted})
"""
CHECKS_VALUE = """
def check(kind):
    assert kind().{method}(*{given}) == {wanted}
"""


def _program_passes(code: Mapping[str, Any], source: str) -> bool:
    """Run LiveCodeBench's tests, one after another until one fails."""
    return all(_test_passes(source, code["method"], test) for test in code["tests"][:MOST_TESTS])


def _test_passes(source: str, method: str | None, test: Record) -> bool:
    given, wanted = test["input"], test["output"]
    if test.get("testtype", "stdin") == "stdin":
        check = CHECKS_OUTPUT.format(given=repr(given), wanted=repr(wanted))
        head = READS_STDIN.format(source=repr(source))
        return passes(CodeProblem("", head, check, "run"), "")
    values = [json.loads(line) for line in given.split("\n") if line.strip()]
    check = CHECKS_VALUE.format(method=method, given=repr(values), wanted=repr(json.loads(wanted)))
    return passes(CodeProblem("", source + "\n", check, "Solution"), "")
