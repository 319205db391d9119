"""One worker of a group, and how the step that it writes is read."""

from __future__ import annotations

from collections import Counter

from ..exchange import Cause
from ..graph import Lane, Node
from .script import Script
from .steps import StepText

ANSWERS = ("yes", "no")
"""What a check may be answered with; anything else counts as no."""

CHECK_TOKENS = 8
"""Sampled tokens in which a check's answer is looked for."""


class Worker:
    """One worker: its lane, and what the group must know of the step it is writing."""

    def __init__(self, number: int, lane: Lane) -> None:
        self.number = number
        self.lane = lane
        self.num_steps = 0
        self.num_sampled = 0
        self.text = ""
        """What it sampled in this step: a mark or a check's answer may be in it."""
        self.checked = False
        """Whether this step began with a check whose answer is not known yet."""
        self.carry: int | None = None
        """The token that ended the last step: it has no K/V, and starts the next one."""
        self.ended: Cause | None = None
        """Why the current step ended, until the group has settled that."""
        self.stop_reason: int | None = None
        self._step = StepText()

    @property
    def node(self) -> Node:
        """The step being written, or the last one."""
        return self.lane.nodes[-1]

    def begin_step(self) -> None:
        """Forget what the last step left: its carried token is in the new one."""
        self.carry = None
        self._step, self.text = StepText(), ""

    def reads(self, token: int, script: Script, checks: Counter[str]) -> bool:
        """Read a sampled token; return whether it ends the step.

        Args:
            token: Already appended to the step's node.
            script: What ends a step.
            checks: Answers to checks, counted here.

        """
        piece = script.vocabulary.piece(token)
        self.text += piece
        if self.checked:
            self._read_check(checks)
        rules = script.recipe.workers
        sampled = self.node.num_sampled - self.node.num_pending
        if rules.max_step_tokens is not None and sampled >= rules.max_step_tokens:
            return True
        by_text = self._step.feed(piece)
        return token in script.ends if script.ends else by_text

    def _read_check(self, checks: Counter[str]) -> None:
        words = self.text.lower().replace("*", " ").split()
        first = words[0].strip(".,:;!\"'()[]") if words else ""
        if first in ANSWERS or len(words) > 1 or self.node.num_sampled >= CHECK_TOKENS:
            self.end_check(first, checks)

    def end_check(self, word: str, checks: Counter[str]) -> None:
        """Count the answer to this step's check, if one is open."""
        if self.checked:
            checks[word if word in ANSWERS else "no"] += 1
            self.checked = False
