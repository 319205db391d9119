"""A tiny target, a draft that agrees with it now and then, and engines over both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spec_decode.judge_head import JudgeHead, save_head
from tests.support.tiny import EOS, make_model

NUM_DRAFTS = 4
HIDDEN_SIZE = 64


def make_models(folder: Path, noise: float = 0.02) -> tuple[Path, Path]:
    """Write a target and a draft: the same model with noise on its weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = make_model(folder / "target")
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder / "draft")
    AutoTokenizer.from_pretrained(target).save_pretrained(folder / "draft")
    return target, folder / "draft"


def make_head(folder: Path, name: str, *, scale: float = 0.2, bias: float = 0.0) -> Path:
    """Write a random head; ``scale`` 0 gives one that says the same of every token."""
    weight = scale * torch.randn(HIDDEN_SIZE, generator=torch.Generator().manual_seed(5))
    path = folder / f"{name}.safetensors"
    save_head(JudgeHead(weight, torch.tensor(bias), "target", 0.5), path)
    return path


def speculation(draft: Path, **more: Any) -> dict[str, Any]:
    """Return a --speculative-config with a draft model."""
    return {
        "method": "draft_model",
        "model": str(draft),
        "num_speculative_tokens": NUM_DRAFTS,
        **more,
    }


def params(max_tokens: int = 48, **more: Any) -> Any:
    """Return greedy sampling parameters."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=max_tokens, **{"temperature": 0, **more})


__all__ = ["EOS", "NUM_DRAFTS", "make_head", "make_models", "params", "speculation"]
