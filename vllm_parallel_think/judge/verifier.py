"""Lossy verification without a copy of vLLM's: a point mass on every draft token a rule accepts.

Where the rule accepts, the draft token's processed logit is raised so far that the target's
distribution is a point mass on it. vLLM's own test then accepts it: greedily, because it is the
most likely token; sampled, because p/q >= 1. Other rows are untouched, so the cut at the first
rejection, its replacement, the bonus token and the random numbers stay vLLM's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from spec_decode.acceptance import is_protected
from spec_decode.draft_rows import DraftRows
from spec_decode.rules import Judge, Rule

from .request_settings import JudgeRequestTable

POINT_MASS = 1e30
"""Logit of a point mass, where the type can hold it: nothing else has any probability beside it."""


@dataclass(frozen=True)
class Counts:
    """What was verified.

    Attributes:
        drafts: Draft tokens.
        kept: Those that were kept.
        lossy: Those that were kept although the target had another token.
        steps: How often drafts of a request were verified: 1 + kept / steps is vLLM's mean
            acceptance length.

    """

    drafts: int
    kept: int
    lossy: int
    steps: int


@dataclass(frozen=True, eq=False)
class Judgement:
    """What a rule says of a batch's drafts.

    Attributes:
        ids: [N] int64, draft tokens, 0 in filler rows.
        is_draft: [N] bool.
        request: [N] int64, place in the batch.
        position: [N] int64, place among the request's drafts.
        lossy: [N] bool, to be accepted whatever the standard test says.
        other: [N] bool, the target's most likely token is another one.

    """

    ids: torch.Tensor
    is_draft: torch.Tensor
    request: torch.Tensor
    position: torch.Tensor
    lossy: torch.Tensor
    other: torch.Tensor


class Verifier:
    """A rule at work in one worker.

    Attributes:
        rule: The rule.
        requests: What requests say.
        hidden: The current step's hidden states, as its runner keeps them; ``None`` in dummy runs,
            where the rule rests.

    """

    def __init__(self, rule: Rule, protected: torch.Tensor, requests: JudgeRequestTable) -> None:
        self.rule = rule
        self.requests = requests
        self.hidden: torch.Tensor | None = None
        self._protected = protected
        self._counts = torch.zeros(4, dtype=torch.int64, device=protected.device)

    @property
    def counts(self) -> Counts:
        """Totals since the start; reading them waits for the device."""
        return Counts(*self._counts.tolist())

    @contextmanager
    def shown(self, hidden: torch.Tensor | None) -> Iterator[None]:
        """Hold the step's hidden states, as the runner keeps them, while it verifies."""
        self.hidden = hidden
        try:
            yield
        finally:
            self.hidden = None

    def judge(self, rows: DraftRows, req_ids: Sequence[str]) -> Judgement:
        """Apply the rule, within what requests and protected tokens leave to it.

        Args:
            rows: The drafts; ``request`` counts in the order of ``req_ids``.
            req_ids: The batch.

        """
        batch = self.requests.batch(req_ids, rows.logits.device)
        ids, request = rows.safe_ids, rows.request
        allowed = batch.enabled[request] & ~is_protected(
            rows.draft_ids, self._protected, batch.grammar[request]
        )
        allowed &= ~is_protected(rows.draft_ids, self.requests.stops.masks, batch.stop_row[request])
        allowed &= (batch.stop_ids[request] != ids[:, None]).all(dim=1)
        if isinstance(self.rule, Judge):
            rows = replace(rows, threshold=batch.threshold[request])
        return Judgement(
            ids=ids,
            is_draft=rows.is_draft,
            request=request,
            position=rows.position,
            lossy=allowed & self.rule(rows),
            other=rows.logits.argmax(dim=-1) != rows.draft_ids,
        )

    def count(self, judgement: Judgement, num_kept: torch.Tensor) -> None:
        """Add a step to the totals, of which [B] int drafts each request keeps."""
        kept = judgement.is_draft & (judgement.position < num_kept[judgement.request])
        lossy = kept & judgement.lossy & judgement.other
        first = judgement.is_draft & (judgement.position == 0)
        self._counts += torch.stack(
            [mask.sum() for mask in (judgement.is_draft, kept, lossy, first)]
        )


@dataclass(frozen=True, eq=False)
class PointMasses:
    """Point masses set into processed logits, and how to take them out again."""

    _logits: torch.Tensor
    _ids: torch.Tensor
    _before: torch.Tensor

    def undo(self) -> None:
        """Put the logits back."""
        self._logits.scatter_(1, self._ids, self._before)


def set_point_masses(
    logits: torch.Tensor, judgement: Judgement, unmasked: torch.Tensor
) -> PointMasses:
    """Set point masses, in place, where a rule accepts and nothing has forbidden the token.

    Args:
        logits: [N, V] float, processed logits.
        judgement: What the rule says.
        unmasked: [N] float, the draft tokens' logits before top-k and top-p, which say what the
            target would sample and not what is forbidden: bad words, grammars, ``min_tokens`` and
            ``allowed_token_ids`` have put -inf there.

    """
    index = judgement.ids[:, None]
    before = logits.gather(1, index)
    lossy = judgement.lossy & torch.isfinite(unmasked)
    mass = min(POINT_MASS, torch.finfo(logits.dtype).max / 4)
    logits.scatter_(1, index, torch.where(lossy[:, None], mass, before))
    return PointMasses(logits, index, before)
