"""Server options: the keys of ``parallel_think`` in ``--additional-config``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import OptionError, quoted
from .loading import compiled
from .profile import MAX_PATHS_LIMIT

CONFIG_KEY = "parallel_think"
FLAG = "--additional-config '{\"parallel_think\": {...}}'"

MAX_DEPTH_LIMIT = 8


@dataclass(frozen=True)
class ServerOptions:
    """The server's settings, all of them keys of ``parallel_think`` in ``--additional-config``.

    Attributes:
        profile: Built-in profile, or path of a ``.toml`` file, for requests that name none;
            ``off`` leaves requests alone unless they name one.
        profiles: Further profile files that requests may name.
        max_paths: Most paths one fork may have (2-64).
        max_depth: Deepest nesting of forks (1-8).
        max_forks: Most forks in one request.
        max_total_tokens: Most visible tokens of one request, whatever its ``max_tokens``;
            ``None`` leaves that to ``max_tokens``.
        held_kv_fraction: Share of the KV pool that groups may hold; beyond it a request that wants
            to fork goes on sequentially (0-1].
        thought_embeddings: A ``.safetensors`` file with ParaThinker's thought embeddings for this
            model, for profiles whose paths have ``num_tags``; ``None`` for none.
        vote_pattern: Regular expression that finds the final answer of a text for ``pt_vote`` (its
            first group, its last match), before ``\\boxed{}`` and the last number. It sees the
            last 4096 characters of a text; an expression that takes exponential time on those (as
            nested repetitions do) would stop the engine.
        block_size: KV block size when ``--block-size`` is not given; small blocks waste fewer slots
            where branches start. ``None`` picks one that fits the attention backend.
        judge: Rule that verifies draft tokens, with its parameters; ``None`` for vLLM's own test
            alone. What is in it is checked where the model is known.

    """

    profile: str = "multiverse"
    profiles: tuple[str, ...] = ()
    max_paths: int = 8
    max_depth: int = 2
    max_forks: int = 64
    max_total_tokens: int | None = None
    held_kv_fraction: float = 0.9
    thought_embeddings: str | None = None
    vote_pattern: str | None = None
    block_size: int | None = None
    judge: Mapping[str, Any] | None = None

    @classmethod
    def parse(cls, raw: object) -> ServerOptions:
        """Check the server's settings.

        Raises:
            OptionError: Names the key, the value and what is allowed.

        """
        if not isinstance(raw, Mapping):
            raise OptionError(f"{FLAG}: expected an object, got {quoted(raw)}")
        allowed = [f.name for f in fields(cls)]
        if unknown := sorted(set(raw) - set(allowed)):
            raise OptionError(
                f"{FLAG}: unknown key {quoted(unknown[0])}; allowed: {', '.join(allowed)}"
            )
        values = dict(raw)
        if not isinstance(values.get("profile", ""), str):
            raise OptionError(f"{FLAG}: profile must be a name, got {quoted(values['profile'])}")
        extra = values.get("profiles", ())
        if not isinstance(extra, (list, tuple)) or not all(isinstance(p, str) for p in extra):
            raise OptionError(
                f"{FLAG}: profiles must be a list of .toml paths, got {quoted(extra)}"
            )
        values["profiles"] = tuple(extra)
        check_number(values, "max_paths", 2, MAX_PATHS_LIMIT, FLAG)
        check_number(values, "max_depth", 1, MAX_DEPTH_LIMIT, FLAG)
        check_number(values, "max_forks", 1, 1_000_000, FLAG)
        check_number(values, "max_total_tokens", 1, 2**31, FLAG, optional=True)
        check_number(values, "block_size", 1, 1024, FLAG, optional=True)
        thoughts = values.get("thought_embeddings")
        if thoughts is not None and not isinstance(thoughts, str):
            raise OptionError(f"{FLAG}: thought_embeddings must be a path, got {quoted(thoughts)}")
        pattern = values.get("vote_pattern")
        if pattern is not None:
            compiled(pattern, f"{FLAG}: vote_pattern")
        fraction = values.get("held_kv_fraction", 0.9)
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
            raise OptionError(f"{FLAG}: held_kv_fraction must be a number, got {quoted(fraction)}")
        if not 0 < fraction <= 1:
            raise OptionError(
                f"{FLAG}: held_kv_fraction must be above 0 and at most 1, got {quoted(fraction)}"
            )
        judge = values.get("judge")
        if judge is not None and not isinstance(judge, Mapping):
            raise OptionError(
                f"{FLAG}: judge must be an object such as "
                f'{{"rule": "judge", "weights": "judge.safetensors"}}, got {quoted(judge)}'
            )
        return cls(**values)


def check_number(
    values: Mapping[str, Any], key: str, low: int, high: int, where: str, optional: bool = False
) -> None:
    """Refuse a value that is no whole number between two bounds.

    Args:
        values: What somebody set.
        key: The value's key; one that is not there is right.
        low: Least number allowed.
        high: Largest; from ``2**31`` on the message names no upper bound.
        where: How to call the place of the key in the message.
        optional: Whether ``None`` is as good as no key.

    Raises:
        OptionError: Names the key, the value and what is allowed.

    """
    value = values.get(key)
    if value is None and (optional or key not in values):
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        upper = f" and {high}" if high < 2**31 else ""
        span = f"between {low}{upper}" if upper else f"of at least {low}"
        raise OptionError(f"{where}: {key} must be a whole number {span}, got {quoted(value)}")
