"""The engine process: vLLM's scheduler with sequence groups."""

from .scheduler import AsyncGroupScheduler, GroupScheduler

__all__ = ["AsyncGroupScheduler", "GroupScheduler"]
