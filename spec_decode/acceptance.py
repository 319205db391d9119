"""The standard test, and which drafts survive it together with a lossy rule."""

from __future__ import annotations

import torch

from .draft_rows import DraftRows


def standard_greedy(rows: DraftRows) -> torch.Tensor:
    """Return [N] bool: the draft token is the target's most likely one.

    The test of greedy speculative decoding; ties go to the first token, as in ``argmax``.
    """
    return rows.logits.argmax(dim=-1) == rows.draft_ids


def standard_sampled(
    rows: DraftRows, temperature: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """Return [N] bool: the draft token passes the test that keeps the target's distribution.

    Accepts with probability min(1, p(x) / q(x)), where q is a point mass on x if the proposer has
    no logits. Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding
    (arXiv 2211.17192), algorithm 1.

    Args:
        rows: The drafts.
        temperature: [N] float above 0.
        uniform: [N] float, drawn from [0, 1).

    """
    ids = rows.safe_ids[:, None]
    scale = temperature[:, None]
    p = (rows.logits.float() / scale).softmax(dim=-1).gather(1, ids)[:, 0]
    if rows.draft_logits is None:
        return rows.is_draft & (uniform < p)
    q = (rows.draft_logits.float() / scale).softmax(dim=-1).gather(1, ids)[:, 0]
    return rows.is_draft & (uniform * q < p)


def accept(
    rows: DraftRows,
    standard: torch.Tensor,
    lossy: torch.Tensor | None = None,
    protected: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return [N] bool: the drafts that are kept, (standard or lossy), up to the first rejection.

    The token at the cut and the bonus token behind the last draft are those of standard
    verification, so this says nothing of them.

    Args:
        rows: The drafts.
        standard: [N] bool, outcome of the standard test.
        lossy: [N] bool, outcome of a lossy rule, or ``None``.
        protected: [N] bool, rows that only the standard test may accept (see :func:`is_protected`).

    """
    kept = standard
    if lossy is not None:
        kept = kept | (lossy if protected is None else lossy & ~protected)
    return before_rejection(kept & rows.is_draft, rows.position)


def before_rejection(passed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Return [N] bool: rows that passed and in front of which no row of the request failed."""
    failed = (~passed).long().cumsum(dim=0)
    num_rows = passed.shape[0]
    first = torch.arange(num_rows, device=passed.device) - position.long()
    # Failures of the batch in front of a request's first row.
    before = torch.cat([failed.new_zeros(1), failed])[first]
    return failed == before


def is_protected(
    draft_ids: torch.Tensor, protected_ids: torch.Tensor, grammar: torch.Tensor
) -> torch.Tensor:
    """Return [N] bool: rows that no lossy rule may accept.

    Args:
        draft_ids: [N] int, draft tokens; negative ones are protected.
        protected_ids: [G, V] bool, by grammar, tokens that end or structure a text: end-of-sequence
            and special tokens and the grammar's tags.
        grammar: [N] int, which grammar each row is written in.

    """
    return (draft_ids < 0) | protected_ids[grammar, draft_ids.long().clamp(min=0)]
