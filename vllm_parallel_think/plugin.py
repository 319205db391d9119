"""The entry point that vLLM loads in every process."""

from __future__ import annotations

import functools
import logging

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
    """Run :func:`configure` behind the platform's own check, vLLM's last word on a configuration.

    Patch: vLLM 0.32 has no hook for plugins there. It could go if ``VllmConfig`` called one.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    check = platform.check_and_update_config.__func__

    @functools.wraps(check)
    def check_and_update_config(cls: type, vllm_config: object) -> None:
        check(cls, vllm_config)
        additional = getattr(vllm_config, "additional_config", None)
        if isinstance(additional, dict) and "parallel_think" in additional:
            from .configure import configure

            configure(vllm_config)

    platform.check_and_update_config = classmethod(check_and_update_config)
