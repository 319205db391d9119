"""What the plugin logs is in vLLM's log."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

LINES = """
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging, init_logger as stock
from vllm_parallel_think.compat.logger import init_logger
configure_logging(LoggingConfig())  # as every process of a server does
init_logger("vllm_parallel_think.scheduler.gang").info("ours")
stock("vllm_parallel_think.scheduler.gang").info("stock")
"""


def test_the_plugins_lines_are_in_vllms_log() -> None:
    """vLLM's own function leaves a logger of another package without a handler."""
    done = subprocess.run(
        [sys.executable, "-c", LINES],
        cwd=ROOT,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"},  # tests with engines set another
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "INFO" in line]
    assert any(line.endswith("] ours") for line in lines)
    assert not any(line.endswith("stock") for line in lines)


def test_every_module_takes_its_logger_from_one_place() -> None:
    # The entry point runs in every process of every vLLM: it imports nothing of ours.
    exempt = {"vllm_parallel_think/compat/logger.py", "vllm_parallel_think/plugin.py"}
    for path in (ROOT / "vllm_parallel_think").rglob("*.py"):
        if str(path.relative_to(ROOT)) in exempt:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                assert "logging" not in [alias.name for alias in node.names], path
            elif isinstance(node, ast.ImportFrom):
                assert node.module not in ("logging", "vllm.logger"), path
