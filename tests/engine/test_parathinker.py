"""A ParaThinker checkpoint as released: Qwen2 with the authors' control tokens, at their ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.oracle import dense_forward

FIRST = 151665
"""Id of ``<think1>``; ``<think i>`` is two further on each, and ``</think i>`` right behind it."""
NUM_TAGS = 8
NUM_WORDS = 256


def think(number: int) -> int:
    """Return the id of ``<think number>``."""
    return FIRST + 2 * (number - 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Qwen2 with the vocabulary of the released checkpoints."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("parathinker")
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=FIRST + 2 * NUM_TAGS + 3,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        initializer_range=0.5,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    words = {f"w{i}": i for i in range(NUM_WORDS)}
    tags = {}
    for number in range(1, NUM_TAGS + 1):
        tags |= {f"<think{number}>": think(number), f"</think{number}>": think(number) + 1}
    tags |= {"<summary>": think(NUM_TAGS) + 2, "</summary>": think(NUM_TAGS) + 3}
    tokenizer = Tokenizer(models.WordLevel(words | tags, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="w2",
        unk_token="w0",
        additional_special_tokens=list(tags),
    ).save_pretrained(folder)
    return folder


def test_released_checkpoints_go_through_unchanged(checkpoint: Path, make_engine: Any) -> None:
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    engine = make_engine(
        model=checkpoint, options={"profile": "parathinker", "max_paths": 12}, block_size=16
    )
    prompt = list(range(40, 70))
    extra = {"pt_num_paths": 10, "pt_path_tokens": 12, "pt_summary_tokens": 9}
    params = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True, extra_args=extra)
    (output,) = engine.generate([prompt], params)
    nodes = engine.snapshot(output).nodes
    paths = [node for node in nodes if node.kind.value == "path"]
    assert [node.tokens[0] for node in paths] == [think(i % NUM_TAGS + 1) for i in range(10)]
    assert [node.num_given for node in paths] == [1] * 10, "a tag is one token"
    assert {node.start for node in paths} == {len(prompt)}
    closes = [node.tokens[-1] for node in nodes if node.kind.value == "close"]
    assert closes == [node.tokens[0] + 1 for node in paths]
    assert output.kv_transfer_params["parallel_think"]["reused_tags"] == 2
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    logits, _ = dense_forward(model, nodes)
    offset = 0
    for node in nodes:
        for index in range(node.num_given, len(node.tokens)):
            row = logits[offset + index - 1]
            assert row.max() - row[node.tokens[index]] < 1e-3, f"{node.address}, token {index}"
        offset += len(node.tokens)
    engine.assert_all_blocks_free()
