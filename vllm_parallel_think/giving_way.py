"""What groups do when they hold the whole pool: the youngest gives way and is replayed."""

from __future__ import annotations

import time

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from .families import Family, FamilyTable
from .ledger import BlockLedger

logger = init_logger(__name__)


class GivingWayMixin(Scheduler):
    """Lets a scheduler's families give their blocks away and come back."""

    _families: FamilyTable
    _ledger: BlockLedger
    _preempted_member: bool
    """Whether a branch was preempted in this step."""
    _preempted_other: bool
    """Whether anybody else was."""

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
            pool = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
            holding[0].error = (
                f"the answer needs {holding[0].group.blocks_needed} KV blocks of {self.block_size} "
                f"tokens, the whole pool has {pool}"
            )

    def _give_way(self, family: Family) -> None:
        """Drop a family's K/V; it is computed again, node by node, once there is room."""
        logger.debug("request %s gives way", family.root.request_id)
        family.parked = True
        family.num_replays += 1
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
                self._submit_ready(family)
            except Exception as error:
                self._fault(family, error)
        return False

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        if reset_running_requests:
            timestamp = time.monotonic()
            members = [request for request in self.running if self._is_member(request)]
            for request in reversed(members):
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
