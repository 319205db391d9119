"""Problems made by a program: a sum for each of several people, independent or in a row."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo")
NUM_PROBLEMS = 200


def orders(seed: int = 0, num: int = NUM_PROBLEMS) -> Iterator[dict[str, Any]]:
    """Yield problems whose sums can be worked out side by side."""
    for number in range(num):
        rng = random.Random(f"orders:{seed}:{number}")
        people = rng.sample(NAMES, rng.randint(2, 4))
        prices = {name: [rng.randint(2, 9) for _ in range(rng.randint(4, 8))] for name in people}
        lists = [f"{name} pays {_listed(paid)} euros." for name, paid in prices.items()]
        question = f"{' '.join(lists)} What is the largest total that one of them pays?"
        yield {"problem": question, "answer": str(max(sum(paid) for paid in prices.values()))}


def chained_orders(seed: int = 0, num: int = NUM_PROBLEMS) -> Iterator[dict[str, Any]]:
    """Yield problems in the same words whose sums need each other, one after another."""
    for number in range(num):
        rng = random.Random(f"chained:{seed}:{number}")
        first, *others = rng.sample(NAMES, rng.randint(2, 4))
        paid = [rng.randint(2, 9) for _ in range(rng.randint(4, 8))]
        total = sum(paid)
        lines = [f"{first} pays {_listed(paid)} euros."]
        last = first
        for name in others:
            more = rng.randint(2, 9)
            lines.append(f"{name} pays {more} euros more than {last} pays in total.")
            total, last = total + more, name
        yield {"problem": f"{' '.join(lines)} How much does {last} pay?", "answer": str(total)}


def _listed(numbers: list[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
