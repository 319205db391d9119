"""The vLLM releases that this package knows."""

from __future__ import annotations

from packaging.version import Version

from ..core.config.server_options import FLAG
from ..core.errors import OptionError

SUPPORTED = (Version("0.32"), Version("0.34"))
"""vLLM versions from the first up to, not including, the second."""


def check_version(version: str) -> None:
    """Refuse a vLLM whose seams this plugin does not know.

    Raises:
        OptionError: Names the version found and those supported.

    """
    low, high = SUPPORTED
    if not low <= Version(version) < high:
        raise OptionError(
            f"vllm-parallel-think supports vLLM >={low},<{high}, found {version}: "
            f"install a supported vLLM, or remove parallel_think from {FLAG.split()[0]}"
        )
