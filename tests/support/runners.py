"""The environment of engines, and scripts that run one in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

from tests.support.repository import ROOT

IN_PROCESS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Read by vLLM when it is imported, and by the OpenMP runtime when torch is."""

ENVIRONMENT = {**IN_PROCESS, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
"""Of a script that runs an engine."""

V2 = {
    "TRITON_INTERPRET": "1",
    # No warm-up run: it is slow in the interpreter and there is nothing to warm up.
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}
"""Model Runner V2 on a CPU, its Triton kernels in Triton's interpreter."""


def set_environment() -> None:
    """Prepare this process for an engine; nothing of vLLM is imported yet."""
    os.environ.update(IN_PROCESS)


def run_script(module: str, *arguments: str, runner: str = "v1") -> str:
    """Run a module as a script, under Model Runner V1 or V2; return what it prints."""
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **(V2 if runner == "v2" else {})},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return result.stdout


def pretend_triton_runs_on_cpus() -> None:
    """Let vLLM find a Triton backend for CPUs, without which it takes Model Runner V1."""
    from triton.backends import backends

    driver = SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)
