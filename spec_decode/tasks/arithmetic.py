"""Arithmetic word problems with answers that can be checked, made up without a network."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kim", "Leo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pens", "shells", "stamps")
SHOTS = """\
Q: Mia has 6 cups. Sam gives Mia 3 more. How many cups does Mia have now?
A: Mia starts with 6 cups. Sam gives her 3 more, so we add. 6 + 3 = 9. Answer: 9

Q: Sam has 14 hats. Sam gives 5 to Mia. How many hats does Sam have now?
A: Sam starts with 14 hats. Sam gives away 5, so we subtract. 14 - 5 = 9. Answer: 9

Q: Mia has 3 boxes with 4 cups in each box. How many cups does Mia have now?
A: There are 3 boxes. Each box has 4 cups, so we multiply. 3 * 4 = 12. Answer: 12

"""
"""Solved examples in front of every question: a base model needs them, a small one too."""


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        key: The same for the same problem, in every run.
        question: Text for the model, to be continued up to the end of the line.
        answer: What is right.

    """

    key: str
    question: str
    answer: str


def make_problems(num: int, seed: int) -> list[Question]:
    """Return so many problems of one step; another seed gives others."""
    return [_make(f"{seed}-{i}", random.Random(f"{seed}:{i}")) for i in range(num)]


def _make(key: str, rng: random.Random) -> Question:
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    a, b, c = rng.randint(3, 20), rng.randint(2, 9), rng.randint(2, 5)
    story, answer = rng.choice(
        [
            (f"{name} has {a} {thing}. {other} gives {name} {b} more.", a + b),
            (f"{name} finds {b} {thing}. {name} had {a} before.", a + b),
            (f"{name} has {a + b} {thing}. {name} gives {b} to {other}.", a),
            (f"{name} has {a + b} {thing} and loses {b}.", a),
            (f"{name} has {c} boxes with {b} {thing} in each box.", b * c),
            (f"{name} buys {c} bags. Each bag has {b} {thing}.", b * c),
        ]
    )
    question = f"Q: {story} How many {thing} does {name} have now?\nA:"
    return Question(key, SHOTS + question, str(answer))


def read_answer(text: str) -> str | None:
    """Return the answer that the first line gives, if any: behind 'Answer:', else its last number.

    A token may hold a line's end and more; what stands behind it is no part of the answer.
    """
    text = text.partition("\n")[0]
    tail = text.rpartition("Answer:")[2] if "Answer:" in text else ""
    found = re.findall(r"-?\d[\d,]*|\b[A-E]\b", tail) or re.findall(r"-?\d[\d,]*", text)
    return found[-1].replace(",", "") if found else None
