"""What groups do when they hold the whole pool: the youngest gives way and is replayed."""

from __future__ import annotations

import time

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from .core.hogwild.group import HogwildGroup
from .families import Family, FamilyTable
from .ledger import BlockLedger
from .messages import Swap

logger = init_logger(__name__)


class GivingWayMixin(Scheduler):
    """Lets a scheduler's families give their blocks away and come back."""

    _families: FamilyTable
    _ledger: BlockLedger
    _preempted_member: bool
    """Whether a branch was preempted in this step."""
    _preempted_other: bool
    """Whether anybody else was."""
    _swaps: list[Swap]
    """K/V to copy in front of the next step."""

    def _submit_ready(self, family: Family) -> None:
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

    @staticmethod
    def _fault(family: Family, error: Exception) -> None:
        """Let one request fail at the end of the step: a fault in it must not end the engine."""
        logger.error("request %s failed", family.root.request_id, exc_info=error)
        family.error = f"internal error: {error!r}"

    def _is_stuck(self) -> bool:
        """Whether members wait, nobody runs, and nothing that is under way will change that.

        A member that was preempted in this very step found no room beside what groups hold. Let in
        again it would only get as far as before, step after step, so that counts although its last
        output is still under way. When anybody else was preempted, blocks came free after members
        were looked at: the next step goes on.
        """
        return (
            not self.running
            and not self._preempted_other
            and bool(self.kv_holding_waiting)
            and self._pause_state != PauseState.PAUSED_ALL
            and (
                self._preempted_member
                or all(request.num_in_flight_tokens == 0 for request in self.requests.values())
            )
        )

    def _make_room(self) -> None:
        """Let the youngest family give all its blocks away; the oldest one always gets on."""
        holding = [f for f in self._families if f.group.branched and not f.parked]
        if len(holding) > 1:
            youngest = max(holding, key=lambda family: family.age)
            try:
                self._give_way(youngest)
            except Exception as error:
                self._fault(youngest, error)
        elif holding:
            self._refuse_too_large(holding[0])

    def _refuse_too_large(self, family: Family) -> None:
        """Let a request fail that no other one could make room for."""
        pool = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        family.error = (
            f"the answer needs {family.group.blocks_needed} KV blocks of {self.block_size} "
            f"tokens, the whole pool has {pool}"
        )

    def _give_way(self, family: Family) -> None:
        """Drop a family's K/V; it is computed again, node by node, once there is room."""
        logger.debug("request %s gives way", family.root.request_id)
        family.parked = True
        family.num_replays += 1
        if isinstance(family.group, HogwildGroup):
            self._swap_out(family)
            return
        for node, request in list(family.requests.items()):
            if node.computing:
                self._drop_request(request)
            else:
                self.kv_holding_waiting.remove_requests([request])
                self.waiting.remove_requests([request])
                self.deferred_waiting.discard(request)
                node.parked = True
        for node in family.group.nodes:
            if node.sealed:
                self._ledger.release(node)
                family.group.sealed(node, kept=False)

    def _unpark(self) -> bool:
        """Let families that gave way come back, oldest first; return whether some still wait."""
        parked = sorted((f for f in self._families if f.parked), key=lambda family: family.age)
        for family in parked:
            free = self.kv_cache_manager.block_pool.get_num_free_blocks()
            idle = not self.running and not self.kv_holding_waiting
            if not idle and free < family.group.blocks_needed:
                return True
            family.parked = False
            try:
                if isinstance(family.group, HogwildGroup):
                    self._swap_in(family)
                self._submit_ready(family)
            except Exception as error:
                self._fault(family, error)
        return False

    def _swap_out(self, family: Family) -> None:
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
                if request in self.running:
                    self.running.remove(request)
                self._preempt_request(request, time.monotonic())
                self.prev_step_scheduled_req_ids.discard(request.request_id)
            self.kv_holding_waiting.remove_requests([request])
            self.waiting.remove_requests([request])
            self.deferred_waiting.discard(request)
        self._swaps.append(Swap(family.root.request_id, tuple(ids), out=True))

    def _swap_in(self, family: Family) -> None:
        """Get blocks for a group's K/V on the host, and have it copied back."""
        pool = self.kv_cache_manager.block_pool
        managers = self.kv_cache_manager.coordinator.single_type_managers
        if pool.get_num_free_blocks() < family.group.blocks_needed:
            self._refuse_too_large(family)
            return
        blocks = pool.get_new_blocks(sum(count for _, count, _ in family.stash))
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
        self._swaps.append(Swap(family.root.request_id, ids, out=False))

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
