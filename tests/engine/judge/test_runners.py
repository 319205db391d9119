"""The judge in both model runners, each in a process of its own (see ``runner_script``)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "PYTHONPATH": str(ROOT),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
MODULES = {
    "v1": "vllm.v1.worker.cpu_model_runner",
    "v2": "vllm.v1.worker.cpu.model_runner",
}
V2 = {"TRITON_INTERPRET": "1", "VLLM_CPU_CI_ENV": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


def run(runner: str, what: str, folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "tests.engine.judge.runner_script", runner, what, str(folder)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **(V2 if runner == "v2" else {})},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return result.stdout


@pytest.mark.parametrize(
    ("runner", "last"),
    [
        ("v1", "check_distribution"),
        pytest.param("v2", "check_sampled", marks=pytest.mark.slow),
    ],
)
def test_rules_and_requests(runner: str, last: str, tmp_path: Path) -> None:
    """Standard verification, every rule, requests' wishes, log probabilities, sampling."""
    assert f"{last} holds" in run(runner, "plain", tmp_path)


@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_branches(runner: str, tmp_path: Path) -> None:
    """Speculative decoding in groups: tokens and K/V, standard and lossy, preempted or not."""
    assert "branches hold" in run(runner, "branches", tmp_path)


@pytest.mark.parametrize(
    ("runner", "proposer"),
    [("v1", "eagle"), ("v1", "ngram"), pytest.param("v2", "eagle", marks=pytest.mark.slow)],
)
def test_proposers(runner: str, proposer: str, tmp_path: Path) -> None:
    """Drafts of an EAGLE head and of n-grams: standard and lossy, alone and in groups.

    The n-gram proposer of V2 is refused when a server starts (see ``test_settings``).
    """
    said = run(runner, proposer, tmp_path)
    assert f"{proposer} holds" in said
    assert f"runner: {MODULES[runner]}" in said


@pytest.mark.slow
def test_tensor_parallel(tmp_path: Path) -> None:
    """Two workers come to the verdicts of one."""
    assert "two workers hold" in run("v1", "parallel", tmp_path)
