"""Playing what was read through a group, for its positions and figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..branch_graph import Kind, Lane, Node, State
from ..characters import Characters
from ..config.profile import Profile
from ..config.request_options import RequestOptions
from ..fork_join.group import ForkJoinGroup
from ..fork_join.tag_scanner import BranchEnd, Event, ForkSeen, Grammar, Scanner
from ..interface import Cause, Limits, Verdict
from ..vocabulary import Vocabulary
from .steps import Step
from .wording import PLENTY


@dataclass(frozen=True)
class ReplayedBranch:
    """One line of a trace: what a lane wrote up to its next fork or its end.

    Attributes:
        label: ``trunk``, ``path NAME`` or ``conclusion``.
        depth: Nesting of the lane.
        num_generated: Tokens the model wrote.
        num_forced: Tokens the engine wrote.
        start: RoPE position of the first visible token; the answer's first token has 0.
        end: RoPE position of the last token.
        text: How the generated text begins.

    """

    label: str
    depth: int
    num_generated: int
    num_forced: int
    start: int
    end: int
    text: str


class Replay:
    """Plays a text that was read through a group, one branch after the other."""

    def __init__(self, profile: Profile, vocabulary: Vocabulary, steps: list[Step]) -> None:
        self._vocabulary = vocabulary
        self._steps = steps
        first = steps[0].block
        num_paths = len(first.names) if profile.fork.at_start and first is not None else None
        options = RequestOptions(
            profile.name, max_paths=PLENTY, max_depth=PLENTY, num_paths=num_paths
        )
        limits = Limits(1, PLENTY**3, PLENTY, PLENTY, has_room=lambda _: True)
        self._scanner = _Told(vocabulary)
        grammar = _ToldGrammar(profile, vocabulary, self._scanner)
        self.group = ForkJoinGroup((), grammar, options, limits)
        self._names: dict[Lane, str] = {}
        self._texts: dict[Node, str] = {}

    def run(self) -> list[ReplayedBranch]:
        """Play the trunk and everything inside it; return the branches in visible order."""
        self._settle()
        self._play(self._steps, self.group.trunk)
        return list(self._branches())

    def _play(self, steps: list[Step], node: Node) -> list[Node]:
        """Play one lane, from its first node on; return the nodes that its end made ready."""
        for step in steps:
            ready = self._write(node, step)
            if step.block is None:
                return ready
            behind: list[Node] = []
            for name, path, inner in zip(step.block.names, ready, step.block.paths, strict=True):
                self._names[path.lane] = name.name
                behind = self._play(inner, path)
            (node,) = behind
        raise AssertionError("a lane's last step opens no block")

    def _write(self, node: Node, step: Step) -> list[Node]:
        """Write a step's text into a node, end the node, and return what that made ready."""
        tokens = self._vocabulary.encode(step.text)
        self._texts[node] = step.text
        if node.state is State.CLOSING:  # a trunk that forks at the start
            self.group.end(node, Cause.CLOSED)
            self.group.sealed(node, kept=True)
            return self._settle()
        event = self._event(node, step)
        by_end = event is None or not tokens or (step.block is not None and step.block.by_end)
        verdict = Verdict.CONTINUE
        for index, token in enumerate(tokens):
            if index == len(tokens) - 1 and not by_end:
                self._scanner.event = event
            verdict = self.group.feed(node, token)
        if by_end:
            self._scanner.event = event
            self.group.end(node, Cause.EOS)
            self._scanner.event = None
        else:
            assert verdict is not Verdict.CONTINUE, "a tag that was read ends its branch"
            cause = Cause.CLOSED if verdict is Verdict.CLOSE else Cause.VERDICT
            self.group.end(node, cause)
        self.group.sealed(node, kept=True)
        return self._settle()

    @staticmethod
    def _event(node: Node, step: Step) -> Event | None:
        if step.block is not None:
            return ForkSeen(step.block.names, opened=True)
        return BranchEnd() if node.depth else None

    def _settle(self) -> list[Node]:
        """Start what can start, run nodes that only compute, and return those that generate."""
        started: list[Node] = []
        while ready := self.group.ready():
            for node in ready:
                self.group.started(node)
                if node.kind is Kind.CLOSE:
                    self.group.end(node, Cause.CLOSED)
                    self.group.sealed(node, kept=True)
                else:
                    started.append(node)
        return started

    def _branches(self) -> Iterator[ReplayedBranch]:
        nodes = [node for node in self.group.nodes if node.state is State.DONE]
        while nodes:
            node, last = nodes.pop(0), None
            run = [node]
            while nodes and nodes[0].kind is Kind.CLOSE:
                run.append(last := nodes.pop(0))
            label = f"path {self._names[node.lane]}" if node.kind is Kind.PATH else node.kind.value
            yield ReplayedBranch(
                label=label,
                depth=node.depth,
                num_generated=sum(part.num_sampled for part in run),
                num_forced=sum(len(part.forced_visible) for part in run),
                start=node.start + node.num_hidden,
                end=(last or node).end - 1,
                text=self._texts[node],
            )


class _Told(Scanner):
    """A scanner that is told what it sees."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.event: Event | None = None
        self.characters = Characters(vocabulary)

    def feed(self, token_id: int) -> Event | None:
        event, self.event = self.event, None
        return event

    def at_end(self) -> ForkSeen | None:
        return self.event if isinstance(self.event, ForkSeen) else None


@dataclass(frozen=True)
class _ToldGrammar(Grammar):
    """A grammar whose scanner is told what it sees: the reader has looked already.

    Attributes:
        told: The scanner of all branches, which are played one after the other.

    """

    told: _Told

    def scanner(self, **branch: object) -> Scanner:
        """Return the scanner, whatever branch it is for."""
        return self.told
