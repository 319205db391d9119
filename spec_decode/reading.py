"""The one place that runs models for training: greedy text, next tokens, hidden states."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch


def load_model(path: str) -> tuple[Any, Any]:
    """Load a causal model in float32 and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model, AutoTokenizer.from_pretrained(path)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: those that end any text, and the end of the line."""
    ends = model.generation_config.eos_token_id
    line = tokenizer.encode("\n", add_special_tokens=False)
    return sorted({*([ends] if isinstance(ends, int) else ends or ()), *line[-1:]})


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
    def of(cls, texts: Sequence[Sequence[int]], device: Any) -> Batch:
        """Put texts side by side; each keeps at least its last token out of the shared part."""
        first, most = texts[0], min(map(len, texts)) - 1
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
    model: Any, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Return the model's most likely token in place of each token of texts behind prompts."""
    whole = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    places = [range(len(p) - 1, len(w) - 1) for p, w in zip(prompts, whole, strict=True)]
    tokens = model.lm_head(hidden_states(model, whole, places).to(model.device)).argmax(dim=-1)
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
    batch = Batch.of(sequences, model.device)
    hidden = batch.read(model).last_hidden_state
    num_shared, rows = len(batch.shared), []
    for row, (tokens, wanted) in enumerate(zip(sequences, places, strict=True)):
        if min(wanted, default=num_shared) < num_shared:
            raise ValueError("hidden states are asked for on tokens that all texts begin with")
        first = batch.width - (len(tokens) - num_shared) - num_shared
        rows.append(hidden[row, [first + place for place in wanted]])
    return torch.cat(rows).float().cpu()
