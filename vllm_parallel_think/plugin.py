"""The entry point that vLLM loads in every process."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

logger = logging.getLogger("vllm.parallel_think")

_registered = False


def register() -> None:
    """Let vLLM's configuration pass through ours; changes nothing unless it asks for us.

    Never raises: vLLM does not catch what an entry point raises, and would not start for anybody.
    """
    global _registered
    if _registered:
        return
    _registered = True
    try:
        _wrap_platform_check()
    except Exception:
        logger.exception("vllm-parallel-think is not available: this vLLM has no seam it knows")


def _wrap_platform_check() -> None:
    """Run :func:`configure` after the platform's own check."""
    from vllm.platforms import current_platform

    from .compat.patches import CHECK_CONFIG

    CHECK_CONFIG.apply(type(current_platform), _with_configure)


def _with_configure(check: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(check)
    def check_and_update_config(cls: type, vllm_config: object) -> None:
        check(cls, vllm_config)
        additional = getattr(vllm_config, "additional_config", None)
        if isinstance(additional, dict) and "parallel_think" in additional:
            from .configure import configure

            configure(vllm_config)

    return check_and_update_config
