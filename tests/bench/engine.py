"""The engine that benchmarks run on: one process, float32."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

# Read by vLLM when it is imported, and by the OpenMP runtime when torch is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Without it vLLM serves an engine in this process with a single thread.
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

NEVER = '"</never>"'
"""A tag that no model writes: branches end by their budgets."""


def bench_profile(num_paths: int) -> str:
    """Write a profile that forks behind the first token, into paths that only budgets end."""
    folder = Path(tempfile.mkdtemp(prefix="parallel-think-bench-"))
    path = folder / f"bench-{num_paths}.toml"
    path.write_text(
        f"""
name = "bench-{num_paths}"
summary = "forks behind the first token"
max_depth = 1
[fork]
trigger = {NEVER}
num_paths = {num_paths}
max_outline_tokens = 1
once = true
[path]
start = "\\n{{name}}."
end = {NEVER}
[join]
start = "\\nSo"
""",
        "utf-8",
    )
    return str(path)


def make_llm(model: str, options: dict[str, Any] | None, **kwargs: Any) -> Any:
    """Start vLLM in this process, with the plugin on if ``options`` are given."""
    from vllm import LLM

    if options is not None:
        from vllm_parallel_think.plugin import register

        register()
        kwargs["additional_config"] = {"parallel_think": options}
    defaults = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 32}
    return LLM(model, **{**defaults, **kwargs})


def prompt_of(num_tokens: int) -> dict[str, Any]:
    """Return a prompt of so many ordinary tokens."""
    return {"prompt_token_ids": [1000 + 7 * i % 4001 for i in range(num_tokens)]}


def forever(max_tokens: int, **extra: Any) -> Any:
    """Return greedy sampling parameters that only a budget ends."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens, extra_args=extra)
