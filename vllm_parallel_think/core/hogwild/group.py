"""The life of one request whose workers think side by side: a pure state machine.

To the scheduler it looks like :class:`~vllm_parallel_think.core.fork_join.group.Group`: it is told
what was sampled and what ended, and answers with nodes that need a vLLM request and with tokens
whose turn has come. A node is one worker's step. Nodes have no prefix of their own: what they
see changes from step to step, and is told by
:class:`~vllm_parallel_think.core.hogwild.cache_layout.CacheLayout`.

Whatever depends on the order in which the engine reports its rows waits for :meth:`settle`, at the
end of the engine's step: so the same tokens come out whatever the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from ..branch_graph import Fork, Kind, Lane, Node, State
from ..characters import MAX_REST, Characters
from ..config.hogwild_profile import Layout
from ..config.request_options import RequestOptions
from ..interface import Cause, Finish, Limits, Verdict
from ..live import show_path
from ..ordered_output import OrderedOutput
from .cache_layout import ANSWER, OTHERS, OWN
from .prompts import HogwildPrompts
from .writer import Writer


class HogwildGroup(OrderedOutput):
    """One client request and its workers."""

    def __init__(
        self, prompt: Sequence[int], script: HogwildPrompts, options: RequestOptions, limits: Limits
    ) -> None:
        recipe = script.recipe
        super().__init__(limits)
        self._script, self._options = script, options
        self._num_workers = options.num_workers or recipe.workers.num_workers
        every = options.check_every
        self._check_every = recipe.check.every if every is None else every
        self._worker_tokens = options.worker_tokens or recipe.workers.max_tokens
        self.layout: Layout = options.layout or recipe.workers.layout
        self.num_changes = 1
        self.num_moves = 0
        """Grows whenever what rows see changes otherwise than by a token more."""
        self.fallbacks: Counter[str] = Counter()
        self.opening = tuple(script.opening(self._num_workers))
        self.history: list[Node] = []
        """Finished steps in the order of completion; their K/V is there."""
        self.num_unmoved = 0
        """How many of them stand where they stood when the worker process was told of them."""
        self._found: Finish | None = None
        """How the answer ends, once a worker has found it."""
        self.roles: dict[Node, int] = {}
        self.workers: list[Writer] = []
        self._num_nodes = 0
        self._num_reused = 0
        self._num_seen = self._num_checked = 0
        """Tokens of the prompt and of the history; steps of it whose K/V was found to be there."""
        self._lost: list[Node] = []
        self._num_settled = self._num_forced = 0
        """Visible tokens in the order of the text, when their nodes came into it; forced ones."""
        self._headers: list[Node] = []
        self._answer_node: Node | None = None
        self._since_check = 0
        self._checks: Counter[str] = Counter()
        self._over = False
        """Whether workers stop with the next token, as there is no room for more."""
        self._trunk_settled = False
        lane = Lane(depth=0, room=limits.index_blocks, forks_left=0)
        given = [*prompt, *self.opening]
        self._last_of_prompt: list[int] = []
        if not script.step(0, 1):  # only a recipe for a lone worker has none
            self._last_of_prompt = [given.pop()]
        self.trunk = self._add_node(Kind.TRUNK, lane, ANSWER, given, num_hidden=len(given))
        # Its one step computes the prompt; what that samples is of no use.
        self.trunk.state = State.CLOSING
        self._append(self.trunk)
        self._num_tokens = self._num_seen = len(given)
        self._num_hidden = self._num_tokens
        """Tokens of the prompt and of the headers, which are in the K/V but not in the answer."""

    # -- what the adapter reports ------------------------------------------------------------

    def feed(self, node: Node, token: int) -> Verdict:
        """Take a token that was sampled for a step and appended to its request."""
        if node.state is State.DROPPED:
            return Verdict.END
        node.tokens.append(token)
        self._num_tokens += 1
        if node.first_at is None:
            node.first_at = self._limits.clock()
        if self.roles[node] == ANSWER:
            if node.characters is not None:
                node.characters.feed(token)
            return Verdict.END if node.is_full else Verdict.CONTINUE
        worker = self.workers[self.roles[node]]
        worker.num_sampled += 1
        self._since_check += 1
        ends = worker.reads(token, self._script, self._checks)
        if worker.is_spent(0 if self._over else self._worker_tokens):
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
            worker = self.workers[role]
            worker.ended, worker.stop_reason = cause, stop_reason
            if cause in (Cause.VERDICT, Cause.LENGTH, Cause.STOP_TOKEN):
                worker.carry = node.tokens.pop()
                self._num_tokens -= 1
        elif role == ANSWER and node is not self.trunk:
            capped = cause in (Cause.VERDICT, Cause.LENGTH)
            reason: Literal["length", "stop"] = "length" if capped else "stop"
            self.finish = Finish(reason, stop_reason)

    def settle(self) -> None:
        """Act on what ended in this step of the engine, worker by worker."""
        if self.finish is not None:
            return
        if not self._trunk_settled and self.trunk.state is State.DONE:
            self._trunk_settled = True
            self._start_workers()
            return
        ended = [worker for worker in self.workers if worker.ended is not None]
        wrote = [worker for worker in ended if worker.node.kind is not Kind.CLOSE]
        for worker in ended:
            if worker not in wrote:
                self._take_close(worker)
        found = [worker for worker in wrote if self._take_step(worker)]
        if found:
            self._stop_all(found[0])
        for worker in ended:
            if worker in wrote and (given := self._lacks(worker, wrote)):
                self._close_step(worker, given)
            elif worker.stopped:
                self._complete(worker)
            else:
                self._start_step(worker)
            worker.ended = None
        if ended and all(worker.lane.complete for worker in self.workers):
            self._conclude()
        self._over = self._over or self._is_full()

    def _take_step(self, worker: Writer) -> bool:
        """Make an ended step history; return whether it holds the answer."""
        node, cause = worker.node, worker.ended
        if node.tokens:
            self.history.append(node)
            self._num_seen += len(node.tokens)
        self._append(node)
        worker.num_steps += 1
        worker.end_check("", self._checks)
        worker.stopped = cause in (Cause.CLOSED, Cause.EOS, Cause.STOP_TOKEN)
        found = cause is Cause.STOP_TOKEN or worker.has_mark
        # Where answers are marked, a worker that ends its text without one has only done its part.
        found = found or (cause is Cause.EOS and not self._script.recipe.answer.marks)
        return found and self._may_end(cause)

    def _may_end(self, cause: Cause | None) -> bool:
        """Whether the client's lower bounds let the answer end with a step."""
        if self._limits.ignore_eos and cause is not Cause.STOP_TOKEN:
            return False
        return self._num_visible >= self._limits.min_tokens

    @property
    def _num_visible(self) -> int:
        """Tokens of the answer that are written for good, those without K/V included."""
        carried = sum(worker.carry is not None for worker in self.workers)
        return carried + self._num_settled

    def _stop_all(self, winner: Writer) -> None:
        """A worker has answered: what the others have not finished is of no more use."""
        for other in self.workers:
            other.stopped = True
            if other.ended is None and other.node.kind is not Kind.CLOSE:
                if other.node.state is not State.DONE:
                    self._drop(other.node)
                self._complete(other)
        # A stop token counts as the end of the text only where it is that.
        is_last = winner.ended is Cause.STOP_TOKEN and self._order[-1] is winner.node
        self._found = Finish("stop", winner.stop_reason, apart=not is_last)

    def _lacks(self, worker: Writer, wrote: list[Writer]) -> list[int]:
        """Return what must still follow a step that has just ended, before anything else does."""
        given = []
        if worker.is_open(self._script) and self._is_followed(worker, wrote):
            given = [*self._script.close]
        if worker.carry is not None and (given or (worker.stopped and self._found is None)):
            given = [worker.carry, *given]
        return given

    def _is_followed(self, worker: Writer, wrote: list[Writer]) -> bool:
        """Whether another step comes behind one in the text, as far as one can know."""
        return worker is not wrote[-1] or not all(other.stopped for other in self.workers)

    def _close_step(self, worker: Writer, given: list[int]) -> None:
        """Compute what a step lacks, right behind it in the text and in the history."""
        step = worker.node
        node = self._add_node(Kind.CLOSE, worker.lane, worker.number, given, num_hidden=0)
        node.num_pending = int(worker.carry is not None)
        worker.carry = None
        self.num_changes += 1
        self._num_tokens += len(given)
        self._put(node, _behind(self._order, step))

    def _take_close(self, worker: Writer) -> None:
        node, step = worker.lane.nodes[-1], worker.lane.nodes[-2]
        place = _behind(self.history, step)
        self.history.insert(place, node)
        self._num_seen += len(node.tokens)
        self.num_unmoved = min(self.num_unmoved, place)
        self._num_checked = min(self._num_checked, place)

    def _conclude(self) -> None:
        """All that the workers wrote is in the K/V: end, or let the answer be written."""
        if self._found is None:
            self._answer(self._script.forced, self._script.recipe.answer.max_tokens)
        elif self._script.found:
            self._answer(self._script.found)
        else:
            self.finish = self._found

    def _complete(self, worker: Writer) -> None:
        if not worker.lane.complete:
            worker.lane.complete = True
            worker.lane.completed_at = self._limits.clock()

    def sealed(self, node: Node, *, kept: bool) -> None:
        """Take note that a node's blocks are held by the group, or were lost with its request."""
        node.sealed = kept
        node.computing = False
        self.num_changes += 1
        self.num_moves += 1
        if not kept:
            self._lost.append(node)

    def take_cut(self) -> list[Node]:
        """Return paths that must stop now: workers stop together, so there are none."""
        return []

    # -- what the adapter asks ---------------------------------------------------------------

    @property
    def branched(self) -> bool:
        """Whether the request is no longer the one request that the client sent."""
        return self.trunk.state is State.DONE

    @property
    def nodes(self) -> Sequence[Node]:
        """All nodes, in the order in which they were made."""
        return list(self.roles)

    @property
    def outvoted(self) -> Sequence[Node]:
        """No step is ever outvoted."""
        return ()

    @property
    def widest_step(self) -> tuple[int, int]:
        """Tokens and rows that the group can have in one step of the engine."""
        headers = [tokens for tokens in (self._script.others, self._script.own) if tokens]
        steps = self._num_workers * self._script.longest_step
        tokens = max(steps + sum(map(len, headers)), len(self._script.forced))
        return tokens, self._num_workers + len(headers)

    @property
    def live(self) -> dict[int, Node]:
        """Nodes that are being written, by role."""
        states = (State.LIVE, State.CLOSING)
        return {self.roles[node]: node for node in self._newest if node.state in states}

    @property
    def _newest(self) -> list[Node]:
        """Nodes that may still be written: headers, each worker's step and the answer."""
        answer = [self._answer_node] if self._answer_node is not None else []
        steps = sorted((worker.node for worker in self.workers), key=lambda node: node.index)
        return [*self._headers, *steps, *answer]

    @property
    def headers(self) -> dict[int, Node]:
        """Headers whose K/V is there."""
        return {self.roles[node]: node for node in self._headers if node.sealed}

    def ready(self) -> list[Node]:
        """Return nodes that need a request now."""
        if self.finish is not None:
            return []
        waiting = [node for node in self._newest if node.parked or node.state is State.WAITING]
        if waiting:
            self._check_history()
        return waiting

    def _check_history(self) -> None:
        """Make sure that the K/V of all that a step sees is there."""
        lost = [node for node in self._lost if node is self.trunk or node in self.history]
        new = (
            self.history[self._num_checked :] if self._num_checked else [self.trunk, *self.history]
        )
        if lost := [node for node in (*lost, *new) if not node.sealed]:
            raise RuntimeError(f"K/V of node {lost[0].index} was lost")
        self._lost.clear()
        self._num_checked = len(self.history)

    def take_retired(self) -> list[Node]:
        """Return nodes that nobody will attend to any more: everybody sees all steps."""
        return []

    def started(self, node: Node) -> None:
        """Take note that a node returned by :meth:`ready` has its request."""
        if node.state is State.WAITING:
            node.state = State.LIVE
            node.started_at = self._limits.clock()
            self._num_reused += self._num_seen
        node.parked = False
        self.num_moves += 1

    def blocks_of(self, node: Node) -> int:
        """Return how many KV blocks a node's own tokens fill."""
        return -(-len(node.tokens) // self._limits.block_size)

    @property
    def blocks_needed(self) -> int:
        """Blocks that all K/V of the group takes, with one to grow for each worker."""
        alive = [node for node in self.roles if node.state is not State.DROPPED]
        return sum(self.blocks_of(n) + (n.state is not State.DONE) for n in alive)

    def padded_prefix(self, node: Node) -> list[int]:
        """Return the token ids in front of a node's request: none, what it sees is told apart."""
        return []

    def written_before(self, node: Node) -> list[int]:
        """Return the answer's tokens that a step sees in front of its first sampled one."""
        written = [token for seen in self.history for token in seen.tokens[seen.num_hidden :]]
        return written + node.tokens[node.num_hidden : node.num_given]

    def temperature(self, node: Node) -> float | None:
        """Return a temperature that replaces the request's: none does."""
        return None

    def take_join_waits(self) -> list[float]:
        """Return how long paths waited for their join: workers end together."""
        return []

    def live_view(self) -> list[dict[str, Any]] | None:
        """Return where every worker stands, if the client asked to see that."""
        if not self._options.live or not self.workers:
            return None
        return [show_path(worker.lane, self._script.vocabulary) for worker in self.workers]

    def summary(self) -> dict[str, Any]:
        """Return the request's figures, as plain values for the client."""
        answer = self._answer_node.num_sampled if self._answer_node is not None else 0
        sampled = sum(worker.num_sampled for worker in self.workers) + answer
        critical = max((worker.num_sampled for worker in self.workers), default=0) + answer
        return {
            "profile": self._script.recipe.name,
            "join": "live",
            "forks": int(bool(self.workers)),
            "paths": len(self.workers),
            "widest_fork": max(1, len(self.workers)),
            "depth": int(bool(self.workers)),
            "generated_tokens": sampled,
            "forced_tokens": self._num_forced,
            "critical_path_tokens": critical,
            "parallelism_ratio": round(sampled / critical, 4) if critical else 1.0,
            "reused_kv_tokens": self._num_reused,
            "cut_paths": 0,
            "fallbacks": dict(self.fallbacks),
            "hogwild": self._figures(),
        }

    def _figures(self) -> dict[str, Any]:
        names = self._script.recipe.workers.names
        return {
            "layout": self.layout,
            "steps": sum(worker.num_steps for worker in self.workers),
            "checks_yes": self._checks["yes"],
            "checks_no": self._checks["no"],
            "workers": [
                {
                    "name": names[worker.number],
                    "steps": worker.num_steps,
                    "tokens": worker.num_sampled,
                }
                for worker in self.workers
            ],
        }

    # -- decisions ---------------------------------------------------------------------------

    def _start_workers(self) -> None:
        fork = Fork(self.trunk)
        self.num_changes += 1
        if self.layout != "interleaved" and self._num_workers > 1:
            for role, tokens in ((OTHERS, self._script.others), (OWN, self._script.own)):
                if tokens:
                    lane = self.trunk.lane
                    self._headers.append(
                        self._add_node(Kind.CLOSE, lane, role, list(tokens), num_hidden=len(tokens))
                    )
                    self._num_tokens += len(tokens)
        self._num_hidden = self._num_tokens + len(self._last_of_prompt)
        for number in range(self._num_workers):
            name = self._script.recipe.workers.names[number]
            lane = Lane(depth=1, room=0, forks_left=0, fork=fork, name=name)
            fork.lanes.append(lane)
            worker = Writer(number, lane, self._script.vocabulary)
            self.workers.append(worker)
            self._start_step(worker)

    def _start_step(self, worker: Writer) -> None:
        carry = [] if worker.carry is None else [worker.carry]
        prefix = self._script.step(worker.number, worker.num_steps + 1)
        asks = bool(self._check_every and worker.num_steps)
        if asks and self._since_check >= self._check_every:
            self._since_check = 0
            worker.checked = True
            prefix += self._script.question
        # A lone worker without words of its own computes the prompt's last token itself.
        hidden = [] if carry or prefix else self._last_of_prompt
        given = [*hidden, *carry, *prefix]
        node = self._add_node(Kind.PATH, worker.lane, worker.number, given, num_hidden=len(hidden))
        node.num_pending = len(carry)
        self._num_tokens += len(given)
        # The group ends a step itself; vLLM only needs a bound.
        node.limit = max(1, self._worker_tokens - worker.num_sampled)
        node.most = node.limit + MAX_REST
        worker.begin_step(self._script.recipe.answer.marks)

    def _answer(self, forced: list[int], most: int | None = None) -> None:
        self.num_changes += 1
        node = self._add_node(Kind.CONCLUSION, self.trunk.lane, ANSWER, list(forced), num_hidden=0)
        self._num_tokens += len(forced)
        node.characters = Characters(self._script.vocabulary)
        before = self._num_visible + len(forced)
        left = self._limits.max_tokens - before
        node.least = max(0, self._limits.min_tokens - before)
        node.most = max(1, min(left, self._context - self._num_tokens))
        budget = left if most is None or self._limits.ignore_eos else max(most, node.least)
        node.limit = min(node.most, max(1, budget))
        node.critical_before = max(worker.num_sampled for worker in self.workers)
        self._answer_node = node
        self._append(node)

    def _append(self, node: Node) -> None:
        """Put a node behind all others in the text."""
        self._put(node, len(self._order))

    def _put(self, node: Node, place: int) -> None:
        self._order.insert(place, node)
        self._num_settled += node.num_visible
        self._num_forced += len(node.forced_visible)

    @property
    def _context(self) -> int:
        return self._limits.index_blocks * self._limits.block_size

    def _is_full(self) -> bool:
        """Whether the workers must stop so that an answer still fits."""
        if not self.workers:
            return False
        answer = len(self._script.forced) + self._script.recipe.answer.max_tokens
        # Each worker may write one token more, and the rest of a character, and start or close a
        # step, before all of them have stopped.
        spare = self._num_workers * (2 + MAX_REST + self._script.longest_step)
        if self._num_tokens + spare + answer >= self._context:
            return True
        visible = self._num_tokens - self._num_hidden
        most = self._limits.max_tokens
        return visible + spare + min(answer, most // 2) >= most

    def _add_node(
        self, kind: Kind, lane: Lane, role: int, given: list[int], num_hidden: int
    ) -> Node:
        critical = self.workers[role].num_sampled if role >= 0 else 0
        node = Node(
            index=self._num_nodes,
            kind=kind,
            lane=lane,
            prefix=(),
            start=0,
            tokens=given,
            num_given=len(given),
            num_hidden=num_hidden,
            critical_before=critical,
            limit=None,
            scanner=None,
            place=len(lane.nodes),
        )
        self._num_nodes += 1
        lane.nodes.append(node)
        lane.all_nodes.append(node)
        self.roles[node] = role
        return node


def _behind(nodes: Sequence[Node], node: Node) -> int:
    """Return the place behind a node that is one of the last; that behind all, if it is none."""
    for place in range(len(nodes), 0, -1):
        if nodes[place - 1] is node:
            return place
    return len(nodes)
