"""Lossy verification in Model Runner V2: its rejection sampler, with one method wrapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from spec_decode.draft_rows import NO_DRAFT, DraftRows

from ..compat.patches import SAMPLER_V2, SAMPLING_PARAMS_V2, TOP_K_TOP_P_V2
from .verifier import Judgement, PointMasses, Verifier, set_point_masses


class JudgeRejectionSamplerV2(RejectionSampler):
    """vLLM's rejection sampler with a rule; made of one by :func:`install`."""

    verifier: Verifier
    _hidden: torch.Tensor | None
    _req_ids: list[str]
    _num_rows: int
    _num_reqs: int

    def __call__(
        self,
        logits: torch.Tensor,
        input_batch: Any,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,
    ) -> Any:
        hidden = self.verifier.hidden
        # With tensor-parallel sampling the batch is this rank's part, the hidden states are all.
        self._hidden = None if hidden is None else hidden[input_batch.logits_indices]
        self._req_ids = input_batch.req_ids[: input_batch.num_reqs]
        self._num_rows = self._num_reqs = 0
        try:
            return super().__call__(logits, input_batch, draft_logits, invalid_drafts)
        finally:
            self._hidden = None

    def _verify(
        self,
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: Any,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: Any,
        verify_draft_sampled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Verify some of the batch's requests."""
        first_row, first_req = self._num_rows, self._num_reqs
        self._num_rows += logits.shape[0]
        self._num_reqs += len(idx_mapping_np)
        arguments = (
            *(logits, draft_logits, draft_sampled, pos, cu_num_logits, idx_mapping),
            *(idx_mapping_np, expanded_idx_mapping, expanded_local_pos, seq_lens_upper_bound_np),
            verify_draft_sampled,
        )
        if self._hidden is None:
            return super()._verify(*arguments)
        rows = self._make_rows(
            logits,
            verify_draft_sampled,
            expanded_local_pos,
            self._hidden[first_row : self._num_rows],
            self._draft_rows(draft_logits, expanded_idx_mapping, expanded_local_pos),
        )
        judgement = self.verifier.judge(rows, self._req_ids[first_req : self._num_reqs])
        with self._point_masses(judgement):
            processed, sampled, num_sampled = super()._verify(*arguments)
        self.verifier.count(judgement, num_sampled - 1)
        return processed, sampled, num_sampled

    def _make_rows(
        self,
        logits: torch.Tensor,
        fed: torch.Tensor,
        local_pos: torch.Tensor,
        hidden: torch.Tensor,
        draft_logits: torch.Tensor | None,
    ) -> DraftRows:
        """Return the batch's rows; a request's last row judges nothing and is a filler.

        Row r's logits predict the token that was fed at row r + 1, if that is of the same request.
        """
        follows = torch.roll(local_pos, -1) == local_pos + 1
        follows[-1:] = False
        return DraftRows(
            logits=logits,
            draft_ids=torch.where(follows, torch.roll(fed, -1), NO_DRAFT),
            request=(local_pos == 0).long().cumsum(dim=0) - 1,
            position=local_pos.long(),
            draft_logits=draft_logits,
            hidden=torch.roll(hidden, -1, 0) if self.verifier.rule.needs_hidden else None,
        )

    def _draft_rows(
        self, draft_logits: torch.Tensor | None, idx_mapping: torch.Tensor, local_pos: torch.Tensor
    ) -> torch.Tensor | None:
        """Return [N, V], the draft model's logits for the place behind each row."""
        if draft_logits is None or not self.verifier.rule.needs_draft_logits:
            return None
        step = local_pos.long().clamp(max=draft_logits.shape[1] - 1)
        return draft_logits[idx_mapping.long(), step]

    @contextmanager
    def _point_masses(self, judgement: Judgement) -> Iterator[None]:
        """Set point masses into what the sampler's processing returns, and take them out at last.

        They have to be: without anything to process vLLM goes on with the model's own logits, and
        takes logprobs from them afterwards.
        """
        ids = judgement.ids[:, None]
        unmasked: list[torch.Tensor] = []
        masses: list[PointMasses] = []

        def remembering(top_k_top_p: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def remember(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                unmasked.append(logits.gather(1, ids)[:, 0])
                return top_k_top_p(logits, *args, **kwargs)

            return remember

        def setting_masses(process: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def processed(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                result = process(logits, *args, **kwargs)
                before = unmasked[0] if unmasked else result.gather(1, ids)[:, 0]
                masses.append(set_point_masses(result, judgement, before))
                return result

            return processed

        sampler = self.sampler
        with TOP_K_TOP_P_V2.applied(sampler.sampling_states, remembering):
            with SAMPLING_PARAMS_V2.applied(sampler, setting_masses):
                try:
                    yield
                finally:
                    for mass in masses:
                        mass.undo()


def install(runner: Any, verifier: Verifier) -> None:
    """Let a runner's rejection sampler ask the verifier."""
    sampler = runner.rejection_sampler
    # What is replaced in every step is checked once, before the first.
    SAMPLING_PARAMS_V2.check(sampler.sampler)
    TOP_K_TOP_P_V2.check(sampler.sampler.sampling_states)
    SAMPLER_V2.change_class(sampler, JudgeRejectionSamplerV2)
    sampler.verifier = verifier


def hidden_states(runner: Any) -> torch.Tensor | None:
    """Return the last hidden states of the step, [tokens, H]."""
    state = runner.execute_model_state
    return None if state is None else state.hidden_states
