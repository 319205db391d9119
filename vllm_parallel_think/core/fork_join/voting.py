"""Independent answers to one question, of which the majority's is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..branch_graph import Node
from ..interface import Cause, Finish, Limits
from ..ordered_output import OrderedOutput
from ..summary import Votes
from .node_tree import NodeTree
from .tag_scanner import Grammar
from .vote import VOTE_TOKENS, Vote, extract, majority


class Voting:
    """Waits for all answers, and chooses one.

    Attributes:
        outvoted: Answers that lost, and are no longer in the visible order.

    """

    def __init__(
        self, grammar: Grammar, limits: Limits, tree: NodeTree, output: OrderedOutput
    ) -> None:
        self.outvoted: Sequence[Node] = ()
        self._grammar = grammar
        self._limits = limits
        self._tree = tree
        self._output = output
        self._answers: dict[Node, str | None] = {}
        """What answers that ended say."""
        self._vote: Vote | None = None

    def end(self, node: Node, cause: Cause, stop_reason: int | None) -> None:
        """Take note that an independent answer ended; the last one brings the vote."""
        capped = cause in (Cause.VERDICT, Cause.LENGTH, Cause.CUT)
        reason: Literal["length", "stop"] = "length" if capped else "stop"
        # The client gets no end-of-sequence token: an answer's last token is its own.
        finish = Finish(reason, stop_reason, apart=cause is Cause.EOS)
        self._output.lane_ends[node.lane] = finish
        self._tree.tally.num_cut += capped
        node.retired = node.lane.complete = True  # nobody will attend to it
        ending = node.tokens[max(node.num_given, len(node.tokens) - VOTE_TOKENS) :]
        text = self._grammar.vocabulary.text(ending)
        self._answers[node] = extract(text, self._limits.vote_pattern)
        fork = node.lane.fork
        assert fork is not None
        if all(lane.complete for lane in fork.lanes):
            self._choose([lane.nodes[-1] for lane in fork.lanes])

    def _choose(self, voters: list[Node]) -> None:
        self._vote = majority([self._answers[voter] for voter in voters])
        winner = voters[self._vote.winner]
        self.outvoted = [voter for voter in voters if voter is not winner]
        self._output.order[:] = [self._output.order[0], winner]
        self._output.finish = self._output.lane_ends[winner.lane]
        self._output.is_held = False

    @property
    def votes(self) -> Votes | None:
        """How the answer was chosen, if it was."""
        if self._vote is None:
            return None
        return Votes(self._vote.answer, self._vote.counts, 1 + len(self.outvoted))
