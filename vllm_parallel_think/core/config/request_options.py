"""Request options: the keys of one request's ``vllm_xargs``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import OptionError, quoted, shortened
from .hogwild_profile import LAYOUTS, MAX_WORKERS, HogwildProfile, Layout
from .profile import Profile
from .server_options import ServerOptions, check_number

LIVE_KEY = "parallel_think_live"
"""Beside the summary: where every path stands, for clients that asked to see it."""


@dataclass(frozen=True)
class RequestOptions:
    """What one request asks for, within the server's limits.

    Attributes:
        profile: Name of the profile, or ``None`` for a request that is left alone.
        max_paths: Most paths of one fork.
        max_depth: Deepest nesting.
        path_tokens: Budget of one path's critical length, ``None`` for the profile's.
        critical_tokens: Budget of the critical path, ``None`` for unlimited.
        join: ``kv``, ``reprefill``, or ``None`` for the profile's.
        live: Whether a streaming client wants to see all paths grow, not only the one whose turn it
            is in the text.
        num_paths: Paths of a profile that forks at the start, ``None`` for the profile's number.
        summary_tokens: Budget of the conclusion, ``None`` for unlimited.
        termination: Share of the paths that must have ended before all others are cut.
        path_temperature: Sampling temperature of paths, ``None`` for the request's.
        vote: Whether the paths are independent answers, and the majority's is sent.
        num_workers: Workers of a Hogwild profile, ``None`` for the profile's number.
        layout: How they see each other, ``None`` for the profile's.
        check_every: Tokens from one redundancy check to the next, ``None`` for the profile's.
        worker_tokens: Tokens that each worker may sample, ``None`` for the profile's.

    """

    profile: str | None
    max_paths: int
    max_depth: int
    path_tokens: int | None = None
    critical_tokens: int | None = None
    join: Literal["kv", "reprefill"] | None = None
    live: bool = False
    num_paths: int | None = None
    summary_tokens: int | None = None
    termination: float = 1.0
    path_temperature: float | None = None
    vote: bool = False
    num_workers: int | None = None
    layout: Layout | None = None
    check_every: int | None = None
    worker_tokens: int | None = None

    def within(self, max_tokens: int | None) -> RequestOptions:
        """Return what these options come to in an answer of at most so many tokens.

        A single token cannot be thought in parallel, and a forced one would stand in its place. So
        a request for one token is left alone, whoever sent it: a client that reads the next token's
        log-probabilities, or vLLM itself, which makes such requests for beams and for scores and
        cannot be told to turn branches off.
        """
        return replace(self, profile=None) if max_tokens == 1 else self


AT_START_KEYS = (
    "pt_num_paths",
    "pt_summary_tokens",
    "pt_termination",
    "pt_path_temperature",
    "pt_vote",
)
"""Keys for profiles that fork at the start."""

HOGWILD_KEYS = ("pt_num_workers", "pt_layout", "pt_check_every", "pt_worker_tokens")
"""Keys for profiles with workers that see each other."""

PATH_KEYS = ("pt_max_paths", "pt_max_depth", "pt_path_tokens", "pt_critical_tokens", "pt_join")
"""Keys for profiles with paths."""

TERMINATIONS = {"first": 0.0, "half": 0.5, "all": 1.0}

REQUEST_KEYS = (
    "parallel_think",
    "pt_max_paths",
    "pt_max_depth",
    "pt_path_tokens",
    "pt_critical_tokens",
    "pt_join",
    "pt_live",
    *AT_START_KEYS,
    *HOGWILD_KEYS,
    "pt_judge",
    "pt_judge_threshold",
)
JUDGE_KEYS = ("parallel_think", "pt_judge", "pt_judge_threshold")
"""What the verification of draft tokens needs of a request's ``vllm_xargs``, in every branch."""
GROUP_KEY = "pt_group"
"""Set by the scheduler on branches: the client's request. No client may send it."""


def is_ours(key: str) -> bool:
    """Return whether a ``vllm_xargs`` key belongs to this plugin."""
    return key == "parallel_think" or key.startswith("pt_")


def parse_request(
    extra: Mapping[str, Any] | None,
    server: ServerOptions,
    profiles: Mapping[str, Profile | HogwildProfile],
    default: str,
    judge_threshold: float | None = None,
    no_workers: str | None = None,
) -> RequestOptions:
    """Check a request's ``vllm_xargs`` against the server's limits.

    Args:
        extra: ``SamplingParams.extra_args``; keys that are not ours are ignored.
        server: The server's settings.
        profiles: Profiles that requests may name, by name.
        default: Profile of requests that name none, or ``off``.
        judge_threshold: The judge's threshold, which a request may only raise; ``None`` where the
            rule has none, or is not known.
        no_workers: Why this server cannot run profiles with workers, if it cannot.

    Raises:
        OptionError: Names the key, the value and what is allowed; suits an HTTP 400.

    """
    values = {key: value for key, value in (extra or {}).items() if is_ours(key)}
    if unknown := sorted(set(values) - set(REQUEST_KEYS)):
        raise OptionError(
            f"vllm_xargs.{shortened(unknown[0])} is unknown; allowed: {', '.join(REQUEST_KEYS)}"
        )
    name = values.get("parallel_think", default)
    names = [*profiles, "off"]
    if not isinstance(name, str) or name not in names:
        raise OptionError(
            f"vllm_xargs.parallel_think must be one of {', '.join(names)}; got {quoted(name)}"
        )
    where = "vllm_xargs"
    _check_workers(values, name, profiles, server, no_workers)
    check_number(values, "pt_max_paths", 1, server.max_paths, where)
    check_number(values, "pt_max_depth", 0, server.max_depth, where)
    check_number(values, "pt_path_tokens", 1, 2**31, where)
    check_number(values, "pt_critical_tokens", 1, 2**31, where)
    join = values.get("pt_join")
    if join not in (None, "kv", "reprefill"):
        raise OptionError(f"vllm_xargs.pt_join must be kv or reprefill; got {quoted(join)}")
    live, votes = _flag(values, "pt_live"), _flag(values, "pt_vote")
    _check_at_start(values, name, profiles)
    check_number(values, "pt_num_paths", 1, server.max_paths, where)
    check_number(values, "pt_summary_tokens", 1, 2**31, where)
    _check_judge(values, server, judge_threshold)
    return RequestOptions(
        profile=None if name == "off" else name,
        max_paths=values.get("pt_max_paths", server.max_paths),
        max_depth=values.get("pt_max_depth", server.max_depth),
        path_tokens=values.get("pt_path_tokens"),
        critical_tokens=values.get("pt_critical_tokens"),
        join=join,
        live=live,
        num_paths=values.get("pt_num_paths"),
        summary_tokens=values.get("pt_summary_tokens"),
        termination=_termination(values.get("pt_termination", "all")),
        path_temperature=_temperature(values.get("pt_path_temperature")),
        vote=votes,
        num_workers=values.get("pt_num_workers"),
        layout=values.get("pt_layout"),
        check_every=values.get("pt_check_every"),
        worker_tokens=values.get("pt_worker_tokens"),
    )


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if value not in (0, 1) or not isinstance(value, int):
        raise OptionError(f"vllm_xargs.{key} must be true or false; got {quoted(value)}")
    return bool(value)


def _check_workers(
    values: Mapping[str, Any],
    name: str,
    profiles: Mapping[str, Profile | HogwildProfile],
    server: ServerOptions,
    no_workers: str | None,
) -> None:
    """Check the keys of workers, and refuse them and paths' keys where they mean nothing."""
    profile = profiles.get(name)
    if not isinstance(profile, HogwildProfile):
        if wrong := [key for key in HOGWILD_KEYS if key in values]:
            fitting = [
                known for known, found in profiles.items() if isinstance(found, HogwildProfile)
            ]
            raise OptionError(
                f"vllm_xargs.{wrong[0]} needs a profile with workers ({', '.join(fitting)}); "
                f"got {quoted(name)}"
            )
        return
    if no_workers is not None:
        raise OptionError(f"vllm_xargs.parallel_think {quoted(name)}: {no_workers}")
    if wrong := [key for key in PATH_KEYS if key in values]:
        raise OptionError(
            f"vllm_xargs.{wrong[0]} means nothing to the workers of {quoted(name)}; allowed beside "
            f"it: {', '.join(HOGWILD_KEYS)}"
        )
    most = min(MAX_WORKERS, server.max_paths, len(profile.workers.names))
    check_number(values, "pt_num_workers", 2, most, "vllm_xargs")
    if values.get("pt_num_workers", profile.workers.num_workers) > most:
        raise OptionError(
            f"vllm_xargs.pt_num_workers: {quoted(name)} has {profile.workers.num_workers} workers, "
            f"this server allows {most} (max_paths); send fewer"
        )
    check_number(values, "pt_check_every", 0, 2**31, "vllm_xargs")
    check_number(values, "pt_worker_tokens", 1, 2**31, "vllm_xargs")
    layout = values.get("pt_layout", LAYOUTS[0])
    if layout not in LAYOUTS:
        raise OptionError(
            f"vllm_xargs.pt_layout must be one of {', '.join(LAYOUTS)}; got {quoted(layout)}"
        )


def _check_at_start(
    values: Mapping[str, Any], name: str, profiles: Mapping[str, Profile | HogwildProfile]
) -> None:
    """Refuse keys that a profile has no use for."""

    def at_start(profile: Profile | HogwildProfile | None) -> bool:
        return isinstance(profile, Profile) and profile.fork.at_start

    if at_start(profiles.get(name)):
        return
    if wrong := [key for key in AT_START_KEYS if key in values]:
        fitting = [known for known, profile in profiles.items() if at_start(profile)]
        raise OptionError(
            f"vllm_xargs.{wrong[0]} needs a profile that forks at the start "
            f"({', '.join(fitting)}); got {quoted(name)}"
        )


def _termination(value: object) -> float:
    if isinstance(value, str) and value in TERMINATIONS:
        return TERMINATIONS[value]
    if isinstance(value, str):  # plain values travel as text in some clients
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise OptionError(
            f"vllm_xargs.pt_termination must be {', '.join(TERMINATIONS)} or a number above 0 and "
            f"at most 1; got {quoted(value)}"
        )
    return float(value)


def _temperature(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 2:
        raise OptionError(
            f"vllm_xargs.pt_path_temperature must be a number between 0 and 2; got {quoted(value)}"
        )
    return float(value)


def _check_judge(
    values: Mapping[str, Any], server: ServerOptions, server_threshold: float | None
) -> None:
    if _flag(values, "pt_judge") and server.judge is None:
        raise OptionError("vllm_xargs.pt_judge: this server runs no judge; leave it out")
    if "pt_judge_threshold" not in values:
        return
    if server.judge is None or server.judge.get("rule") != "judge":
        raise OptionError(
            "vllm_xargs.pt_judge_threshold: this server has no judge with a threshold; leave it out"
        )
    low, value = server_threshold or 0, values["pt_judge_threshold"]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= 1:
        raise OptionError(
            f"vllm_xargs.pt_judge_threshold must be a number between {low} (the server's) and 1; "
            f"got {quoted(value)}"
        )
