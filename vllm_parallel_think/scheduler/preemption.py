"""What groups do when they hold the whole pool: the youngest gives way and is replayed."""

from __future__ import annotations

import time

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from ..compat.logger import init_logger
from ..core.errors import OptionError, short_id
from ..core.hogwild.group import HogwildGroup
from ..observability.observer import Observer
from ..scheduler_output import KVSwap
from .group_table import GroupState, GroupTable
from .held_blocks import HeldBlocks

logger = init_logger(__name__)

MOST_EMPTY_STEPS = 100
"""Steps in a row without work, after which a request that cannot go on is ended."""

_INTERNAL = "internal error; the server's log says which, beside this request's id"


class GivingWayMixin(Scheduler):
    """Lets a scheduler's families give their blocks away and come back."""

    kv_holding_waiting: RequestQueue
    _families: GroupTable
    _ledger: HeldBlocks
    _preempted_member: bool
    """Whether a branch was preempted in this step."""
    _preempted_other: bool
    """Whether anybody else was."""
    _swaps: list[KVSwap]
    """K/V to copy in front of the next step."""
    _num_empty_steps: int
    """Steps without work since the last one that had some, or that had some under way."""
    _observer: Observer

    def _submit_ready(self, family: GroupState) -> None:
        """Start what can start."""
        raise NotImplementedError

    def _drop_request(
        self, request: Request, status: RequestStatus = RequestStatus.FINISHED_ABORTED
    ) -> None:
        """End one vLLM request whose output nobody waits for."""
        raise NotImplementedError

    def _is_member(self, request: Request) -> bool:
        """Whether a request is a branch of a family that has forked."""
        branch = self._families.branch(request.request_id)
        return branch is not None and branch.family.group.branched

    def _is_held(self, request: Request) -> bool:
        """Whether a running row was kept from taking this step."""
        raise NotImplementedError

    @staticmethod
    def _fault(family: GroupState, error: Exception) -> None:
        """Let one request fail at the end of the step: a fault in it must not end the engine.

        What went wrong first is what the client is told: the rest follows from it. An error that is
        no sentence for people stays in the log.
        """
        logger.error("request %s failed", short_id(family.root.request_id), exc_info=error)
        if family.error is None:
            family.error = str(error) if isinstance(error, OptionError) else _INTERNAL

    def _keep_going(self, output: SchedulerOutput) -> None:
        """See to it that the next step can do something, if this one could do nothing."""
        if output.total_num_scheduled_tokens or self._pause_state == PauseState.PAUSED_ALL:
            self._num_empty_steps = 0
            return
        under_way = any(request.num_in_flight_tokens for request in self.requests.values())
        if self._is_stuck(under_way):
            self._make_room()
        self._num_empty_steps = 0 if under_way else self._num_empty_steps + 1
        if self._num_empty_steps > MOST_EMPTY_STEPS:
            self._num_empty_steps = 0
            self._end_standstill()

    def _is_stuck(self, under_way: bool) -> bool:
        """Whether a step did nothing although groups hold blocks, and nothing will change that.

        Rows may be running all the same: those that are held keep what they have. One that is not
        held was only not looked at, as the scan ended with a row that preempted itself.

        A member that was preempted in this very step found no room beside what groups hold. Let in
        again it would only get as far as before, step after step, so that counts although its last
        output is still under way. When anybody else was preempted, blocks came free after members
        were looked at: the next step goes on.
        """
        if self._preempted_other or (under_way and not self._preempted_member):
            return False
        if not all(map(self._is_held, self.running)):
            return False
        return any(f.group.branched and not f.parked for f in self._families)

    def _end_standstill(self) -> None:
        """Let the youngest request fail, as steps without any work follow each other.

        Whatever the cause, which is a fault of ours: the others must get on.
        """
        families = [f for f in self._families if f.error is None]
        if not families:
            return
        youngest = max(families, key=lambda f: (f.group.branched, f.age))
        logger.error(
            "nothing was scheduled in %d steps although requests are unfinished; request %s fails",
            MOST_EMPTY_STEPS,
            short_id(youngest.root.request_id),
        )
        youngest.error = f"no step of the engine could go on with it in {MOST_EMPTY_STEPS} tries"
        self._observer.stalled()

    def _make_room(self) -> None:
        """Let a request give its blocks away: an ordinary one, then the youngest family.

        The oldest family always gets on.
        """
        if ordinary := self._youngest_ordinary():
            self._put_off(ordinary)
            return
        holding = [f for f in self._families if f.group.branched and not f.parked]
        if len(holding) > 1:
            youngest = max(holding, key=lambda family: family.age)
            try:
                self._give_way(youngest)
            except Exception as error:
                self._fault(youngest, error)
        elif holding:
            self._refuse_too_large(holding[0])

    def _youngest_ordinary(self) -> Request | None:
        """Return the running row that would be the first to give way, if any is no member."""
        ordinary = [r for r in self.running if not self._is_member(r)]
        return max(ordinary, key=lambda r: (r.priority, r.arrival_time), default=None)

    def _refuse_too_large(self, family: GroupState) -> None:
        """Let a request fail that no other one could make room for."""
        pool = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        family.error = family.error or (
            f"the answer needs {family.group.blocks_needed} KV blocks of {self.block_size} "
            f"tokens, the whole pool has {pool}"
        )

    def _give_way(self, family: GroupState) -> None:
        """Drop a family's K/V; it is computed again, node by node, once there is room."""
        logger.debug("request %s gives way", short_id(family.root.request_id))
        family.parked = True
        family.num_replays += 1
        if isinstance(family.group, HogwildGroup):
            self._swap_out(family)
            return
        for node, request in list(family.requests.items()):
            if node.computing:
                self._drop_request(request)
            else:
                if request.status == RequestStatus.RUNNING:
                    self._put_off(request)
                self.kv_holding_waiting.remove_requests([request])
                self.waiting.remove_requests([request])
                self.deferred_waiting.discard(request)
                node.parked = True
        for node in family.group.nodes:
            if node.sealed:
                self._ledger.release(node)
                family.group.sealed(node, kept=False)

    def _put_off(self, request: Request) -> None:
        """Preempt a running request, between two steps."""
        if request in self.running:
            self.running.remove(request)
        self._preempt_request(request, time.monotonic())
        # It may run again in the very next step, which vLLM's own preemption never allows.
        self.prev_step_scheduled_req_ids.discard(request.request_id)

    def _unpark(self) -> bool:
        """Let families that gave way come back, oldest first; return whether some still wait."""
        parked = sorted((f for f in self._families if f.parked), key=lambda family: family.age)
        for family in parked:
            free = self.kv_cache_manager.block_pool.get_num_free_blocks()
            idle = not self.running and not self.kv_holding_waiting
            if not idle and (free < family.group.blocks_needed or self._elder_waits(family)):
                return True
            family.parked = False
            try:
                if isinstance(family.group, HogwildGroup):
                    self._swap_in(family)
                if family.error is None:
                    self._submit_ready(family)
            except Exception as error:
                self._fault(family, error)
        return False

    def _elder_waits(self, family: GroupState) -> bool:
        """Whether a branch of an older family waits, which may be what this one gave way to."""
        branches = (self._families.branch(r.request_id) for r in self.kv_holding_waiting)
        return any(b is not None and b.family.age < family.age for b in branches)

    def _swap_out(self, family: GroupState) -> None:
        """Copy all K/V of a group of workers to the host, and let its blocks go.

        What workers wrote was computed while they saw each other half finished. Computing it again
        would need the order of every token; a copy is the same K/V by construction.
        """
        ids: list[int] = []
        for node in family.group.nodes:
            if node.sealed:
                blocks = self._ledger.blocks(node)
                family.stash.append((node, len(blocks), 0))
                ids += [block.block_id for block in blocks]
                self._ledger.release(node)
                node.sealed = False
        for node, request in family.requests.items():
            if request is family.root:
                continue
            node.parked = True
            if request.status == RequestStatus.RUNNING:
                blocks = self.kv_cache_manager.coordinator.get_blocks(request.request_id)[0]
                num_computed = request.num_computed_tokens
                used = list(blocks[: -(-num_computed // self.block_size)])
                family.stash.append((node, len(used), num_computed))
                ids += [block.block_id for block in used]
                self._put_off(request)
            self.kv_holding_waiting.remove_requests([request])
            self.waiting.remove_requests([request])
            self.deferred_waiting.discard(request)
        self._swaps.append(KVSwap(family.root.request_id, tuple(ids), out=True))

    def _swap_in(self, family: GroupState) -> None:
        """Get blocks for a group's K/V on the host, and have it copied back."""
        pool = self.kv_cache_manager.block_pool
        managers = self.kv_cache_manager.coordinator.single_type_managers
        num_blocks = sum(count for _, count, _ in family.stash)
        if pool.get_num_free_blocks() < num_blocks:
            self._refuse_too_large(family)
            return
        blocks = pool.get_new_blocks(num_blocks)
        ids = tuple(block.block_id for block in blocks)
        for node, count, num_computed in family.stash:
            own, blocks = blocks[:count], blocks[count:]
            request = family.requests.get(node)
            if request is None:
                self._ledger.adopt(node, own)
                node.sealed = True
            else:
                # As if its K/V had come from another host: it has blocks, and goes on from there.
                managers[0].req_to_blocks[request.request_id] = own
                managers[0].num_cached_block[request.request_id] = 0
                request.num_computed_tokens = num_computed
        family.stash.clear()
        family.history_told = family.moves_told = 0  # all blocks are others now
        self._swaps.append(KVSwap(family.root.request_id, ids, out=False))

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        if reset_running_requests:
            timestamp = time.monotonic()
            members = [request for request in self.running if self._is_member(request)]
            for request in reversed(members):
                if request not in self.running:
                    continue  # left with the workers of its group
                self.running.remove(request)
                self._preempt_request(request, timestamp, drop_stale_output=True)
            for family in self._families:
                if family.group.branched and not family.parked:
                    self._give_way(family)
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    def get_num_unfinished_requests(self) -> int:
        num_unfinished = super().get_num_unfinished_requests()
        if self._families and self._pause_state != PauseState.PAUSED_ALL:
            num_unfinished += sum(family.parked for family in self._families)
        return num_unfinished
