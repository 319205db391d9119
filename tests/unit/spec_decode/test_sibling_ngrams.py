"""Drafts from siblings' texts, against a slow search."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec_decode.sibling_ngrams import SiblingTexts, continuation
from tests.support.runners import run_script

text = st.lists(st.integers(0, 2), max_size=14)


def slow(own: list[int], others: list[list[int]], num: int) -> list[int]:
    for size in (4, 3, 2):
        for other in [own, *others]:
            for place in range(len(other) - 1, size - 1, -1):
                if len(own) >= size and other[place - size : place] == own[-size:]:
                    return other[place : place + num]
    return []


@given(text, st.lists(text, max_size=3), st.integers(1, 5))
def test_continuation(own: list[int], others: list[list[int]], num: int) -> None:
    arrays = [np.array(other, dtype=np.int64) for other in others]
    found = continuation(np.array(own, dtype=np.int64), arrays, num)
    assert found == slow(own, others, num)


def test_texts_of_groups_are_apart_and_bounded() -> None:
    texts = SiblingTexts(max_groups=2)

    def tell(request: str, group: str | None, tokens: list[int]) -> None:
        groups = {} if group is None else {request: group}
        texts.update({request: np.array(tokens)}, groups)

    tell("a1", "a", [1, 2])
    tell("a2", "a", [3])
    tell("b1", "b", [4])
    tell("alone", None, [5])
    assert [t.tolist() for t in texts.others("a1", "a")] == [[3]]
    assert [t.tolist() for t in texts.others("new", "a")] == [[3], [1, 2]]
    assert not texts.others("b1", "b")
    assert not texts.others("alone", None)
    tell("a1", "a", [1, 2, 6])
    tell("c1", "c", [7])
    assert [t.tolist() for t in texts.others("x", "a")] == [[3], [1, 2, 6]]
    assert not texts.others("x", "b")


def test_a_server_without_branches_is_refused() -> None:
    from vllm_parallel_think.core.errors import OptionError
    from vllm_parallel_think.judge.proposer import SiblingProposer

    config: Any = SimpleNamespace(
        additional_config={}, speculative_config=SimpleNamespace(num_speculative_tokens=4)
    )
    with pytest.raises(OptionError, match="add parallel_think to --additional-config"):
        SiblingProposer(config)
    config.additional_config = {"parallel_think": {"profile": "skeleton"}}
    SiblingProposer(config)


@pytest.mark.slow
def test_in_an_engine(tmp_path: Path) -> None:
    """Groups answer as the dense oracle does; drafts of siblings are kept."""
    said = run_script("tests.engine.judge.runner_script", "v1", "siblings", str(tmp_path))
    assert "siblings hold" in said
