"""What is shown of groups to people: metrics, the page of recent requests, spans.

The scheduler reports what happens to its families; nothing here decides anything, and a fault here
turns the showing off for a while, never the engine.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import vllm
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.request import RequestStatus

from .. import __version__
from .metrics import export
from .metrics.instruments import instruments
from .metrics.outage import Outage
from .metrics.recorder import Load, Recorder
from .page import PLUGIN
from .page.timelines import TimelineWriter

if TYPE_CHECKING:
    from ..scheduler.group_table import GroupState, GroupTable
    from ..scheduler.held_blocks import HeldBlocks

logger = logging.getLogger("vllm.parallel_think")

SECONDS_BETWEEN_LOOKS = 0.25
"""How often what is shown follows the engine; steps in between cost one reading of the clock."""


def _span_writer(config: VllmConfig) -> Viewer:
    from .tracing import SpanWriter  # OpenTelemetry is loaded only where it is used

    return SpanWriter(config)


class Viewer(Protocol):
    """Somebody who is told of families; each event is optional."""

    def ended(self, family: GroupState, outcome: str) -> None:
        """Take note of a family's end."""


class Observer:
    """Tells viewers what a scheduler's families do; one that fails is told nothing for a while."""

    def __init__(self, config: VllmConfig, families: GroupTable, ledger: HeldBlocks) -> None:
        self._families = families
        self._ledger = ledger
        self._engine = str(config.parallel_config.data_parallel_index)
        self._next_look = 0.0
        self._changed: dict[GroupState, None] = {}
        """Families in which something happened since the last look, in order."""
        self._viewers: dict[str, Viewer] = {}
        self._outages: defaultdict[str, Outage] = defaultdict(Outage)
        if config.observability_config.otlp_traces_endpoint is not None:
            self._attach("spans", lambda: _span_writer(config))
        if PLUGIN in (envs.VLLM_PLUGINS or ()):
            directory = export.directory()
            if directory is not None:
                self._attach("timelines", lambda: TimelineWriter(directory, self._engine))

    def count(self, default: str, profiles: list[str], pool_blocks: int) -> None:
        """Export metrics from now on.

        Args:
            default: Profile of requests that name none.
            profiles: Profiles that are shown before anybody asks for them.
            pool_blocks: KV blocks of this engine.

        """

        def make() -> Recorder | None:
            made = instruments()
            if made is None:
                return None
            recorder = Recorder(made, self._engine)
            recorder.introduce(__version__, vllm.__version__, default, pool_blocks, profiles)
            return recorder

        self._attach("metrics", make)

    def started(self, family: GroupState) -> None:
        """Take note of a request that may branch."""
        self._tell("started", family)

    def changed(self, family: GroupState) -> None:
        """Take note of forks, joins and ends in a family; told at the next look.

        Many branches end in the same steps, and their step must not wait for so many counters.
        """
        if self._viewers:
            self._changed[family] = None

    def ended(self, family: GroupState, outcome: str) -> None:
        """Take note of a family's end; its blocks are back and it is no longer listed."""
        self._changed.pop(family, None)
        self._tell("ended", family, outcome)
        if not self._families:  # perhaps the last step for a long time
            self._look()

    def stalled(self) -> None:
        """Take note that steps without work had to be ended."""
        self._tell("stalled")

    def stepped(self) -> None:
        """Look at the families, if it is time to."""
        if not self._viewers:
            return
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + SECONDS_BETWEEN_LOOKS
            self._look()

    def _look(self) -> None:
        changed, self._changed = self._changed, {}
        for family in changed:
            self._tell("changed", family)
        if "metrics" in self._viewers:
            self._tell("load", self._load())
        self._tell("write", self._families)

    def _load(self) -> Load:
        groups = running = waiting = 0
        for family in self._families:
            if not family.group.branched:
                continue
            groups += 1
            for request in family.requests.values():
                if request.status == RequestStatus.RUNNING:
                    running += 1
                else:
                    waiting += 1
        return Load(groups, running, waiting, self._ledger.num_held)

    def _attach(self, name: str, make: Callable[[], Viewer | None]) -> None:
        try:
            viewer = make()
        except Exception:
            logger.exception("parallel_think shows no %s", name)
        else:
            if viewer is not None:
                self._viewers[name] = viewer

    def _tell(self, event: str, *values: Any) -> None:
        for name, viewer in self._viewers.items():
            take = getattr(viewer, event, None)
            outage = self._outages[name]
            if take is None or not outage.due():
                continue
            try:
                take(*values)
            except Exception:
                if outage.failed():
                    logger.exception("parallel_think shows no %s for now", name)
            else:
                if outage.ended():
                    logger.info("parallel_think shows %s again; some of before is missing", name)
