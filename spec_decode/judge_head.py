"""The judge head, and the safetensors file it is kept in."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

FORMAT = "judge-head/1"


@dataclass(frozen=True, eq=False)
class JudgeHead:
    """A linear layer that says how probably a draft token is right.

    Attributes:
        weight: [H] float32.
        bias: [] float32.
        target: Name of the model whose hidden states it reads.
        threshold: Probability above which it was meant to accept, 0-1.
        facts: How it was trained: plain values that JSON can hold.

    Raises:
        ValueError: A shape, a number or the threshold is not what it must be.

    """

    weight: torch.Tensor
    bias: torch.Tensor
    target: str
    threshold: float = 0.5
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weight.ndim != 1 or not self.weight.numel() or self.bias.ndim:
            shapes = f"{tuple(self.weight.shape)} and {tuple(self.bias.shape)}"
            raise ValueError(f"a judge head has a weight [H] and a bias [], got {shapes}")
        for name, tensor in (("weight", self.weight), ("bias", self.bias)):
            if tensor.dtype != torch.float32:
                raise ValueError(f"the head's {name} must be float32, got {tensor.dtype}")
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"the head's {name} holds values that are not finite")
        threshold = self.threshold
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise ValueError(f"the head's threshold must be a number, got {threshold!r}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"the head's threshold must be between 0 and 1, got {threshold}")
        if not self.target:
            raise ValueError("the head must name its target model")

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states it reads."""
        return self.weight.shape[0]

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [N] float32 probabilities of 'right' for hidden states [N, H]."""
        return torch.sigmoid(hidden.float() @ self.weight + self.bias)

    def to(self, device: torch.device | str) -> JudgeHead:
        """Return the head on another device."""
        weight, bias = self.weight.to(device), self.bias.to(device)
        return JudgeHead(weight, bias, self.target, self.threshold, self.facts)


def save_head(head: JudgeHead, path: Path | str) -> None:
    """Write a head; the file appears whole or not at all."""
    from safetensors.torch import save_file

    path = Path(path)
    metadata = {
        "format": FORMAT,
        "target": head.target,
        "hidden_size": str(head.hidden_size),
        "threshold": repr(head.threshold),
        "facts": json.dumps(dict(head.facts), sort_keys=True),
    }
    tensors = {"weight": head.weight.cpu().contiguous(), "bias": head.bias.cpu().contiguous()}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, str(partial), metadata)
    partial.replace(path)


def load_head(
    path: Path | str, *, targets: Collection[str] = (), hidden_size: int | None = None
) -> JudgeHead:
    """Read a head, and refuse one that does not fit.

    Args:
        path: A file written by :func:`save_head`.
        targets: Names or paths of the served model; none to take any head. Heads are bound to a
            model by the last part of its name, so that a local copy of a hub's model fits.
        hidden_size: Width of its hidden states.

    Raises:
        ValueError: The file is missing or is no judge head, holds bad numbers, or belongs to
            another model; the message says what is allowed.

    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"judge weights {path}: no such file; `python -m spec_decode fit` makes it"
        )
    try:
        with safe_open(str(path), "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"judge weights {path} are no safetensors file: {error}") from None
    if metadata.get("format") != FORMAT or set(tensors) != {"weight", "bias"}:
        raise ValueError(
            f"judge weights {path}: expected the tensors weight and bias and the metadata "
            f"format={FORMAT}, as `python -m spec_decode fit` writes them"
        )
    try:
        head = _from_file(tensors, metadata)
    except (KeyError, ValueError) as error:
        raise ValueError(f"judge weights {path}: {error}") from None
    if hidden_size is not None and head.hidden_size != hidden_size:
        raise ValueError(
            f"judge weights {path} are for hidden size {head.hidden_size} ({head.target}), the "
            f"served model has {hidden_size}"
        )
    if targets and model_name(head.target) not in map(model_name, targets):
        raise ValueError(
            f"judge weights {path} were trained for {head.target}, not for {' or '.join(targets)}: "
            "train a head for this model, or serve the other one"
        )
    return head


def _from_file(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> JudgeHead:
    try:
        threshold = float(metadata["threshold"])
        declared = int(metadata["hidden_size"])
        facts = json.loads(metadata["facts"])
    except KeyError as error:
        raise ValueError(f"the metadata lacks {error}") from None
    if math.isnan(threshold):
        raise ValueError("the head's threshold must be between 0 and 1, got nan")
    head = JudgeHead(
        tensors["weight"], tensors["bias"], metadata.get("target", ""), threshold, facts
    )
    if head.hidden_size != declared:
        raise ValueError(
            f"the metadata says hidden size {declared}, the weight has {head.hidden_size}"
        )
    return head


def model_name(name: str) -> str:
    """Return the last part of a model's name or path, in lower case."""
    return name.rstrip("/").rsplit("/", 1)[-1].lower()
