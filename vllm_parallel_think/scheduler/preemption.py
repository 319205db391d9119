"""What groups do when they hold the whole pool: the youngest is evicted, and resumes later.

A group of paths drops its K/V and computes it again, node by node; a gang's is copied to the host.
Who is evicted is decided in ``step_policy``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from ..compat.logger import init_logger
from ..core.errors import short_id
from ..core.hogwild.group import HogwildGroup
from ..observability.observer import Observer
from ..scheduler_output import KVSwap
from .engine_queues import EngineBlocks, EngineQueues
from .fault_fence import fence
from .group_lifecycle import GroupLifecycle
from .group_table import Branch, GroupState, GroupTable
from .held_blocks import HeldBlocks
from .step_message import StepMessage
from .step_policy import Age, Way, is_standstill, may_resume, who_gives_way

logger = init_logger(__name__)

MOST_EMPTY_STEPS = 100
"""Steps in a row without work, after which a request that cannot go on is ended."""


class Preemption:
    """Lets groups give their blocks away and come back."""

    def __init__(
        self,
        groups: GroupTable,
        held_blocks: HeldBlocks,
        queues: EngineQueues,
        blocks: EngineBlocks,
        lifecycle: GroupLifecycle,
        message: StepMessage,
        observer: Observer,
    ) -> None:
        self._groups = groups
        self._held_blocks = held_blocks
        self._queues = queues
        self._blocks = blocks
        self._lifecycle = lifecycle
        self._message = message
        self._observer = observer
        self._inside_step = False
        self._preempted_member = self._preempted_other = False
        self._num_empty_steps = 0

    # Preemption of single rows, by vLLM or by us.

    @contextmanager
    def inside_step(self) -> Iterator[None]:
        """Take preemptions as vLLM's own, in the middle of a step."""
        self._inside_step = True
        try:
            yield
        finally:
            self._inside_step = False

    def begin_step(self) -> None:
        """Forget who was preempted in the step before."""
        self._preempted_member = self._preempted_other = False

    def other_leaves(self) -> None:
        """Take note that somebody is preempted who belongs to no group that has forked."""
        self._preempted_other = True

    def member_leaves(self, branch: Branch) -> bool:
        """Take note that a member is preempted; return whether its whole gang left instead."""
        state = branch.state
        self._preempted_member = True
        if state.is_gang and not state.evicted:
            if not self._inside_step:
                # None of its workers goes on without the others.
                self.evict(state)
                return True
            state.error = "a worker was preempted while others took the step"
        return False

    def preempt_for_reset(self) -> None:
        """Let all groups drop their K/V, as weights change."""
        members = [request for request in self._queues.running if self._groups.is_member(request)]
        self._queues.preempt_for_reset(members)
        for state in self._groups:
            if state.holds_blocks:
                self.evict(state)

    @property
    def num_evicted(self) -> int:
        """Groups that wait for room and are in none of vLLM's queues; none while all is paused."""
        if not self._groups or self._queues.is_paused:
            return 0
        return sum(state.evicted for state in self._groups)

    # Steps without work.

    def keep_going(self, output: SchedulerOutput, is_held: Callable[[Request], bool]) -> None:
        """See to it that the next step can do something, if this one could do nothing.

        Args:
            output: Of this step.
            is_held: Whether a running row was kept from taking it.

        """
        if output.total_num_scheduled_tokens or self._queues.is_paused:
            self._num_empty_steps = 0
            return
        under_way = self._queues.is_under_way
        if is_standstill(
            preempted_member=self._preempted_member,
            preempted_other=self._preempted_other,
            under_way=under_way,
            all_held=all(map(is_held, self._queues.running)),
            blocks_are_held=any(state.holds_blocks for state in self._groups),
        ):
            self.make_room()
        self._num_empty_steps = 0 if under_way else self._num_empty_steps + 1
        if self._num_empty_steps > MOST_EMPTY_STEPS:
            self._num_empty_steps = 0
            self.end_standstill()

    def end_standstill(self) -> None:
        """Let the youngest request fail, as steps without any work follow each other.

        Whatever the cause, which is a fault of ours: the others must get on.
        """
        states = [state for state in self._groups if state.error is None]
        if not states:
            return
        youngest = max(states, key=lambda state: (state.group.branched, state.age))
        logger.error(
            "nothing was scheduled in %d steps although requests are unfinished; request %s fails",
            MOST_EMPTY_STEPS,
            short_id(youngest.root.request_id),
        )
        youngest.error = f"no step of the engine could go on with it in {MOST_EMPTY_STEPS} tries"
        self._observer.stalled()

    def make_room(self, asking: GroupState | None = None) -> bool:
        """Let one request give its blocks away; return whether that may have freed some.

        Args:
            asking: The gang that needs room for a step, to which faults are left then.

        """
        rows = [row for row in self._queues.running if not self._groups.is_member(row)]
        states = [state for state in self._groups if state.holds_blocks]
        decision = who_gives_way(
            [(row.priority, row.arrival_time) for row in rows],
            [state.age for state in states],
            asking.age if asking is not None else None,
        )
        if decision.way is Way.PREEMPT:
            self._queues.preempt(rows[decision.index])
        elif decision.way is Way.EVICT and asking is not None:
            self.evict(states[decision.index])
        elif decision.way is Way.EVICT:
            with fence(states[decision.index]):
                self.evict(states[decision.index])
        elif decision.way is Way.REFUSE:
            self._refuse_too_large(states[decision.index])
        return decision.way in (Way.PREEMPT, Way.EVICT)

    def _refuse_too_large(self, state: GroupState) -> None:
        """Let a request fail that no other one could make room for."""
        state.error = state.error or (
            f"the answer needs {state.group.blocks_needed} KV blocks of {self._blocks.block_size} "
            f"tokens, the whole pool has {self._blocks.num_blocks}"
        )

    # Out and back in.

    def evict(self, state: GroupState) -> None:
        """Take all K/V of a group; it resumes once there is room."""
        logger.debug("request %s is evicted", short_id(state.root.request_id))
        state.evicted = True
        state.num_evictions += 1
        if isinstance(state.group, HogwildGroup):
            self._swap_out(state)
            return
        for node, request in list(state.requests.items()):
            if node.computing:
                self._lifecycle.drop(request)
            else:
                if request.status == RequestStatus.RUNNING:
                    self._queues.preempt(request)
                self._queues.withdraw(request)
                node.parked = True
        for node in state.group.nodes:
            if node.sealed:
                self._held_blocks.release(node)
                state.group.sealed(node, kept=False)

    def resume(self) -> bool:
        """Let evicted groups come back, oldest first; return whether some still wait."""
        evicted = sorted((s for s in self._groups if s.evicted), key=lambda state: state.age)
        for state in evicted:
            if not may_resume(
                state.age,
                self._waiting_ages(),
                free_blocks=self._blocks.num_free,
                needed=state.group.blocks_needed,
                engine_idle=not self._queues.running and not self._queues.waiting_members,
            ):
                return True
            state.evicted = False
            with fence(state):
                if isinstance(state.group, HogwildGroup):
                    self._swap_in(state)
                if state.error is None:
                    self._lifecycle.submit_ready(state)
        return False

    def _waiting_ages(self) -> Iterator[Age]:
        """Yield the ages of groups of which a branch waits."""
        for request in self._queues.waiting_members:
            if (branch := self._groups.branch(request.request_id)) is not None:
                yield branch.state.age

    def _swap_out(self, state: GroupState) -> None:
        """Copy all K/V of a gang to the host, and let its blocks go.

        What workers wrote was computed while they saw each other half finished. Computing it again
        would need the order of every token; a copy is the same K/V by construction.
        """
        ids: list[int] = []
        for node in state.group.nodes:
            if node.sealed:
                blocks = self._held_blocks.blocks(node)
                state.stash.append((node, len(blocks), 0))
                ids += [block.block_id for block in blocks]
                self._held_blocks.release(node)
                node.sealed = False
        for node, request in state.requests.items():
            if request is state.root:
                continue
            node.parked = True
            if request.status == RequestStatus.RUNNING:
                num_computed = request.num_computed_tokens
                used = self._blocks.of(request)[: -(-num_computed // self._blocks.block_size)]
                state.stash.append((node, len(used), num_computed))
                ids += [block.block_id for block in used]
                self._queues.preempt(request)
            self._queues.withdraw(request)
        self._message.swap(KVSwap(state.root.request_id, tuple(ids), out=True))

    def _swap_in(self, state: GroupState) -> None:
        """Get blocks for a gang's K/V on the host, and have it copied back."""
        num_blocks = sum(count for _, count, _ in state.stash)
        if self._blocks.num_free < num_blocks:
            self._refuse_too_large(state)
            return
        blocks = self._blocks.take(num_blocks)
        ids = tuple(block.block_id for block in blocks)
        for node, count, num_computed in state.stash:
            own, blocks = blocks[:count], blocks[count:]
            request = state.requests.get(node)
            if request is None:
                self._held_blocks.adopt(node, own)
                node.sealed = True
            else:
                self._blocks.give(request, own, num_computed)
        state.stash.clear()
        state.history_sent = state.moves_sent = 0  # all blocks are others now
        self._message.swap(KVSwap(state.root.request_id, ids, out=False))
