"""Gang scheduling: workers that see each other take every step of the engine together, or none.

What a step has room for is decided in ``step_policy``; here gangs are measured, and admitted or
held in vLLM's queues.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from ..compat.logger import init_logger
from ..core.errors import short_id
from ..core.summary import FallbackReason
from .engine_queues import EngineBlocks, EngineQueues
from .fault_fence import fence
from .group_table import GroupState, GroupTable
from .preemption import Preemption
from .step_policy import Need, StepBudget, StepRow, allowed_tokens, need_of

logger = init_logger(__name__)


class GangScheduling:
    """Lets the gangs of a scheduler advance as one.

    Attributes:
        admitted: Members that enter in the coming step; slots, tokens and blocks for them are kept
            free.

    """

    def __init__(
        self,
        groups: GroupTable,
        queues: EngineQueues,
        blocks: EngineBlocks,
        preemption: Preemption,
    ) -> None:
        self._groups = groups
        self._queues = queues
        self._blocks = blocks
        self._preemption = preemption
        self.admitted: list[Request] = []
        self._aside: list[Request] = []
        """Members that wait for their gang, out of vLLM's queues."""
        self._allowed: dict[str, int] = {}
        """Most tokens of the coming step for running rows of others, where that is bounded."""

    def align(self) -> bool:
        """Make sure of what each gang needs in the coming step, oldest first, or hold it.

        Returns:
            Whether a gang waits for room, that newcomers would take.

        """
        gangs = sorted((s for s in self._groups if s.is_gang), key=lambda state: state.age)
        gangs = [s for s in gangs if not s.evicted and s.error is None and self._members(s)]
        if not gangs:
            return False
        # Members first: they are not preempted for others, and their tokens are counted first.
        self._queues.running.sort(key=lambda request: not self._groups.is_gang_member(request))
        budget = StepBudget(self._queues.step_tokens)
        is_held = False
        for state in gangs:
            if not state.evicted:  # as it is for an older one
                is_held = not self._admit(state, budget) or is_held
        # Only by priority does vLLM preempt a member for a row that needs a block.
        if self.admitted or self._queues.by_priority:
            self._keep_room_for_members(budget)
        return is_held

    def _admit(self, state: GroupState, budget: StepBudget) -> bool:
        """Promise a gang what its members need for a step, or hold them; return which."""
        members = self._members(state)
        waiting = [r for r in members if r.status != RequestStatus.RUNNING]
        rows = [self._row(request) for request in members]
        need = need_of(rows, self._blocks.block_size, self._blocks.watermark)
        fits = False
        with fence(state):
            fits = budget.holds(
                need, self._queues.free_rows(len(self.admitted))
            ) and self._clear_blocks(state, budget, need)
        if not fits:
            self._hold(members, waiting)
            return False
        budget.promise(need)
        self.admitted += waiting
        return True

    def _clear_blocks(self, state: GroupState, budget: StepBudget, need: Need) -> bool:
        """Get blocks free, from ordinary requests, then from younger groups."""
        while budget.short_of(need, self._blocks.num_free):
            if not self._preemption.make_room(state):
                return False
        return True

    def _hold(self, members: Sequence[Request], waiting: Sequence[Request]) -> None:
        for request in members:
            self._queues.delay(request)
        for request in waiting:
            self._queues.take_out(request)
        self._aside += waiting

    def _keep_room_for_members(self, budget: StepBudget) -> None:
        """Keep others from taking what members need, and from preempting anybody for more."""
        others = [self._row(r) for r in self._queues.running if not self._groups.is_gang_member(r)]
        self._allowed |= allowed_tokens(
            others, budget, self._blocks.num_free, self._blocks.block_size, bool(self.admitted)
        )

    def restore_aside(self) -> None:
        """Put members that were held back into vLLM's queues: it must know of them."""
        aside, self._aside = self._aside, []
        self._queues.put_back(aside)

    def end_step(self) -> None:
        """Forget what held for this step: with the last group gone, no later one is aligned."""
        self._allowed.clear()
        self.admitted.clear()

    def note_strays(self, output: SchedulerOutput) -> None:
        """Count steps that a gang's members did not take together; gang scheduling allows none."""
        for state in self._groups:
            if not state.is_gang or state.evicted:
                continue
            members = self._members(state)
            taken = sum(r.request_id in output.num_scheduled_tokens for r in members)
            if 0 < taken < len(members):
                if not state.group.fallbacks[FallbackReason.OUT_OF_STEP]:
                    logger.warning(
                        "request %s: its workers did not step together",
                        short_id(state.root.request_id),
                    )
                state.group.fallbacks[FallbackReason.OUT_OF_STEP] += 1

    def most_tokens(self, request: Request, num_new_tokens: int) -> int:
        """Return how many tokens of the coming step a running row may have."""
        if not self._allowed:
            return num_new_tokens
        return min(num_new_tokens, self._allowed.get(request.request_id, num_new_tokens))

    def is_held(self, request: Request) -> bool:
        """Whether a running row was kept from taking this step."""
        return self._groups.is_gang_member(request) or self._allowed.get(request.request_id) == 0

    def _members(self, state: GroupState) -> list[Request]:
        """Return the unfinished requests of a gang, in a fixed order."""
        unfinished = self._queues.request_ids
        requests = state.requests.values()
        return [r for r in requests if r is not state.root and r.request_id in unfinished]

    def _row(self, request: Request) -> StepRow:
        return StepRow(
            request.request_id,
            request.num_tokens - request.num_computed_tokens,
            request.num_computed_tokens,
            len(self._blocks.of(request)),
            request.status == RequestStatus.RUNNING,
        )
