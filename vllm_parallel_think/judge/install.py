"""Putting a verifier between a worker's forward and its verification of drafts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.worker.worker_base import WorkerBase

from spec_decode.rules import Judge

from ..compat import expand_batch_to_tokens
from ..core.config.profile import Profile
from ..settings import Settings
from . import rejection_sampler_v1
from . import settings as judge_settings
from .proposer import SiblingProposer
from .protected_tokens import StopStrings, protected_tokens, token_texts
from .request_settings import JudgeRequestTable
from .verifier import Verifier


def to_worker(worker: WorkerBase, settings: Settings) -> Verifier | None:
    """Let a worker whose model is loaded verify with the server's rule, if it has one.

    Returns:
        The verifier; ``None`` without a rule, or where another pipeline stage verifies.

    Raises:
        NotImplementedError: The runner verifies in a way that has no place for a rule.

    """
    sampler = getattr(worker.model_runner, "rejection_sampler", None)
    if isinstance(sampler, RejectionSampler) and current_platform.is_cpu():
        expand_batch_to_tokens.mend()
    raw = settings.options.judge
    if raw is None or sampler is None:
        return None
    module = _module(sampler)
    if type(sampler) is not module.RejectionSampler:
        raise NotImplementedError(
            f"parallel_think.judge cannot take part in {type(sampler).__name__}: remove judge from "
            "--additional-config"
        )
    config, device = worker.vllm_config, worker.device
    rule = judge_settings.load(raw, config).rule
    if isinstance(rule, Judge):
        rule = replace(rule, head=rule.head.to(device))
    # Workers do not run beside drafts.
    profiles = {n: p for n, p in settings.profiles.items() if isinstance(p, Profile)}
    model = config.model_config
    stops = StopStrings(token_texts(model), model.get_vocab_size(), device)
    verifier = Verifier(
        rule,
        protected_tokens(model, profiles.values()).to(device),
        JudgeRequestTable({name: i for i, name in enumerate(profiles, 1)}, settings.default, stops),
    )
    module.install(worker.model_runner, verifier)
    return verifier


def proposer(runner: Any) -> None:
    """Tell our own proposer which runner it works for, if it is the one."""
    drafter = getattr(runner, "drafter", None)
    if isinstance(drafter, SiblingProposer):
        drafter.runner = runner


@contextmanager
def hidden_states(verifier: Verifier, runner: Any) -> Iterator[None]:
    """Lend the step's hidden states to the verifier."""
    verifier.hidden = _module(runner.rejection_sampler).hidden_states(runner)
    try:
        yield
    finally:
        verifier.hidden = None


def _module(sampler: Any) -> ModuleType:
    """Return the module for the runner that a sampler belongs to; V2's is for V2 only to import."""
    if isinstance(sampler, RejectionSampler):
        return rejection_sampler_v1
    from . import rejection_sampler_v2

    return rejection_sampler_v2
