"""Workers that see each other take every step of the engine together, or none of them does.

vLLM alone does not keep them together: a prefill chunk of somebody else eats the step's tokens
before a new member is looked at, nobody is admitted in a step that preempts, slots and blocks run
out. So whatever a group needs is made sure of before vLLM schedules; a group that cannot have it is
held for that step as a whole. Otherwise its text would depend on the load beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.request import Request, RequestStatus

from ..compat.logger import init_logger
from ..core.errors import short_id
from ..core.hogwild.group import HogwildGroup
from ..core.summary import FallbackReason
from .group_table import GroupState
from .preemption import GivingWayMixin

logger = init_logger(__name__)


def is_gang(family: GroupState) -> bool:
    """Whether a family's branches are workers that started."""
    return isinstance(family.group, HogwildGroup) and family.group.branched


class LockStepMixin(GivingWayMixin):
    """Lets a scheduler's groups of workers advance as one."""

    _aside: list[Request]
    """Members that wait for their group, out of vLLM's queues."""
    _admitted: list[Request]
    """Members that enter in the coming step; slots, tokens and blocks for them are kept free."""
    _allowed: dict[str, int]
    """Most tokens of the coming step for running rows of others, where that is bounded."""

    def _align_gangs(self) -> bool:
        """Make sure of what each group needs in the coming step, oldest first, or hold it.

        Returns:
            Whether a group waits for room, that newcomers would take.

        """
        self._allowed.clear()
        self._admitted.clear()
        gangs = sorted((f for f in self._families if is_gang(f)), key=lambda family: family.age)
        gangs = [f for f in gangs if not f.parked and f.error is None and self._members(f)]
        if not gangs:
            return False
        # Members first: they are not preempted for others, and their tokens are counted first.
        self.running.sort(key=lambda request: not self._is_gang_member(request))
        tokens = self.max_num_scheduled_tokens
        blocks = 0
        is_held = False
        for family in gangs:
            if family.parked:  # gave way to an older one
                continue
            members = self._members(family)
            waiting = [r for r in members if r.status != RequestStatus.RUNNING]
            need = [self._need(request) for request in members]
            new_tokens, new_blocks = sum(t for t, _ in need), sum(b for _, b in need)
            if waiting:
                new_blocks += self.kv_cache_manager.watermark_blocks
            fits = new_tokens <= tokens and len(waiting) <= self._free_slots
            try:
                fits = fits and self._clear_blocks(family, blocks + new_blocks)
            except Exception as error:  # one group may fail, the engine may not
                self._fault(family, error)
                fits = False
            if not fits:
                self._hold(members, waiting)
                is_held = True
                continue
            tokens -= new_tokens
            blocks += new_blocks
            self._admitted += waiting
        # Only by priority does vLLM preempt a member for a row that needs a block.
        if self._admitted or self.policy == SchedulingPolicy.PRIORITY:
            self._keep_room_for_members(tokens, blocks)
        return is_held

    @property
    def _free_slots(self) -> int:
        """Rows that may still be admitted beside those that run and those made sure of."""
        taken = len(self.running) + self.num_waiting_for_streaming_input + len(self._admitted)
        return self.max_num_active_reqs - taken

    @contextmanager
    def _members_first(self) -> Iterator[None]:
        """Let vLLM look at the members that were made sure of before anybody else who waits.

        Whoever stands in front of them would take their slots, or, finding no room, end the scan.
        """
        if not self._admitted:
            yield
            return
        self.kv_holding_waiting.remove_requests(self._admitted)
        waiting = self.kv_holding_waiting
        self.kv_holding_waiting = create_request_queue(SchedulingPolicy.FCFS)
        for request in (*self._admitted, *waiting):
            self.kv_holding_waiting.add_request(request)
        try:
            yield
        finally:
            left = self.kv_holding_waiting
            self.kv_holding_waiting = create_request_queue(self.policy)
            for request in left:
                self.kv_holding_waiting.add_request(request)

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        # vLLM asks this of every row; none of a row's tokens puts it off without stopping others.
        if self._allowed:
            most = self._allowed.get(request.request_id, num_new_tokens)
            num_new_tokens = min(num_new_tokens, most)
        return super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)

    def _too_wide(self, group: HogwildGroup) -> str | None:
        """Return why no step could ever hold a group's workers, if none could."""
        tokens, rows = group.widest_step
        if tokens > self.max_num_scheduled_tokens:
            return (
                f"a step of its workers takes up to {tokens} tokens; raise "
                f"--max-num-batched-tokens ({self.max_num_scheduled_tokens}) or send fewer workers"
            )
        if rows > self.max_num_active_reqs:
            return (
                f"its workers and headers are {rows} rows; raise --max-num-seqs "
                f"({self.max_num_active_reqs}) or send fewer workers"
            )
        return None

    def _restore_aside(self) -> None:
        """Put members that were held back into vLLM's queues: it must know of them."""
        aside, self._aside = self._aside, []
        for request in reversed(aside):
            if request.request_id in self.requests:
                self.kv_holding_waiting.prepend_request(request)

    def _note_strays(self, output: SchedulerOutput) -> None:
        """Count steps that a group's members did not take together; the guard allows none."""
        for family in self._families:
            if not is_gang(family) or family.parked:
                continue
            members = self._members(family)
            taken = sum(r.request_id in output.num_scheduled_tokens for r in members)
            if 0 < taken < len(members):
                if not family.group.fallbacks[FallbackReason.OUT_OF_STEP]:
                    logger.warning(
                        "request %s: its workers did not step together",
                        short_id(family.root.request_id),
                    )
                family.group.fallbacks[FallbackReason.OUT_OF_STEP] += 1

    def _is_gang_member(self, request: Request) -> bool:
        branch = self._families.branch(request.request_id)
        return branch is not None and is_gang(branch.family)

    def _is_held(self, request: Request) -> bool:
        return self._is_gang_member(request) or self._allowed.get(request.request_id) == 0

    def _members(self, family: GroupState) -> list[Request]:
        """Return the unfinished requests of a group, in a fixed order."""
        if not family.group.branched:
            return []
        requests = family.requests.values()
        return [r for r in requests if r is not family.root and r.request_id in self.requests]

    def _need(self, request: Request, most: int | None = None) -> tuple[int, int]:
        """Return the tokens that a request lacks (or so many of them), and blocks for those."""
        have = len(self.kv_cache_manager.coordinator.get_blocks(request.request_id)[0])
        new_tokens = request.num_tokens - request.num_computed_tokens
        if most is not None:
            new_tokens = min(new_tokens, most)
        total = request.num_computed_tokens + new_tokens
        return new_tokens, max(0, -(-total // self.block_size) - have)

    def _clear_blocks(self, family: GroupState, needed: int) -> bool:
        """Get so many blocks free, from ordinary requests, then from younger groups."""
        pool = self.kv_cache_manager.block_pool
        while pool.get_num_free_blocks() < needed:
            if ordinary := self._youngest_ordinary():
                self._put_off(ordinary)
                continue
            holding = [f for f in self._families if f.group.branched and not f.parked]
            youngest = max(holding, key=lambda other: other.age)
            if youngest is not family:
                self._give_way(youngest)
            elif len(holding) > 1:
                return False  # its turn comes when an older one has ended
            else:
                self._refuse_too_large(family)
                return False
        return True

    def _hold(self, members: Iterable[Request], waiting: list[Request]) -> None:
        for request in members:
            # vLLM compares this with the number that the coming step will have.
            request.next_decode_eligible_step = self.current_step + 2
        for request in waiting:
            self.waiting.remove_requests([request])
            self.kv_holding_waiting.remove_requests([request])
        self._aside += waiting

    def _keep_room_for_members(self, tokens: int, blocks: int) -> None:
        """Keep others from taking what members need, and from preempting anybody for more.

        A prompt's chunk becomes as small as what is left; members that enter are looked at only
        after all running rows.

        Args:
            tokens: What is left of the step's tokens.
            blocks: What groups will take of the free blocks.

        """
        free = self.kv_cache_manager.block_pool.get_num_free_blocks() - blocks
        others = [r for r in self.running if not self._is_gang_member(r)]
        # Rows that decode go first, then chunks of prompts, as far as there is room.
        for request in sorted(others, key=lambda r: self._need(r)[0] > 1):
            have = len(self.kv_cache_manager.coordinator.get_blocks(request.request_id)[0])
            room = (have + max(0, free)) * self.block_size - request.num_computed_tokens
            new_tokens = min(self._need(request)[0], room)
            if self._admitted:
                new_tokens = min(new_tokens, tokens)
            new_tokens = max(0, new_tokens)
            self._allowed[request.request_id] = new_tokens
            tokens -= min(tokens, new_tokens)
            free -= self._need(request, new_tokens)[1]
