"""Workers that see each other take every step of the engine together, or none of them does.

vLLM alone does not keep them together: a prefill chunk of somebody else eats the step's tokens
before a new member is looked at, nobody is admitted in a step that preempts, slots and blocks run
out. So whatever a group needs is made sure of before vLLM schedules; a group that cannot have it is
held for that step as a whole. Otherwise its text would depend on the load beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request, RequestStatus

from .core.hogwild.group import HogwildGroup
from .families import Family
from .giving_way import GivingWayMixin

logger = init_logger(__name__)


def is_gang(family: Family) -> bool:
    """Whether a family's branches are workers that started."""
    return isinstance(family.group, HogwildGroup) and family.group.branched


class LockStepMixin(GivingWayMixin):
    """Lets a scheduler's groups of workers advance as one."""

    _aside: list[Request]
    """Members that wait for their group, out of vLLM's queues."""

    def _align_gangs(self) -> bool:
        """Make sure of what each group needs in the coming step, oldest first, or hold it.

        Returns:
            Whether a group waits for room, that newcomers would take.

        """
        gangs = sorted((f for f in self._families if is_gang(f)), key=lambda family: family.age)
        gangs = [f for f in gangs if not f.parked and f.error is None and self._members(f)]
        if not gangs:
            return False
        # Members first: they are not preempted for others, and their tokens are counted first.
        self.running.sort(key=lambda request: not self._is_gang_member(request))
        tokens = self.max_num_scheduled_tokens
        blocks = 0
        slots = self.max_num_active_reqs - len(self.running)
        admits = is_held = False
        for family in gangs:
            if family.parked:  # gave way to an older one
                continue
            members = self._members(family)
            waiting = [r for r in members if r.status != RequestStatus.RUNNING]
            need = [self._need(request) for request in members]
            new_tokens, new_blocks = sum(t for t, _ in need), sum(b for _, b in need)
            fits = new_tokens <= tokens and len(waiting) <= slots
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
            slots -= len(waiting)
            blocks += new_blocks
            admits = admits or bool(waiting)
        # Only by priority does vLLM preempt a member for a row that needs a block.
        if admits or self.policy == SchedulingPolicy.PRIORITY:
            self._keep_room_for_members(tokens, blocks, admits)
        return is_held

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
                if not family.group.fallbacks["out_of_step"]:
                    logger.warning(
                        "request %s: its workers did not step together", family.root.request_id
                    )
                family.group.fallbacks["out_of_step"] += 1

    def _is_gang_member(self, request: Request) -> bool:
        branch = self._families.branch(request.request_id)
        return branch is not None and is_gang(branch.family)

    def _members(self, family: Family) -> list[Request]:
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

    def _clear_blocks(self, family: Family, needed: int) -> bool:
        """Get so many blocks free, from ordinary requests, then from younger groups."""
        pool = self.kv_cache_manager.block_pool
        while pool.get_num_free_blocks() < needed:
            ordinary = [r for r in self.running if not self._is_member(r)]
            if ordinary:
                victim = max(ordinary, key=lambda r: (r.priority, r.arrival_time))
                self.running.remove(victim)
                self._preempt_request(victim, time.monotonic())
                self.prev_step_scheduled_req_ids.discard(victim.request_id)
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

    def _keep_room_for_members(self, tokens: int, blocks: int, admits: bool) -> None:
        """Keep others from taking what members need, and from preempting anybody for more.

        Args:
            tokens: What is left of the step's tokens.
            blocks: What groups will take of the free blocks.
            admits: Whether members wait: they are looked at behind all running rows.

        """
        free = self.kv_cache_manager.block_pool.get_num_free_blocks() - blocks
        others = [r for r in self.running if not self._is_gang_member(r)]
        # Rows that decode go first, then chunks of prompts, as far as there is room.
        for request in sorted(others, key=lambda r: self._need(r)[0] > 1):
            new_tokens, _ = self._need(request)
            _, new_blocks = self._need(request, min(new_tokens, tokens))
            if (admits and new_tokens > tokens) or new_blocks > free:
                request.next_decode_eligible_step = self.current_step + 2
            else:
                tokens, free = max(0, tokens - new_tokens), free - new_blocks
