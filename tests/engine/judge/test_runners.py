"""The judge in both model runners, each in a process of its own (see ``runner_script``)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runners import run_script

MODULES = {
    "v1": "vllm.v1.worker.cpu_model_runner",
    "v2": "vllm.v1.worker.cpu.model_runner",
}


def run(runner: str, what: str, folder: Path) -> str:
    return run_script("tests.engine.judge.runner_script", runner, what, str(folder), runner=runner)


@pytest.mark.parametrize(
    ("runner", "last"),
    [
        ("v1", "check_distribution"),
        pytest.param("v2", "check_sampled", marks=pytest.mark.slow),
    ],
)
def test_rules_and_requests(runner: str, last: str, tmp_path: Path) -> None:
    """Standard verification, every rule, requests' own settings, log probabilities, sampling."""
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
