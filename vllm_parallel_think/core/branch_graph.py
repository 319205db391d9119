"""The shape of a request that has branched: nodes, lanes and forks.

A *node* is a run of tokens that one vLLM request computes; it attends to the nodes of its
``prefix`` as a whole and to itself causally. A *lane* is a sequence of nodes that follow each
other: the trunk, or one path with everything that happened inside it. A *fork* opens lanes after a
node.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from .characters import Characters


@dataclass(frozen=True)
class PathName:
    """Name of a path and, where the grammar has them, its title and the number of its tag."""

    name: str
    title: str = ""
    tag: str = ""


class Kind(enum.Enum):
    """What a node is for."""

    TRUNK = "trunk"
    PATH = "path"
    CLOSE = "close"
    """Tokens that a branch still lacks in the KV cache, and what is forced after them."""
    CONCLUSION = "conclusion"
    OUTLINE = "outline"
    """A title of an outline that the client does not see."""
    REST = "rest"
    """The answer as the model goes on with it, where no outline came of one."""


class State(enum.Enum):
    """Where a node stands."""

    WAITING = "waiting"
    """Needs a vLLM request as soon as its prefix is in the KV cache."""
    LIVE = "live"
    CLOSING = "closing"
    """Wrote its end tag, which needs one more step to be in the KV cache."""
    DONE = "done"
    DROPPED = "dropped"
    """Will never be seen: its tokens lie after the end of the answer."""


_ENDED = (State.CLOSING, State.DONE, State.DROPPED)


@dataclass(eq=False, repr=False)
class Node:
    """A run of tokens that one vLLM request computes.

    Attributes:
        index: Number of the node in its group.
        prefix: Nodes this one sees as a whole, in order.
        start: RoPE position of the first own token.
        tokens: Own tokens: given ones first, then sampled ones.
        num_given: How many of ``tokens`` were given.
        num_hidden: How many given tokens the client never sees (the prompt, or copies).
        num_pending: How many given tokens after those were sampled by the node before.
        num_after: How many tokens at the end stand after the tag that ended the branch.
        critical_before: Sampled tokens on the longest chain before this node.
        limit: Tokens after which this node is cut, at the end of a character; ``None`` leaves
            that to vLLM.
        characters: Reads what it samples as text.
        most: Most tokens it may sample, in the middle of a character or not; ``None`` is ``limit``.
        least: Fewest tokens it must sample before the answer may end in it, other than by a limit.
        num_front: Visible tokens that stood before its first sampled one for certain, when it
            was made.
        place: Number of the node among those of its lane.
        sealed: Whether all own tokens are in the KV cache and held by the group.
        computing: Whether a request is computing the lost K/V of a finished node again.
        parked: Whether the node's request waits outside the queues for its prefix.
        retired: Whether nobody will attend to this node any more.
        outbox: Sampled tokens that wait for their turn in the visible text.
        started_at: When its request was handed to vLLM, by the group's clock.
        first_at: When its first token was sampled.
        ended_at: When its request ended.

    """

    index: int
    kind: Kind
    lane: Lane
    prefix: tuple[Node, ...]
    start: int
    tokens: list[int]
    num_given: int
    num_hidden: int
    critical_before: int
    limit: int | None
    characters: Characters | None = None
    most: int | None = None
    least: int = 0
    num_front: int = 0
    num_pending: int = 0
    num_after: int = 0
    place: int = 0
    state: State = State.WAITING
    sealed: bool = False
    computing: bool = False
    parked: bool = False
    retired: bool = False
    outbox: deque[Any] = field(default_factory=deque)
    started_at: float | None = None
    first_at: float | None = None
    ended_at: float | None = None

    def __repr__(self) -> str:
        """Name the node only: what it holds is one client's, and may end up in a log."""
        return f"<{self.kind.value} {self.index}, {self.state.value}>"

    @property
    def num_sampled(self) -> int:
        """Number of sampled tokens."""
        return len(self.tokens) - self.num_given + self.num_pending

    @property
    def critical(self) -> int:
        """Sampled tokens on the longest chain up to the end of this node."""
        return self.critical_before + self.num_sampled

    @property
    def is_full(self) -> bool:
        """Whether it may sample no more: its limit is reached, and no character is cut by that."""
        if self.limit is None or self.num_sampled < self.limit:
            return False
        most = self.limit if self.most is None else self.most
        return self.num_sampled >= most or self.characters is None or self.characters.whole

    @property
    def num_visible(self) -> int:
        """Number of tokens the client sees of this node."""
        return 0 if self.kind is Kind.OUTLINE else len(self.tokens) - self.num_hidden

    @property
    def end(self) -> int:
        """RoPE position after the last own token."""
        return self.start + len(self.tokens)

    @property
    def tag_end(self) -> int:
        """RoPE position after the tag that ended the branch, where what follows it starts."""
        return self.end - self.num_after

    @property
    def address(self) -> str:
        """Place in the tree, the same whatever the order of events: lanes and nodes by number."""
        return f"{self.lane.address}.{self.place}"

    @property
    def forced_visible(self) -> list[int]:
        """Given tokens that the client sees and that nobody sampled."""
        if self.kind is Kind.OUTLINE:
            return []
        return self.tokens[self.num_hidden + self.num_pending : self.num_given]

    @property
    def depth(self) -> int:
        """Nesting of the lane this node is in; the trunk has 0."""
        return self.lane.depth


@dataclass(eq=False, repr=False)
class Lane:
    """Nodes that follow each other: the trunk, or one path and what happened inside it.

    Attributes:
        depth: 0 for the trunk, 1 for its paths, and so on.
        room: KV blocks the lane may fill in the index space of the join.
        forks_left: Forks the lane may still make, those inside its paths included.
        nodes: Own nodes, without those of inner lanes.
        all_nodes: Own nodes and those of inner lanes, in visible order.
        complete: Whether nothing more will be written in this lane.
        budget_end: Critical length at which the path's budget is used up.
        name: The path's name in the text; empty for the trunk.
        title: Its title, where the grammar has one.
        tag: Number of its control token, where the grammar has those.
        thought: Number of its thought embedding, from 1; 0 is none.
        completed_at: When it was complete, by the group's clock.

    """

    depth: int
    room: int
    forks_left: int
    nodes: list[Node] = field(default_factory=list)
    all_nodes: list[Node] = field(default_factory=list)
    complete: bool = False
    budget_end: int | None = None
    name: str = ""
    title: str = ""
    tag: str = ""
    thought: int = 0
    completed_at: float | None = None
    fork: Fork | None = None
    """The fork that opened this lane; ``None`` for the trunk."""
    _num_counted: int = 0
    _num_sampled: int = 0

    @property
    def num_sampled(self) -> int:
        """Sampled tokens of all nodes; only the last one still grows."""
        for node in self.all_nodes[self._num_counted : -1]:
            self._num_sampled += node.num_sampled
            self._num_counted += 1
        return self._num_sampled + self.all_nodes[-1].num_sampled

    @property
    def path(self) -> PathName:
        """What forced text calls the path."""
        return PathName(self.name, self.title, self.tag)

    @property
    def ended(self) -> bool:
        """Whether a lane without inner forks has written its last token."""
        last = self.nodes[-1]
        return self.complete or last.kind is Kind.CLOSE or last.state in _ENDED

    @property
    def end(self) -> int:
        """RoPE position after the tag that ended the lane."""
        return self.nodes[-1].tag_end

    @property
    def address(self) -> str:
        """Place in the tree: the number of this lane in every fork on the way to it."""
        if self.fork is None:
            return "0"
        return f"{self.fork.parent.address}/{self.fork.lanes.index(self)}"


@dataclass(eq=False, repr=False)
class Fork:
    """Lanes opened after one node."""

    parent: Node
    lanes: list[Lane] = field(default_factory=list)
