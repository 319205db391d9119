"""The groups of one scheduler: which vLLM request computes which node, and who waits for what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request, RequestStatus

from ..core.branch_graph import Node
from ..core.interface import Group
from ..observability.observed_group import Load


@dataclass(eq=False, repr=False)
class GroupState:
    """One client request, its group, and the vLLM requests that compute the group's nodes.

    Attributes:
        root: The request the client sent; the only one the client knows of.
        group: What decides.
        requests: Unfinished vLLM requests by the node they compute.
        parked: Whether the family gave all its blocks away and waits for room to be replayed.
        ended: Whether the client got the last output, or went away.
        error: Why the family cannot go on, if it cannot.
        num_replays: How often it gave way.
        num_changes_seen: The group's changes that were acted upon.
        first_output: The prompt's output, if it had no token of the answer: what it says of the
            prompt goes out with the first one that has.
        stash: Of workers that gave way, which K/V is on the host: node, blocks, and how many tokens
            are computed where the node is still being written.
        moves_told: The group's moves that the worker process was told of.
        history_told: How many steps of its history that knows.

    """

    root: Request
    group: Group
    requests: dict[Node, Request] = field(default_factory=dict)
    parked: bool = False
    ended: bool = False
    error: str | None = None
    num_replays: int = 0
    num_changes_seen: int = 0
    first_output: EngineCoreOutput | None = None
    stash: list[tuple[Node, int, int]] = field(default_factory=list)
    moves_told: int = 0
    history_told: int = 0

    @property
    def age(self) -> tuple[int, float, str]:
        """Sort key: the family that must make room last comes first."""
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


@dataclass(eq=False, repr=False)
class Branch:
    """One vLLM request of a family.

    Attributes:
        num_placed: Own blocks whose position header was sent to the worker.

    """

    family: GroupState
    node: Node
    request: Request
    num_placed: int = 0


class GroupTable:
    """Looks up families by the client's request id, and branches by any request id."""

    def __init__(self) -> None:
        self._families: dict[str, GroupState] = {}
        self._branches: dict[str, Branch] = {}

    def __bool__(self) -> bool:
        """Return whether any request may branch or has branched."""
        return bool(self._families)

    def __iter__(self) -> Iterator[GroupState]:
        """Iterate over the families."""
        return iter(list(self._families.values()))

    def load(self, held_blocks: int) -> Load:
        """Return what branched groups keep busy."""
        groups = running = waiting = 0
        for family in self._families.values():
            if not family.group.branched:
                continue
            groups += 1
            for request in family.requests.values():
                if request.status == RequestStatus.RUNNING:
                    running += 1
                else:
                    waiting += 1
        return Load(groups, running, waiting, held_blocks)

    def family(self, root_id: str) -> GroupState | None:
        """Return the family of a client's request."""
        return self._families.get(root_id)

    def branch(self, request_id: str) -> Branch | None:
        """Return the branch that a vLLM request is."""
        return self._branches.get(request_id)

    def add(self, family: GroupState) -> None:
        """Register a client's request as a family of one."""
        self._families[family.root.request_id] = family
        self.attach(family, family.group.trunk, family.root)

    def attach(self, family: GroupState, node: Node, request: Request) -> None:
        """Say that a request computes a node."""
        family.requests[node] = request
        self._branches[request.request_id] = Branch(family, node, request)

    def detach(self, branch: Branch) -> None:
        """Forget a request that ended."""
        self._branches.pop(branch.request.request_id, None)
        if branch.family.requests.get(branch.node) is branch.request:
            del branch.family.requests[branch.node]

    def remove(self, family: GroupState) -> None:
        """Forget a family and its requests."""
        for request in family.requests.values():
            self._branches.pop(request.request_id, None)
        family.requests.clear()
        self._families.pop(family.root.request_id, None)
