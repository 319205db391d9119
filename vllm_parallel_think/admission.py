"""Refusing bad requests before the engine sees them: HTTP 400, streaming or not.

Installed only in a configured server. Two places, because vLLM answers an error found while streaming
with HTTP 200: ``to_sampling_params`` runs before the stream starts, ``validate_request`` covers the
offline API and sees the prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams

from .core.errors import OptionError
from .core.options import RequestOptions, is_ours, parse_request
from .settings import Settings

_settings: Settings | None = None


def install(settings: Settings) -> None:
    """Check every request against these settings; safe to call again."""
    global _settings
    first = _settings is None
    _settings = settings
    if first:
        _wrap_platform()
        _wrap_protocols()


def check(params: SamplingParams, processed_input: Any = None) -> None:
    """Check one request.

    Args:
        params: Its sampling parameters.
        processed_input: vLLM's processed prompt, where known.

    Raises:
        VLLMValidationError: Names the key, the value and what is allowed.

    """
    assert _settings is not None
    try:
        options = parse_request(
            params.extra_args, _settings.options, _settings.profiles, _settings.default
        )
    except OptionError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
    if options.profile is not None:
        _refuse_combinations(params, processed_input, options)


def _refuse_combinations(
    params: SamplingParams, processed_input: Any, options: RequestOptions
) -> None:
    reasons = {
        "structured outputs": params.structured_outputs is not None,
        "prompt_logprobs": params.prompt_logprobs is not None,
        "repetition_detection": params.repetition_detection is not None,
        "thinking_token_budget": getattr(params, "thinking_token_budget", None) is not None,
        "prompt embeddings": isinstance(processed_input, dict)
        and processed_input.get("type") == "embeds",
    }
    for reason, present in reasons.items():
        if present:
            raise VLLMValidationError(
                f"{reason} cannot be combined with the parallel profile {options.profile!r}; "
                'send vllm_xargs {"parallel_think": "off"} for a sequential answer',
                parameter="vllm_xargs",
            )


def refuse_beam_search(request: Any) -> None:
    """Refuse parallel keys beside beam search, which ignores ``vllm_xargs``.

    Raises:
        VLLMValidationError: The request names one of our keys.

    """
    keys = [key for key in (getattr(request, "vllm_xargs", None) or {}) if is_ours(key)]
    if keys and request.vllm_xargs.get("parallel_think") != "off":
        raise VLLMValidationError(
            f"vllm_xargs.{keys[0]} cannot be combined with beam search", parameter="vllm_xargs"
        )


def _wrap_platform() -> None:
    """Patch: vLLM 0.32 offers admission checks to platforms only."""
    platform = type(current_platform)
    original = platform.validate_request.__func__  # type: ignore[attr-defined]

    @functools.wraps(original)
    def validate_request(cls: type, processed_inputs: Any, params: Any) -> None:
        original(cls, processed_inputs, params)
        if isinstance(params, SamplingParams):
            check(params, processed_inputs)

    platform.validate_request = classmethod(validate_request)  # type: ignore[assignment]


def _wrap_protocols() -> None:
    """Patch: the only code of a request that runs before vLLM starts a streaming response."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    for request in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        request.to_sampling_params = _checked(request.to_sampling_params)  # type: ignore[method-assign]
        beam = getattr(request, "to_beam_search_params", None)
        if beam is not None:
            request.to_beam_search_params = _no_beam(beam)  # type: ignore[union-attr]


def _checked(original: Callable[..., SamplingParams]) -> Callable[..., SamplingParams]:
    @functools.wraps(original)
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> SamplingParams:
        params = original(self, *args, **kwargs)
        check(params)
        return params

    return to_sampling_params


def _no_beam(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_beam_search(self)
        return original(self, *args, **kwargs)

    return to_beam_search_params
