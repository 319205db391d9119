"""Random rows, with ties, filler, sure and unsure places."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from spec_decode.draft_rows import NO_DRAFT, DraftRows


def make_rows(
    seed: int,
    lengths: list[int],
    vocab_size: int = 11,
    hidden_size: int = 5,
    filler: float = 0.1,
    with_draft_logits: bool = True,
    with_threshold: bool = False,
) -> DraftRows:
    """Return drafts of requests with so many drafts each; drafts are likely tokens, mostly."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    sharpness = torch.rand(n, 1, generator=g) * 4
    logits = torch.randn(n, vocab_size, generator=g) * sharpness
    noise = torch.randn(n, vocab_size, generator=g) * torch.rand(n, 1, generator=g)
    draft_logits = logits + noise
    ids = draft_logits.argmax(-1) if n else torch.zeros(0, dtype=torch.long)
    other = torch.randint(vocab_size, (n,), generator=g)
    ids = torch.where(torch.rand(n, generator=g) < 0.3, other, ids)
    ids = torch.where(torch.rand(n, generator=g) < filler, NO_DRAFT, ids)
    return DraftRows(
        logits=logits,
        draft_ids=ids.to(torch.int32),
        request=torch.tensor([r for r, k in enumerate(lengths) for _ in range(k)]).long(),
        position=torch.tensor([j for k in lengths for j in range(k)]).long(),
        draft_logits=draft_logits if with_draft_logits else None,
        hidden=torch.randn(n, hidden_size, generator=g),
        threshold=torch.rand(n, generator=g) if with_threshold else None,
    )


batches = st.builds(
    make_rows,
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(0, 6), max_size=5),
    vocab_size=st.integers(2, 17),
    filler=st.sampled_from([0.0, 0.2, 1.0]),
    with_draft_logits=st.booleans(),
    with_threshold=st.booleans(),
)
"""Batches of all shapes: no request, requests without drafts, whole batches of filler."""
