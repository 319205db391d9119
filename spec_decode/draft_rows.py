"""What a verification rule sees of a batch: one flat row per draft token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NO_DRAFT = -1
"""Draft id of a row that only fills a place; never accepted."""


@dataclass(frozen=True, eq=False)
class DraftRows:
    """Draft tokens of all requests of a step, request by request, in the order of the text.

    Row i is about one draft token x_i. Its logits are those *in front of* x_i (they predict it),
    its hidden state is the one *on* x_i: in a verification forward over ``[last token, x_0 ..
    x_K-1]`` logits row j and hidden row j + 1 belong to draft j.

    Nothing here is copied to the host, so that a step on a GPU need not wait; what only values
    could tell (that rows of a request follow each other, positions count from 0) is the caller's
    promise.

    Attributes:
        logits: [N, V] float, the target's logits for the place of each draft token.
        draft_ids: [N] int, draft tokens, or :data:`NO_DRAFT`.
        request: [N] int, which request a row belongs to.
        position: [N] int, place of the draft token among its request's drafts, from 0.
        draft_logits: [N, V] float, the draft model's logits at temperature 1 for the same places; a
            constant per row may be missing from them. ``None`` if the proposer has none.
        hidden: [N, H] float, the target's last hidden state (after the final norm) on the draft
            token itself, or ``None``.
        threshold: [N] float, the least probability with which each row's request lets the judge
            accept, or ``None``.

    Raises:
        ValueError: Shapes do not fit each other.

    """

    logits: torch.Tensor
    draft_ids: torch.Tensor
    request: torch.Tensor
    position: torch.Tensor
    draft_logits: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    threshold: torch.Tensor | None = None

    def __post_init__(self) -> None:
        num_rows = self.draft_ids.shape[0]
        if self.logits.ndim != 2:
            raise ValueError(f"logits must be [N, V], got {tuple(self.logits.shape)}")
        for name in ("logits", "request", "position", "draft_logits", "hidden", "threshold"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape[0] != num_rows:
                raise ValueError(f"{name} has {tensor.shape[0]} rows, draft_ids {num_rows}")
        if self.draft_logits is not None and self.draft_logits.shape != self.logits.shape:
            raise ValueError("draft_logits must have the shape of logits")

    @property
    def safe_ids(self) -> torch.Tensor:
        """[N] int64, draft tokens with 0 in place of :data:`NO_DRAFT`, to index with."""
        return self.draft_ids.long().clamp(min=0)

    @property
    def is_draft(self) -> torch.Tensor:
        """[N] bool, whether the row holds a draft token at all."""
        return self.draft_ids >= 0
