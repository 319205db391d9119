"""The plugin's settings, read from vLLM's configuration in whichever process asks."""

from __future__ import annotations

from dataclasses import dataclass

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
