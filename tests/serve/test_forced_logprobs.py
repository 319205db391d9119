"""Log-probabilities of forced tokens are shaped as those of sampled ones and claim nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
from vllm.logprobs import append_logprobs_for_next_position

from vllm_parallel_think.scheduler.client_output import forced_logprobs

TOKENS = (7, 0, 2, 7)


def entries(num_logprobs: int, named: list[int] | None = None) -> list[dict[int, Any]]:
    """Read them as vLLM's front end does."""
    found: list[dict[int, Any]] = []
    ids, logprobs, ranks, _ = forced_logprobs(TOKENS, num_logprobs, named)
    for row, values, rank in zip(ids.tolist(), logprobs.tolist(), ranks.tolist(), strict=True):
        append_logprobs_for_next_position(found, row, values, [""] * len(row), rank, num_logprobs)
    return found


@pytest.mark.parametrize("num_logprobs", [0, 1, 2, 5])
def test_as_many_entries_as_asked_for(num_logprobs: int) -> None:
    for token, entry in zip(TOKENS, entries(num_logprobs), strict=True):
        assert next(iter(entry)) == token
        assert len(entry) == max(num_logprobs, 1)
        assert sorted(e.rank for e in entry.values()) == list(range(1, len(entry) + 1))
        assert entry[token].logprob == 0
        assert math.fsum(math.exp(e.logprob) for e in entry.values()) == 1


def test_the_whole_vocabulary() -> None:
    for token, entry in zip(TOKENS, entries(9), strict=True):
        assert sorted(entry) == list(range(9))
        assert [i for i, e in entry.items() if e.logprob == 0] == [token]


def test_tokens_that_the_client_names() -> None:
    for token, entry in zip(TOKENS, entries(3, [2, 5, 6]), strict=True):
        assert set(entry) == {token, 2, 5, 6}
        assert [i for i, e in entry.items() if e.logprob == 0] == [token]
