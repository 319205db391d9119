"""Speculative decoding of one text at a time in transformers: slow, readable, with any rule."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .acceptance import accept, is_protected, standard_greedy
from .draft_rows import DraftRows
from .rules import Rule


@dataclass
class DecodingTrace:
    """What one text took.

    Attributes:
        tokens: The continuation, the token that ended it included.
        steps: Forwards of the target behind the prompt.
        drafts: Draft tokens that were verified.
        kept: Draft tokens that were kept.
        lossy: Kept draft tokens in whose place the target had another one.

    """

    tokens: list[int] = field(default_factory=list)
    steps: int = 0
    drafts: int = 0
    kept: int = 0
    lossy: int = 0


class ModelReader:
    """A causal model with the K/V of one text.

    Every call gives logits of the first tokens of the vocabulary and last hidden states (after the
    final norm, what the vocabulary head reads) of the tokens it is fed.
    """

    def __init__(self, model: Any, num_tokens: int) -> None:
        self._model, self._num_tokens = model, num_tokens
        self._cache: Any = None
        self._num_cached = 0

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens; return [T, num_tokens] logits and [T, H] hidden states on them."""
        device = self._model.device
        output = self._model.model(
            input_ids=torch.tensor([list(tokens)], device=device),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = output.past_key_values
        self._num_cached += len(tokens)
        hidden = output.last_hidden_state[0]
        return self._model.lm_head(hidden)[:, : self._num_tokens], hidden

    def forget_behind(self, num_tokens: int) -> None:
        """Drop the K/V of all but the first tokens."""
        if self._cache is not None and num_tokens < self._num_cached:
            self._cache.crop(num_tokens - self._num_cached)
            self._num_cached = num_tokens

    @property
    def num_cached(self) -> int:
        """How many tokens have been read."""
        return self._num_cached


def speculate(
    target: Any,
    draft: Any,
    prompt: Sequence[int],
    *,
    rule: Rule | None,
    num_drafts: int,
    max_tokens: int,
    stop_ids: Collection[int],
    protected: torch.Tensor | None = None,
) -> DecodingTrace:
    """Continue a prompt greedily, the draft model proposing and the target verifying.

    Args:
        target: A causal model of transformers with ``model`` and ``lm_head``.
        draft: Another one with the same vocabulary; either embedding may be padded.
        prompt: Token ids.
        rule: What accepts beside the standard test; ``None`` for nothing.
        num_drafts: Draft tokens a step.
        max_tokens: Most tokens of the continuation.
        stop_ids: Tokens that end it; never accepted lossily.
        protected: [V] bool, further tokens that are never accepted lossily.

    """
    guard = torch.zeros(target.config.vocab_size, dtype=torch.bool)
    if protected is not None:
        guard |= protected
    guard[list(stop_ids)] = True
    # Beyond the narrower embedding there are no tokens, only padding of the other.
    common = min(target.config.vocab_size, draft.config.vocab_size)
    reader, proposer, trace = (
        ModelReader(target, common),
        ModelReader(draft, common),
        DecodingTrace(),
    )
    text = list(prompt)
    logits, _ = reader.feed(text)
    text.append(int(logits[-1].argmax()))
    while not _is_complete(text, len(prompt), max_tokens, stop_ids):
        drafts, draft_logits = _propose(proposer, text, num_drafts)
        logits, hidden = reader.feed([text[-1], *drafts])
        rows = DraftRows(
            logits=logits[:-1].float(),
            draft_ids=torch.tensor(drafts, device=logits.device),
            request=torch.zeros(num_drafts, dtype=torch.long, device=logits.device),
            position=torch.arange(num_drafts, device=logits.device),
            draft_logits=draft_logits.float(),
            hidden=hidden[1:],
        )
        standard = standard_greedy(rows)
        lossy = rule(rows) if rule is not None else None
        safe = is_protected(rows.draft_ids, guard[None].to(logits.device), rows.request)
        num_kept = int(accept(rows, standard, lossy, safe).sum())
        trace.steps += 1
        trace.drafts += num_drafts
        trace.kept += num_kept
        trace.lossy += int((~standard[:num_kept]).sum())
        text += [*drafts[:num_kept], int(logits[num_kept].argmax())]
        for model in (reader, proposer):
            model.forget_behind(len(text) - 1)
    trace.tokens = _cut(text[len(prompt) :], max_tokens, stop_ids)
    return trace


def _propose(
    proposer: ModelReader, text: list[int], num_drafts: int
) -> tuple[list[int], torch.Tensor]:
    """Return draft tokens and the [K, V] logits they came from."""
    tokens, rows = text[proposer.num_cached :], []
    drafts: list[int] = []
    for _ in range(num_drafts):
        logits, _ = proposer.feed(tokens)
        rows.append(logits[-1])
        tokens = [int(logits[-1].argmax())]
        drafts += tokens
    return drafts, torch.stack(rows)


def _is_complete(
    text: list[int], num_prompt: int, max_tokens: int, stop_ids: Collection[int]
) -> bool:
    written = text[num_prompt:]
    return len(written) >= max_tokens or any(token in stop_ids for token in written)


def _cut(tokens: list[int], max_tokens: int, stop_ids: Collection[int]) -> list[int]:
    for index, token in enumerate(tokens[:max_tokens]):
        if token in stop_ids:
            return tokens[: index + 1]
    return tokens[:max_tokens]
