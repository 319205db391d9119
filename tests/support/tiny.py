"""A random two-layer Llama with a word-level tokenizer, and a grammar of bare token ids for it.

Weights are drawn wide, so that greedy text wanders over the whole vocabulary instead of looping:
tags turn up by chance, blocks nest, and an error in K/V changes the tokens soon.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCAB_SIZE = 256
EOS = 2
FIRST_NUMBER = 100
"""Token id of the word "0"; names of paths are the words that follow."""
THOUGHT_SHAPE = (2, 64)
"""Layers, and KV heads times head size, of the tiny model."""


@dataclass(frozen=True)
class IdGrammar:
    """A grammar whose tags are token ids, so that a random model writes them."""

    triggers: tuple[int, ...] = (20, 21, 22, 23, 24, 25)
    ends: tuple[int, ...] = (30, 31, 32, 33, 34, 35, 36, 37)
    num_paths: int = 3
    fork_after: tuple[int, ...] = ()
    path_start: tuple[int, ...] = (5, 6)
    path_after: tuple[int, ...] = ()
    path_close: tuple[int, ...] = (7,)
    join_start: tuple[int, ...] = (8, 9)
    join_end: tuple[int, ...] = ()
    join_mode: str = "kv"
    stride: int = 0
    join_position: str = "longest"
    at_start: bool = False
    num_tags: int | None = None

    @property
    def name(self) -> str:
        """Return a name that tells the variants apart."""
        after = "-after" if self.fork_after else ""
        start = "-at-start" if self.at_start else ""
        numbers = f"{self.num_paths}-{self.join_mode}-{self.join_position}-{self.stride}"
        end = "-end" if self.join_end else ""
        return f"ids-{numbers}{after}{start}{end}"

    def write(self, folder: Path) -> str:
        """Write the grammar as a profile file and return its path."""
        path = folder / f"{self.name}.toml"
        path.write_text(
            f"""
name = {json.dumps(self.name)}
summary = "token ids as tags"
max_depth = {1 if self.stride or self.at_start else 8}
[fork]
{"at_start = true" if self.at_start else f"trigger = {list(self.triggers)}"}
num_paths = {self.num_paths}
after = {list(self.fork_after)}
[path]
start = {json.dumps([*self.path_start, "{name}"])}
end = {list(self.ends)}
close = {list(self.path_close)}
after = {list(self.path_after)}
stride = {self.stride}
{"" if self.num_tags is None else f"num_tags = {self.num_tags}"}
[join]
start = {list(self.join_start)}
end = {list(self.join_end)}
mode = {json.dumps(self.join_mode)}
position = {json.dumps(self.join_position)}
""",
            "utf-8",
        )
        return str(path)


def make_model(folder: Path, seed: int = 0) -> Path:
    """Write a tiny model and its tokenizer; return the folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=16384,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    for number in range(64):
        del words[f"w{FIRST_NUMBER + number}"]
        words[str(number)] = FIRST_NUMBER + number
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w1", eos_token=f"w{EOS}", unk_token="w0"
    ).save_pretrained(folder)
    return folder


def write_vectors(file: Path, num_paths: int = 8, scale: float = 2.0) -> Any:
    """Write random thought embeddings, large enough to change the text."""
    import torch
    from safetensors.torch import save_file

    vectors = (
        torch.randn(num_paths, *THOUGHT_SHAPE, generator=torch.Generator().manual_seed(3)) * scale
    )
    save_file({"thought_embeddings": vectors}, file)
    return vectors
