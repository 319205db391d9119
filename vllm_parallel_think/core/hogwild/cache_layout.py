"""What a row of a group of writers attends to, in which order, and how far its query must turn.

Keys are never rewritten: every run of tokens was stored with positions that count from its own
first token. A row whose own run starts at place ``s`` of its view sees a run that starts at place
``p`` of that view through a query rotated by ``s - p`` positions (HOGWILD, arXiv 2504.06261,
section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.hogwild_profile import Layout

OTHERS, OWN, ANSWER = -1, -2, -3
"""Roles beside the writers', which are numbered from 0: two headers, and the answer."""


@dataclass(frozen=True)
class Run:
    """Tokens in consecutive slots of their own KV blocks.

    Attributes:
        blocks: Physical block ids, in whatever form their keeper has them; read by nobody here.
        length: Tokens.
        role: Who wrote them; the prompt's is :data:`ANSWER`, as it belongs to nobody.

    """

    blocks: Any
    length: int
    role: int = ANSWER


@dataclass(frozen=True)
class Turned:
    """A run as one row sees it.

    Attributes:
        run: The tokens.
        shift: Positions by which the row's query turns for them.

    """

    run: Run
    shift: int


@dataclass
class CacheLayout:
    """All runs of one group.

    Attributes:
        layout: How writers see each other.
        prompt: The prompt's tokens.
        history: Finished steps in order of completion.
        headers: Tokens of the two headers that are in the KV cache as a whole.
        live: Request that writes a run, by role.

    """

    layout: Layout
    prompt: Run | None = None
    history: tuple[Run, ...] = ()
    headers: Mapping[int, Run] = ()  # type: ignore[assignment]
    live: Mapping[int, str] = ()  # type: ignore[assignment]

    def view(self, role: int, live_run: Callable[[int], Run]) -> list[Turned]:
        """Return what a row sees, its own run last.

        Args:
            role: Whose row it is.
            live_run: Returns a live run with the tokens it has once this step is computed.

        """
        own = live_run(role)
        runs = [run for run in self._before(role, live_run) if run.length]
        start = sum(run.length for run in runs)
        turned, place = [], 0
        for run in runs:
            turned.append(Turned(run, start - place))
            place += run.length
        return [*turned, Turned(own, 0)]

    def _before(self, role: int, live_run: Callable[[int], Run]) -> Iterator[Run]:
        assert self.prompt is not None, "writers start after the prompt"
        yield self.prompt
        if role in (OTHERS, OWN):
            return
        others = [w for w in sorted(self.live) if w >= 0 and w != role]
        if self.layout == "contiguous" and role >= 0:
            yield from self._header(OTHERS, live_run)
            writers = {run.role for run in self.history} | set(others)
            for writer in sorted(writers - {role}):
                yield from _written_by(writer, self.history)
                if writer in self.live:
                    yield live_run(writer)
            yield from self._header(OWN, live_run)
            yield from _written_by(role, self.history)
            return
        yield from self.history
        if role >= 0 and self.layout == "combined":
            yield from self._header(OTHERS, live_run)
            for writer in others:
                yield live_run(writer)
            yield from self._header(OWN, live_run)

    def _header(self, role: int, live_run: Callable[[int], Run]) -> Iterator[Run]:
        if role in self.headers:
            yield self.headers[role]
        elif role in self.live:
            yield live_run(role)


def _written_by(writer: int, history: Sequence[Run]) -> Iterator[Run]:
    return (run for run in history if run.role == writer)
