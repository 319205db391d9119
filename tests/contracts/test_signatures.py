"""Every override takes what vLLM passes, in both supported releases: the installed one, and the one
whose parameters ``python -m tests.contracts.record_signatures`` recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import vllm
from packaging.version import Version

from tests.contracts.overrides import Override, overrides
from tests.contracts.record_signatures import RECORD, Release, wanted
from vllm_parallel_think.compat.patches import PATCHES
from vllm_parallel_think.compat.patching import parameters_of
from vllm_parallel_think.compat.version import SUPPORTED

RECORDED: dict[str, Any] = json.loads(RECORD.read_text("utf-8"))

MUST_BE_AMONG = {
    "vllm.v1.core.sched.scheduler.Scheduler._free_request",
    "vllm.v1.core.sched.scheduler.Scheduler._get_local_prefix_cache_hit",
    "vllm.v1.core.sched.scheduler.Scheduler.schedule",
    "vllm.v1.worker.gpu_worker.Worker.execute_model",
    "vllm.v1.worker.cpu_worker.CPUWorker.__init__",
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadataBuilder.build",
    "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.forward",
    "vllm.v1.sample.rejection_sampler.RejectionSampler._get_logprobs_tensors",
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler.RejectionSampler._verify",
    "vllm.parser.abstract_parser.Parser.parse_delta",
}
"""Some that have to be found, of every kind: hooks, private ones, and a class without a base."""


def differences(ours: str, theirs: str | None) -> str | None:
    """Return what is wrong with an override, if anything is.

    ``*`` and ``**`` take the rest deliberately: such an override passes it on as it is.
    """
    if theirs is None:
        return "vLLM has no such function"
    mine, stock = ours.split(", "), theirs.split(", ")
    for index, parameter in enumerate(mine):
        if parameter.startswith("*") and parameter != "*":
            rest = [p for p in stock[index:] if p.startswith("*") and p != "*"]
            return None if all(p in mine for p in rest) or not rest else f"takes {ours} of {theirs}"
        if index >= len(stock) or parameter != stock[index]:
            return f"takes ({ours}), vLLM passes ({theirs})"
    return None if len(mine) == len(stock) else f"takes ({ours}), vLLM passes ({theirs})"


@pytest.mark.parametrize(
    ("ours", "theirs", "fits"),
    [
        ("a, b=", "a, b=", True),
        ("", "", True),
        ("a", "a, b=", False),
        ("a, b=", "a", False),
        ("a, b", "a, b=", False),
        ("b, a", "a, b", False),
        ("a, *rest", "a, b=", True),
        ("*args, **kwargs", "a, b=, *, c=", True),
        ("c, *rest", "a, b=", False),
        ("a", None, False),
    ],
)
def test_what_differs(ours: str, theirs: str | None, fits: bool) -> None:
    assert (differences(ours, theirs) is None) == fits


@pytest.mark.parametrize("override", overrides(), ids=lambda override: override.ours)
def test_an_override_takes_what_vllm_passes(override: Override) -> None:
    ours = parameters_of(override.mine)
    found = {
        vllm.__version__: differences(ours, parameters_of(override.original)),
        RECORDED["version"]: differences(ours, RECORDED["parameters"].get(override.theirs)),
    }
    wrong = [f"vLLM {version}: {text}" for version, text in found.items() if text is not None]
    assert not wrong, f"{override.ours} in place of {override.theirs}: " + "; ".join(wrong)


def test_all_overrides_are_looked_at() -> None:
    assert {override.theirs for override in overrides()} >= MUST_BE_AMONG


@pytest.mark.parametrize(
    "patch", [patch for patch in PATCHES if patch.parameters], ids=lambda patch: patch.target
)
def test_a_patch_knows_both_releases(patch: Any) -> None:
    """Those of the installed release are compared when the patch is applied, too."""
    installed = Release(Path(vllm.__file__).parents[1]).parameters(patch.target)
    forms = {installed, RECORDED["parameters"].get(patch.target)}
    assert forms == set(patch.parameters)


def test_the_record_is_of_the_other_supported_release() -> None:
    low, high = SUPPORTED
    releases = {Version(RECORDED["version"]).release[:2], Version(vllm.__version__).release[:2]}
    assert releases == {(low.major, minor) for minor in range(low.minor, high.minor)}
    assert set(RECORDED["parameters"]) == wanted(), (
        "run `python -m tests.contracts.record_signatures SITE_PACKAGES` with an unpacked vLLM "
        f"{RECORDED['version']}"
    )


def test_syntax_trees_say_what_the_functions_say() -> None:
    """What is recorded of a release that is not installed, tried on the one that is."""
    release = Release(Path(vllm.__file__).parents[1])
    assert Version(vllm.__version__).base_version == release.version
    for override in overrides():
        assert release.parameters(override.theirs) == parameters_of(override.original), override
    assert release.parameters("vllm.v1.core.sched.scheduler.Scheduler.gone") is None
    assert release.parameters("vllm.gone.Scheduler.schedule") is None
