"""Everything of vLLM's that this package replaces, in the order of the processes it happens in.

``vllm-parallel-think patches`` prints the table.
"""

from __future__ import annotations

from .patching import Patch

_OPENAI = "vllm.entrypoints.openai"
_SERVING_TOKENS = "vllm.entrypoints.scale_out.token_in_token_out.serving.ServingTokens"

# Every process.

CHECK_CONFIG = Patch(
    "vllm.platforms.interface.Platform.check_and_update_config",
    "A configuration with the key `parallel_think` gets our scheduler, worker and block size after "
    "the platform's own check, vLLM's last word on it; no hook for plugins runs there.",
    "`VllmConfig` calls a hook of plugins.",
    ("vllm_config",),
)

# The API server, and the process of an offline `LLM`.

_CHECKED_LATE = (
    "The only code of a request that runs before a stream is answered with HTTP 200: what cannot "
    "be served is refused with HTTP 400 there."
)
_CHECKED_EARLIER = "vLLM checks a request before it answers a stream."

VALIDATE_REQUEST = Patch(
    "vllm.platforms.interface.Platform.validate_request",
    "Requests are checked against the server's settings, offline ones too, with their prompt; only "
    "platforms may check.",
    "Plugins can add a check of requests.",
    ("processed_inputs, params",),
)
CHAT_PARAMS = Patch(
    f"{_OPENAI}.chat_completion.protocol.ChatCompletionRequest.to_sampling_params",
    _CHECKED_LATE,
    _CHECKED_EARLIER,
    ("max_tokens, default_sampling_params",),
)
COMPLETION_PARAMS = Patch(
    f"{_OPENAI}.completion.protocol.CompletionRequest.to_sampling_params",
    _CHECKED_LATE,
    _CHECKED_EARLIER,
    ("max_tokens, default_sampling_params=",),
)
RESPONSES_PARAMS = Patch(
    f"{_OPENAI}.responses.protocol.ResponsesRequest.to_sampling_params",
    _CHECKED_LATE,
    _CHECKED_EARLIER,
    ("default_max_tokens, default_sampling_params=",),
)
CHAT_BEAMS = Patch(
    f"{_OPENAI}.chat_completion.protocol.ChatCompletionRequest.to_beam_search_params",
    "Beam search computes a token at a time and cannot branch; it is refused in words.",
    _CHECKED_EARLIER,
    ("max_tokens, default_sampling_params",),
)
COMPLETION_BEAMS = Patch(
    f"{_OPENAI}.completion.protocol.CompletionRequest.to_beam_search_params",
    "Beam search computes a token at a time and cannot branch; it is refused in words.",
    _CHECKED_EARLIER,
    ("max_tokens, default_sampling_params=",),
)
SERVE_TOKENS = Patch(
    f"{_SERVING_TOKENS}.serve_tokens",
    "A request in tokens brings its sampling parameters ready made and is checked here.",
    _CHECKED_EARLIER,
    ("request, raw_request=",),
)

_STREAM_FIELD = "Chunks of streams have a field for `kv_transfer_params`, by choice."
_BY_CHOICE = "vLLM keeps `kv_transfer_params` by choice."

REQUEST_OUTPUT = Patch(
    "vllm.v1.engine.output_processor.RequestState.make_request_output",
    "Of `n` choices only the one that spoke last keeps its `kv_transfer_params`; the summaries of "
    "all are kept.",
    _BY_CHOICE,
    (
        "new_token_ids, pooling_output, finish_reason, stop_reason, kv_transfer_params=, "
        "ec_transfer_params=, error=",
    ),
)
CHAT_STREAM = Patch(
    f"{_OPENAI}.chat_completion.serving.OpenAIServingChat.chat_completion_stream_generator",
    "A stream drops `kv_transfer_params`: summaries, and paths as they grow, are put into its "
    "chunks.",
    _STREAM_FIELD,
    (
        "request, result_generator, request_id, model_name, conversation, tokenizer, "
        "request_metadata, chat_template_kwargs=, mm_token_counts=",
    ),
)
COMPLETION_STREAM = Patch(
    f"{_OPENAI}.completion.serving.OpenAIServingCompletion.completion_stream_generator",
    "The same in a stream of completions.",
    _STREAM_FIELD,
    (
        "request, engine_inputs, result_generator, request_id, created_time, model_name, "
        "num_prompts, tokenizer, request_metadata",
    ),
)
TOKENS_STREAM = Patch(
    f"{_SERVING_TOKENS}.serve_tokens_stream_generator",
    "The same in a stream of tokens.",
    _STREAM_FIELD,
    ("request, result_generator, request_id, model_name, request_metadata",),
)
MESSAGES_STREAM = Patch(
    "vllm.entrypoints.anthropic.serving.AnthropicServingMessages.message_stream_converter",
    "A stream of `/v1/messages` is made from chat chunks and drops what they have more.",
    "vLLM puts `kv_transfer_params` into its last `message_delta`.",
    ("generator",),
)
CHAT_BATCH = Patch(
    f"{_OPENAI}.chat_completion.batch_serving.OpenAIServingChatBatch"
    ".chat_completion_full_generator_batch",
    "The answer to a batch of conversations leaves out `kv_transfer_params`.",
    _BY_CHOICE,
    (
        "request, generators, request_id, model_name, all_conversations, tokenizer, "
        "request_metadata, parser_cls=",
    ),
)
COMPLETION_RESPONSE = Patch(
    f"{_OPENAI}.completion.serving.OpenAIServingCompletion.request_output_to_completion_response",
    "Of several prompts only the first one's `kv_transfer_params` are kept.",
    _BY_CHOICE,
    (
        "final_res_batch, request, request_id, created_time, model_name, tokenizer, "
        "request_metadata",
    ),
)
CHAT_PARSER = Patch(
    f"{_OPENAI}.chat_completion.serving.OpenAIServingChat._make_parser",
    "Parsers of reasoning and tool calls take a marker and more in one delta for text; forced and "
    "held-back text comes in such deltas, so that they are read token by token.",
    "A parser's `parse_delta` does not depend on how the text was cut.",
    ("request, tokenizer, chat_template_kwargs",),
)
RESPONSES_PARSER = Patch(
    f"{_OPENAI}.responses.serving.OpenAIServingResponses._make_response_parser",
    "The same for the Responses API.",
    "A parser's `parse_delta` does not depend on how the text was cut.",
    ("request, tokenizer, chat_template_kwargs",),
)

# The engine.

CACHE_BLOCKS = Patch(
    "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator.cache_blocks",
    "What a branch's block holds depends on masks and positions, not on token ids alone: only the "
    "client's own request enters the prefix cache.",
    "A request can say that its blocks are not to be cached.",
    ("request, num_computed_tokens",),
)

# Workers.

CPU_BACKEND = Patch(
    "vllm.v1.attention.backends.registry.AttentionBackendEnum.CPU_ATTN",
    "Rows with holes in their block table are computed by our kernel, all others by vLLM's, which "
    "ours inherits from. (By `register_backend`, vLLM's own seam.)",
    "The CPU platform lets a backend be chosen.",
)
FLASH_BACKEND = Patch(
    "vllm.v1.attention.backends.registry.AttentionBackendEnum.FLASH_ATTN",
    "The same for CUDA. (By `register_backend`, vLLM's own seam.)",
    "A backend of another name is treated as `FLASH_ATTN` is.",
)
GRAPHS_V1 = Patch(
    "vllm.v1.cudagraph_dispatcher.CudagraphDispatcher.dispatch",
    "A full CUDA graph replays attention as it was captured; steps with branches take the graphs "
    "between the attention layers.",
    "vLLM asks the attention backend about each step.",
    ("num_tokens, uniform_decode=, has_lora=, num_active_loras=, valid_modes=, invalid_modes=",),
)
GRAPHS_V2 = Patch(
    "vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager.dispatch",
    "The same in Model Runner V2.",
    "vLLM asks the attention backend about each step.",
    ("num_reqs, num_tokens, uniform_token_count, num_active_loras, max_query_len=, num_ubatches=",),
)

_COUNTED_ELSEWHERE = "A request can bring tokens of its prompt that penalties are to count."

PENALTIES_V1 = Patch(
    "vllm.v1.sample.sampler.Sampler.apply_penalties",
    "A branch has the answer before it as its prompt, which presence and frequency penalties leave "
    "out; what the answer already says is counted.",
    _COUNTED_ELSEWHERE,
    ("logits, sampling_metadata, output_token_ids",),
)
DRAFT_PENALTIES_V1 = Patch(
    "vllm.v1.sample.rejection_sampler.RejectionSampler.apply_penalties",
    "The same where drafts are verified.",
    _COUNTED_ELSEWHERE,
    ("logits, sampling_metadata, metadata, repeat_indices, output_token_ids",),
)
PENALTIES_V2 = Patch(
    "vllm.v1.worker.gpu.sample.penalties.PenaltiesState.apply_staged_writes",
    "The same in Model Runner V2.",
    _COUNTED_ELSEWHERE,
    ("",),
)
GENERATORS = Patch(
    "vllm.v1.worker.gpu_input_batch.InputBatch.generators",
    "vLLM samples for every row and winds back the generators of prompts that are not computed to "
    "their end. A CPU's generator cannot be wound back: it raises, and the engine ends. Such rows "
    "have none during the step.",
    "vLLM's CPU runner does not call `get_offset`; where it does not, nothing is done.",
)

# Workers that verify drafts.

EXPAND_BATCH = Patch(
    "vllm.v1.sample.rejection_sampler.expand_batch_to_tokens",
    "On a CPU it leaves its output unwritten (vLLM issue #55005): temperature, top-k and top-p of "
    "drafts are noise.",
    "vLLM's own is right, which is tried first; then nothing is replaced.",
    ("x, cu_num_tokens, num_tokens, replace_from=, replace_to=",),
)
_VERIFICATION = "vLLM takes verification methods from plugins."
SAMPLER_V1 = Patch(
    "vllm.v1.sample.rejection_sampler.RejectionSampler",
    "Lossy verification. The runner makes the sampler itself and registers its warm-up, so the "
    "object stays and its class becomes a subclass.",
    _VERIFICATION,
)
SAMPLER_V2 = Patch(
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler.RejectionSampler",
    "The same in Model Runner V2, whose hook for samplers belongs to model classes and gives no "
    "hidden states.",
    _VERIFICATION,
)
SAMPLING_PARAMS_V2 = Patch(
    "vllm.v1.worker.gpu.sample.sampler.Sampler.apply_sampling_params",
    "While drafts are verified: point masses are put into what it returns, and taken out again.",
    _VERIFICATION,
    (
        "logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, input_ids, "
        "expanded_local_pos, seq_lens_upper_bound_np, skip_top_k_top_p=",
    ),
)
TOP_K_TOP_P_V2 = Patch(
    "vllm.v1.worker.gpu.sample.states.SamplingStates.apply_top_k_top_p",
    "While drafts are verified: what is forbidden has to be told from what is merely unlikely.",
    _VERIFICATION,
    ("logits, expanded_idx_mapping, idx_mapping_np",),
)

PATCHES: tuple[Patch, ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Patch)
)
"""All of them."""


def render() -> str:
    """Return the table for a terminal."""
    return "\n".join(
        f"{patch.target}\n  why:   {patch.why}\n  until: {patch.until}" for patch in PATCHES
    )


def render_markdown() -> str:
    """Return the table for ARCHITECTURE.md."""
    rows = [("Target", "Why", "What would let it go"), ("---",) * 3]
    rows += [(f"`{patch.target}`", patch.why, patch.until) for patch in PATCHES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
