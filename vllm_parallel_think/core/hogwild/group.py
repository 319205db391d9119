"""The life of one request whose workers think side by side: a pure state machine.

A node is one writer's step. Nodes have no prefix of their own: what they see changes from step to
step, and is said by :class:`~vllm_parallel_think.core.hogwild.cache_layout.CacheLayout`.

Whatever depends on the order in which the engine reports its rows waits for
:meth:`HogwildGroup.settle`, at the end of the engine's step: so the same tokens come out whatever
the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from ..branch_graph import Fork, Kind, Lane, Node, State
from ..characters import MAX_REST, Characters
from ..config.hogwild_profile import Layout
from ..config.request_options import RequestOptions
from ..group_base import GroupBase
from ..interface import Cause, Finish, Limits, Verdict
from ..ordered_output import OrderedOutput, show_path
from ..summary import HogwildFigures, Summary
from .budget import WriterBudget
from .cache_layout import ANSWER, OTHERS, OWN
from .history import History
from .node_table import NodeTable
from .prompts import HogwildPrompts
from .writer import Writer


class HogwildGroup(GroupBase):
    """One client request and its writers.

    Attributes:
        layout: How writers see each other.
        num_moves: Grows whenever what rows see changes otherwise than by a token more.
        history: Finished steps in the order of completion.
        num_unmoved: How many of them stand where they stood when the worker process was told of
            them; set by who tells it.
        roles: Whose each node is.
        writers: The writers, once the prompt is computed.

    """

    def __init__(
        self,
        prompt: Sequence[int],
        prompts: HogwildPrompts,
        options: RequestOptions,
        limits: Limits,
    ) -> None:
        super().__init__(limits, OrderedOutput(limits, lambda: self.branched))
        profile = prompts.profile
        self._prompts, self._profile, self._options = prompts, profile, options
        self._num_writers = options.num_workers or profile.workers.num_workers
        every = options.check_every
        self._check_every = profile.check.every if every is None else every
        self._writer_tokens = options.worker_tokens or profile.workers.max_tokens
        self._budget = WriterBudget(prompts, limits, self._num_writers)
        self._nodes = NodeTable(self._output.order)
        self._steps = History()
        self.layout: Layout = options.layout or profile.workers.layout
        self.num_moves = 0
        self.opening = tuple(prompts.opening(self._num_writers))
        self.history = self._steps.steps
        self.num_unmoved = 0
        self.roles = self._nodes.roles
        self.writers: list[Writer] = []
        self._found: Finish | None = None
        """How the answer ends, once a writer has found it."""
        self._num_reused = 0
        self._since_check = 0
        self._checks: Counter[str] = Counter()
        self._over = False
        """Whether writers stop with the next token, as there is no room for more."""
        lane = Lane(depth=0, room=limits.index_blocks, forks_left=0)
        given = [*prompt, *self.opening]
        self._last_of_prompt: list[int] = []
        if not prompts.step(0, 1):  # only a profile for a lone writer has none
            self._last_of_prompt = [given.pop()]
        self.trunk = self._nodes.add(Kind.TRUNK, lane, ANSWER, given, num_hidden=len(given))
        # Its one step computes the prompt; what that samples is of no use.
        self.trunk.state = State.CLOSING
        self._nodes.append(self.trunk)
        self._nodes.num_hidden = len(given)

    def feed(self, node: Node, token: int) -> Verdict:
        """Take a token that was sampled for a step and appended to its request."""
        if node.state is State.DROPPED:
            return Verdict.END
        node.tokens.append(token)
        self._nodes.num_tokens += 1
        if node.first_at is None:
            node.first_at = self._limits.clock()
        if self.roles[node] == ANSWER:
            if node.characters is not None:
                node.characters.feed(token)
            return Verdict.END if node.is_full else Verdict.CONTINUE
        writer = self.writers[self.roles[node]]
        writer.num_sampled += 1
        self._since_check += 1
        ends = writer.reads(token, self._prompts, self._checks)
        if writer.is_spent(0 if self._over else self._writer_tokens):
            # The last token gets its K/V: the answer is to see everything that was written.
            node.state = State.CLOSING
            return Verdict.CLOSE
        return Verdict.END if ends else Verdict.CONTINUE

    def end(self, node: Node, cause: Cause, stop_reason: int | None = None) -> None:
        """Take note that a request ended; a step's end is acted upon by :meth:`settle`."""
        if node.state is State.DROPPED:
            return
        self.num_changes += 1
        self.num_moves += 1
        node.state = State.DONE
        node.ended_at = self._limits.clock()
        role = self.roles[node]
        if role >= 0:
            writer = self.writers[role]
            writer.ended, writer.stop_reason = cause, stop_reason
            if cause in (Cause.VERDICT, Cause.LENGTH, Cause.STOP_TOKEN):
                writer.carry = node.tokens.pop()
                self._nodes.num_tokens -= 1
        elif role == ANSWER and node is not self.trunk:
            capped = cause in (Cause.VERDICT, Cause.LENGTH)
            reason: Literal["length", "stop"] = "length" if capped else "stop"
            self._output.finish = Finish(reason, stop_reason)

    def settle(self) -> None:
        """Act on what ended in this step of the engine, writer by writer."""
        if self.finish is not None:
            return
        if not self.writers and self.branched:
            self._start_writers()
            return
        ended = [writer for writer in self.writers if writer.ended is not None]
        wrote = [writer for writer in ended if writer.node.kind is not Kind.CLOSE]
        for writer in ended:
            if writer not in wrote:
                place = self._steps.insert_after(*writer.lane.nodes[-2:])
                self.num_unmoved = min(self.num_unmoved, place)
        found = [writer for writer in wrote if self._take_step(writer)]
        if found:
            self._stop_all(found[0])
        for writer in ended:
            if writer in wrote and (given := self._lacks(writer, wrote)):
                self._close_step(writer, given)
            elif writer.stopped:
                writer.complete(self._limits.clock)
            else:
                self._start_step(writer)
            writer.ended = None
        if ended and all(writer.lane.complete for writer in self.writers):
            self._conclude()
        if self.writers and not self._over:
            self._over = self._budget.is_full(self._nodes)

    def _take_step(self, writer: Writer) -> bool:
        """Make an ended step history; return whether it holds the answer."""
        node, cause = writer.node, writer.ended
        if node.tokens:
            self._steps.append(node)
        self._nodes.append(node)
        writer.num_steps += 1
        writer.end_check("", self._checks)
        writer.stopped = cause in (Cause.CLOSED, Cause.EOS, Cause.STOP_TOKEN)
        found = cause is Cause.STOP_TOKEN or writer.has_mark
        # Where answers are marked, a writer that ends its text without one has only done its part.
        found = found or (cause is Cause.EOS and not self._profile.answer.marks)
        # The client's lower bounds go before what writers find.
        if self._limits.ignore_eos and cause is not Cause.STOP_TOKEN:
            return False
        return found and self._nodes.num_visible(self.writers) >= self._limits.min_tokens

    def _stop_all(self, winner: Writer) -> None:
        """A writer has answered: what the others have not finished is of no more use."""
        for other in self.writers:
            other.stopped = True
            if other.ended is None and other.node.kind is not Kind.CLOSE:
                if other.node.state is not State.DONE:
                    self._output.drop(other.node)
                other.complete(self._limits.clock)
        # A stop token counts as the end of the text only where it is that.
        is_last = winner.ended is Cause.STOP_TOKEN and self._nodes.order[-1] is winner.node
        self._found = Finish("stop", winner.stop_reason, apart=not is_last)

    def _lacks(self, writer: Writer, wrote: list[Writer]) -> list[int]:
        """Return what must still follow a step that has just ended, before anything else does."""
        given = []
        # Whether another step comes after this one in the text, as far as one can know.
        followed = writer is not wrote[-1] or not all(other.stopped for other in self.writers)
        if writer.is_open(self._prompts) and followed:
            given = [*self._prompts.close]
        if writer.carry is not None and (given or (writer.stopped and self._found is None)):
            given = [writer.carry, *given]
        return given

    def _close_step(self, writer: Writer, given: list[int]) -> None:
        """Compute what a step lacks, right after it in the text and in the history."""
        step, pending = writer.node, int(writer.carry is not None)
        node = self._nodes.add(
            Kind.CLOSE,
            writer.lane,
            writer.number,
            given,
            num_pending=pending,
            critical_before=writer.num_sampled,
        )
        writer.carry = None
        self.num_changes += 1
        self._nodes.insert_after(step, node)

    def _conclude(self) -> None:
        """All that the writers wrote is in the K/V: end, or let the answer be written."""
        if self._found is None:
            self._answer(self._prompts.forced, self._profile.answer.max_tokens)
        elif self._prompts.found:
            self._answer(self._prompts.found)
        else:
            self._output.finish = self._found

    def _start_writers(self) -> None:
        fork = Fork(self.trunk)
        self.num_changes += 1
        if self.layout != "interleaved" and self._num_writers > 1:
            for role, tokens in ((OTHERS, self._prompts.others), (OWN, self._prompts.own)):
                if tokens:
                    header = self._nodes.add(
                        Kind.CLOSE, self.trunk.lane, role, list(tokens), num_hidden=len(tokens)
                    )
                    self._nodes.headers.append(header)
        self._nodes.num_hidden = self._nodes.num_tokens + len(self._last_of_prompt)
        for number in range(self._num_writers):
            name = self._profile.workers.names[number]
            lane = Lane(depth=1, room=0, forks_left=0, fork=fork, name=name)
            fork.lanes.append(lane)
            writer = Writer(number, lane, self._prompts.vocabulary)
            self.writers.append(writer)
            self._start_step(writer)

    def _start_step(self, writer: Writer) -> None:
        carry = [] if writer.carry is None else [writer.carry]
        prefix = self._prompts.step(writer.number, writer.num_steps + 1)
        asks = bool(self._check_every and writer.num_steps)
        if asks and self._since_check >= self._check_every:
            self._since_check = 0
            writer.checked = True
            prefix += self._prompts.question
        # A lone writer without words of its own computes the prompt's last token itself.
        hidden = [] if carry or prefix else self._last_of_prompt
        node = self._nodes.add(
            Kind.PATH,
            writer.lane,
            writer.number,
            [*hidden, *carry, *prefix],
            num_hidden=len(hidden),
            num_pending=len(carry),
            critical_before=writer.num_sampled,
        )
        # The group ends a step itself; vLLM only needs a bound.
        node.limit = max(1, self._writer_tokens - writer.num_sampled)
        node.most = node.limit + MAX_REST
        writer.begin_step(self._profile.answer.marks)

    def _answer(self, forced: list[int], most: int | None = None) -> None:
        """Let the answer be written after all steps."""
        self.num_changes += 1
        critical = max(writer.num_sampled for writer in self.writers)
        node = self._nodes.add(
            Kind.CONCLUSION, self.trunk.lane, ANSWER, list(forced), critical_before=critical
        )
        node.characters = Characters(self._prompts.vocabulary)
        num_before = self._nodes.num_visible(self.writers) + len(forced)
        self._budget.bound_answer(node, self._nodes, num_before, most)
        self._nodes.answer = node
        self._nodes.append(node)

    def sealed(self, node: Node, *, kept: bool) -> None:
        """Take note that a node's blocks are held by the group, or were lost with its request."""
        node.sealed = kept
        node.computing = False
        self.num_changes += 1
        self.num_moves += 1
        if not kept:
            self._steps.note_lost(node)

    def started(self, node: Node) -> None:
        """Take note that a node returned by :meth:`ready` has its request."""
        if node.state is State.WAITING:
            node.state = State.LIVE
            node.started_at = self._limits.clock()
            self._num_reused += self.trunk.num_given + self._steps.num_tokens
        node.parked = False
        self.num_moves += 1

    def ready(self) -> list[Node]:
        """Return nodes that need a request now."""
        if self.finish is not None:
            return []
        newest = self._nodes.newest(self.writers)
        waiting = [node for node in newest if node.parked or node.state is State.WAITING]
        if waiting:
            self._steps.check(self.trunk)
        return waiting

    def written_before(self, node: Node) -> list[int]:
        """Return the answer's tokens that a step sees before its first sampled one."""
        written = [token for seen in self.history for token in seen.tokens[seen.num_hidden :]]
        return written + node.tokens[node.num_hidden : node.num_given]

    @property
    def branched(self) -> bool:
        """Whether the request is no longer the one request that the client sent."""
        return self.trunk.state is State.DONE

    @property
    def has_paths(self) -> bool:
        """Whether it has writers: as soon as it is branched."""
        return self.branched

    @property
    def nodes(self) -> Sequence[Node]:
        """All nodes, in the order in which they were made."""
        return list(self.roles)

    @property
    def widest_step(self) -> tuple[int, int]:
        """Tokens and rows that the group can have in one step of the engine."""
        return self._budget.widest_step

    @property
    def live(self) -> dict[int, Node]:
        """Nodes that are being written, by role."""
        states, newest = (State.LIVE, State.CLOSING), self._nodes.newest(self.writers)
        return {self.roles[node]: node for node in newest if node.state in states}

    @property
    def headers(self) -> dict[int, Node]:
        """Headers whose K/V is there."""
        return {self.roles[node]: node for node in self._nodes.headers if node.sealed}

    @property
    def blocks_needed(self) -> int:
        """Blocks that all K/V of the group takes, with one to grow for each writer."""
        alive = [node for node in self.roles if node.state is not State.DROPPED]
        return sum(self.blocks_of(n) + (n.state is not State.DONE) for n in alive)

    def live_view(self) -> list[dict[str, Any]] | None:
        """Return where every writer stands, if the client asked to see that."""
        if not self._options.live or not self.writers:
            return None
        return [show_path(writer.lane, self._prompts.vocabulary) for writer in self.writers]

    def summary(self) -> Summary:
        """Return the group's figures so far."""
        answer = self._nodes.answer.num_sampled if self._nodes.answer is not None else 0
        written = [writer.num_sampled for writer in self.writers]
        return Summary(
            profile=self._profile.name,
            join="live",
            forks=int(bool(written)),
            paths=len(written),
            widest_fork=max(1, len(written)),
            depth=int(bool(written)),
            generated_tokens=sum(written) + answer,
            forced_tokens=self._nodes.num_forced,
            critical_path_tokens=max(written, default=0) + answer,
            reused_kv_tokens=self._num_reused,
            cut_paths=0,
            fallbacks=dict(self.fallbacks),
            hogwild=HogwildFigures(
                layout=self.layout,
                steps=sum(writer.num_steps for writer in self.writers),
                checks_yes=self._checks["yes"],
                checks_no=self._checks["no"],
                workers=tuple(writer.figures for writer in self.writers),
            ),
        )
