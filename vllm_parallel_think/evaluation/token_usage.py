"""What an answer cost: every generated token, and those of the critical path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..core.config.server_options import CONFIG_KEY

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class TokenUsage:
    """Tokens of an answer.

    Attributes:
        generated: All sampled tokens, also those of paths that the text does not show.
        critical: Sampled tokens of the longest chain; ``None`` where the server does not tell how
            long each of several choices was.
        forced: Tokens that the engine wrote.
        forks: Forks that were made, workers counting as one.
        paths: Branches that ran side by side.

    """

    generated: int
    critical: int | None
    forced: int = 0
    forks: int = 0
    paths: int = 0

    def then(self, other: TokenUsage) -> TokenUsage:
        """Return both, one after the other."""
        known = self.critical is not None and other.critical is not None
        return TokenUsage(
            self.generated + other.generated,
            (self.critical or 0) + (other.critical or 0) if known else None,
            self.forced + other.forced,
            self.forks + other.forks,
            self.paths + other.paths,
        )

    def within(self, budget: int) -> bool:
        """Return whether the budget of all generated tokens was kept."""
        return self.generated <= budget

    def record(self) -> dict[str, int | None]:
        """Return the figures as plain values."""
        return asdict(self)


def summaries(response: Mapping[str, Any]) -> list[Summary | None]:
    """Return the engine's summary of each choice; ``None`` where there is none."""
    found = (response.get("kv_transfer_params") or {}).get(CONFIG_KEY)
    choices = response.get("choices") or []
    if isinstance(found, Mapping):
        return [found, *([None] * (len(choices) - 1))]
    if isinstance(found, Sequence) and not isinstance(found, str) and len(found) == len(choices):
        return [each if isinstance(each, Mapping) else None for each in found]
    return [None] * len(choices)


def usage_of(response: Mapping[str, Any]) -> TokenUsage:
    """Return the tokens of a response.

    A summary counts more than ``usage`` does, which knows the visible tokens only. Several choices
    are branches of one fork: their tokens add up, and the longest is the critical path.

    Raises:
        KeyError: The response has neither a summary nor ``usage``.

    """
    found = summaries(response)
    if found and all(each is not None for each in found):
        parts = [_of_summary(each) for each in found if each is not None]
        return parts[0] if len(parts) == 1 else _side_by_side(parts)
    generated = int(response["usage"]["completion_tokens"])
    choices = response["choices"]
    if len(choices) == 1:
        return TokenUsage(generated, generated)
    lengths = [len(choice["token_ids"]) for choice in choices if choice.get("token_ids")]
    critical = max(lengths) if len(lengths) == len(choices) else None
    return TokenUsage(generated, critical, forks=1, paths=len(choices))


def _of_summary(summary: Summary) -> TokenUsage:
    return TokenUsage(
        generated=int(summary["generated_tokens"]),
        critical=int(summary["critical_path_tokens"]),
        forced=int(summary.get("forced_tokens", 0)),
        forks=int(summary.get("forks", 0)),
        paths=int(summary.get("paths", 0)),
    )


def _side_by_side(parts: Sequence[TokenUsage]) -> TokenUsage:
    known = [part.critical for part in parts if part.critical is not None]
    return TokenUsage(
        generated=sum(part.generated for part in parts),
        critical=max(known) if len(known) == len(parts) else None,
        forced=sum(part.forced for part in parts),
        forks=1 + sum(part.forks for part in parts),
        paths=len(parts) + sum(part.paths for part in parts),
    )
