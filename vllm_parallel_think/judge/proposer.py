"""Drafts from the sibling branches of a group, in Model Runner V1.

``--speculative-config '{"method": "custom_class", "num_speculative_tokens": 4, "model":
"vllm_parallel_think.judge.proposer.SiblingProposer"}'``. Siblings repeat each other's words; the
gain is for branches that run behind others, and for the conclusion.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig

from spec_decode.sibling_ngrams import SiblingTexts, continuation

from ..core.config.request_options import GROUP_KEY
from ..core.errors import OptionError
from ..settings import raw_options


class SiblingProposer:
    """Proposes what a branch or one of its siblings wrote after the same words.

    Raises:
        OptionError: The server has no branches whose words could be proposed.

    Attributes:
        runner: The model runner, which vLLM does not hand over; set once the model is loaded.

    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        spec = vllm_config.speculative_config
        assert spec is not None
        if raw_options(vllm_config) is None:
            raise OptionError(
                "--speculative-config: SiblingProposer drafts from the branches of a request, and "
                "this server has none: add parallel_think to --additional-config, or choose "
                "another method"
            )
        self.runner: Any = None
        self._num = spec.num_speculative_tokens
        self._texts = SiblingTexts()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: there is no model."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Return drafts for every row of the batch; none for rows that sampled nothing.

        Args:
            sampled_token_ids: What each row sampled in this step.
            num_tokens_no_spec: [rows] int, length of each row's text.
            token_ids_cpu: [rows, max_model_len] int, the texts.
            slot_mappings: Not used.

        """
        req_ids = self.runner.input_batch.req_ids[: len(sampled_token_ids)]
        texts = {
            req_id: token_ids_cpu[row, : num_tokens_no_spec[row]]
            for row, req_id in enumerate(req_ids)
        }
        groups = {req_id: group for req_id in req_ids if (group := self._group(req_id))}
        self._texts.update(texts, groups)
        return [
            continuation(texts[req_id], self._texts.others(req_id, groups.get(req_id)), self._num)
            if sampled
            else []
            for req_id, sampled in zip(req_ids, sampled_token_ids, strict=True)
        ]

    def _group(self, req_id: str) -> str | None:
        """Return a branch's group; requests that stand alone have none."""
        state = self.runner.requests.get(req_id)
        params = None if state is None else state.sampling_params
        extra = (params.extra_args or {}) if params is not None else {}
        group = extra.get(GROUP_KEY)
        return group if isinstance(group, str) else None
