"""A judge head survives its file, and one that does not fit is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spec_decode.judge_head import JudgeHead, load_head, save_head


def make_head(size: int = 4) -> JudgeHead:
    weight = torch.arange(size, dtype=torch.float32)
    facts = {"examples": 500, "auc": 0.81}
    return JudgeHead(weight, torch.tensor(-0.5), "org/Tiny", 0.6, facts)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    save_head(make_head(), path)
    read = load_head(path, targets=["served", "/models/tiny"], hidden_size=4)
    assert read.weight.equal(make_head().weight)
    assert read.bias.equal(make_head().bias)
    assert (read.target, read.threshold, read.facts) == ("org/Tiny", 0.6, make_head().facts)
    assert [p.name for p in tmp_path.iterdir()] == ["judge.safetensors"]
    hidden = torch.randn(3, 4)
    expected = torch.sigmoid((hidden * read.weight).sum(-1) - 0.5)
    assert torch.allclose(read.score(hidden), expected)


GOOD = {"weight": torch.ones(4), "bias": torch.tensor(0.0)}
METADATA = {
    "format": "judge-head/1",
    "target": "tiny",
    "hidden_size": "4",
    "threshold": "0.5",
    "facts": "{}",
}
BAD: dict[str, tuple[dict[str, torch.Tensor], dict[str, str], str]] = {
    "no format": (GOOD, {"target": "tiny"}, "format=judge-head/1"),
    "another tensor": ({"w": torch.ones(4)}, METADATA, "the tensors weight and bias"),
    "nan": ({**GOOD, "weight": torch.tensor([1, float("nan"), 1, 1])}, METADATA, "not finite"),
    "infinite": ({**GOOD, "bias": torch.tensor(float("inf"))}, METADATA, "bias holds values"),
    "shape": ({**GOOD, "weight": torch.ones(4, 2)}, METADATA, r"a weight \[H\]"),
    "dtype": ({**GOOD, "weight": torch.ones(4).half()}, METADATA, "must be float32"),
    "threshold": (GOOD, {**METADATA, "threshold": "1.5"}, "between 0 and 1, got 1.5"),
    "nan threshold": (GOOD, {**METADATA, "threshold": "nan"}, "between 0 and 1, got nan"),
    "no number": (GOOD, {**METADATA, "threshold": "high"}, "could not convert"),
    "no target": (GOOD, {**METADATA, "target": ""}, "must name its target"),
    "lies": (GOOD, {**METADATA, "hidden_size": "8"}, "says hidden size 8, the weight has 4"),
    "no facts": (GOOD, {k: v for k, v in METADATA.items() if k != "facts"}, "lacks 'facts'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path: Path, name: str) -> None:
    tensors, metadata, says = BAD[name]
    path = tmp_path / "judge.safetensors"
    save_file(tensors, str(path), metadata)
    with pytest.raises(ValueError, match=says) as caught:
        load_head(path)
    assert str(path) in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_head(tmp_path / "nothing.safetensors")
    text = tmp_path / "text.safetensors"
    text.write_text("not a tensor")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_head(text)


def test_another_model(tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    save_head(make_head(), path)
    with pytest.raises(ValueError, match=r"hidden size 4 .* the served model has 8"):
        load_head(path, hidden_size=8)
    with pytest.raises(ValueError, match="trained for org/Tiny, not for org/Large"):
        load_head(path, targets=["org/Large"], hidden_size=4)
