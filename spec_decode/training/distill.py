"""``distill``: a smaller draft, made of some of a target's layers and taught by its own text.

Greedy text is its own label: plain cross-entropy on what the target wrote needs no second pass of
the target. Embeddings and vocabulary head stay the target's; the loss looks only at tokens that the
text uses and some thousand others, which is most of the time saved.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..dtypes import Dtype
from .collect import batches, texts_of
from .generation import Batch, load_model, stop_ids

IGNORED = -100
NUM_OTHER_TOKENS = 4000


@dataclass(frozen=True)
class Distill:
    """Settings of the command.

    Attributes:
        model: Path of the target.
        data: Records of ``collect``.
        out: Folder of the draft, a model in Hugging Face's format.
        layers: The target's layers that the draft keeps, from 0.
        epochs: Passes over the text.
        rate: Highest learning rate.
        batch: Texts a step.
        seed: Order of the texts.
        dtype: What the target is loaded in: float32, bfloat16, float16, or auto for its files'. The
            draft is trained and kept in float32: updates are too small for less.

    """

    model: str
    data: Path
    out: Path
    layers: tuple[int, ...] = (0, 1, 10, 20, 28, 29)
    epochs: int = 8
    rate: float = 6e-4
    batch: int = 16
    seed: int = 0
    dtype: Dtype = "float32"


def run(settings: Distill) -> None:
    """Train from where an earlier run stopped, and write the draft after every epoch."""
    texts_of(settings.data, settings.model)  # before a model is read for nothing
    state = settings.out / "training.json"
    done = json.loads(state.read_text("utf-8"))["epochs"] if state.exists() else 0
    if done >= settings.epochs:
        return
    draft, tokenizer = _draft(settings, done)
    written = texts_of(settings.data, settings.model, stop_ids(draft, tokenizer))
    texts = [record["prompt"] + record["text"] for record in written]
    starts = [len(record["prompt"]) for record in written]
    vocabulary = _vocabulary(texts, draft.config.vocab_size, settings.seed)
    trained = [p for p in draft.model.layers.parameters()] + [draft.model.norm.weight]
    for weight in draft.parameters():
        weight.requires_grad_(False)
    for weight in trained:
        weight.requires_grad_(True)
    draft.train()
    optimizer = torch.optim.AdamW(trained, lr=settings.rate, weight_decay=0.01)
    steps = -(-len(texts) // settings.batch)
    with tqdm(
        total=settings.epochs * steps, initial=done * steps, desc="distill", unit="step"
    ) as bar:
        for epoch in range(done, settings.epochs):
            order = list(range(len(texts)))
            random.Random(settings.seed + epoch).shuffle(order)
            for step, some in enumerate(batches(order, settings.batch)):
                share = (epoch * steps + step) / (settings.epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = settings.rate * min(1.0, 20 * share + 0.05) * (1 - share)
                loss = _loss(draft, [texts[i] for i in some], [starts[i] for i in some], vocabulary)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
            _save(draft, tokenizer, settings, epoch + 1)


def _draft(settings: Distill, done: int) -> tuple[Any, Any]:
    """Return the draft as far as it has been trained, and its tokenizer, which is the target's."""
    if done:
        return load_model(str(settings.out))
    target, tokenizer = load_model(settings.model, settings.dtype)
    return keep_layers(target, settings.layers), tokenizer


def keep_layers(model: Any, layers: tuple[int, ...]) -> Any:
    """Return a model of a target's chosen layers, in float32.

    Raises:
        ValueError: The target has no such layer.

    """
    num = model.config.num_hidden_layers
    if not layers or not all(0 <= layer < num for layer in layers):
        raise ValueError(f"layers must be some of 0-{num - 1}, got {list(layers)}")
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [model.config.layer_types[layer] for layer in layers]
    draft = type(model)(config)
    names = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(layers)}
    weights = {}
    for name, tensor in model.state_dict().items():
        old = next((prefix for prefix in names if name.startswith(prefix)), None)
        if old is not None:
            weights[names[old] + name[len(old) :]] = tensor.clone()
        elif not name.startswith("model.layers."):
            weights[name] = tensor.clone()
    draft.load_state_dict(weights)
    draft.generation_config = model.generation_config
    return draft.to(model.device, torch.float32)


def _vocabulary(texts: list[list[int]], vocab_size: int, seed: int) -> torch.Tensor:
    used = {token for text in texts for token in text}
    others = random.Random(seed).sample(range(vocab_size), min(NUM_OTHER_TOKENS, vocab_size))
    return torch.tensor(sorted({*used, *others}))


def _loss(
    draft: Any, texts: list[list[int]], starts: list[int], vocabulary: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the tokens the target wrote, over a part of the vocabulary."""
    device = draft.device
    vocabulary = vocabulary.to(device)
    batch = Batch.of(texts, device)
    goals = torch.full((len(texts), batch.width), IGNORED)
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        goals[row, batch.width - 1 - (len(text) - start) : -1] = torch.tensor(text[start:])
    hidden = batch.read(draft).last_hidden_state
    wanted = goals.to(device) != IGNORED
    logits = hidden[wanted] @ draft.lm_head.weight[vocabulary].T
    places = torch.searchsorted(vocabulary, goals.to(device)[wanted])
    return torch.nn.functional.cross_entropy(logits, places)


def _save(draft: Any, tokenizer: Any, settings: Distill, epochs: int) -> None:
    draft.eval()
    draft.save_pretrained(settings.out)
    tokenizer.save_pretrained(settings.out)
    state = {"epochs": epochs, "layers": settings.layers, "model": settings.model}
    (settings.out / "training.json").write_text(json.dumps(state), "utf-8")
    draft.train()
