"""What is known of a group at any time, in figures: for the client, the metrics and the traces."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class FallbackReason(enum.StrEnum):
    """Why a fork that the model asked for was not made, or a group did not run as it should."""

    NOT_OPENED = "not_opened"
    FEWER_THAN_TWO_PATHS = "fewer_than_two_paths"
    MAX_PATHS = "max_paths"
    MAX_DEPTH = "max_depth"
    MAX_FORKS = "max_forks"
    MAX_TOKENS = "max_tokens"
    MAX_MODEL_LEN = "max_model_len"
    HELD_KV_FRACTION = "held_kv_fraction"
    PROMPT_OF_ONE_TOKEN = "prompt_of_one_token"
    OUT_OF_STEP = "out_of_step"
    """Workers did not take a step of the engine together: no fork, and nothing that may happen."""


Fallbacks = Counter[FallbackReason]


@dataclass(frozen=True)
class Votes:
    """How one of several independent answers was chosen.

    Attributes:
        answer: The most frequent one, ``None`` if none was found.
        counts: How many answers said what, most frequent first.
        paths: Independent answers.

    """

    answer: str | None
    counts: Mapping[str, int]
    paths: int


@dataclass(frozen=True)
class WriterFigures:
    """What one worker wrote."""

    name: str
    steps: int
    tokens: int


@dataclass(frozen=True)
class HogwildFigures:
    """What workers that see each other wrote.

    Attributes:
        layout: How they see each other.
        steps: Their steps.
        checks_yes: Checks that a worker answered with yes.
        checks_no: Checks that it answered otherwise.
        workers: Each of them.

    """

    layout: str
    steps: int
    checks_yes: int
    checks_no: int
    workers: tuple[WriterFigures, ...]


@dataclass(frozen=True)
class Summary:
    """A request's figures so far.

    Attributes:
        profile: Name of the profile.
        join: ``kv`` or ``reprefill``, ``live`` for workers.
        forks: Forks.
        paths: Paths that they opened.
        widest_fork: Paths of the widest of them, 1 without one.
        depth: Deepest nesting.
        generated_tokens: Sampled tokens.
        forced_tokens: Tokens of the answer that the engine wrote.
        critical_path_tokens: Sampled tokens on the longest chain.
        reused_kv_tokens: Tokens whose K/V branches took over instead of computing it.
        cut_paths: Paths that did not end themselves.
        fallbacks: How often something was not done, by reason; reasons without any are left out.
        reused_tags: Paths that share a control token with another one; ``None`` where paths have
            none.
        votes: How the answer was chosen; ``None`` where it was not, or not yet.
        hogwild: What workers wrote; ``None`` where there are none.

    """

    profile: str
    join: str
    forks: int
    paths: int
    widest_fork: int
    depth: int
    generated_tokens: int
    forced_tokens: int
    critical_path_tokens: int
    reused_kv_tokens: int
    cut_paths: int
    fallbacks: Mapping[FallbackReason, int]
    reused_tags: int | None = None
    votes: Votes | None = None
    hogwild: HogwildFigures | None = None

    @property
    def parallelism_ratio(self) -> float:
        """Generated tokens over those of the critical path."""
        if not self.critical_path_tokens:
            return 1.0
        return round(self.generated_tokens / self.critical_path_tokens, 4)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain values, in the order in which clients get them."""
        values: dict[str, Any] = {
            "profile": self.profile,
            "join": self.join,
            "forks": self.forks,
            "paths": self.paths,
            "widest_fork": self.widest_fork,
            "depth": self.depth,
            "generated_tokens": self.generated_tokens,
            "forced_tokens": self.forced_tokens,
            "critical_path_tokens": self.critical_path_tokens,
            "parallelism_ratio": self.parallelism_ratio,
            "reused_kv_tokens": self.reused_kv_tokens,
            "cut_paths": self.cut_paths,
            "fallbacks": {reason.value: num for reason, num in self.fallbacks.items()},
        }
        if self.reused_tags is not None:
            values["reused_tags"] = self.reused_tags
        if self.votes is not None:
            values["votes"] = dict(vars(self.votes))
        if self.hogwild is not None:
            workers = [dict(vars(worker)) for worker in self.hogwild.workers]
            values["hogwild"] = {**vars(self.hogwild), "workers": workers}
        return values
