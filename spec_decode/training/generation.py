"""The one place that runs models for training: greedy text, next tokens, hidden states."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from ..dtypes import Dtype
from ..vocabulary import line_ids


def load_model(path: str, dtype: Dtype = "float32") -> tuple[Any, Any]:
    """Load a causal model and its tokenizer.

    Raises:
        ValueError: There is no such precision.

    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model, AutoTokenizer.from_pretrained(path)


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end any text: the tokenizer's, and those of generation_config."""
    ends = model.generation_config.eos_token_id
    named = [ends] if isinstance(ends, int) else ends or ()
    return frozenset(i for i in (*named, tokenizer.eos_token_id) if i is not None)


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: those that end any text, or hold a line break."""
    ids = end_ids(model, tokenizer) | line_ids(tokenizer)
    return frozenset(i for i in ids if i < model.config.vocab_size)


@dataclass(frozen=True, eq=False)
class Batch:
    """Texts side by side, padded on the left so that all end together.

    Attributes:
        shared: Tokens that all texts begin with; read once, for all of them.
        inputs: ids, mask (over shared tokens too) and positions of the rest.
        width: Length of the padded rest.

    """

    shared: list[int]
    inputs: dict[str, torch.Tensor]
    width: int

    @classmethod
    def of(
        cls, texts: Sequence[Sequence[int]], device: Any, most_shared: int | None = None
    ) -> Batch:
        """Put texts side by side; each keeps at least its last token out of the shared part.

        Args:
            texts: Token ids.
            device: Where the inputs go.
            most_shared: Most tokens of the shared part, for what is asked of later ones.

        """
        first, most = texts[0], min(map(len, texts)) - 1
        if most_shared is not None:
            most = min(most, most_shared)
        num = 0
        while num < most and all(text[num] == first[num] for text in texts):
            num += 1
        rests = [text[num:] for text in texts]
        width = max(map(len, rests))
        ids = torch.zeros(len(texts), width, dtype=torch.long)
        mask = torch.ones(len(texts), num + width, dtype=torch.long)
        for row, rest in enumerate(rests):
            ids[row, width - len(rest) :] = torch.tensor(list(rest))
            mask[row, num : num + width - len(rest)] = 0
        positions = (mask.cumsum(dim=1) - 1)[:, num:].clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return cls(list(first[:num]), {k: v.to(device) for k, v in inputs.items()}, width)

    def read(self, model: Any) -> Any:
        """Return the model's output on the padded rest."""
        return model.model(**self.inputs, past_key_values=self.read_shared(model), use_cache=True)

    def read_shared(self, model: Any) -> Any:
        """Return K/V of the shared tokens, once for every text."""
        if not self.shared:
            return None
        ids = torch.tensor([self.shared], device=model.device)
        cache = model.model(input_ids=ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(self.inputs["input_ids"].shape[0])
        return cache


@torch.inference_mode()
def write_greedily(
    model: Any, prompts: Sequence[Sequence[int]], max_tokens: int, ends: Collection[int]
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, the token that ended it included."""
    batch = Batch.of(prompts, model.device)
    output = batch.read(model)
    mask, positions = batch.inputs["attention_mask"], batch.inputs["position_ids"]
    texts: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(texts)))
    while True:
        ids = model.lm_head(output.last_hidden_state[:, -1:]).argmax(dim=-1)
        for row, token in zip(live, ids[:, 0].tolist(), strict=True):
            texts[row].append(token)
        going = [
            i
            for i, row in enumerate(live)
            if texts[row][-1] not in ends and len(texts[row]) < max_tokens
        ]
        if not going:
            return texts
        cache = output.past_key_values
        if len(going) < len(live):
            live = [live[i] for i in going]
            ids, positions, mask = ids[going], positions[going], mask[going]
            cache.batch_select_indices(torch.tensor(going, device=model.device))
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        output = model.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )


@torch.inference_mode()
def next_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    num_tokens: int | None = None,
) -> list[list[int]]:
    """Return the model's most likely token in place of each token of texts behind prompts.

    Args:
        model: A causal model of transformers.
        prompts: What texts stand behind.
        texts: One a prompt.
        num_tokens: Ids below which tokens are chosen; ``None`` for all that the model has.

    """
    whole = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    places = [range(len(p) - 1, len(w) - 1) for p, w in zip(prompts, whole, strict=True)]
    hidden = hidden_states(model, whole, places).to(model.device, model.dtype)
    tokens = model.lm_head(hidden)[:, :num_tokens].argmax(dim=-1)
    parts = tokens.cpu().split([len(text) for text in texts])
    return [part.tolist() for part in parts]


@torch.inference_mode()
def hidden_states(
    model: Any, sequences: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Return [N, H] last hidden states (after the final norm) on tokens of texts.

    Args:
        model: A causal model of transformers.
        sequences: Texts.
        places: For each text the indices of tokens that are asked for; N is their number in all.

    """
    first_wanted = min((min(wanted) for wanted in places if len(wanted)), default=None)
    batch = Batch.of(sequences, model.device, first_wanted)
    hidden = batch.read(model).last_hidden_state
    num_shared, rows = len(batch.shared), []
    for row, (tokens, wanted) in enumerate(zip(sequences, places, strict=True)):
        first = batch.width - (len(tokens) - num_shared) - num_shared
        rows.append(hidden[row, [first + place for place in wanted]])
    return torch.cat(rows).float().cpu()
