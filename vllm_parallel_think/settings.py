"""The plugin's settings, read from vLLM's configuration in whichever process asks."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config import VllmConfig

from .core.options import CONFIG_KEY, ServerOptions
from .core.profile import Profile, builtin_profiles, load_profile


@dataclass(frozen=True)
class Settings:
    """Server options with their profiles loaded.

    Attributes:
        options: As the operator set them.
        profiles: Profiles that requests may name, by name.
        default: Name of the profile for requests that name none, or ``off``.
        judge_threshold: Least threshold of the judge, where it has one and the model is known.

    """

    options: ServerOptions
    profiles: dict[str, Profile]
    default: str
    judge_threshold: float | None = None

    @classmethod
    def load(cls, options: ServerOptions) -> Settings:
        """Load every profile that requests may name.

        Raises:
            OptionError: A profile does not exist or is not valid.

        """
        profiles = {name: load_profile(name) for name in builtin_profiles()}
        for path in options.profiles:
            profile = load_profile(path)
            profiles[profile.name] = profile
        default = "off"
        if options.profile != "off":
            chosen = profiles.get(options.profile) or load_profile(options.profile)
            profiles[chosen.name] = chosen
            default = chosen.name
        return cls(options, profiles, default)

    @classmethod
    def from_config(cls, vllm_config: VllmConfig) -> Settings:
        """Load the settings of a configured server."""
        return cls.load(ServerOptions.parse(raw_options(vllm_config)))


def raw_options(vllm_config: VllmConfig) -> object | None:
    """Return what ``--additional-config`` says about this plugin, or ``None``."""
    additional = vllm_config.additional_config
    return additional.get(CONFIG_KEY) if isinstance(additional, dict) else None
