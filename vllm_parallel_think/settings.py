"""The plugin's settings, read from vLLM's configuration in whichever process asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig

from .core.config.hogwild_profile import HogwildProfile
from .core.config.loading import builtin_profiles, load_profile
from .core.config.profile import Profile
from .core.config.server_options import CONFIG_KEY, ServerOptions
from .core.errors import OptionError, quoted


@dataclass(frozen=True)
class Settings:
    """Server options with their profiles loaded.

    Attributes:
        options: As the operator set them.
        profiles: Profiles that requests may name, by name.
        default: Name of the profile for requests that name none, or ``off``.
        judge_threshold: Least threshold of the judge, where it has one and the model is known.
        no_workers: Why this server cannot run profiles with workers, if it cannot.

    """

    options: ServerOptions
    profiles: dict[str, Profile | HogwildProfile]
    default: str
    judge_threshold: float | None = None
    no_workers: str | None = None

    @classmethod
    def load(cls, options: ServerOptions) -> Settings:
        """Load every profile that requests may name.

        Raises:
            OptionError: A profile does not exist or is not valid.

        """
        profiles = {name: load_profile(name) for name in builtin_profiles()}
        for path in options.profiles:
            cls._add(profiles, path)
        default = "off"
        if options.profile in profiles:
            default = options.profile
        elif options.profile != "off":
            default = cls._add(profiles, options.profile)
        return cls(options, profiles, default)

    @staticmethod
    def _add(profiles: dict[str, Profile | HogwildProfile], path: str) -> str:
        """Load a profile file; return its name."""
        profile = load_profile(path)
        taken = profiles.get(profile.name)
        if profile.name == "off" or (taken is not None and taken != profile):
            raise OptionError(
                f"profile {path}: the name {quoted(profile.name)} is taken; choose another one"
            )
        profiles[profile.name] = profile
        return profile.name

    @classmethod
    def from_config(cls, vllm_config: VllmConfig) -> Settings:
        """Load the settings of a configured server."""
        return cls.load(ServerOptions.parse(raw_options(vllm_config)))


def raw_options(vllm_config: VllmConfig) -> object | None:
    """Return what ``--additional-config`` says about this plugin, or ``None``."""
    additional = vllm_config.additional_config
    return additional.get(CONFIG_KEY) if isinstance(additional, dict) else None


def workers_refusal(vllm_config: VllmConfig) -> str | None:
    """Return why a server cannot run profiles with workers that see each other, if it cannot."""
    parallel = vllm_config.parallel_config
    reasons = {
        "workers would see each other's unverified drafts: drop --speculative-config": (
            vllm_config.speculative_config is not None
        ),
        "workers see each other's newest tokens: start the server with --no-async-scheduling": bool(
            vllm_config.scheduler_config.async_scheduling
        ),
        "workers' rows must run in one forward: drop --pipeline-parallel-size": (
            parallel.pipeline_parallel_size > 1
        ),
        "workers read each other's keys through rotated queries, which this model's positions "
        "do not allow": not _rotates_alike(vllm_config.model_config.hf_text_config),
    }
    return next((reason for reason, present in reasons.items() if present), None)


ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
"""Kinds of rotary positions whose frequencies are the same for every length of a text."""


def _rotates_alike(config: Any) -> bool:
    """Whether all layers of a model rotate queries and keys by the same, fixed frequencies."""
    rope = getattr(config, "rope_parameters", None)
    return isinstance(rope, dict) and rope.get("rope_type") in ROPE_TYPES
