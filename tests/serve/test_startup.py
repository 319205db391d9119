"""What a server refuses to start with, what it leaves alone, and the offline API beside it."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.repository import VISIBLE_OUTLINE
from tests.support.scrape import Scrape
from tests.support.server import (
    FRUITS,
    XARGS,
    Answer,
    Server,
    environment,
    run_script,
    vllm_command,
)

_PATCHED = """
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion import protocol as chat, serving as chat_serving
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.completion import protocol as text, serving as text_serving
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.platforms import current_platform
from vllm.v1.engine.output_processor import RequestState

SEAMS = [
    (type(current_platform), "validate_request"),
    (chat.ChatCompletionRequest, "to_sampling_params"),
    (chat.ChatCompletionRequest, "to_beam_search_params"),
    (text.CompletionRequest, "to_sampling_params"),
    (text.CompletionRequest, "to_beam_search_params"),
    (ResponsesRequest, "to_sampling_params"),
    (chat_serving.OpenAIServingChat, "chat_completion_stream_generator"),
    (text_serving.OpenAIServingCompletion, "completion_stream_generator"),
    (text_serving.OpenAIServingCompletion, "request_output_to_completion_response"),
    (RequestState, "make_request_output"),
    (chat_serving.OpenAIServingChat, "_make_parser"),
    (OpenAIServingResponses, "_make_response_parser"),
    (OpenAIServingChatBatch, "chat_completion_full_generator_batch"),
    (AnthropicServingMessages, "message_stream_converter"),
    (ServingTokens, "serve_tokens"),
    (ServingTokens, "serve_tokens_stream_generator"),
]

def patched():
    functions = [getattr(owner, name) for owner, name in SEAMS]
    functions = [getattr(function, "__func__", function) for function in functions]
    return ["/vllm_parallel_think/" in f.__code__.co_filename for f in functions]
"""

CONFIGURE = """
import json, sys
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.platforms import current_platform

def configure(**kwargs):
    try:
        return EngineArgs(model=sys.argv[1], dtype="float32", **kwargs).create_engine_config()
    except Exception as error:
        return error

def outcome(call, *args):
    try:
        call(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

says = []
for kwargs in json.loads(sys.argv[2]):
    result = configure(**kwargs)
    says.append([type(result).__name__, str(result)] if isinstance(result, Exception) else None)

# The last of these configurations is a good one.
embeds = {"type": "embeds", "prompt_embeds": None}
off = SamplingParams(extra_args={"parallel_think": "off"})
request = CompletionRequest(model="m", prompt_embeds=b"x")
embeddings = [
    outcome(current_platform.validate_request, embeds, SamplingParams()),
    outcome(current_platform.validate_request, embeds, off),
    outcome(request.to_sampling_params, 8, {}),
]
print(json.dumps([says, embeddings]))
"""

UNTOUCHED = (
    _PATCHED
    + """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

load_general_plugins()

def look(**kwargs):
    config = EngineArgs(model=sys.argv[1], dtype="float32", **kwargs).create_engine_config()
    return {
        "scheduler": config.scheduler_config.scheduler_cls,
        "worker": config.parallel_config.worker_cls,
        "block_size": config.cache_config.block_size,
        "modules": sorted(m for m in sys.modules if m.startswith("vllm_parallel_think")),
        "patched": patched(),
    }

without = look()
key = {"parallel_think": {}}
once = look(additional_config=key)
functions = [getattr(owner, name) for owner, name in SEAMS]
again = look(additional_config=key)
same = functions == [getattr(owner, name) for owner, name in SEAMS]
print(json.dumps([without, once, again, same]))
"""
)

OFFLINE = """
import json, sys

def main():
    from vllm import LLM, SamplingParams

    model, options, messages, requests = sys.argv[1], *map(json.loads, sys.argv[2:])
    llm = LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=2048, additional_config=options
    )
    default = {"temperature": 0, "max_tokens": 100}
    params = [SamplingParams(**{**default, **request}) for request in requests]
    outputs = llm.chat([messages] * len(params), params, use_tqdm=False)
    summaries = [(out.kv_transfer_params or {}).get("parallel_think") for out in outputs]
    in_process = hasattr(llm.llm_engine.engine_core, "engine_core")
    answers = [[list(choice.token_ids) for choice in out.outputs] for out in outputs]
    llm.llm_engine.engine_core.shutdown()
    print(json.dumps([in_process, answers, summaries]), flush=True)

if __name__ == "__main__":
    main()
"""


def with_options(**options: Any) -> dict[str, Any]:
    return {"additional_config": {"parallel_think": options}}


ON = with_options()
NGRAM = {
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
}
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": (with_options(bogus=1), ["--additional-config", "'bogus'", "allowed: profile"]),
    "wrong type": (with_options(max_paths="8"), ["--additional-config", "max_paths", "'8'"]),
    "out of range": (with_options(max_depth=99), ["max_depth", "between 1 and 8"]),
    "not an object": ({"additional_config": {"parallel_think": 1}}, ["expected an object, got 1"]),
    "unknown profile": (with_options(profile="nobody"), ["'nobody'", "skeleton", ".toml"]),
    "missing profile": (with_options(profile="/no/such.toml"), ["/no/such.toml", "not exist"]),
    "block_size": (with_options(block_size=20), ["block_size 20", "multiple of 16"]),
    "--block-size": ({**ON, "block_size": 24}, ["--block-size 24", "remove parallel_think"]),
    "no prefix caching": (
        {**ON, "enable_prefix_caching": False},
        ["--no-enable-prefix-caching", "remove parallel_think"],
    ),
    "judge without drafts": (
        with_options(judge={"rule": "typical"}),
        ["parallel_think.judge", "add --speculative-config"],
    ),
    "judge without weights": (
        {**with_options(judge={"rule": "judge", "weights": "/no/such"}), **NGRAM},
        ["/no/such", "no such file", "spec_decode fit"],
    ),
    "scheduler": (
        {**ON, "scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
        ["--scheduler-cls", "remove parallel_think"],
    ),
    "worker": (
        {**ON, "worker_cls": "vllm.v1.worker.gpu_worker.Nobody"},
        ["--worker-cls", "remove parallel_think"],
    ),
    "routed experts": (
        {**ON, "enable_return_routed_experts": True},
        ["--enable-return-routed-experts"],
    ),
    "workers beside drafts": (
        {**with_options(profile="hogwild"), **NGRAM},
        ["profile hogwild", "drop --speculative-config", "remove parallel_think"],
    ),
    "no tokenizer": ({**ON, "skip_tokenizer_init": True}, ["--skip-tokenizer-init"]),
}
ACCEPTED = [
    ON,
    {**ON, **NGRAM},
    {**with_options(judge={"rule": "top_n_delta", "n": 5}), **NGRAM},
    with_options(profile="off", max_paths=64),
    with_options(profile="hogwild"),
    {**ON, "block_size": 48},
]


@pytest.fixture(scope="module")
def told(model: Path) -> tuple[dict[str, Any], list[str | None]]:
    """What vLLM raises for each configuration and for embeddings, all asked in one process."""
    asked = [kwargs for kwargs, _ in REFUSED.values()] + ACCEPTED
    says, embeddings = run_script(CONFIGURE, str(model), json.dumps(asked))
    assert says[len(REFUSED) :] == [None] * len(ACCEPTED)
    return dict(zip(REFUSED, says, strict=False)), embeddings


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(told: tuple[dict[str, Any], Any], name: str) -> None:
    kind, message = told[0][name]
    assert kind == "OptionError"
    assert "\n" not in message
    assert len(message) < 300
    for words in REFUSED[name][1]:
        assert words in message


@pytest.mark.slow
def test_server_says_why_it_does_not_start(model: Path) -> None:
    options = json.dumps({"parallel_think": {"max_path": 4}})
    done = subprocess.run(
        vllm_command("serve", str(model), "--additional-config", options),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    output = done.stdout + done.stderr
    assert done.returncode != 0
    last = output.strip().splitlines()[-1]
    assert "--additional-config" in last
    assert "unknown key 'max_path'; allowed: profile" in last
    assert "validation error" not in output


def test_nothing_is_touched_without_the_key(model: Path) -> None:
    """INV-1, and that the same look sees the difference once the key is there."""
    without, once, again, same = run_script(UNTOUCHED, str(model))
    assert without["scheduler"] is None
    assert without["worker"] == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert without["block_size"] in (16, 128)  # vLLM 0.33 decides later
    loaded = ["", ".compat", ".compat.patches", ".compat.patching", ".plugin"]
    assert without["modules"] == [f"vllm_parallel_think{name}" for name in loaded]
    assert not any(without["patched"])
    assert once["scheduler"] == "vllm_parallel_think.scheduler.GroupScheduler"
    assert once["block_size"] == 32
    assert all(once["patched"])
    assert again == once
    assert same, "a second configuration patched the patches"


def test_embeddings_are_refused(told: tuple[Any, list[str | None]]) -> None:
    at_engine, off, at_server = told[1]
    assert off is None
    for refusal in (at_engine, at_server):
        assert refusal is not None
        assert refusal.startswith("VLLMValidationError: prompt embeddings cannot be combined")


@pytest.mark.slow
def test_server_writes_what_an_engine_in_process_writes(
    model: Path, server: Server, whole: Answer
) -> None:
    """What runs in process is compared with a dense mask; the server's processes change nothing."""
    request = {"extra_args": XARGS, "max_tokens": 120}
    key = {"parallel_think": {"profile": VISIBLE_OUTLINE}}
    in_process, answers, summaries = run_script(
        OFFLINE,
        str(model),
        *map(json.dumps, (key, FRUITS, [request])),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    assert in_process
    assert answers[0][0] == list(whole.tokens)
    assert summaries[0]["forks"] == whole.summary["forks"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "engines"),
    [
        (["--api-server-count", "2"], {"0"}),
        (["--data-parallel-size", "2"], {"0", "1"}),  # makes as many API servers
        (["--data-parallel-size", "2", "--api-server-count", "1"], {"0", "1"}),
    ],
)
def test_several_processes(
    model: Path, tmp_path: Path, arguments: list[str], engines: set[str]
) -> None:
    """Answers come back to the process that the client asked; one scrape shows all engines."""
    server = Server(model, tmp_path / "log", {"profile": VISIBLE_OUTLINE}, *arguments)
    try:
        server.wait_ready()
        asked = range(8)  # the kernel deals connections out to both processes
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda _: server.ask()[0], asked))
        assert {answer.tokens for answer in answers} == {answers[0].tokens}
        assert all(answer.summary["forks"] == 1 for answer in answers)
        too_many = {"messages": FRUITS, "vllm_xargs": {"pt_max_paths": 999}}
        for _ in asked:
            assert server.post("/v1/chat/completions", **too_many).status_code == 400
        server.wait_idle()
        scrape = Scrape(server.http.get("/metrics").text)
        for engine in engines:
            assert scrape.sum("vllm_pt_forks_total", engine=engine, profile="visible-outline") > 0
            assert scrape.sum("vllm_pt_info", engine=engine, profile="visible-outline") == 1
        assert scrape.values("vllm_pt_forks_total", "engine") == engines
        assert scrape.sum("vllm_pt_forks_total", profile="visible-outline") == len(asked)
        assert scrape.sum("vllm_pt_refused_requests_total", reason="options") == len(asked)
        assert scrape.sum("vllm_pt_held_blocks") == 0
        assert scrape.sum("vllm:request_success_total") == len(asked)
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)  # three engines, one after another
def test_offline_answers(model: Path) -> None:
    """``LLM`` answers alike in one process and in several; ``off`` is what vLLM answers alone."""
    branching = [{"extra_args": XARGS}, {"extra_args": {"parallel_think": "off"}}]
    branching.append({"extra_args": XARGS, "n": 2, "temperature": 1, "seed": 7})
    key = {"parallel_think": {"profile": VISIBLE_OUTLINE}}

    def answers(several: bool, options: dict[str, Any], requests: list[dict[str, Any]]) -> Any:
        return run_script(
            OFFLINE,
            str(model),
            *map(json.dumps, (options, FRUITS, requests)),
            VLLM_ENABLE_V1_MULTIPROCESSING=str(int(several)),
        )

    in_process, apart, summaries = answers(True, key, branching)
    assert not in_process
    in_process, together, _ = answers(False, key, branching)
    assert in_process
    assert apart == together
    assert summaries[0]["forks"] == 1
    assert summaries[1] is None
    assert [summary["forks"] for summary in summaries[2]] == [1, 1]
    _, plain, nothing = answers(True, {}, [{}])
    assert nothing == [None]
    assert plain[0] == apart[1]


ROTATES = {"rope_type": "yarn", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("text_config", "changes", "says"),
    [
        ({"rope_parameters": ROTATES}, {}, None),
        ({"rope_parameters": {"rope_type": "longrope"}}, {}, "positions do not allow"),
        ({"rope_parameters": {"full_attention": ROTATES}}, {}, "positions do not allow"),
        ({}, {}, "positions do not allow"),
        ({"rope_parameters": ROTATES}, {"speculative_config": 1}, "drop --speculative-config"),
        (
            {"rope_parameters": ROTATES},
            {"scheduler_config": SimpleNamespace(async_scheduling=True)},
            "--no-async-scheduling",
        ),
        (
            {"rope_parameters": ROTATES},
            {"parallel_config": SimpleNamespace(pipeline_parallel_size=2)},
            "drop --pipeline-parallel-size",
        ),
    ],
)
def test_what_workers_need(
    text_config: dict[str, Any], changes: dict[str, Any], says: str | None
) -> None:
    """Asked in the front end: what no worker could compute never reaches the engine."""
    from vllm_parallel_think.validation import workers_refusal

    config = {
        "speculative_config": None,
        "scheduler_config": SimpleNamespace(async_scheduling=False),
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1),
        "model_config": SimpleNamespace(hf_text_config=SimpleNamespace(**text_config)),
    }
    refusal = workers_refusal(SimpleNamespace(**{**config, **changes}))
    assert refusal is None if says is None else says in refusal
