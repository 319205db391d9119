"""Drives a group as the scheduler does, with scripts in place of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support.vocabularies import Pieces, tags
from vllm_parallel_think.core.branch_graph import Kind, Node, State
from vllm_parallel_think.core.config.loading import load_profile
from vllm_parallel_think.core.config.profile import Profile
from vllm_parallel_think.core.config.request_options import RequestOptions
from vllm_parallel_think.core.fork_join.group import ForkJoinGroup
from vllm_parallel_think.core.fork_join.tag_scanner import Grammar
from vllm_parallel_think.core.interface import Cause, Chunk, Emission, Finish, Limits, Verdict

EOS = -1
"""Stands for the end-of-sequence token in a script."""

STOP = -2
"""Stands for a token of ``stop_token_ids`` in a script."""

Script = str | Iterable[str | int]


@dataclass
class Player:
    """A group and what its branches are going to write.

    Attributes:
        profile: Built-in name, or a profile.
        scripts: Text of each branch by its address; ``EOS`` and ``STOP`` may stand in it. A branch
            without one, or at the end of it, writes ``EOS``.
        num_chunk: Tokens one step samples for a branch.

    """

    profile: str | Profile
    scripts: Mapping[str, Script] = field(default_factory=dict)
    vocabulary: Pieces = field(default_factory=tags)
    prompt: str = "Q"
    block_size: int = 4
    index_blocks: int = 10_000
    max_tokens: int = 10_000
    max_forks: int = 64
    has_room: Callable[[int], bool] = lambda _: True
    max_paths: int = 8
    max_depth: int = 2
    path_tokens: int | None = None
    critical_tokens: int | None = None
    join: Any = None
    live: bool = False
    num_paths: int | None = None
    summary_tokens: int | None = None
    termination: float = 1.0
    vote: bool = False
    num_chunk: int = 1

    def __post_init__(self) -> None:
        profile = self.profile
        self.profile = profile = load_profile(profile) if isinstance(profile, str) else profile
        options = RequestOptions(
            profile.name,
            self.max_paths,
            self.max_depth,
            self.path_tokens,
            self.critical_tokens,
            self.join,
            self.live,
            self.num_paths,
            self.summary_tokens,
            self.termination,
            vote=self.vote,
        )
        limits = Limits(
            self.block_size, self.index_blocks, self.max_tokens, self.max_forks, self.has_room
        )
        prompt = self.vocabulary.encode(self.prompt)
        self.group = ForkJoinGroup(prompt, Grammar(profile, self.vocabulary), options, limits)
        self.running: list[Node] = [self.group.trunk]
        self.replays: list[Node] = []
        self.num_starts: dict[Node, int] = {self.group.trunk: 1}
        self.visible: list[int] = []
        self.emissions: list[Emission] = []
        self.num_forced = 0
        self.finish: Finish | None = None
        self._pending: dict[Node, list[int]] = {}
        self.group.started(self.group.trunk)

    def step(self, node: Node) -> None:
        """Run one engine step in which only this branch is scheduled."""
        self.compute(node)
        self.advance()

    def round(self) -> None:
        """Run one engine step in which every branch is scheduled."""
        for node in list(self.running):
            self.compute(node)
        self.advance()

    def compute(self, node: Node) -> None:
        """Run a branch's share of an engine step: sample, feed, end and seal."""
        self.running.remove(node)
        if node in self.replays:
            self.replays.remove(node)
            self.group.sealed(node, kept=True)
            return
        chunk, alive = self._sample(node)
        if chunk:
            node.outbox.append(Chunk(len(chunk), chunk))
        if alive:
            self.running.append(node)
        elif node.state is State.DONE and self.group.branched and not node.retired:
            self.group.sealed(node, kept=True)

    def _sample(self, node: Node) -> tuple[list[int], bool]:
        kept: list[int] = []
        for _ in range(self.num_chunk):
            if node.state is State.CLOSING or node.kind is Kind.CLOSE:
                self.group.end(node, Cause.CLOSED)
                return kept, False
            token = self._next_token(node)
            if token == EOS:
                self.group.end(node, Cause.EOS)
                return kept + ([EOS] if self.group.finish and not node.depth else []), False
            kept.append(token)
            verdict = self.group.feed(node, token)
            if verdict is Verdict.RETRACT:
                self.group.end(node, Cause.EOS)
                return kept[:-1], False
            budget = self.max_tokens - len(self.group.opening)
            if token == STOP:
                self.group.end(node, Cause.STOP_TOKEN, STOP)
                return kept, False
            if node is self.group.trunk and node.num_sampled >= budget:
                self.group.end(node, Cause.LENGTH)
                return kept, False
            if verdict is Verdict.END:
                self.group.end(node, Cause.VERDICT)
                return kept, False
        return kept, True

    def _next_token(self, node: Node) -> int:
        if node not in self._pending:
            script = self.scripts.get(node.address, "")
            parts = [script] if isinstance(script, str) else script
            self._pending[node] = [
                token
                for part in parts
                for token in ([part] if isinstance(part, int) else self.vocabulary.encode(part))
            ]
        pending = self._pending[node]
        return pending.pop(0) if pending else EOS

    def advance(self) -> None:
        """Drop, release and start what the group says, as the scheduler does after each step."""
        group = self.group
        for node in group.take_dropped():
            if node in self.running:
                self.running.remove(node)
        for node in group.take_cut():
            group.end(node, Cause.CUT)
            self.running.remove(node)
            group.sealed(node, kept=True)
        for node in group.take_retired():
            if node.sealed:
                group.sealed(node, kept=False)
        for node in group.ready():
            assert all(seen.sealed for seen in node.prefix), "starts in front of its prefix"
            if node.state is State.DONE:
                self.replays.append(node)
            group.started(node)
            self.running.append(node)
            self.num_starts[node] = self.num_starts.get(node, 0) + 1
        self._release()

    def _release(self) -> None:
        for emission in self.group.release():
            assert self.finish is None, "released behind the end"
            self.emissions.append(emission)
            if emission.payload is None:
                assert len(emission.forced) == emission.keep
                self.visible += emission.forced
                self.num_forced += emission.keep
            else:
                self.visible += emission.payload[: emission.keep]
            self.finish = emission.finish

    def run(self, choose: Callable[[list[Node]], Node] = lambda nodes: nodes[0]) -> Player:
        """Step branches in an order that the caller chooses until the answer is complete."""
        for _ in range(100_000):
            if self.finish is not None:
                return self
            assert self.running, "nothing runs, and the answer is not complete"
            self.step(choose(self.running))
        raise AssertionError("the group does not come to an end")

    def run_until(self, seen: Callable[[], bool]) -> Player:
        """Step branches in turn until something holds."""
        for _ in range(10_000):
            if seen():
                return self
            self.step(self.running[0])
        raise AssertionError("it never came to that")

    @property
    def text(self) -> str:
        """The visible answer so far, without its end-of-sequence token."""
        return self.vocabulary.text(self.visible)

    @property
    def summary(self) -> dict[str, Any]:
        return self.group.summary().as_dict()

    def node(self, address: str) -> Node:
        """Return the node at a place in the tree."""
        (node,) = [node for node in self.group.nodes if node.address == address]
        return node

    def placed(self, *addresses: str) -> list[tuple[str, int]]:
        """Return pieces and positions of some nodes (default: all), in visible order."""
        return [
            (self.vocabulary.piece(token), node.start + index)
            for node in self.group.nodes
            if not addresses or node.address in addresses
            for index, token in enumerate(node.tokens)
            if index >= node.num_hidden
        ]

    def check_limits(self) -> None:
        """INV-4: no branch leaves its index space; forks, paths and length keep to limits."""
        for node in self.group.nodes:
            if node.state in (State.LIVE, State.CLOSING):
                prefix = sum(map(self.group.blocks_of, node.prefix))
                blocks = prefix + self.group.blocks_of(node)
                limit = self.index_blocks if node.prefix else 10**9
                assert blocks <= limit, f"{node.address} spans {blocks} blocks of {limit}"
        summary = self.summary
        assert summary["forks"] <= self.max_forks
        assert summary["widest_fork"] <= self.max_paths
        assert summary["depth"] <= self.max_depth
        assert len(self.visible) <= self.max_tokens
