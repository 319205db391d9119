"""The groups of one scheduler: which vLLM request computes which node, and who waits for what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request, RequestStatus

from ..core.branch_graph import Node
from ..core.hogwild.group import HogwildGroup
from ..core.interface import Group
from ..observability.observed_group import Load


@dataclass(eq=False, repr=False)
class GroupState:
    """One client request, its group, and the vLLM requests that compute the group's nodes.

    Attributes:
        root: The request the client sent; the only one the client knows of.
        group: What decides.
        requests: Unfinished vLLM requests by the node they compute.
        evicted: Whether the group gave all its blocks away and waits for room to resume.
        ended: Whether the client got the last output, or went away.
        error: Why the group cannot go on, if it cannot.
        num_evictions: How often it was evicted.
        num_changes_seen: The group's changes that were acted upon.
        first_output: The prompt's output, if it had no token of the answer: what it says of the
            prompt goes out with the first one that has.
        stash: Of an evicted gang, which K/V is on the host: node, blocks, and how many tokens are
            computed where the node is still being written.
        moves_sent: The group's moves that the worker process knows of.
        history_sent: How many steps of its history that knows.

    """

    root: Request
    group: Group
    requests: dict[Node, Request] = field(default_factory=dict)
    evicted: bool = False
    ended: bool = False
    error: str | None = None
    num_evictions: int = 0
    num_changes_seen: int = 0
    first_output: EngineCoreOutput | None = None
    stash: list[tuple[Node, int, int]] = field(default_factory=list)
    moves_sent: int = 0
    history_sent: int = 0

    @property
    def age(self) -> tuple[int, float, str]:
        """Sort key: the group that must make room last comes first."""
        return self.root.priority, self.root.arrival_time, self.root.request_id

    @property
    def request_id(self) -> str:
        """The client's request."""
        return self.root.request_id

    @property
    def arrival_time(self) -> float:
        """When it arrived."""
        return self.root.arrival_time

    @property
    def trace_headers(self) -> Mapping[str, str] | None:
        """The client's trace, if it sent one."""
        return self.root.trace_headers

    @property
    def holds_blocks(self) -> bool:
        """Whether eviction would free blocks: the group has forked, and has not been evicted."""
        return self.group.branched and not self.evicted

    @property
    def is_gang(self) -> bool:
        """Whether the group's branches are workers that started, which step together or not."""
        return isinstance(self.group, HogwildGroup) and self.group.branched


@dataclass(eq=False, repr=False)
class Branch:
    """One vLLM request of a group.

    Attributes:
        num_placed: Own blocks whose position header was sent to the worker.

    """

    state: GroupState
    node: Node
    request: Request
    num_placed: int = 0

    @property
    def num_prefix_blocks(self) -> int:
        """How many blocks of the request's the group holds as its prefix."""
        return sum(map(self.state.group.blocks_of, self.node.prefix))


class GroupTable:
    """Looks up groups by the client's request id, and branches by any request id."""

    def __init__(self) -> None:
        self._groups: dict[str, GroupState] = {}
        self._branches: dict[str, Branch] = {}

    def __bool__(self) -> bool:
        """Return whether any request may branch or has branched."""
        return bool(self._groups)

    def __iter__(self) -> Iterator[GroupState]:
        """Iterate over the groups."""
        return iter(list(self._groups.values()))

    def load(self, held_blocks: int) -> Load:
        """Return what branched groups keep busy."""
        groups = running = waiting = 0
        for state in self._groups.values():
            if not state.group.branched:
                continue
            groups += 1
            for request in state.requests.values():
                if request.status == RequestStatus.RUNNING:
                    running += 1
                else:
                    waiting += 1
        return Load(groups, running, waiting, held_blocks)

    def group(self, root_id: str) -> GroupState | None:
        """Return the group of a client's request."""
        return self._groups.get(root_id)

    def branch(self, request_id: str) -> Branch | None:
        """Return the branch that a vLLM request is."""
        return self._branches.get(request_id)

    def is_member(self, request: Request) -> bool:
        """Whether a request is a branch of a group that has forked."""
        branch = self._branches.get(request.request_id)
        return branch is not None and branch.state.group.branched

    def is_gang_member(self, request: Request) -> bool:
        """Whether a request is a branch of a gang."""
        branch = self._branches.get(request.request_id)
        return branch is not None and branch.state.is_gang

    def add(self, state: GroupState) -> None:
        """Register a client's request as a group of one."""
        self._groups[state.root.request_id] = state
        self.attach(state, state.group.trunk, state.root)

    def attach(self, state: GroupState, node: Node, request: Request) -> None:
        """Say that a request computes a node."""
        state.requests[node] = request
        self._branches[request.request_id] = Branch(state, node, request)

    def detach(self, branch: Branch) -> None:
        """Forget a request that ended."""
        self._branches.pop(branch.request.request_id, None)
        if branch.state.requests.get(branch.node) is branch.request:
            del branch.state.requests[branch.node]

    def remove(self, state: GroupState) -> None:
        """Forget a group and its requests."""
        for request in state.requests.values():
            self._branches.pop(request.request_id, None)
        state.requests.clear()
        self._groups.pop(state.root.request_id, None)
