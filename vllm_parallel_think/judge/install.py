"""Putting a verifier between a worker's forward and its verification of drafts."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from vllm.platforms import current_platform

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


def verifier(
    module: ModuleType, runner: Any, device: torch.device, settings: Settings
) -> Verifier | None:
    """Let a model runner whose model is loaded verify with the server's rule, if it has one.

    Args:
        module: ``rejection_sampler_v1`` or ``rejection_sampler_v2``, whichever is the runner's.
        runner: vLLM's model runner.
        device: Where it computes.
        settings: The server's.

    Returns:
        The verifier; ``None`` without a rule, or where another pipeline stage verifies.

    Raises:
        NotImplementedError: The runner verifies in a way that has no place for a rule.

    """
    sampler = getattr(runner, "rejection_sampler", None)
    if sampler is not None and module is rejection_sampler_v1 and current_platform.is_cpu():
        expand_batch_to_tokens.replace_if_broken()
    raw = settings.options.judge
    if raw is None or sampler is None:
        return None
    if type(sampler) is not module.RejectionSampler:
        raise NotImplementedError(
            f"parallel_think.judge cannot take part in {type(sampler).__name__}: remove judge from "
            "--additional-config"
        )
    config = runner.vllm_config
    rule = judge_settings.load(raw, config).rule
    if isinstance(rule, Judge):
        rule = replace(rule, head=rule.head.to(device))
    # Workers do not run beside drafts.
    profiles = {n: p for n, p in settings.profiles.items() if isinstance(p, Profile)}
    model = config.model_config
    stops = StopStrings(token_texts(model), model.get_vocab_size(), device)
    made = Verifier(
        rule,
        protected_tokens(model, profiles.values()).to(device),
        JudgeRequestTable({name: i for i, name in enumerate(profiles, 1)}, settings.default, stops),
    )
    module.install(runner, made)
    return made


def proposer(drafter: Any, runner: Any) -> None:
    """Give our own proposer, if it is the one, the runner it works for."""
    if isinstance(drafter, SiblingProposer):
        drafter.runner = runner
