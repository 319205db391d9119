"""One writer of a group, and how the step that it writes is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ..branch_graph import Lane, Node
from ..characters import Characters
from ..interface import Cause
from ..summary import WriterFigures
from ..vocabulary import Vocabulary
from .prompts import HogwildPrompts
from .step_boundary import StepText

ANSWERS = ("yes", "no")
"""What a check may be answered with; anything else counts as no."""

CHECK_TOKENS = 8
"""Sampled tokens in which a check's answer is looked for."""


class Writer:
    """One writer: its lane, and what the group must know of the step it is writing."""

    def __init__(self, number: int, lane: Lane, vocabulary: Vocabulary) -> None:
        self.number = number
        self.lane = lane
        self.num_steps = 0
        self.num_sampled = 0
        self.has_mark = False
        """Whether it wrote a mark of the answer in this step."""
        self._marks: tuple[str, ...] = ()
        self._check = ""
        """What it has answered to a check so far."""
        self._text = ""
        """The end of what it sampled in this step: a mark may be begun in it."""
        self.checked = False
        """Whether this step began with a check whose answer is not known yet."""
        self.carry: int | None = None
        """The token that ended the last step: it has no K/V, and starts the next one."""
        self.ended: Cause | None = None
        """Why the current step ended, until the group has settled that."""
        self.stop_reason: int | None = None
        self.stopped = False
        """Whether its last step is written."""
        self.finished = False
        """Whether the current step has come to the end that a step is to have."""
        self.characters = Characters(vocabulary)
        self._step = StepText()

    @property
    def figures(self) -> WriterFigures:
        """What it has written, for people."""
        return WriterFigures(self.lane.name, self.num_steps, self.num_sampled)

    def complete(self, clock: Callable[[], float]) -> None:
        """Take note that it writes no more."""
        if not self.lane.complete:
            self.lane.complete = True
            self.lane.completed_at = clock()

    @property
    def node(self) -> Node:
        """The step being written, or the last one."""
        return self.lane.nodes[-1]

    def begin_step(self, marks: Sequence[str]) -> None:
        """Forget what the last step left: its carried token is in the new one.

        Args:
            marks: Texts that show that the new step holds the answer.

        """
        self.carry = None
        self._step, self._text = StepText(), ""
        self._marks, self.has_mark = tuple(marks), False
        self.finished = False

    def reads(self, token: int, prompts: HogwildPrompts, checks: Counter[str]) -> bool:
        """Read a sampled token; return whether it ends the step.

        Args:
            token: Already appended to the step's node.
            prompts: What ends a step.
            checks: Answers to checks, counted here.

        """
        piece = self.characters.feed(token)
        self._look_for_marks(piece, prompts)
        if self.checked:
            self._read_check(piece, checks)
        rules = prompts.profile.workers
        by_text = self._step.feed(piece)
        self.finished = token in prompts.ends if prompts.ends else by_text
        most = rules.max_step_tokens
        sampled = self.node.num_sampled - self.node.num_pending
        cut = most is not None and sampled >= most and self.characters.whole
        return self.finished or cut

    def is_spent(self, budget: int) -> bool:
        """Whether it may sample no more, and no character is cut by that."""
        return self.num_sampled >= budget and self.characters.whole

    def is_open(self, prompts: HogwildPrompts) -> bool:
        """Whether what follows the step's text would be glued to it."""
        closed = self.finished or self._text.endswith(prompts.close_text)
        return bool(prompts.close) and not closed

    def _look_for_marks(self, piece: str, prompts: HogwildPrompts) -> None:
        text = self._text + piece
        self.has_mark = self.has_mark or any(mark in text for mark in self._marks)
        longest = max(map(len, (*self._marks, prompts.close_text)))
        self._text = text[max(0, len(text) - longest) :]

    def _read_check(self, piece: str, checks: Counter[str]) -> None:
        self._check += piece
        words = self._check.lower().replace("*", " ").split()
        first = words[0].strip(".,:;!\"'()[]") if words else ""
        if first in ANSWERS or len(words) > 1 or self.node.num_sampled >= CHECK_TOKENS:
            self.end_check(first, checks)

    def end_check(self, word: str, checks: Counter[str]) -> None:
        """Count the answer to this step's check, if one is open."""
        if self.checked:
            checks[word if word in ANSWERS else "no"] += 1
            self.checked = False
            self._check = ""
