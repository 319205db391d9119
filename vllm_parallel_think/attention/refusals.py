"""Attention features that the masked rows of a group could not reproduce."""

from __future__ import annotations

from typing import Any


def refuse_unsupported(impl: Any) -> None:
    """Refuse layers whose attention the masked rows could not reproduce.

    Raises:
        NotImplementedError: Names the feature of the model.

    """
    window = impl.sliding_window
    features = {
        "ALiBi": impl.alibi_slopes is not None,
        "logits soft-capping": bool(impl.logits_soft_cap),
        "attention sinks": impl.sinks is not None,
        "a sliding window": window not in (None, -1, (-1, -1)),
    }
    for feature, present in features.items():
        if present:
            raise NotImplementedError(
                f"parallel_think cannot serve a model whose attention uses {feature}; "
                "remove parallel_think from --additional-config to serve it without branches"
            )
