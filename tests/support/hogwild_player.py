"""Drives a Hogwild group as the scheduler does, with characters in place of tokens."""

from __future__ import annotations

from typing import Any

from tests.support.vocabularies import chars
from vllm_parallel_think.core.branch_graph import Kind, State
from vllm_parallel_think.core.config.loading import parse_profile
from vllm_parallel_think.core.config.request_options import RequestOptions
from vllm_parallel_think.core.hogwild.cache_layout import ANSWER, OTHERS, OWN
from vllm_parallel_think.core.hogwild.group import HogwildGroup
from vllm_parallel_think.core.hogwild.prompts import HogwildPrompts
from vllm_parallel_think.core.interface import Cause, Chunk, Limits, Verdict

GOOD = """
name = "toy"
summary = "a toy"
[workers]
names = ["A", "B", "C"]
step = "{name}{number}:"
others = "["
own = "]"
[check]
every = 12
text = "?"
[answer]
marks = ["!"]
forced = "="
max_tokens = 3
"""


class Play:
    """Feeds a group texts, a character a step of the engine, as the scheduler does."""

    def __init__(
        self,
        max_tokens: int = 1000,
        context: int = 1024,
        min_tokens: int = 0,
        ignore_eos: bool = False,
        recipe: str = GOOD,
        vocabulary: Any = None,
        **options: Any,
    ) -> None:
        self.limits = limits = Limits(
            16,
            context // 16,
            max_tokens,
            0,
            lambda _: True,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
        )
        request = RequestOptions("toy", 8, 2, **options)
        vocabulary = vocabulary or chars()
        script = HogwildPrompts(parse_profile(recipe, "toy.toml"), vocabulary)
        self.group = HogwildGroup(vocabulary.encode("12+3"), script, request, limits)
        self.vocabulary = vocabulary
        self.tokens: list[int] = []
        self.group.end(self.group.trunk, Cause.CLOSED)
        self.group.sealed(self.group.trunk, kept=True)
        self.settle()

    @property
    def seen(self) -> str:
        return self.vocabulary.text(self.tokens)

    def settle(self) -> None:
        group = self.group
        group.settle()
        for node in group.take_dropped():
            assert node.state is State.DROPPED
        for node in group.ready():
            group.started(node)
        for emission in group.release():
            self.tokens += emission.forced or (emission.payload or ())[: emission.keep]

    def step(self, order: tuple[int, ...] = (0, 1, 2, ANSWER), **texts: str | int | None) -> None:
        """Run the live nodes once; ``w0="a"`` is what worker 0 samples, ``None`` its end."""
        group = self.group
        live = group.live
        for role in (OTHERS, OWN, *order):
            if role not in live:
                continue
            node = live[role]
            if node.kind is Kind.CLOSE or node.state is State.CLOSING:
                group.end(node, Cause.CLOSED)
                group.sealed(node, kept=True)
                continue
            text = texts.get("answer" if role == ANSWER else f"w{role}", "x")
            if text is None:
                group.end(node, Cause.EOS)
                group.sealed(node, kept=True)
                continue
            (token,) = [text] if isinstance(text, int) else self.vocabulary.encode(text)
            verdict = group.feed(node, token)
            node.outbox.append(Chunk(1, (token,)))
            if verdict is Verdict.END:
                group.end(node, Cause.VERDICT)
                group.sealed(node, kept=True)
        self.settle()

    def say(self, w0: str, w1: str) -> None:
        for one, two in zip(w0, w1, strict=True):
            self.step(w0=one, w1=two)
