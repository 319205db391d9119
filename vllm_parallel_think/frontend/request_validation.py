"""Refusing bad requests before the engine sees them: HTTP 400, streaming or not.

Installed only in a configured server. Two places, because vLLM answers an error found while
streaming with HTTP 200: ``to_sampling_params`` runs before the stream starts, ``validate_request``
covers the offline API and sees the prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams

from ..compat import patches
from ..core.config.request_options import RequestOptions, parse_request
from ..core.errors import OptionError
from ..observability.metrics import refused_requests
from ..settings import Settings

_settings: Settings | None = None


def install(settings: Settings) -> None:
    """Check every request against these settings; safe to call again."""
    global _settings
    _settings = settings
    patches.VALIDATE_REQUEST.apply(type(current_platform), _with_check)
    _patch_protocols()


def check(
    params: SamplingParams, processed_input: Any = None, *, has_embeddings: bool = False
) -> None:
    """Check one request.

    Args:
        params: Its sampling parameters.
        processed_input: vLLM's processed prompt, where known.
        has_embeddings: Whether the client sent embeddings instead of text.

    Raises:
        VLLMValidationError: Names the key, the value and what is allowed.

    """
    options = _parse(params.extra_args).within(params.max_tokens)
    if isinstance(processed_input, dict) and processed_input.get("type") == "embeds":
        has_embeddings = True
    _refuse(
        options,
        {
            "structured outputs": params.structured_outputs is not None,
            "prompt_logprobs": params.prompt_logprobs is not None,
            "prompt_logprob_token_ids": (
                getattr(params, "prompt_logprob_token_ids", None) is not None
            ),
            "trace_decode_token_ids": getattr(params, "trace_decode_token_ids", None) is not None,
            "repetition_detection": params.repetition_detection is not None,
            "thinking_token_budget": getattr(params, "thinking_token_budget", None) is not None,
            "prompt embeddings": has_embeddings,
        },
    )


def may_branch(extra_args: dict[str, Any] | None) -> bool:
    """Return whether a request with these ``vllm_xargs`` has a parallel profile.

    Raises:
        VLLMValidationError: Names the key, the value and what is allowed.

    """
    return _parse(extra_args).profile is not None


def refuse_beam_search(request: Any) -> None:
    """Refuse beam search of a client that may say ``off``: beams are computed one token at a time.

    Raises:
        VLLMValidationError: The request would branch, or names a wrong key.

    """
    _refuse(_parse(getattr(request, "vllm_xargs", None)), {"beam search": True})


def _parse(extra_args: dict[str, Any] | None) -> RequestOptions:
    assert _settings is not None
    try:
        return parse_request(
            extra_args,
            _settings.options,
            _settings.profiles,
            _settings.default,
            _settings.judge_threshold,
            _settings.no_workers,
        )
    except OptionError as error:
        refused_requests.count("options")
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None


def _refuse(options: RequestOptions, reasons: dict[str, bool]) -> None:
    if options.profile is None:
        return
    for reason, present in reasons.items():
        if present:
            refused_requests.count(reason.replace(" ", "_"))
            raise VLLMValidationError(
                f"{reason} cannot be combined with the parallel profile {options.profile!r}; "
                'send vllm_xargs {"parallel_think": "off"} for a sequential answer',
                parameter="vllm_xargs",
            )


def _with_check(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def validate_request(cls: type, processed_inputs: Any, params: Any) -> None:
        original(cls, processed_inputs, params)
        if isinstance(params, SamplingParams):
            check(params, processed_inputs)

    return validate_request


def _patch_protocols() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens

    patches.CHAT_PARAMS.apply(ChatCompletionRequest, _checked)
    patches.COMPLETION_PARAMS.apply(CompletionRequest, _checked)
    patches.RESPONSES_PARAMS.apply(ResponsesRequest, _checked)
    patches.CHAT_BEAMS.apply(ChatCompletionRequest, _no_beam)
    patches.COMPLETION_BEAMS.apply(CompletionRequest, _no_beam)
    patches.SERVE_TOKENS.apply(ServingTokens, _checked_tokens)


def _checked(original: Callable[..., SamplingParams]) -> Callable[..., SamplingParams]:
    @functools.wraps(original)
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> SamplingParams:
        params = original(self, *args, **kwargs)
        check(params, has_embeddings=bool(getattr(self, "prompt_embeds", None)))
        return params

    return to_sampling_params


def _checked_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def serve_tokens(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        check(request.sampling_params)
        return await original(self, request, *args, **kwargs)

    return serve_tokens


def _no_beam(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_beam_search(self)
        return original(self, *args, **kwargs)

    return to_beam_search_params
