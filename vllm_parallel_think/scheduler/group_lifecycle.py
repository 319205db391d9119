"""The life of a group in the engine: its branches start, it releases text, it ends or fails."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from ..core.branch_graph import Node, State
from ..core.interface import Cause
from ..observability.observer import Observer
from . import client_output
from .branch_request import branch_request
from .engine_queues import EngineBlocks, EngineQueues
from .fault_fence import fence
from .group_opening import GroupOpening
from .group_table import Branch, GroupState, GroupTable
from .held_blocks import HeldBlocks
from .step_message import StepMessage

_COMPLETE = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
"""Ends after which all tokens of a branch are in the KV cache."""


class GroupLifecycle:
    """Does what groups ask for, from the first request of one to its end.

    Args:
        most_held: Most blocks that groups may hold before they are refused further forks.
        vocab_size: Tokens of the model.

    """

    def __init__(
        self,
        groups: GroupTable,
        opening: GroupOpening,
        held_blocks: HeldBlocks,
        queues: EngineQueues,
        blocks: EngineBlocks,
        message: StepMessage,
        observer: Observer,
        *,
        most_held: float,
        vocab_size: int,
    ) -> None:
        self._groups = groups
        self._opening = opening
        self._held_blocks = held_blocks
        self._queues = queues
        self._blocks = blocks
        self._message = message
        self._observer = observer
        self._most_held = most_held
        self._vocab_size = vocab_size
        self._num_requests_made = 0

    # Begin.

    def open(self, request: Request) -> None:
        """Open a group for a client's request, if it may branch; never raises."""
        if self._groups.group(request.request_id) is not None:
            return
        state = self._opening.open(request, self.has_room)
        if state is not None:
            self._groups.add(state)
            self._observer.started(state)
            state.group.started(state.group.trunk)

    def has_room(self, num_blocks: int) -> bool:
        """Whether groups may hold so many more blocks."""
        return self._held_blocks.num_held + num_blocks <= self._most_held

    def submit_ready(self, state: GroupState) -> None:
        """Start what can start."""
        group = state.group
        state.num_changes_seen = group.num_changes
        for node in group.ready():
            parked = state.requests.get(node) if node.parked else None
            if parked is not None:
                self._queues.enter(parked)
            else:
                self._num_requests_made += 1
                request = branch_request(
                    state.root,
                    node,
                    f"{state.root.request_id}#{node.address}-{self._num_requests_made}",
                    group.padded_prefix(node),
                    group.temperature(node),
                )
                self._groups.attach(state, node, request)
                self._queues.add(request)
            group.started(node)

    # Go on.

    def update(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Put what clients may see in the place of what a step put out for branches."""
        for state in self._collect(outputs):
            released: list[EngineCoreOutput] = []
            with fence(state):
                released = self._advance(state) if state.error is None else []
            if state.error is not None and not state.ended:
                released.append(self._fail(state))
            if released:
                client = state.root.client_index
                outputs.setdefault(client, EngineCoreOutputs()).outputs.extend(released)
        self._observer.stepped()

    def _collect(self, outputs: dict[int, EngineCoreOutputs]) -> list[GroupState]:
        """Take branches' outputs out of the step's outputs, into the groups that own them."""
        touched: dict[GroupState, None] = {}
        for engine_outputs in outputs.values():
            others: list[EngineCoreOutput] = []
            for output in engine_outputs.outputs:
                branch = self._groups.branch(output.request_id)
                if branch is None:
                    others.append(output)
                    continue
                touched[branch.state] = None
                if output.new_token_ids:
                    client_output.hold_back(branch.node, output, branch.state.group.branched)
                elif output.prefill_stats is not None and branch.request is branch.state.root:
                    branch.state.first_output = output
                if output.finished:
                    self._groups.detach(branch)
            engine_outputs.outputs[:] = others
        touched.update((state, None) for state in self._groups if state.error is not None)
        return list(touched)

    def _advance(self, state: GroupState) -> list[EngineCoreOutput]:
        """Start what can start, drop what nobody will see, and return what the client may see."""
        group = state.group
        group.settle()
        for node in group.take_dropped():
            if (request := state.requests.get(node)) is not None:
                self.drop(request)
        for node in group.take_cut():
            self._cut(state, node)
        if not state.evicted and state.num_changes_seen != group.num_changes:
            for node in group.take_retired():
                if node.sealed:
                    self._held_blocks.release(node)
                    group.sealed(node, kept=False)
            self.submit_ready(state)
            self._observer.changed(state)
        released = client_output.released(state, self._vocab_size)
        if group.finished:
            self.end(state)
        return released

    def _cut(self, state: GroupState, node: Node) -> None:
        """Stop a path with what it has."""
        request = state.requests.get(node)
        state.group.end(node, Cause.CUT)
        if request is not None:
            self.drop(request, RequestStatus.FINISHED_STOPPED)

    def drop(
        self, request: Request, status: RequestStatus = RequestStatus.FINISHED_ABORTED
    ) -> None:
        """End one vLLM request whose output nobody waits for."""
        self._queues.finish(request.request_id, status)
        branch = self._groups.branch(request.request_id)
        if branch is not None:
            branch.node.computing = False
            self._groups.detach(branch)

    # Blocks of branches that vLLM lets go.

    def before_free(self, branch: Branch) -> list[KVCacheBlock]:
        """Hold what others will attend to of a branch that ends; return its blocks."""
        own = self._blocks.own(branch)
        self._keep_blocks(branch, own)
        return own

    def after_free(self, branch: Branch, own: Sequence[KVCacheBlock]) -> None:
        """Forget what nobody holds of a branch that ended."""
        self._held_blocks.forget(own)
        if branch.state.group.branched:
            self._queues.hide_end(branch.request)

    def after_preemption(self, branch: Branch, own: Sequence[KVCacheBlock]) -> None:
        """Let a member that was preempted, and lost its own blocks, wait for its turn."""
        self._held_blocks.forget(own)
        branch.num_placed = 0
        self._queues.requeue(branch.request)

    def _keep_blocks(self, branch: Branch, own: Sequence[KVCacheBlock]) -> None:
        """Hold a finished node's blocks, if somebody may attend to them and they are all there."""
        state, node = branch.state, branch.node
        complete = branch.request.status in _COMPLETE and node.state is State.DONE
        final = state.ended or state.group.finish is not None or node.retired
        if final or not complete or not state.group.branched:
            return
        needed = state.group.blocks_of(node)
        prefix = branch.num_prefix_blocks * self._blocks.block_size
        # A path that is cut may be waiting, or be computing tokens again that it lost.
        computed = branch.request.num_computed_tokens - prefix
        kept = len(own) >= needed and computed >= len(node.tokens)
        if kept:
            self._held_blocks.hold(node, own[:needed])
        state.group.sealed(node, kept=kept)

    # End.

    def finish(
        self, request_ids: str | Iterable[str] | None, status: RequestStatus
    ) -> list[Request]:
        """End requests from outside; the end of a root or of one branch is that of its group."""
        if request_ids is None:
            ids = {*self._queues.request_ids, *(s.root.request_id for s in self._groups)}
        else:
            ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        ending: dict[str, GroupState] = {}
        for request_id in ids:
            branch = self._groups.branch(request_id)
            state = self._groups.group(request_id) or (branch.state if branch else None)
            if state is not None:
                ending[state.root.request_id] = state
        plain = [i for i in ids if i not in ending and self._groups.branch(i) is None]
        finished = self._queues.finish(plain, status)
        for state in ending.values():
            state.root.status = status if state.group.branched else state.root.status
            self.end(state, status, outcome="aborted")
            finished.append(state.root)
        return finished

    def end(
        self,
        state: GroupState,
        status: RequestStatus = RequestStatus.FINISHED_ABORTED,
        outcome: str | None = None,
    ) -> None:
        """End whatever still runs for a request and give all its blocks back."""
        state.ended = True
        state.evicted = False
        for request in list(state.requests.values()):
            self.drop(request, status)
        for node in state.group.nodes:
            if node.sealed:
                self._held_blocks.release(node)
                node.sealed = False
        self._groups.remove(state)
        self._message.ended(state)
        if state.group.branched:
            self._queues.show_end(state.root)
        own = "branched" if state.group.has_paths else "unbranched"
        self._observer.ended(state, outcome or own)

    def _fail(self, state: GroupState) -> EngineCoreOutput:
        summary = state.group.summary().as_dict() if state.group.branched else None
        self.end(state, outcome="failed")
        return client_output.failed(state.root, state.error or "internal error", summary)
