"""The life of one request that forks and joins: a pure state machine.

The scheduler reports what was sampled and what ended; the group answers with nodes that need a vLLM
request (:meth:`ForkJoinGroup.ready`) and with tokens whose turn in the visible text has come
(:meth:`ForkJoinGroup.release`). It decides what a token and an end mean; what follows from that is
done by the objects it holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from ..branch_graph import Kind, Lane, Node, State
from ..config.request_options import RequestOptions
from ..group_base import GroupBase
from ..interface import Cause, Finish, Limits, Verdict
from ..ordered_output import OrderedOutput, show_path
from ..summary import FallbackReason, Summary
from .budget import Budget
from .drafting import Drafting
from .fork_policy import Endings, ForkPolicy
from .forks import Forks
from .joins import Joins
from .node_tree import NodeTree
from .tag_scanner import BranchEnd, Event, ForkSeen, Grammar, ListDue, TitleSeen
from .voting import Voting

_NOTHING: Any = object()


class ForkJoinGroup(GroupBase):
    """One client request and everything it forked into."""

    def __init__(
        self,
        prompt: Sequence[int],
        grammar: Grammar,
        options: RequestOptions,
        limits: Limits,
    ) -> None:
        super().__init__(limits, OrderedOutput(limits, lambda: self.branched))
        self._grammar = grammar
        self._profile = grammar.profile
        self._options = options
        self._concluded = False
        self._endings: Endings = {}
        self.opening = grammar.forced(self._profile.opening)
        budget, order = Budget(grammar, options, limits), self._output.order
        tree = self._tree = NodeTree(grammar, options, budget, order, limits.clock)
        self._policy = ForkPolicy(
            self._profile,
            options,
            limits,
            budget,
            tree,
            self._endings,
            self.fallbacks,
            len(prompt),
        )
        self._drafting = Drafting(grammar, options, budget, self._policy, tree, self._endings)
        self._joins = Joins(grammar, options, tree, limits.clock)
        last = list(prompt[-1:])
        self._forks = Forks(grammar, options, budget, tree, self._endings, self._joins, last)
        self._voting = Voting(grammar, limits, tree, self._output)
        self.trunk = tree.add(
            Kind.TRUNK,
            Lane(depth=0, room=limits.index_blocks, forks_left=limits.max_forks),
            prefix=(),
            start=0,
            # Independent answers compute the prompt's last token themselves, as their first one.
            given=list(prompt[:-1] if options.vote else [*prompt, *self.opening]),
            num_hidden=len(prompt) - options.vote,
            critical_before=0,
            after=None,
        )
        if self._profile.fork.at_start:
            self._fork_at_start()

    def _fork_at_start(self) -> None:
        """Let the trunk end with the step that computes the prompt."""
        count = self._options.num_paths
        if count is None:
            count = min(self._profile.fork.num_paths or 0, self._options.max_paths)
        names = self._grammar.numbered(count)
        if self._options.vote and not self.trunk.tokens:
            self.fallbacks[FallbackReason.PROMPT_OF_ONE_TOKEN] += 1
            return
        if self._policy.may_fork(self.trunk, ForkSeen(names, opened=True)):
            self._endings[self.trunk] = names
            self.num_changes += 1
            self.trunk.state = State.CLOSING

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
        self._tree.tally.fed(node)
        if node.first_at is None:
            node.first_at = self._limits.clock()
        if event is not None and (verdict := self._verdict_on(event, node)) is not None:
            return verdict
        return Verdict.END if node.is_full else Verdict.CONTINUE

    def _read(self, node: Node, token: int) -> Event | None:
        scanner = self._tree.scanners.get(node)
        if scanner is not None:
            return scanner.feed(token)
        if node.characters is not None:
            node.characters.feed(token)
        return None

    def _verdict_on(self, event: Event, node: Node) -> Verdict | None:
        """Decide what an event means to a branch; ``None`` if it means nothing."""
        if isinstance(event, TitleSeen):
            self._drafting.see_title(event.title)
            return Verdict.END
        if isinstance(event, ListDue):
            return Verdict.END if self._drafting.begins(node, event) else None
        if isinstance(event, BranchEnd) and node.depth == 0:
            if not self._may_conclude(node):
                return None
            self._concluded = True
            return Verdict.END
        if isinstance(event, BranchEnd):
            after = self._profile.path.after
            self._endings[node] = None
        elif self._policy.may_fork(node, event):
            after = self._profile.fork.after
            self._endings[node] = event.names
        else:
            return None
        if after:
            return Verdict.END
        node.state = State.CLOSING
        return Verdict.CLOSE

    def _may_conclude(self, node: Node) -> bool:
        """Whether a tag may end the answer: the client's lower bounds go before the grammar."""
        return not self._limits.ignore_eos and node.num_sampled >= node.least

    def _may_stop(self, node: Node) -> bool:
        """Whether a stop token in a path ends the answer, and not the path only."""
        return node.num_front + node.num_sampled >= self._limits.min_tokens

    def end(self, node: Node, cause: Cause, stop_reason: int | None = None) -> None:
        """Take note that a branch's request ended, and decide what follows it."""
        if node.state is State.DROPPED:
            return
        self.num_changes += 1
        node.state = State.DONE
        node.ended_at = self._limits.clock()
        if self._options.vote and node.depth:
            self._voting.end(node, cause, stop_reason)
        elif node.kind is Kind.OUTLINE:
            self._drafting.end_title(node, cause)
        elif node.depth or not self._drafting.end_parent(node, cause):
            self._end_text(node, cause, stop_reason)

    def _end_text(self, node: Node, cause: Cause, stop_reason: int | None) -> None:
        """Decide what follows a node of the visible text."""
        scanner = self._tree.scanners.get(node)
        if cause is Cause.EOS and scanner is not None:
            seen = scanner.at_end()
            if seen is not None and self._policy.may_fork(node, seen):
                self._endings[node] = seen.names
        ending = self._endings.pop(node, _NOTHING)
        stops = cause is Cause.STOP_TOKEN and (node.depth == 0 or self._may_stop(node))
        by_tag = ending is not _NOTHING and cause not in (Cause.CUT, Cause.LENGTH) and not stops
        if node.kind is Kind.CLOSE:
            self._forks.go_on(node, None if ending is _NOTHING else ending)
        elif by_tag:
            # Of independent answers the client sees none before the vote.
            self._output.is_held = self._options.vote
            self._forks.follow(node, ending, pending=cause in (Cause.VERDICT, Cause.STOP_TOKEN))
        elif stops and node.depth:
            self._output.lane_ends[node.lane] = Finish("stop", stop_reason)
            self._output.drop_after(node)
        elif node.depth == 0:
            capped = cause in (Cause.VERDICT, Cause.LENGTH) and not self._concluded
            reason: Literal["length", "stop"] = "length" if capped else "stop"
            self._output.finish = Finish(reason, stop_reason, apart=self._concluded)
        else:
            self._tree.tally.num_cut += cause is not Cause.EOS
            pending = cause is not Cause.EOS and node.num_sampled > 0
            self._forks.close_path(node, pending=pending)

    def sealed(self, node: Node, *, kept: bool) -> None:
        """Take note that a node's blocks are held by the group, or were lost with its request."""
        self.num_changes += 1
        self._tree.sealed(node, kept=kept)

    def started(self, node: Node) -> None:
        """Take note that a node returned by :meth:`ready` has its request."""
        self._tree.started(node)

    def take_dropped(self) -> list[Node]:
        """Return branches that nobody will see, each once; their requests are of no more use."""
        full = self._tree.tally.num_visible >= self._limits.max_tokens
        if full and self.branched and not self._options.vote:
            self._output.drop_beyond_budget()
        return super().take_dropped()

    def take_cut(self) -> list[Node]:
        """Return paths that must stop now, because enough of their siblings have ended."""
        fork = self._forks.latest
        if fork is None or self._options.termination >= 1:
            return []
        needed = max(1, math.ceil(self._options.termination * len(fork.lanes)))
        if sum(lane.ended for lane in fork.lanes) < needed:
            return []
        running = [lane.nodes[-1] for lane in fork.lanes if not lane.ended]
        # The others are cut at the end of the character that they have begun.
        return [node for node in running if node.characters is None or node.characters.whole]

    def take_retired(self) -> list[Node]:
        """Return nodes that nobody will attend to any more, each once; some may be held."""
        return self._tree.take_retired()

    def ready(self) -> list[Node]:
        """Return nodes that need a request now: new branches, and lost K/V to compute again."""
        return [] if self.finish is not None else self._tree.ready()

    def written_before(self, node: Node) -> list[int]:
        """Return the answer's tokens that a branch sees before its first sampled one."""

        def own(seen: Node) -> int:
            # A linear copy is hidden, as the client has it already, but it was written.
            return 0 if seen.kind is Kind.CONCLUSION else seen.num_hidden

        tokens = [token for seen in node.prefix for token in seen.tokens[own(seen) :]]
        return tokens + node.tokens[own(node) : node.num_given]

    def temperature(self, node: Node) -> float | None:
        """Return a sampling temperature that replaces the request's, if the client chose one."""
        return self._options.path_temperature if node.depth else None

    @property
    def branched(self) -> bool:
        """Whether the request is no longer the one request that the client sent."""
        return len(self._output.order) > 1

    @property
    def has_paths(self) -> bool:
        """Whether it opened paths; a request may branch and go on as one answer all the same."""
        return self._tree.tally.num_paths > 0

    @property
    def nodes(self) -> Sequence[Node]:
        """All nodes in visible order."""
        return self._output.order

    @property
    def outvoted(self) -> Sequence[Node]:
        """Independent answers that lost the vote, and are no longer in the visible order."""
        return self._voting.outvoted

    @property
    def blocks_needed(self) -> int:
        """Blocks that computing the whole group again takes, with one to grow for each branch."""
        return self._tree.blocks_needed

    def live_view(self) -> list[dict[str, Any]] | None:
        """Return where every path of the latest block stands, if the client asked to see that.

        Counts and tails, not differences: a client that misses one of these misses nothing. What
        the paths of an inner block write is shown at its join.
        """
        fork = self._forks.latest
        if not self._options.live or fork is None:
            return None
        return [show_path(lane, self._grammar.vocabulary) for lane in fork.lanes]

    def take_join_waits(self) -> list[float]:
        """Return how many seconds each path waited for its join, each path once."""
        return self._joins.take_waits()

    def summary(self) -> Summary:
        """Return the group's figures so far."""
        tally, num_tags = self._tree.tally, self._profile.path.num_tags
        return Summary(
            profile=self._profile.name,
            join=self._joins.mode,
            forks=tally.num_forks,
            paths=tally.num_paths,
            widest_fork=tally.widest,
            depth=tally.deepest,
            generated_tokens=tally.num_sampled,
            forced_tokens=tally.num_forced,
            critical_path_tokens=tally.critical,
            reused_kv_tokens=tally.num_reused,
            cut_paths=tally.num_cut,
            fallbacks=dict(self.fallbacks),
            reused_tags=None if num_tags is None else max(0, tally.widest - num_tags),
            votes=self._voting.votes,
        )
