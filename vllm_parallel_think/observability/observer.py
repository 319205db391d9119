"""What is shown of groups to people: metrics, the page of recent requests, spans.

The scheduler reports what happens to its groups; nothing here decides anything, and a fault here
turns the showing off for a while, never the engine.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import vllm
from vllm import envs
from vllm.config import VllmConfig

from .. import __version__
from ..compat.logger import init_logger
from .metrics import export
from .metrics.instruments import instruments
from .metrics.outage import Outage
from .metrics.recorder import Recorder
from .observed_group import Load, ObservedGroup, ObservedGroups, Viewer
from .page import PLUGIN
from .page.timelines import TimelineWriter

Values = ParamSpec("Values")

logger = init_logger(__name__)

SECONDS_BETWEEN_LOOKS = 0.25
"""How often what is shown follows the engine; steps in between cost one reading of the clock."""


def _span_writer(config: VllmConfig) -> Viewer:
    from .tracing import SpanWriter  # OpenTelemetry is loaded only where it is used

    return SpanWriter(config)


class Observer:
    """Notifies viewers of what a scheduler's groups do; one that fails is left out for a while."""

    def __init__(
        self, config: VllmConfig, groups: ObservedGroups, load: Callable[[], Load]
    ) -> None:
        """Attach the viewers that the server is configured for.

        Args:
            config: vLLM's.
            groups: The scheduler's groups, kept up to date by it.
            load: Returns what they keep busy.

        """
        self._groups = groups
        self._load = load
        self._engine = str(config.parallel_config.data_parallel_index)
        self._next_look = 0.0
        self._changed: dict[ObservedGroup, None] = {}
        """Groups in which something happened since the last look, in order."""
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

    def started(self, observed: ObservedGroup) -> None:
        """Show a request that may branch."""
        self._notify(Viewer.started, observed)

    def changed(self, observed: ObservedGroup) -> None:
        """Show forks, joins and ends in a group, at the next look.

        Many branches end in the same steps, and their step must not wait for so many counters.
        """
        if self._viewers:
            self._changed[observed] = None

    def ended(self, observed: ObservedGroup, outcome: str) -> None:
        """Show the end of a request; its blocks are back and it is no longer listed."""
        self._changed.pop(observed, None)
        self._notify(Viewer.ended, observed, outcome)
        if not self._groups:  # perhaps the last step for a long time
            self._look()

    def stalled(self) -> None:
        """Show that steps without work had to be ended."""
        self._notify(Viewer.stalled)

    def stepped(self) -> None:
        """Look at the groups, if it is time to."""
        if not self._viewers:
            return
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + SECONDS_BETWEEN_LOOKS
            self._look()

    def _look(self) -> None:
        changed, self._changed = self._changed, {}
        for observed in changed:
            self._notify(Viewer.changed, observed)
        if "metrics" in self._viewers:
            self._notify(Viewer.load, self._load())
        self._notify(Viewer.write, self._groups)

    def _attach(self, name: str, make: Callable[[], Viewer | None]) -> None:
        try:
            viewer = make()
        except Exception:
            logger.exception("parallel_think shows no %s", name)
        else:
            if viewer is not None:
                self._viewers[name] = viewer

    def _notify(
        self,
        event: Callable[Concatenate[Viewer, Values], None],
        *values: Values.args,
        **named: Values.kwargs,
    ) -> None:
        for name, viewer in self._viewers.items():
            take = getattr(type(viewer), event.__name__)
            outage = self._outages[name]
            # An event that a viewer does not show says nothing about whether it works again.
            if take is event or not outage.due():
                continue
            try:
                take(viewer, *values, **named)
            except Exception:
                if outage.failed():
                    logger.exception("parallel_think shows no %s for now", name)
            else:
                if outage.ended():
                    logger.info("parallel_think shows %s again; some of before is missing", name)
