"""Lossy verification in Model Runner V1: its rejection sampler, with two methods wrapped."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler, apply_sampling_constraints
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from spec_decode.draft_rows import DraftRows

from ..compat.patches import SAMPLER_V1
from .verifier import Judgement, Verifier, set_point_masses


class JudgeRejectionSampler(RejectionSampler):
    """vLLM's rejection sampler with a rule; made of one by :func:`install`."""

    verifier: Verifier
    runner: Any
    _draft_probs: torch.Tensor | None
    _sampling: SamplingMetadata
    _judgement: Judgement | None
    _clean: torch.Tensor | None

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> Any:
        self._draft_probs, self._sampling = draft_probs, sampling_metadata
        self._judgement = self._clean = None
        output = super().forward(metadata, draft_probs, logits, sampling_metadata)
        self._count(output.sampled_token_ids)
        self._judgement = self._clean = self._draft_probs = None
        return output

    def apply_logits_processors(
        self,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        metadata: SpecDecodeMetadata,
    ) -> torch.Tensor:
        """Process logits, then set point masses; temperature, top-k and top-p come after this."""
        judgement = None
        if self.verifier.hidden is not None and metadata.draft_token_ids.numel():
            # Before processing, which writes into these logits: rules see the model's own.
            rows = self._make_rows(logits, metadata, self.verifier.hidden)
            judgement = self.verifier.judge(rows, self.runner.input_batch.req_ids)
        processed = super().apply_logits_processors(logits, sampling_metadata, metadata)
        if judgement is not None:
            if self.is_processed_logprobs_mode and sampling_metadata.max_num_logprobs is not None:
                self._clean = processed.clone()
            unmasked = processed.gather(1, judgement.ids[:, None])[:, 0]
            set_point_masses(processed, judgement, unmasked)
            self._judgement = judgement
        return processed

    def _count(self, sampled_token_ids: torch.Tensor) -> None:
        if self._judgement is not None:
            self.verifier.count(self._judgement, (sampled_token_ids >= 0).sum(dim=1) - 1)

    def _make_rows(
        self, logits: torch.Tensor, metadata: SpecDecodeMetadata, hidden: torch.Tensor
    ) -> DraftRows:
        target = metadata.target_logits_indices.long()
        row = torch.arange(target.shape[0], device=target.device)
        # Every request has one row more than drafts, so its number is how far the rows ran ahead.
        request = target - row
        ends = metadata.cu_num_draft_tokens.long()
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        rule = self.verifier.rule
        return DraftRows(
            logits=logits,
            draft_ids=metadata.draft_token_ids,
            request=request,
            position=row - starts[request],
            draft_logits=self._draft_logits(request) if rule.needs_draft_logits else None,
            hidden=hidden[target + 1] if rule.needs_hidden else None,
        )

    def _draft_logits(self, request: torch.Tensor) -> torch.Tensor | None:
        """Return the drafts' logits at temperature 1; this runner keeps probabilities at theirs."""
        temperature = self._sampling.temperature
        if self._draft_probs is None or temperature is None:
            return None
        scale = torch.where(temperature == 0, 1.0, temperature)[request]
        return self._draft_probs.log() * scale[:, None]

    def _get_logprobs_tensors(
        self,
        max_num_logprobs: int,
        metadata: SpecDecodeMetadata,
        logits: torch.Tensor,
        target_logits: torch.Tensor,
        bonus_logits: torch.Tensor,
        sampled_token_ids: torch.Tensor,
    ) -> Any:
        """Report the target's own probabilities, also where they are asked for as processed."""
        if self._clean is not None:
            target_logits = apply_sampling_constraints(
                self._clean, metadata.cu_num_draft_tokens, self._sampling
            )
        return super()._get_logprobs_tensors(
            max_num_logprobs, metadata, logits, target_logits, bonus_logits, sampled_token_ids
        )


def install(runner: Any, verifier: Verifier) -> None:
    """Let a runner's rejection sampler ask the verifier."""
    sampler = runner.rejection_sampler
    SAMPLER_V1.change_class(sampler, JudgeRejectionSampler)
    sampler.verifier = verifier
    sampler.runner = runner


def hidden_states(runner: Any) -> torch.Tensor | None:
    """Return the hidden states of the rows that are about to be verified, [rows, H]."""
    state = runner.execute_model_state
    return None if state is None else state.sample_hidden_states
