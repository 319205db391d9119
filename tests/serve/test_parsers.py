"""What vLLM's parsers make of a stream does not depend on how its text was cut into deltas."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import get_tokenizer
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from tests.support.server import thinking_model
from vllm_parallel_think.frontend.tokenwise import TokenByToken

THOUGHTS = "<think>\nAttempt 1: one, two \N{SNOWMAN}\n</think>"
MORE = "\n<think>\nAttempt 2: so\n</think>"
ANSWER = "\n\nComparing these attempts, it is \N{GREEK SMALL LETTER PI}."
CALL = '{"name": "look", "arguments": {"at": "the sky"}}'
TOOLS: list[Any] = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


@pytest.fixture(scope="module")
def tokenizer(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return get_tokenizer(str(thinking_model(model, tmp_path_factory.mktemp("thinking"))))


def core_request(**params: Any) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="a",
        prompt_token_ids=[40, 41],
        mm_features=None,
        sampling_params=SamplingParams(**params),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


class Stream:
    """The part of vLLM's front end between the engine's tokens and the client."""

    def __init__(
        self, tokenizer: Any, reasoning: str | None, tool: str | None, **body: Any
    ) -> None:
        self.request = ChatCompletionRequest(
            messages=[{"role": "user", "content": "?"}], stream=True, **body
        )
        self.tokenizer = tokenizer
        parser_class = ParserManager.get_parser(
            tool_parser_name=tool, reasoning_parser_name=reasoning, enable_auto_tools=bool(tool)
        )
        assert parser_class is not None
        self.new_parser = lambda: parser_class(tokenizer, self.request.tools)

    def read(self, deltas: list[list[int]], wrapped: bool = True) -> tuple[str, str, str]:
        """Return reasoning, content and the arguments of calls that a client puts together."""
        parser: Any = self.new_parser()
        if wrapped:
            parser = TokenByToken(parser, self.tokenizer)
        detokenizer = IncrementalDetokenizer.from_new_request(
            self.tokenizer, core_request(stop=self.request.stop)
        )
        parts = ["", "", ""]
        for number, tokens in enumerate(deltas):
            before = detokenizer.num_output_tokens()
            finished = bool(detokenizer.update(list(tokens), False)) or number == len(deltas) - 1
            message = parser.parse_delta(
                delta_text=detokenizer.get_next_output_text(finished, delta=True),
                delta_token_ids=detokenizer.output_token_ids[before:],
                request=self.request,
                prompt_token_ids=[40, 41],
                finished=finished,
            )
            if message is not None:
                parts[0] += message.reasoning or ""
                parts[1] += message.content or ""
                calls = [call.function for call in message.tool_calls]
                parts[2] += "".join(call.arguments or "" for call in calls if call)
            if finished:
                break
        return parts[0], parts[1], parts[2]

    def whole(self, tokens: list[int]) -> tuple[str, str, str]:
        """Return the same of an answer in one piece."""
        detokenizer = IncrementalDetokenizer.from_new_request(
            self.tokenizer, core_request(stop=self.request.stop)
        )
        for token in tokens:
            if detokenizer.update([token], False):
                break
        reasoning, content, calls = self.new_parser().parse(
            detokenizer.get_next_output_text(True, delta=False),
            self.request,
            enable_auto_tools=True,
            model_output_token_ids=detokenizer.output_token_ids,
        )
        return reasoning or "", content or "", "".join(call.arguments for call in calls or [])


def cuts(tokens: list[int], seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    deltas, at = [], 0
    while at < len(tokens):
        size = rng.choice((1, 2, 3, 8, len(tokens)))
        deltas.append(tokens[at : at + size])
        at += size
    return deltas


IN_THOUGHT, IN_ANSWER = ["two"], ["attempts"]
STOPS: dict[str, list[list[str]]] = {
    "deepseek_r1": [[], ["never seen"], IN_ANSWER, IN_THOUGHT, ["\n</th"]],
    "qwen3": [[], ["never seen"], IN_ANSWER, IN_THOUGHT, ["\n</th"]],
    "olmo3": [[], ["never seen"], IN_ANSWER],  # a thought without an end is no thought to it
}


@pytest.mark.parametrize(
    ("reasoning", "stop"), [(name, stop) for name, stops in STOPS.items() for stop in stops]
)
def test_thoughts_and_answer(tokenizer: Any, reasoning: str, stop: list[str]) -> None:
    stream = Stream(tokenizer, reasoning, None, stop=stop)
    # Of several thoughts the other two make one thing at once and another by the token.
    text = THOUGHTS + (MORE if reasoning == "deepseek_r1" else "") + ANSWER
    tokens = tokenizer.encode(text, add_special_tokens=False)
    whole = stream.whole(tokens)
    assert "Attempt 1: one" in whole[0]
    for seed in range(20):
        assert stream.read(cuts(tokens, seed)) == whole
    assert stream.read([[token] for token in tokens]) == whole
    assert stream.read([*cuts(tokens, 0), []]) == whole, "an end without tokens"


def test_what_a_parser_makes_of_deltas_of_several_tokens(tokenizer: Any) -> None:
    """The fault itself, in vLLM alone; without it nothing here would be needed."""
    stream = Stream(tokenizer, "deepseek_r1", None)
    tokens = tokenizer.encode(THOUGHTS + MORE + ANSWER, add_special_tokens=False)
    whole = stream.whole(tokens)
    assert stream.read([[token] for token in tokens], wrapped=False) == whole
    assert stream.read([tokens[:4], tokens[4:]], wrapped=False) != whole
    held_back = Stream(tokenizer, "deepseek_r1", None, stop=["never seen"])
    assert held_back.read([[token] for token in tokens], wrapped=False) != whole


@pytest.mark.parametrize("thinking", [None, "deepseek_r1"])
def test_calls_of_tools(tokenizer: Any, thinking: str | None) -> None:
    stream = Stream(tokenizer, thinking, "hermes", tools=TOOLS, tool_choice="auto")
    text = f"{THOUGHTS if thinking else ''}Let me see.\n<tool_call>\n{CALL}\n</tool_call>"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    whole = stream.whole(tokens)
    assert whole[2] == '{"at": "the sky"}'
    alone = stream.read([[token] for token in tokens], wrapped=False)
    for seed in range(20):
        assert stream.read(cuts(tokens, seed)) == alone
    assert (alone[0].strip(), alone[1].strip(), alone[2]) == tuple(part.strip() for part in whole)


def test_attributes_of_the_parser_are_there(tokenizer: Any) -> None:
    parser: Any = Stream(tokenizer, "deepseek_r1", None).new_parser()
    read = TokenByToken(parser, tokenizer)
    assert read.reasoning_parser is parser.reasoning_parser
    assert read.count_reasoning_tokens([11, 5, 12]) == 1
