"""Summaries in streams of ``/v1/messages``, from the chunks of either supported vLLM."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_parallel_think.core.config.server_options import CONFIG_KEY
from vllm_parallel_think.frontend.response_summary import _of_messages

SUMMARY = {"num_paths": 2}


def as_text(**values: Any) -> str:
    return f"data: {json.dumps(values)}\n\n"


def as_object(**values: Any) -> Any:
    """A chunk of vLLM 0.33, whose summary is where vLLM puts it."""
    params = {CONFIG_KEY: values[CONFIG_KEY][0]} if CONFIG_KEY in values else None
    return SimpleNamespace(content=values["content"], kv_transfer_params=params)


async def convert(self: Any, generator: AsyncIterator[Any]) -> AsyncIterator[str]:
    async for chunk in generator:
        values = json.loads(chunk[6:]) if isinstance(chunk, str) else vars(chunk)
        assert CONFIG_KEY not in values
        yield f"event: content_block_delta\ndata: {json.dumps(values['content'])}\n\n"
    yield 'event: message_delta\ndata: {"type": "message_delta"}\n\n'


def converted(chunks: list[Any]) -> list[str]:
    async def stream() -> AsyncIterator[Any]:
        for chunk in chunks:
            yield chunk

    async def collect() -> list[str]:
        return [event async for event in _of_messages(convert)(None, stream())]

    return asyncio.run(collect())


@pytest.mark.parametrize("make", [as_text, as_object])
def test_the_last_delta_carries_the_summary(make: Any) -> None:
    *texts, last = converted(
        [make(content="a"), make(content="b", **{CONFIG_KEY: [SUMMARY]}), make(content="")]
    )
    assert [event.split("data: ")[1].strip() for event in texts] == ['"a"', '"b"', '""']
    values = json.loads(last.removeprefix("event: message_delta\ndata: "))
    assert values == {"type": "message_delta", CONFIG_KEY: [SUMMARY]}


@pytest.mark.parametrize("make", [as_text, as_object])
def test_a_stream_without_a_summary_is_vllms_own(make: Any) -> None:
    assert converted([make(content="a")])[-1] == (
        'event: message_delta\ndata: {"type": "message_delta"}\n\n'
    )
