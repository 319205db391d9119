"""Streams that vLLM's parsers of reasoning and tool calls read one token at a time.

Most parsers look for their markers among the tokens of one delta, and take a delta with a marker
and more for text: a literal ``<think>`` reaches the client. A model on its own writes a token a
step. Forced text, and a path whose turn has come, are released by many. With stop strings vLLM
also holds text back behind its tokens, and the parsers cut at the wrong place.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from ..compat import patches
from . import request_validation


def install() -> None:
    """Read streams of requests that may branch token by token; safe to call again."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    patches.CHAT_PARSER.apply(OpenAIServingChat, _reading)
    patches.RESPONSES_PARSER.apply(OpenAIServingResponses, _reading)


def _reading(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make_parser(self: Any, request: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
        parser = original(self, request, tokenizer, *args, **kwargs)
        if (
            parser is None
            or not request.stream
            or not request_validation.may_branch(request.vllm_xargs)
        ):
            return parser
        return TokenByToken(parser, tokenizer)

    return make_parser


class TokenByToken:
    """One of vLLM's parsers, whose deltas are cut into tokens with their own text."""

    def __init__(self, parser: Any, tokenizer: Any) -> None:
        self._parser = parser
        self._tokenizer = tokenizer
        self._detokenizer: IncrementalDetokenizer | None = None
        self._waiting: deque[tuple[int, int]] = deque()
        """Tokens that the parser has not seen, with the length of their text."""
        self._text = ""
        """Their text, as far as vLLM has let go of it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    def parse_delta(
        self,
        delta_text: str,
        delta_token_ids: list[int],
        request: Any,
        prompt_token_ids: list[int] | None = None,
        *,
        finished: bool,
    ) -> DeltaMessage | None:
        """Parse a delta as if each of its tokens had come alone; return it in one message."""
        if self._detokenizer is None:
            self._detokenizer = _detokenizer(self._tokenizer, request, prompt_token_ids)
        for token in delta_token_ids:
            self._detokenizer.update([token], False)
            text = self._detokenizer.get_next_output_text(finished=False, delta=True)
            self._waiting.append((token, len(text)))
        self._text += delta_text
        feed = functools.partial(
            self._parser.parse_delta, request=request, prompt_token_ids=prompt_token_ids
        )
        messages, at = [], 0
        while self._waiting and (finished or self._waiting[0][1] <= len(self._text) - at):
            token, length = self._waiting.popleft()
            last = finished and not self._waiting
            text = self._text[at:] if last else self._text[at : at + length]
            at += length
            messages.append(feed(text, [token], finished=last))
        self._text = self._text[at:]
        if finished and not messages:
            messages.append(feed(self._text, [], finished=True))
        return joined([message for message in messages if message is not None])


def joined(messages: list[DeltaMessage]) -> DeltaMessage | None:
    """Return one message with the text and the tool calls of several."""
    if len(messages) < 2:
        return messages[0] if messages else None
    values: dict[str, Any] = {}
    for message in messages:
        values.update((name, getattr(message, name)) for name in message.model_fields_set)
    for name in ("role", "content", "reasoning"):
        parts = [part for message in messages if (part := getattr(message, name)) is not None]
        if parts:
            values[name] = parts[0] if name == "role" else "".join(parts)
    if calls := [call for message in messages for call in message.tool_calls]:
        values["tool_calls"] = calls
    return DeltaMessage(**values)


def _detokenizer(
    tokenizer: Any, request: Any, prompt_token_ids: list[int] | None
) -> IncrementalDetokenizer:
    """Return a detokenizer that cuts text as the one of vLLM that wrote it."""
    params = SamplingParams(
        skip_special_tokens=getattr(request, "skip_special_tokens", True),
        spaces_between_special_tokens=getattr(request, "spaces_between_special_tokens", True),
    )
    return IncrementalDetokenizer.from_new_request(
        tokenizer,
        EngineCoreRequest(
            request_id="",
            prompt_token_ids=prompt_token_ids or [],
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        ),
    )
