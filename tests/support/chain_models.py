"""Models in which every token has one that follows it, over a tokenizer that joins line breaks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

QUESTION = "Q: how many?\nA:"
JOINING = r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*| ?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen and Llama 3 cut text, in short: line breaks in a row are one piece."""
FOLLOWS = {":": " ", " ": "9", "9": "\n\n", "7": "\n\n", "\n\n": "4", "4": "\n"}
"""Behind a question " 9", an empty line, then a made-up " 4"."""


def make_tokenizer(text: str = "how many") -> Any:
    """Return a byte-level tokenizer with tokens such as an empty line, and with a text's words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(JOINING), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"Q: {text}?\nA: 9\n\nQ: {text}?\n"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def token(tokenizer: Any, text: str) -> int:
    """Return the one token that a text is."""
    (only,) = tokenizer.encode(text, add_special_tokens=False)
    return int(only)


def make_chain(
    folder: Path,
    follows: Mapping[str, str] = FOLLOWS,
    *,
    tokenizer: Any = None,
    num_rows: int | None = None,
) -> str:
    """Write a model whose embeddings may be padded, and its tokenizer; return the folder.

    Hidden states are the tokens themselves: layers add nothing.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or make_tokenizer()
    num_rows = num_rows or len(tokenizer)
    width = 512
    config = LlamaConfig(
        vocab_size=num_rows,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).float()
    ids = {token(tokenizer, a): token(tokenizer, b) for a, b in follows.items()}
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(num_rows, width))
        model.lm_head.weight.zero_()
        for before in range(len(tokenizer)):
            model.lm_head.weight[ids.get(before, tokenizer.eos_token_id), before] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
