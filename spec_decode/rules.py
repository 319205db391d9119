"""Rules that accept a draft token although the target would have written another one.

A rule is a frozen set of parameters; called with rows it returns [N] bool. It looks at every row
by itself (FLy also at those behind it) and knows nothing of the standard test, of protected tokens
or of the cut: :func:`spec_decode.acceptance.accept` puts them together. Filler rows are never
accepted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch

from .draft_rows import DraftRows
from .judge_head import JudgeHead


class Rule(Protocol):
    """What all rules have in common.

    Attributes:
        needs_hidden: Whether rows must come with hidden states.
        needs_draft_logits: Whether it accepts nothing without the draft model's logits.

    """

    needs_hidden: ClassVar[bool]
    needs_draft_logits: ClassVar[bool]

    def __call__(self, rows: DraftRows) -> torch.Tensor:
        """Return [N] bool: rows the rule accepts."""


@dataclass(frozen=True)
class Judge:
    """A linear head on the hidden state of the draft token itself.

    Accepts if sigmoid(w . h(x) + b) > threshold, the larger of the rule's and the row's. Source:
    Bachmann et al., Judge Decoding (arXiv 2501.19309), section 4.

    Attributes:
        head: The trained head.
        threshold: Probability of 'right' above which a token is accepted, 0-1.

    """

    needs_hidden: ClassVar[bool] = True
    needs_draft_logits: ClassVar[bool] = False

    head: JudgeHead
    threshold: float = 0.5

    def __post_init__(self) -> None:
        _between("threshold", self.threshold, 0, 1)

    def __call__(self, rows: DraftRows) -> torch.Tensor:
        if rows.hidden is None:
            raise ValueError("the judge needs the hidden states of the draft tokens")
        score = self.head.score(rows.hidden)
        least = torch.full_like(score, self.threshold)
        if rows.threshold is not None:
            least = torch.maximum(least, rows.threshold.to(score.dtype))
        return rows.is_draft & (score > least)


@dataclass(frozen=True)
class TopNDelta:
    """Among the target's N most likely tokens, and not far behind the first.

    Accepts if fewer than n tokens are more likely than x, and p(x) >= max p - delta. Source:
    relaxed acceptance in TensorRT-LLM (for DeepSeek-R1: N 10, delta 0.6, thinking phase only).
    With delta 1 this is the top-k baseline of Judge Decoding (arXiv 2501.19309).

    Attributes:
        n: Size of the set, at least 1.
        delta: Largest distance to the most likely token, in probability, 0-1.

    """

    needs_hidden: ClassVar[bool] = False
    needs_draft_logits: ClassVar[bool] = False

    n: int = 10
    delta: float = 0.6

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"n must be a whole number of at least 1, got {self.n!r}")
        _between("delta", self.delta, 0, 1)

    def __call__(self, rows: DraftRows) -> torch.Tensor:
        p = rows.logits.float().softmax(dim=-1)
        of_draft = p.gather(1, rows.safe_ids[:, None])
        logit = rows.logits.gather(1, rows.safe_ids[:, None])
        num_above = (rows.logits > logit).sum(dim=-1)
        near = of_draft[:, 0] >= p.amax(dim=-1) - self.delta
        return rows.is_draft & (num_above < self.n) & near


@dataclass(frozen=True)
class Typical:
    """Likely enough, measured by how sure the target is.

    Accepts if p(x) > min(epsilon, alpha * exp(-H(p))), with the entropy H in nats. Source: typical
    acceptance in Medusa (arXiv 2401.10774), section 2.3.2; its defaults are 0.09 and 0.3.

    Attributes:
        epsilon: A probability that is enough in any case, 0-1.
        alpha: Share of exp(-H) that is enough otherwise, 0-1.

    """

    needs_hidden: ClassVar[bool] = False
    needs_draft_logits: ClassVar[bool] = False

    epsilon: float = 0.09
    alpha: float = 0.3

    def __post_init__(self) -> None:
        _between("epsilon", self.epsilon, 0, 1)
        _between("alpha", self.alpha, 0, 1)

    def __call__(self, rows: DraftRows) -> torch.Tensor:
        log_p = rows.logits.float().log_softmax(dim=-1)
        least = torch.clamp(self.alpha * torch.exp(-_entropy(log_p)), max=self.epsilon)
        of_draft = log_p.gather(1, rows.safe_ids[:, None])[:, 0].exp()
        return rows.is_draft & (of_draft > least)


@dataclass(frozen=True)
class KL:
    """Draft and target agree about the place, and the target is not sure of its own token.

    Accepts if max p <= max_top and KL(p || q) < tau, in nats. Accepts nothing where the proposer
    gives no logits. Source: the divergence gate of JuDi, which its authors compare with AutoJudge.

    Attributes:
        tau: Divergence from which on a row is refused, above 0.
        max_top: Probability of the target's first token above which a row is refused, 0-1.

    """

    needs_hidden: ClassVar[bool] = False
    needs_draft_logits: ClassVar[bool] = True

    tau: float = 0.3
    max_top: float = 0.9

    def __post_init__(self) -> None:
        if not _is_number(self.tau) or not self.tau > 0 or math.isinf(self.tau):
            raise ValueError(f"tau must be a number above 0, got {self.tau!r}")
        _between("max_top", self.max_top, 0, 1)

    def __call__(self, rows: DraftRows) -> torch.Tensor:
        if rows.draft_logits is None:
            return torch.zeros_like(rows.is_draft)
        log_p = rows.logits.float().log_softmax(dim=-1)
        log_q = rows.draft_logits.float().log_softmax(dim=-1)
        p = log_p.exp()
        # A token the target excludes adds nothing, whatever the draft model makes of it.
        divergence = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1)
        unsure = p.amax(dim=-1) <= self.max_top
        return rows.is_draft & unsure & (divergence < self.tau)


@dataclass(frozen=True)
class FLy:
    """The target wavers here, and the text that follows goes on as the target would have it.

    Accepts a mismatch if H(p) / ln V >= entropy and the next ``window`` drafts of the request all
    are the target's most likely tokens. A draft with fewer than ``window`` drafts behind it is
    refused, so the number of speculative tokens must exceed the window. Source: FLy, training-free
    loosely speculative decoding (arXiv 2511.22972), with its entropy gate 0.3 and window 6.

    Attributes:
        entropy: Least normalised entropy, 0-1.
        window: How many of the following drafts must match, at least 1.

    """

    needs_hidden: ClassVar[bool] = False
    needs_draft_logits: ClassVar[bool] = False

    entropy: float = 0.3
    window: int = 6

    def __post_init__(self) -> None:
        _between("entropy", self.entropy, 0, 1)
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be a whole number of at least 1, got {self.window!r}")

    def __call__(self, rows: DraftRows) -> torch.Tensor:
        num_rows, vocab_size = rows.logits.shape
        log_p = rows.logits.float().log_softmax(dim=-1)
        wavers = _entropy(log_p) >= self.entropy * math.log(vocab_size)
        misses = (rows.logits.argmax(dim=-1) != rows.draft_ids).long().cumsum(dim=0)
        row = torch.arange(num_rows, device=misses.device)
        last = (row + self.window).clamp(max=max(num_rows - 1, 0))
        inside = (row + self.window < num_rows) & (rows.request[last] == rows.request)
        return rows.is_draft & wavers & inside & (misses[last] == misses)


RULES: Mapping[str, type[Any]] = {
    "judge": Judge,
    "top_n_delta": TopNDelta,
    "typical": Typical,
    "kl": KL,
    "fly": FLy,
}
"""Rules by the name that settings use."""


def parameters(name: str) -> tuple[str, ...]:
    """Return the names of a rule's parameters."""
    return tuple(field.name for field in fields(RULES[name]))


def _entropy(log_p: torch.Tensor) -> torch.Tensor:
    """Return [N], the entropy in nats of [N, V] log probabilities."""
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(dim=-1)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _between(name: str, value: float, low: float, high: float) -> None:
    if not _is_number(value) or not low <= value <= high:
        raise ValueError(f"{name} must be a number between {low} and {high}, got {value!r}")
