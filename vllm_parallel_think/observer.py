"""What is shown of groups to people: metrics, the page of recent requests, spans.

The scheduler reports what happens to its families; nothing here decides anything, and a fault here
turns the showing off, never the engine.
"""

from __future__ import annotations

import time
from typing import Any

import vllm
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from . import __version__
from .families import Family, FamilyTable
from .ledger import BlockLedger
from .metrics.instruments import instruments
from .metrics.recorder import Load, Recorder

logger = init_logger(__name__)

SECONDS_BETWEEN_LOOKS = 0.25
"""How often gauges follow the engine; steps in between cost one reading of the clock."""


class Observer:
    """Tells people what a scheduler's families do."""

    def __init__(
        self,
        config: VllmConfig,
        families: FamilyTable,
        ledger: BlockLedger,
    ) -> None:
        self._families = families
        self._ledger = ledger
        self._next_look = 0.0
        self._recorder: Recorder | None = None
        self._engine = str(config.parallel_config.data_parallel_index)

    def count(self, default: str, profiles: list[str], pool_blocks: int) -> None:
        """Export metrics from now on.

        Args:
            default: Profile of requests that name none.
            profiles: Profiles that are shown before anybody asks for them.
            pool_blocks: KV blocks of this engine.

        """
        try:
            made = instruments()
            if made is not None:
                self._recorder = Recorder(made, self._engine)
                self._recorder.introduce(
                    __version__, vllm.__version__, default, pool_blocks, profiles
                )
        except Exception:
            self._recorder = None
            logger.exception("vllm_pt_ metrics are not exported")

    def started(self, family: Family) -> None:
        """Take note of a request that may branch."""
        self._tell("started", family)

    def changed(self, family: Family) -> None:
        """Take note of forks, joins and ends in a family."""
        self._tell("changed", family)

    def ended(self, family: Family, outcome: str) -> None:
        """Take note of a family's end; its blocks are back and it is no longer listed."""
        self._tell("ended", family, outcome)
        if not self._families:  # perhaps the last step for a long time
            self._look()

    def stepped(self) -> None:
        """Look at the families, if it is time to."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + SECONDS_BETWEEN_LOOKS
            self._look()

    def _look(self) -> None:
        if self._recorder is not None:
            self._tell("load", self._load())

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

    def _tell(self, event: str, *values: Any) -> None:
        if self._recorder is not None:
            try:
                getattr(self._recorder, event)(*values)
            except Exception:
                self._recorder = None
                logger.exception("vllm_pt_ metrics stand still from now on")
