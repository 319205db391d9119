"""The hidden outline: titles that the model writes where a list may begin, and nobody sees."""

from __future__ import annotations

from dataclasses import dataclass

from ..branch_graph import Kind, Node, PathName
from ..config.request_options import RequestOptions
from ..interface import Cause
from .budget import Budget
from .fork_policy import Endings, ForkPolicy
from .node_tree import NodeTree
from .outline import Draft
from .tag_scanner import ForkSeen, Grammar, ListDue, Scanner, TitleScanner


@dataclass
class _Place:
    """Where a list may begin, and what is known of it.

    Attributes:
        parent: The node that came there.
        draft: The titles.
        held: The parent's last token, which has no K/V yet and is given to whatever follows.
        title: What the last title is, once it is known.

    """

    parent: Node
    draft: Draft
    held: int = 0
    title: str = ""


class Drafting:
    """Lets the model write an outline, one title after the other."""

    def __init__(
        self,
        grammar: Grammar,
        options: RequestOptions,
        budget: Budget,
        policy: ForkPolicy,
        tree: NodeTree,
        endings: Endings,
    ) -> None:
        self._grammar = grammar
        self._options = options
        self._budget = budget
        self._policy = policy
        self._tree = tree
        self._endings = endings
        self._place: _Place | None = None

    @property
    def is_open(self) -> bool:
        """Whether an outline is being written."""
        return self._place is not None

    def begins(self, node: Node, due: ListDue) -> bool:
        """Begin an outline, if it is worth its tokens: paths must be allowed to follow it."""
        two = self._grammar.numbered(2)
        if not self._policy.may_fork(node, ForkSeen(two, opened=True)):
            return False
        self._place = _Place(node, Draft(self._options.max_paths, invited=due.invited))
        return True

    def end_parent(self, node: Node, cause: Cause) -> bool:
        """Let the first title follow the node that came to the place, unless the answer ends there.

        Returns:
            Whether a title follows.

        """
        place = self._place
        if place is None:
            return False
        if cause is not Cause.VERDICT:
            self._place = None
            return False
        place.held = self._tree.take_last_token(node)
        self._write_title(place, node)
        return True

    def see_title(self, title: str) -> None:
        """Take note of what the title being written is."""
        assert self._place is not None
        self._place.title = title

    def end_title(self, node: Node, cause: Cause) -> None:
        """Take a title, and go on to the next one or end the draft."""
        place = self._place
        assert place is not None
        self._tree.retire([node])  # nobody attends to it
        scanner = self._tree.scanners.get(node)
        if cause is Cause.EOS and isinstance(scanner, TitleScanner):
            place.title = scanner.end().title
        if place.draft.take(place.title):
            self._write_title(place, node)
        else:
            self._end_draft(place, node)

    def _write_title(self, place: _Place, node: Node) -> None:
        """Let the model write the next title, after the text and the titles before it."""
        place.title = ""
        given = [place.held, *self._grammar.forced((place.draft.text,))]
        if self._budget.fits_draft(place.parent.lane, len(given)):
            scanner = TitleScanner(self._grammar.vocabulary, place.draft.reader())
            self._add(place, Kind.OUTLINE, node, given, scanner)
        else:
            self._end_draft(place, node)

    def _end_draft(self, place: _Place, node: Node) -> None:
        """Fork by the draft's titles, or let the model go on as if there had been no draft."""
        titles = enumerate(place.draft.titles)
        names = tuple(PathName(str(number + 1), title) for number, title in titles)
        if self._policy.may_fork(place.parent, ForkSeen(names, opened=True)):
            following = self._add(place, Kind.CLOSE, node, [place.held], None)
            self._endings[following] = names
        else:
            scanner = self._tree.scanners.get(place.parent)
            self._add(place, Kind.REST, node, [place.held], scanner)
        self._place = None

    def _add(
        self, place: _Place, kind: Kind, node: Node, given: list[int], scanner: Scanner | None
    ) -> Node:
        """Add a node that sees the text before the list, and no draft."""
        parent = place.parent
        return self._tree.add(
            kind,
            parent.lane,
            prefix=(*parent.prefix, parent),
            start=parent.end,
            given=given,
            critical_before=node.critical,
            after=node,
            num_pending=int(kind is not Kind.OUTLINE),
            scanner=scanner,
        )
