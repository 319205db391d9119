"""The nodes of one group: made, in visible order, and which of them need a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..branch_graph import Kind, Lane, Node, State
from ..characters import Characters
from ..config.request_options import RequestOptions
from .budget import Budget
from .tag_scanner import Grammar, Scanner
from .tally import Tally


class NodeTree:
    """All nodes of a group.

    Attributes:
        order: The visible order, kept here and read by whoever shows the answer.
        tally: What they have written so far.
        scanners: What finds the tags in a node's tokens, for nodes that look for any.

    """

    def __init__(
        self,
        grammar: Grammar,
        options: RequestOptions,
        budget: Budget,
        order: list[Node],
        clock: Callable[[], float],
    ) -> None:
        self.order = order
        self.tally = Tally()
        self.scanners: dict[Node, Scanner] = {}
        self._grammar = grammar
        self._profile = grammar.profile
        self._options = options
        self._budget = budget
        self._clock = clock
        self._num_nodes = 0
        self._unsettled: dict[Node, None] = {}
        """Nodes that may need a request now or later."""
        self._retired: list[Node] = []

    def add(
        self,
        kind: Kind,
        lane: Lane,
        *,
        prefix: tuple[Node, ...],
        start: int,
        given: list[int],
        critical_before: int,
        after: Node | None,
        num_hidden: int = 0,
        num_pending: int = 0,
        scanner: Scanner | None = None,
    ) -> Node:
        """Add a node at the end of its lane.

        Args:
            kind: What it is for.
            lane: Where it goes on.
            prefix: Nodes it sees as a whole.
            start: Position of its first token.
            given: Its given tokens.
            critical_before: Sampled tokens on the longest chain before it.
            after: The node before it in the text, ``None`` for the first one.
            num_hidden: Given tokens that the client never sees.
            num_pending: Given tokens that the node before it sampled.
            scanner: What finds its tags; ``None`` makes one, where it is to have any.

        """
        if scanner is None and kind is not Kind.CLOSE and not self._options.vote:
            scanner = self._scanner(kind, lane)
        node = Node(
            index=self._num_nodes,
            kind=kind,
            lane=lane,
            prefix=prefix,
            start=start,
            tokens=given,
            num_given=len(given),
            num_hidden=num_hidden,
            critical_before=critical_before,
            limit=None,
            characters=scanner.characters if scanner is not None else self._characters(kind),
            num_pending=num_pending,
            place=len(lane.nodes),
        )
        self._num_nodes += 1
        if scanner is not None:
            self.scanners[node] = scanner
        self._budget.bound(node, self.tally.num_visible)
        self.tally.add(node)
        self._unsettled[node] = None
        lane.nodes.append(node)
        lane.all_nodes.append(node)
        self.order.insert(0 if after is None else self.order.index(after) + 1, node)
        return node

    def add_after(self, kind: Kind, node: Node, given: list[int], num_pending: int = 0) -> Node:
        """Add a node that sees all that one of its lane saw, and that one itself."""
        return self.add(
            kind,
            node.lane,
            prefix=(*node.prefix, node),
            start=node.end,
            given=given,
            critical_before=node.critical,
            after=node,
            num_pending=num_pending,
        )

    def _characters(self, kind: Kind) -> Characters | None:
        return None if kind is Kind.CLOSE else Characters(self._grammar.vocabulary)

    def _scanner(self, kind: Kind, lane: Lane) -> Scanner:
        """Return a scanner for a new node."""
        seed = ""
        if kind is Kind.TRUNK and self._profile.opening:
            last = self._profile.opening[-1]
            seed = last.rpartition("\n")[2] if isinstance(last, str) else ""
        once = self._profile.fork.once or self._profile.outline is not None
        budget = self._options.summary_tokens
        if lane.depth:
            budget = self._options.path_tokens or self._profile.path.max_tokens
        return self._grammar.scanner(
            in_path=lane.depth > 0,
            concludes=kind is Kind.CONCLUSION and lane.depth == 0,
            max_names=self._options.max_paths,
            seed=seed,
            forks=not (once and self.tally.num_forks > 0),
            name=lane.name,
            budget=budget,
        )

    def take_last_token(self, node: Node) -> int:
        """Take a node's last token, which has no K/V, to give it to the node after it."""
        self.tally.taken_back()
        return node.tokens.pop()

    def ready(self) -> list[Node]:
        """Return nodes that need a request now: new branches, and lost K/V to compute again."""
        for node in [node for node in self._unsettled if _is_settled(node)]:
            del self._unsettled[node]
        waiting = filter(_needs_request, self._unsettled)
        ready = [node for node in waiting if all(seen.sealed for seen in node.prefix)]
        return sorted(ready, key=self.order.index) if len(ready) > 1 else ready

    def started(self, node: Node) -> None:
        """Take note that a node has its request."""
        if node.state is State.WAITING:
            node.state = State.LIVE
            node.started_at = self._clock()
            self.tally.num_reused += sum(len(seen.tokens) for seen in node.prefix)
        node.computing = node.state is State.DONE
        node.parked = False

    def sealed(self, node: Node, *, kept: bool) -> None:
        """Take note that a node's K/V is held, or is gone."""
        node.sealed = kept
        node.computing = False
        if not kept:
            self._unsettled[node] = None

    def retire(self, nodes: Sequence[Node]) -> None:
        """Take note that nobody will attend to some nodes any more."""
        for node in nodes:
            node.retired = True
        self._retired += nodes

    def take_retired(self) -> list[Node]:
        """Return retired nodes, each once; some may be held."""
        retired, self._retired = self._retired, []
        return retired

    @property
    def blocks_needed(self) -> int:
        """Blocks that computing all nodes again takes, with one to grow for each branch."""
        return sum(
            self._budget.blocks_of(n) + (n.state in (State.WAITING, State.LIVE, State.CLOSING))
            for n in self.order
            if not n.retired and n.state is not State.DROPPED
        )


def _is_settled(node: Node) -> bool:
    """Whether a node needs no request any more, unless its K/V is lost."""
    return node.retired or node.state is State.DROPPED or (node.state is State.DONE and node.sealed)


def _needs_request(node: Node) -> bool:
    if node.retired or node.state is State.DROPPED:
        return False
    if node.state is State.DONE:
        return not (node.sealed or node.computing)
    return node.parked or node.state is State.WAITING
