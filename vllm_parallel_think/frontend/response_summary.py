"""Summaries of answers where vLLM drops them: in streams, with several choices or prompts.

The scheduler sends a request's summary in ``kv_transfer_params["parallel_think"]``, which vLLM puts
into the response of a request with one choice. With several choices it becomes a list here, one
entry a choice (``None`` for a choice without a summary); in a stream the chunk that ends a choice
carries the list in either case, in a stream of ``/v1/messages`` its last ``message_delta``.
Installed only in a configured server.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.engine.output_processor import RequestState
from vllm.v1.engine.parallel_sampling import ParentRequest

from ..compat import patches
from ..core.config.request_options import LIVE_KEY
from ..core.config.server_options import CONFIG_KEY

Summary = dict[str, Any]

_DONE = "data: [DONE]\n\n"

_choices: WeakKeyDictionary[ParentRequest, list[Summary | None]] = WeakKeyDictionary()
"""Summaries of a request's choices so far, for ``n`` above 1."""


def install() -> None:
    """Let summaries reach every client; safe to call again."""
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens

    patches.REQUEST_OUTPUT.apply(RequestState, _gathering)
    chat = functools.partial(_summarised, (OpenAIServingChat, AnthropicServingMessages))
    patches.CHAT_STREAM.apply(OpenAIServingChat, chat)
    completion = functools.partial(_summarised, (OpenAIServingCompletion,))
    patches.COMPLETION_STREAM.apply(OpenAIServingCompletion, completion)
    patches.TOKENS_STREAM.apply(ServingTokens, functools.partial(_summarised, (ServingTokens,)))
    patches.MESSAGES_STREAM.apply(AnthropicServingMessages, _of_messages)
    patches.CHAT_BATCH.apply(OpenAIServingChatBatch, _of_every_conversation)
    patches.COMPLETION_RESPONSE.apply(OpenAIServingCompletion, _of_every_prompt)


def _gathering(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the summaries of all ``n`` choices."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def make_request_output(self: RequestState, *args: Any, **kwargs: Any) -> Any:
        if self.parent_req is None:
            return original(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs)
        params = call.arguments.get("kv_transfer_params")
        call.arguments["kv_transfer_params"] = _gather(self.parent_req, self.request_index, params)
        return original(*call.args, **call.kwargs)

    return make_request_output


def _gather(
    parent: ParentRequest, index: int, params: dict[str, Any] | None
) -> dict[str, Any] | None:
    summaries = _choices.get(parent)
    if params is not None and CONFIG_KEY in params:
        if summaries is None:
            summaries = _choices[parent] = [None] * parent.n
        summaries[index] = params[CONFIG_KEY]
    if summaries is None:
        return params
    return {**(params or {}), CONFIG_KEY: list(summaries)}


def _summarised(owners: tuple[type, ...], original: Callable[..., Any]) -> Callable[..., Any]:
    """Put summaries, and paths as they grow, into a stream's chunks.

    Subclasses make chunks of another API from these and take one without choices for the usage, so
    views of paths are for the first of these classes alone; subclasses that are not named here have
    no place for a summary.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    async def stream(*args: Any, **kwargs: Any) -> AsyncIterator[str]:
        call = signature.bind(*args, **kwargs)
        values = call.arguments
        ours = type(values["self"]) in owners
        num_choices = _num_choices(values["request"])
        summaries: list[Summary | None] = [None] * num_choices * values.get("num_prompts", 1)
        if ours:
            values["result_generator"] = _watch(values["result_generator"], summaries, num_choices)
        views: list[list[dict[str, Any]]] = []
        if type(values["self"]) is owners[0] and num_choices == len(summaries) == 1:
            values["result_generator"] = _watch_paths(values["result_generator"], views)
        first = None
        async with aclosing(original(*call.args, **call.kwargs)) as chunks:
            async for chunk in chunks:
                first = first or chunk
                yield _with_summaries(chunk, summaries) if ours else chunk
                if views and chunk != _DONE:
                    yield _extra_chunk(first, LIVE_KEY, views.pop())

    return stream


def _num_choices(request: Any) -> int:
    """Return how many choices a request of any API has for each of its prompts."""
    params = getattr(request, "sampling_params", request)
    return params.n or 1


async def _watch(
    results: AsyncIterator[Any], summaries: list[Summary | None], num_choices: int
) -> AsyncIterator[Any]:
    """Pass results on; fill in each choice's newest summary.

    Args:
        results: vLLM's request outputs, for completions each with the index of its prompt.
        summaries: Filled in, prompt by prompt.
        num_choices: Choices a prompt.

    """
    async for item in results:
        prompt, result = item if isinstance(item, tuple) else (0, item)
        newest = (result.kv_transfer_params or {}).get(CONFIG_KEY)
        if newest is not None:
            start = prompt * num_choices
            summaries[start : start + num_choices] = (
                newest if isinstance(newest, list) else [newest]
            )
        yield item


async def _watch_paths(
    results: AsyncIterator[Any], views: list[list[dict[str, Any]]]
) -> AsyncIterator[Any]:
    """Pass results on; leave the newest view of all paths, if the client asked to see them grow."""
    async for item in results:
        _, result = item if isinstance(item, tuple) else (0, item)
        view = (result.kv_transfer_params or {}).get(LIVE_KEY)
        if view is not None:
            views[:] = [view]
        yield item


def _with_summaries(chunk: str, summaries: list[Summary | None]) -> str:
    """Add the summaries to a chunk that ends a choice; others pass as they are.

    A chunk of its own would have no choices, and clients that read ``choices[0]`` would fail on it.
    """
    if '"finish_reason":' not in chunk or '"finish_reason":null' in chunk:
        return chunk
    if all(summary is None for summary in summaries):
        return chunk
    values = json.loads(chunk.removeprefix("data: "))
    return f"data: {json.dumps({**values, CONFIG_KEY: summaries}, ensure_ascii=False)}\n\n"


def _extra_chunk(first: str, key: str, value: Any) -> str:
    """Return a chunk without choices, under the identity of the stream's first chunk."""
    same = json.loads(first.removeprefix("data: "))
    identity = ("id", "object", "created", "model", "request_id", "output_mode")
    chunk = {name: same[name] for name in identity if name in same}
    return f"data: {json.dumps({**chunk, 'choices': [], key: value})}\n\n"


def _of_every_prompt(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the summaries of all prompts of a completion request."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def request_output_to_completion_response(*args: Any, **kwargs: Any) -> Any:
        response = original(*args, **kwargs)
        values = signature.bind(*args, **kwargs).arguments
        results, num_choices = values["final_res_batch"], values["request"].n or 1
        if len(results) > 1:
            summaries: list[Summary | None] = []
            for result in results:
                found = (result.kv_transfer_params or {}).get(CONFIG_KEY)
                summaries.extend(found if isinstance(found, list) else [found] * num_choices)
            if any(summary is not None for summary in summaries):
                response.kv_transfer_params = {
                    **(response.kv_transfer_params or {}),
                    CONFIG_KEY: summaries,
                }
        return response

    return request_output_to_completion_response


def _of_every_conversation(original: Callable[..., Any]) -> Callable[..., Any]:
    """Add the summaries to a batch of conversations: a list, whatever their number."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    async def chat_completion_full_generator_batch(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        results = call.arguments["generators"]
        found: list[list[Summary | None]] = [[None] for _ in results]
        call.arguments["generators"] = [
            _watch(result, summary, 1) for result, summary in zip(results, found, strict=True)
        ]
        response = await original(*call.args, **call.kwargs)
        summaries = [summary for (summary,) in found]
        if any(summary is not None for summary in summaries) and hasattr(response, "choices"):
            response.kv_transfer_params = {
                **(response.kv_transfer_params or {}),
                CONFIG_KEY: summaries,
            }
        return response

    return chat_completion_full_generator_batch


def _of_messages(original: Callable[..., Any]) -> Callable[..., Any]:
    """Take summaries out of the chat chunks of ``/v1/messages``; add one to the last delta."""

    @functools.wraps(original)
    async def message_stream_converter(
        self: Any, generator: AsyncIterator[Any], *args: Any, **kwargs: Any
    ) -> AsyncIterator[str]:
        found: list[Any] = []
        chunks = _without_summaries(generator, found)
        async with aclosing(original(self, chunks, *args, **kwargs)) as events:
            async for event in events:
                if found and event.startswith("event: message_delta\n"):
                    head, _, data = event.partition("\ndata: ")
                    values = {**json.loads(data), CONFIG_KEY: found[-1]}
                    event = f"{head}\ndata: {json.dumps(values, ensure_ascii=False)}\n\n"
                yield event

    return message_stream_converter


async def _without_summaries(chunks: AsyncIterator[Any], found: list[Any]) -> AsyncIterator[Any]:
    """Pass chunks of a chat on; take their summaries out.

    vLLM 0.32 makes these streams from text; 0.33 from objects, which carry what a choice with one
    summary ended with.
    """
    mark = f'"{CONFIG_KEY}": '  # inside a text its quotes would be escaped
    async for chunk in chunks:
        if not isinstance(chunk, str):
            params = getattr(chunk, "kv_transfer_params", None) or {}
            if CONFIG_KEY in params:
                found.append([params[CONFIG_KEY]])
        elif mark in chunk:
            values = json.loads(chunk.removeprefix("data: "))
            if CONFIG_KEY in values:
                found.append(values.pop(CONFIG_KEY))
                chunk = f"data: {json.dumps(values, ensure_ascii=False)}\n\n"
        yield chunk
