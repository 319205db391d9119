"""The life of one request that may branch: a pure state machine.

The scheduler adapter tells a group what was sampled and what ended; the group answers with nodes
that need a vLLM request (:meth:`Group.ready`) and with tokens whose turn in the visible text has
come (:meth:`Group.release`). A group knows nothing of vLLM, and nothing of physical blocks beyond
their size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..branch_graph import Fork, Kind, Lane, Node, State
from ..characters import Characters
from ..config.profile import Forced
from ..config.request_options import RequestOptions
from ..interface import Cause, Emission, Finish, Limits, Verdict
from ..live import show_path
from ..ordered_output import OrderedOutput
from ..tally import Tally
from .budget import Budget
from .outline import Draft
from .tag_scanner import (
    BranchEnd,
    Event,
    ForkSeen,
    Grammar,
    ListDue,
    PathName,
    PointScanner,
    Scanner,
    TitleScanner,
    TitleSeen,
)
from .vote import VOTE_TOKENS, Vote, extract, majority

_NOTHING: Any = object()

_LANGUAGE_TOKENS = 64
"""Tokens in front of a list that tell the language of the answer."""


@dataclass
class _Drafting:
    """An outline in the making.

    Attributes:
        parent: Where the list may begin.
        held: The parent's last token, which has no K/V yet and is given to whatever follows.
        title: What the last title is, once it is known.

    """

    parent: Node
    draft: Draft
    held: int = 0
    title: str = ""


class Group(OrderedOutput):
    """One client request and everything it branched into."""

    def __init__(
        self,
        prompt: Sequence[int],
        grammar: Grammar,
        options: RequestOptions,
        limits: Limits,
    ) -> None:
        self._grammar = grammar
        self._options = options
        super().__init__(limits)
        self._profile = grammar.profile
        self._room = Budget(grammar, options, limits)
        self.blocks_of = self._room.blocks_of
        self._join_mode = options.join or self._profile.join.mode
        self.num_changes = 1
        """Grows whenever :meth:`ready` may have a new answer: most steps only add tokens."""
        self._concluded = False
        self.fallbacks: Counter[str] = Counter()
        self._num_nodes = 0
        self._tally = Tally()
        self._unsettled: dict[Node, None] = {}
        """Nodes that may need a request now or later."""
        self._retired: list[Node] = []
        self._num_forks = 0
        self._num_paths = 0
        self._widest = 1
        self._deepest = 0
        self._num_cut = 0
        self._num_reused = 0
        self._join_waits: list[float] = []
        self._ending: dict[Node, tuple[PathName, ...] | None] = {}
        """What a node's end tag asks for: paths to open, or (``None``) the end of its lane."""
        self._lane_stops: dict[Lane, Finish] = {}
        self._latest_fork: Fork | None = None
        self._drafting: _Drafting | None = None
        """The outline that is being written."""
        self._reads_like = ""
        """Text in front of the paths and their titles, which tells the answer's language."""
        self._prompt_len = len(prompt)
        self.opening = grammar.forced(self._profile.opening)
        self._first_only = grammar.forced(self._profile.join.first_only)
        trunk = Lane(depth=0, room=limits.index_blocks, forks_left=limits.max_forks)
        self.trunk = self._add_node(
            Kind.TRUNK,
            trunk,
            prefix=(),
            start=0,
            # Independent answers compute the prompt's last token themselves, as their first one.
            given=list(prompt[:-1] if options.vote else [*prompt, *self.opening]),
            num_hidden=len(prompt) - options.vote,
            critical_before=0,
            after=None,
        )
        self._last_of_prompt = list(prompt[-1:])
        self._outvoted: list[Node] = []
        self._answers: dict[Node, str | None] = {}
        """What independent answers that ended say."""
        self._vote: Vote | None = None
        if self._profile.fork.at_start:
            self._fork_at_start()

    # -- what the adapter reports ------------------------------------------------------------

    def feed(self, node: Node, token: int) -> Verdict:
        """Take a token that was sampled for a branch and appended to its request."""
        if node.state is State.DROPPED:  # by another branch of the same engine step
            return Verdict.END
        event = self._read(node, token)
        if isinstance(event, BranchEnd) and event.before:
            if node.depth or self._may_conclude(node):
                self._concluded = self._concluded or node.depth == 0
                return Verdict.RETRACT
            event = None
        node.tokens.append(token)
        self._tally.fed(node)
        if node.first_at is None:
            node.first_at = self._limits.clock()
        if isinstance(event, TitleSeen):
            assert self._drafting is not None
            self._drafting.title = event.title
            return Verdict.END
        if isinstance(event, ListDue) and self._may_draft(node):
            self._drafting = _Drafting(node, Draft(self._options.max_paths, invited=event.invited))
            return Verdict.END
        after = None
        if isinstance(event, BranchEnd) and node.depth == 0:
            if self._may_conclude(node):
                self._concluded = True
                return Verdict.END
        elif isinstance(event, BranchEnd):
            after = self._profile.path.after
            self._ending[node] = None
        elif isinstance(event, ForkSeen) and self._may_fork(node, event):
            after = self._profile.fork.after
            self._ending[node] = event.names
        if after is not None:
            if after:
                return Verdict.END
            node.state = State.CLOSING
            return Verdict.CLOSE
        return Verdict.END if node.is_full else Verdict.CONTINUE

    def _read(self, node: Node, token: int) -> Event | None:
        if node.scanner is not None:
            return node.scanner.feed(token)
        if node.characters is not None:
            node.characters.feed(token)
        return None

    def _may_conclude(self, node: Node) -> bool:
        """Whether a tag may end the answer: the client's lower bounds go before the grammar."""
        return not self._limits.ignore_eos and node.num_sampled >= node.least

    def _may_stop(self, node: Node) -> bool:
        """Whether a stop token in a path ends the answer, and not the path only."""
        return node.num_front + node.num_sampled >= self._limits.min_tokens

    def _fork_at_start(self) -> None:
        """Let the trunk end with the step that computes the prompt."""
        count = self._options.num_paths
        if count is None:
            count = min(self._profile.fork.num_paths or 0, self._options.max_paths)
        names = self._grammar.numbered(count)
        if self._options.vote and not self.trunk.tokens:
            self.fallbacks["prompt_of_one_token"] += 1
            return
        if self._may_fork(self.trunk, ForkSeen(names, opened=True)):
            self._ending[self.trunk] = names
            self.num_changes += 1
            self.trunk.state = State.CLOSING

    def end(self, node: Node, cause: Cause, stop_reason: int | None = None) -> None:
        """Take note that a branch's request ended, and decide what follows it.

        Args:
            node: The branch; its end-of-sequence token, if any, was not fed.
            cause: Why it ended. Unless that is ``CLOSED`` or ``EOS``, the last token has no K/V
                yet.
            stop_reason: The token of ``stop_token_ids`` that ended it.

        """
        if node.state is State.DROPPED:
            return
        self.num_changes += 1
        node.state = State.DONE
        node.ended_at = self._limits.clock()
        if self._options.vote and node.depth:
            self._end_voter(node, cause, stop_reason)
            return
        if node.kind is Kind.OUTLINE:
            self._end_title(node, cause)
            return
        if self._drafting is not None and node.depth == 0:
            if cause is Cause.VERDICT:
                self._drafting.held = node.tokens.pop()
                self._tally.taken_back()
                self._draft(node)
                return
            self._drafting = None  # the answer ended there anyhow
        if cause is Cause.EOS and node.scanner is not None:
            seen = node.scanner.at_end()
            if seen is not None and self._may_fork(node, seen):
                self._ending[node] = seen.names
        ending = self._ending.pop(node, _NOTHING)
        stops = cause is Cause.STOP_TOKEN and (node.depth == 0 or self._may_stop(node))
        by_tag = ending is not _NOTHING and cause not in (Cause.CUT, Cause.LENGTH) and not stops
        if node.kind is Kind.CLOSE:
            self._follow_tag(node, None if ending is _NOTHING else ending)
        elif by_tag:
            self._follow(node, ending, pending=cause in (Cause.VERDICT, Cause.STOP_TOKEN))
        elif stops and node.depth:
            self._lane_stops[node.lane] = Finish("stop", stop_reason)
            self._drop_behind(node)
        elif node.depth == 0:
            capped = cause in (Cause.VERDICT, Cause.LENGTH) and not self._concluded
            reason: Literal["length", "stop"] = "length" if capped else "stop"
            self.finish = Finish(reason, stop_reason, apart=self._concluded)
        else:
            self._num_cut += cause is not Cause.EOS
            close = self._close_of(node)
            pending = cause is not Cause.EOS and node.num_sampled > 0
            self._compute_behind(node, pending, close, self._profile.path.after, None)

    def _end_voter(self, node: Node, cause: Cause, stop_reason: int | None) -> None:
        """Take note that an independent answer ended; the last one brings the vote."""
        capped = cause in (Cause.VERDICT, Cause.LENGTH, Cause.CUT)
        reason: Literal["length", "stop"] = "length" if capped else "stop"
        # The client gets no end-of-sequence token: an answer's last token is its own.
        self._lane_stops[node.lane] = Finish(reason, stop_reason, apart=cause is Cause.EOS)
        self._num_cut += capped
        node.retired = node.lane.complete = True  # nobody will attend to it
        ending = node.tokens[max(node.num_given, len(node.tokens) - VOTE_TOKENS) :]
        text = self._grammar.vocabulary.text(ending)
        self._answers[node] = extract(text, self._limits.vote_pattern)
        fork = node.lane.fork
        assert fork is not None
        if not all(lane.complete for lane in fork.lanes):
            return
        voters = [lane.nodes[-1] for lane in fork.lanes]
        self._vote = majority([self._answers[voter] for voter in voters])
        winner = voters[self._vote.winner]
        self._outvoted = [voter for voter in voters if voter is not winner]
        self._order = [self.trunk, winner]
        self.finish = self._lane_stops[winner.lane]

    def sealed(self, node: Node, *, kept: bool) -> None:
        """Take note that a node's blocks are held by the group, or were lost with its request."""
        node.sealed = kept
        node.computing = False
        self.num_changes += 1
        if not kept:
            self._unsettled[node] = None

    def take_dropped(self) -> list[Node]:
        """Return branches that nobody will see, each once; their requests are of no more use.

        A branch is out of sight when the tokens known in front of it, and its own, already fill the
        client's budget: fronts only grow, so dropping it changes no visible token.
        """
        limit = self._limits.max_tokens
        if self.branched and self._tally.num_visible >= limit and not self._options.vote:
            before = self._num_passed
            for node in self._order[self._cursor :]:
                before += node.num_visible
                if before >= limit and node.state is not State.DONE:
                    self._drop(node)
        return super().take_dropped()

    def take_cut(self) -> list[Node]:
        """Return paths that must stop now, because enough of their siblings have ended."""
        fork = self._latest_fork
        if fork is None or self._options.termination >= 1:
            return []
        needed = max(1, math.ceil(self._options.termination * len(fork.lanes)))
        if sum(lane.ended for lane in fork.lanes) < needed:
            return []
        running = [lane.nodes[-1] for lane in fork.lanes if not lane.ended]
        # The others are cut at the end of the character that they have begun.
        return [node for node in running if node.characters is None or node.characters.whole]

    def settle(self) -> None:
        """Act at the end of the engine's step: nothing here waits for that."""

    # -- what the adapter asks ---------------------------------------------------------------

    @property
    def branched(self) -> bool:
        """Whether the request is no longer the one request that the client sent."""
        return len(self._order) > 1

    @property
    def has_paths(self) -> bool:
        """Whether it opened paths; a request may branch and go on as one answer all the same."""
        return self._num_paths > 0

    @property
    def nodes(self) -> Sequence[Node]:
        """All nodes in visible order."""
        return self._order

    def ready(self) -> list[Node]:
        """Return nodes that need a request now: new branches, and lost K/V to compute again."""
        if self.finish is not None:
            return []
        for node in [node for node in self._unsettled if _is_settled(node)]:
            del self._unsettled[node]
        waiting = filter(self._needs_request, self._unsettled)
        ready = [node for node in waiting if all(seen.sealed for seen in node.prefix)]
        return sorted(ready, key=self._order.index) if len(ready) > 1 else ready

    def take_retired(self) -> list[Node]:
        """Return nodes that nobody will attend to any more, each once; some may be held."""
        retired, self._retired = self._retired, []
        return retired

    def started(self, node: Node) -> None:
        """Take note that a node returned by :meth:`ready` has its request."""
        if node.state is State.WAITING:
            node.state = State.LIVE
            node.started_at = self._limits.clock()
            self._num_reused += sum(len(seen.tokens) for seen in node.prefix)
        node.computing = node.state is State.DONE
        node.parked = False

    def padded_prefix(self, node: Node) -> list[int]:
        """Return the token ids in front of a branch, padded node by node to whole blocks.

        The padding repeats a token that occurs anyway, so that penalties see no new one.
        """
        block_size = self._limits.block_size
        tokens: list[int] = []
        for seen in node.prefix:
            tokens.extend(seen.tokens)
            tokens.extend([seen.tokens[-1]] * (-len(seen.tokens) % block_size))
        return tokens

    def written_before(self, node: Node) -> list[int]:
        """Return the answer's tokens that a branch sees in front of its first sampled one."""

        def own(seen: Node) -> int:
            # A linear copy is hidden, as the client has it already, but it was written.
            return 0 if seen.kind is Kind.CONCLUSION else seen.num_hidden

        tokens = [token for seen in node.prefix for token in seen.tokens[own(seen) :]]
        return tokens + node.tokens[own(node) : node.num_given]

    @property
    def blocks_needed(self) -> int:
        """Blocks that computing the whole group again takes, with one to grow for each branch."""
        return sum(
            self.blocks_of(n) + (n.state in (State.WAITING, State.LIVE, State.CLOSING))
            for n in self._order
            if not n.retired and n.state is not State.DROPPED
        )

    def release(self) -> Iterator[Emission]:
        """Yield what the client may see now, in the order of the text; the last says the end."""
        if self._options.vote and self.branched and self._vote is None:
            return
        yield from super().release()

    def live_view(self) -> list[dict[str, Any]] | None:
        """Return where every path of the latest block stands, if the client asked to see that.

        Counts and tails, not differences: a client that misses one of these misses nothing. What
        the paths of an inner block write is shown at its join.
        """
        if not self._options.live or self._latest_fork is None:
            return None
        return [show_path(lane, self._grammar.vocabulary) for lane in self._latest_fork.lanes]

    def take_join_waits(self) -> list[float]:
        """Return how many seconds each path waited for its join, each path once."""
        waits, self._join_waits = self._join_waits, []
        return waits

    @property
    def outvoted(self) -> Sequence[Node]:
        """Independent answers that lost the vote, and are no longer in the visible order."""
        return self._outvoted

    def summary(self) -> dict[str, Any]:
        """Return the request's figures, as plain values for the client."""
        sampled, critical = self._tally.num_sampled, self._tally.critical
        return {
            "profile": self._profile.name,
            "join": self._join_mode,
            "forks": self._num_forks,
            "paths": self._num_paths,
            "widest_fork": self._widest,
            "depth": self._deepest,
            "generated_tokens": sampled,
            "forced_tokens": self._tally.num_forced,
            "critical_path_tokens": critical,
            "parallelism_ratio": round(sampled / critical, 4) if critical else 1.0,
            "reused_kv_tokens": self._num_reused,
            "cut_paths": self._num_cut,
            "fallbacks": dict(self.fallbacks),
            **self._reused_tags(),
            **self._votes(),
        }

    def _votes(self) -> dict[str, Any]:
        """Say how an answer was chosen, if it was."""
        if self._vote is None:
            return {}
        num_paths = 1 + len(self._outvoted)
        votes = {"answer": self._vote.answer, "counts": self._vote.counts, "paths": num_paths}
        return {"votes": votes}

    def _reused_tags(self) -> dict[str, int]:
        """Say how many paths share a control token with another one, where they may."""
        num_tags = self._profile.path.num_tags
        return {} if num_tags is None else {"reused_tags": max(0, self._widest - num_tags)}

    def temperature(self, node: Node) -> float | None:
        """Return a sampling temperature that replaces the request's, if the client chose one."""
        return self._options.path_temperature if node.depth else None

    # -- decisions ---------------------------------------------------------------------------

    def _may_fork(self, node: Node, seen: ForkSeen) -> bool:
        """Decide on a fork; a refusal lets the model go on sequentially, and is counted."""
        reason = self._fork_refusal(node, seen)
        if reason is not None:
            self.fallbacks[reason] += 1
            if self._profile.fork.once and node.scanner is not None:
                node.scanner.stop_forks()
        return reason is None

    def _fork_refusal(self, node: Node, seen: ForkSeen) -> str | None:
        options, rule = self._options, self._profile.fork
        count = len(seen.names)
        if rule.num_paths is not None and not rule.at_start:
            count = min(count, options.max_paths)
        if not seen.opened:
            return "not_opened"
        if count < (1 if rule.at_start else 2):
            return "fewer_than_two_paths"
        if count > options.max_paths:
            return "max_paths"
        if node.depth >= min(options.max_depth, self._profile.max_depth):
            return "max_depth"
        under_way = sum(ending is not None for ending in self._ending.values())
        if node.lane.forks_left < 1 or (rule.once and self._num_forks + under_way):
            return "max_forks"
        used = node.end - self._prompt_len
        if self._profile.path.stride:
            # Positions run ahead of tokens; all forks are the trunk's, so nothing runs beside it.
            used = self._tally.num_visible
        left = self._limits.max_tokens - used
        if left < max(rule.min_tokens_left, count):
            return "max_tokens"
        names = seen.names[:count]
        if not self._room.fits_in_index(node, names):
            return "max_model_len"
        if not self._limits.has_room(count * self._room.min_path_blocks(names)):
            return "held_kv_fraction"
        return None

    def _close_of(self, node: Node) -> tuple[int, ...]:
        """Return what is forced behind a path that did not end itself."""
        close = self._profile.path.close
        if isinstance(node.scanner, PointScanner):
            close = (node.scanner.close("".join(map(str, close))),)
        return self._grammar.forced(close, node.lane.path)

    # -- outlines that nobody sees -----------------------------------------------------------

    def _may_draft(self, node: Node) -> bool:
        """Decide whether an outline is worth its tokens: paths must be allowed to follow it."""
        two = self._grammar.numbered(2)
        return self._may_fork(node, ForkSeen(two, opened=True))

    def _draft(self, node: Node) -> None:
        """Let the model write the next title, behind the text and the titles in front of it."""
        drafting = self._drafting
        assert drafting is not None
        drafting.title = ""
        draft, lane = drafting.draft, drafting.parent.lane
        given = [drafting.held, *self._grammar.forced((draft.text,))]
        if self._room.fits_draft(lane, len(given)):
            scanner = TitleScanner(self._grammar.vocabulary, draft.reader())
            self._add_behind_place(Kind.OUTLINE, node, given, scanner)
        else:
            self._end_draft(node)

    def _end_title(self, node: Node, cause: Cause) -> None:
        """Take a title, and go on to the next one or end the draft."""
        drafting = self._drafting
        assert drafting is not None
        node.retired = True  # nobody attends to it
        self._retired.append(node)
        if cause is Cause.EOS and isinstance(node.scanner, TitleScanner):
            drafting.title = node.scanner.end().title
        if drafting.draft.take(drafting.title):
            self._draft(node)
        else:
            self._end_draft(node)

    def _end_draft(self, node: Node) -> None:
        """Fork by the draft's titles, or let the model go on as if there had been no draft."""
        drafting = self._drafting
        assert drafting is not None
        titles = enumerate(drafting.draft.titles)
        names = tuple(PathName(str(number + 1), title) for number, title in titles)
        if self._may_fork(drafting.parent, ForkSeen(names, opened=True)):
            following = self._add_behind_place(Kind.CLOSE, node, [drafting.held], None)
            self._ending[following] = names
        else:
            scanner = drafting.parent.scanner
            following = self._add_behind_place(Kind.REST, node, [drafting.held], scanner)
        self._drafting = None

    def _add_behind_place(
        self, kind: Kind, node: Node, given: list[int], scanner: Scanner | None
    ) -> Node:
        """Add a node that sees the text in front of the list, and no draft."""
        assert self._drafting is not None
        parent = self._drafting.parent
        return self._add_node(
            kind,
            parent.lane,
            prefix=(*parent.prefix, parent),
            start=parent.end,
            given=given,
            num_hidden=0,
            critical_before=node.critical_before + node.num_sampled,
            after=node,
            num_pending=int(kind is not Kind.OUTLINE),
            scanner=scanner,
        )

    def _written_by(self, nodes: Sequence[Node], names: Sequence[PathName]) -> str:
        """Return how the answer reads so far, with its paths' titles."""
        if not self._profile.join.starts:
            return ""
        tokens = [t for node in nodes for t in node.tokens[node.num_given :][-_LANGUAGE_TOKENS:]]
        return "\n".join((self._grammar.vocabulary.text(tokens), *(name.title for name in names)))

    def _follow(self, node: Node, ending: tuple[PathName, ...] | None, *, pending: bool) -> None:
        """Go on behind a tag, once what is forced behind it is computed."""
        rule = self._profile.path if ending is None else self._profile.fork
        self._compute_behind(node, pending, (), rule.after, ending)

    def _compute_behind(
        self,
        node: Node,
        pending: bool,
        close: tuple[int, ...],
        after: Forced,
        ending: tuple[PathName, ...] | None,
    ) -> None:
        """Compute what an ended node lacks (its last token, a tag, a separator), then go on."""
        tail = self._grammar.forced(after)
        given = [*close, *tail]
        if pending:
            given.insert(0, node.tokens.pop())
            self._tally.taken_back()
        if not given:
            self._follow_tag(node, ending)
            return
        closing = self._add_node(
            Kind.CLOSE,
            node.lane,
            prefix=(*node.prefix, node),
            start=node.end,
            given=given,
            num_hidden=0,
            critical_before=node.critical_before + node.num_sampled,
            after=node,
            num_pending=int(pending),
        )
        closing.num_after = len(tail)
        if ending is not None:
            self._ending[closing] = ending

    def _follow_tag(self, node: Node, ending: tuple[PathName, ...] | None) -> None:
        if ending is None:
            self._complete(node.lane)
        else:
            self._fork(node, ending)

    def _fork(self, node: Node, names: tuple[PathName, ...]) -> None:
        names = names[: self._options.max_paths]
        # Shared out like the index space, so that no path's forks depend on its siblings' haste.
        share, node.lane.forks_left = divmod(node.lane.forks_left - 1, len(names) + 1)
        node.lane.forks_left += share
        room = self._room.path_room(node, len(names))
        fork = Fork(node)
        if node.depth == 0:
            self._latest_fork = fork
            self._reads_like = self._written_by((*node.prefix, node), names)
        self._num_forks += 1
        self._num_paths += len(names)
        self._widest = max(self._widest, len(names))
        self._deepest = max(self._deepest, node.depth + 1)
        after = node
        critical = node.critical_before + node.num_sampled
        budget = self._options.path_tokens or self._profile.path.max_tokens
        own = critical + budget if budget is not None else None
        for number, name in enumerate(names):
            lane = Lane(
                depth=node.depth + 1,
                room=room,
                forks_left=share,
                fork=fork,
                name=name.name,
                title=name.title,
                tag=name.tag,
                thought=self._thought(name),
            )
            ends = [b for b in (node.lane.budget_end, own) if b is not None]
            lane.budget_end = min(ends, default=None)
            fork.lanes.append(lane)
            given = list(self._grammar.forced(self._profile.path.start, name))
            num_hidden = len(self._first_only) if number else 0
            if self._options.vote:
                given, num_hidden = list(self._last_of_prompt), 1
            after = self._add_node(
                Kind.PATH,
                lane,
                prefix=(*node.prefix, node),
                start=node.tag_end + number * self._profile.path.stride,
                given=given,
                num_hidden=num_hidden,
                critical_before=critical,
                after=after,
            )

    def _thought(self, name: PathName) -> int:
        """Return the number of a path's thought embedding; independent answers have none."""
        has_one = self._profile.path.num_tags is not None and not self._options.vote
        return int(name.tag) if has_one else 0

    def _complete(self, lane: Lane) -> None:
        lane.complete = True
        lane.completed_at = self._limits.clock()
        fork = lane.fork
        assert fork is not None, "the trunk never completes as a path"
        if all(sibling.complete for sibling in fork.lanes):
            self._join(fork)

    def _join(self, fork: Fork) -> None:
        joined_at = self._limits.clock()
        self._join_waits += [joined_at - (lane.completed_at or joined_at) for lane in fork.lanes]
        parent = fork.parent
        inner = [node for lane in fork.lanes for node in lane.all_nodes]
        critical = max(n.critical_before + n.num_sampled for n in inner)
        given = list(self._grammar.forced(self._grammar.join_start(self._reads_like)))
        if self._join_mode == "kv":
            prefix = (*parent.prefix, parent, *inner)
            start, copies = self._join_position(fork), []
        else:
            prefix = (*parent.prefix, parent)
            start, copies = parent.end, [t for n in inner for t in n.tokens[n.num_hidden :]]
            for node in inner:
                node.retired = True
            self._retired += inner
        parent.lane.all_nodes.extend(inner)
        self._add_node(
            Kind.CONCLUSION,
            parent.lane,
            prefix=prefix,
            start=start,
            given=[*copies, *given],
            num_hidden=len(copies),
            critical_before=critical,
            after=inner[-1],
        )

    def _join_position(self, fork: Fork) -> int:
        """Return the position of a conclusion's first token over reused K/V."""
        if self._profile.join.position == "total":
            lengths = (lane.end - lane.nodes[0].start for lane in fork.lanes)
            return fork.parent.tag_end + sum(lengths)
        return max(lane.end for lane in fork.lanes)

    def _add_node(
        self,
        kind: Kind,
        lane: Lane,
        *,
        prefix: tuple[Node, ...],
        start: int,
        given: list[int],
        num_hidden: int,
        critical_before: int,
        after: Node | None,
        num_pending: int = 0,
        scanner: Scanner | None = None,
    ) -> Node:
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
            scanner=scanner,
            characters=scanner.characters if scanner is not None else self._characters(kind),
            num_pending=num_pending,
            place=len(lane.nodes),
        )
        self._num_nodes += 1
        self._room.bound(node, self._tally.num_visible)
        self._tally.add(node)
        self._unsettled[node] = None
        lane.nodes.append(node)
        lane.all_nodes.append(node)
        self._order.insert(0 if after is None else self._order.index(after) + 1, node)
        return node

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
            forks=not (once and self._num_forks > 0),
            name=lane.name,
            budget=budget,
        )

    def _drop_behind(self, node: Node) -> None:
        """A stop token ended the answer here: nothing behind it will be seen."""
        for later in self._order[self._order.index(node) + 1 :]:
            if later.state is not State.DONE:
                self._drop(later)

    def _needs_request(self, node: Node) -> bool:
        if node.retired or node.state is State.DROPPED:
            return False
        if node.state is State.DONE:
            return not (node.sealed or node.computing)
        return node.parked or node.state is State.WAITING

    def _finish_behind(self, node: Node) -> Finish | None:
        """Return how the answer ends right behind a node, if it does."""
        done = node.state is State.DONE
        if done and node is node.lane.nodes[-1] and node.lane in self._lane_stops:
            return self._lane_stops[node.lane]
        return super()._finish_behind(node)


def _is_settled(node: Node) -> bool:
    """Whether a node needs no request any more, unless its K/V is lost."""
    return node.retired or node.state is State.DROPPED or (node.state is State.DONE and node.sealed)
