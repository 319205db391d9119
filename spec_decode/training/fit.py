"""``fit``: a judge head from labelled tokens, with a hold-out and a threshold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import records
from ..dtypes import Dtype
from ..judge_head import JudgeHead, model_name, save_head
from .collect import batches
from .curve_svg import curve_svg
from .generation import hidden_states, load_model

FOLDS = 4
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Fit:
    """Settings of the command.

    Attributes:
        model: Path of the target whose hidden states are read.
        data: Examples of ``label``.
        out: The head, a .safetensors file; a picture of precision and recall is put beside it.
        recall: Share of the tokens that matter which the threshold must catch, 0-1.
        held_out: Share of the problems that is not trained on, 0-1.
        batch: Texts that are read at once.
        dtype: What the model is loaded in: float32, bfloat16, float16, or auto for its files'.

    """

    model: str
    data: Path
    out: Path
    recall: float = 0.9
    held_out: float = 0.25
    batch: int = 32
    dtype: Dtype = "float32"


def run(settings: Fit) -> None:
    """Read hidden states, or those of an earlier run, fit, and write head and picture."""
    examples = _examples(settings)
    hidden = read_features(settings, examples)
    labels = torch.tensor([float(mark[1]) for e in examples for mark in e["marks"]])
    groups = [e["group"] for e in examples for _ in e["marks"]]
    head = fit_head(
        hidden,
        labels,
        groups,
        target=model_name(settings.model),
        recall=settings.recall,
        held_out=settings.held_out,
    )
    save_head(head, settings.out)
    test = in_share(groups, settings.held_out)
    points = precision_recall(1 - head.score(hidden[test]), 1 - labels[test])
    picture = curve_svg(points, "recall of tokens that matter", "precision")
    settings.out.with_suffix(".svg").write_text(picture, "utf-8")
    print(json.dumps({**head.facts, "threshold": head.threshold}))


def _examples(settings: Fit) -> list[dict[str, Any]]:
    """Return what there is to learn from.

    Raises:
        ValueError: There is nothing, or it is written in the tokens of another model.

    """
    examples, name = list(records.read(settings.data)), model_name(settings.model)
    if not examples:
        raise ValueError(f"{settings.data} holds no examples: run `python -m spec_decode label`")
    for example in examples:
        if (other := example.get("model", name)) != name:
            raise ValueError(
                f"{settings.data}, {example['key']}: a label of {other}, not of {name}: run "
                "`python -m spec_decode label` for this model into another file"
            )
    return examples


def fit_head(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    groups: Sequence[str],
    *,
    target: str,
    recall: float,
    held_out: float,
) -> JudgeHead:
    """Fit logistic regression on standardised hidden states, weighted against the imbalance.

    Args:
        hidden: [N, H] float32.
        labels: [N] float, 1 right, 0 matters.
        groups: What must not be split between training and hold-out: N names of problems.
        target: Name of the model.
        recall: Share of tokens that matter the threshold must catch, among those of training that
            a head fitted without their problems has scored.
        held_out: Share of groups that only serve the figures in the head's facts.

    Raises:
        ValueError: One of the parts has labels of one kind only.

    """
    test = in_share(groups, held_out)
    for part in (labels[~test], labels[test]):
        if not 0 < float(part.sum()) < part.numel():
            raise ValueError(
                f"{labels.numel()} labels, {int(labels.sum())} of them right, are too few or too "
                "much alike to train and to test on: collect more problems"
            )
    x, y = hidden[~test], labels[~test]
    names = [name for name, out in zip(groups, test.tolist(), strict=True) if not out]
    fold = torch.tensor([_digest(f"fold:{name}") % FOLDS for name in names])
    scores = {penalty: _cross_scores(x, y, fold, penalty) for penalty in PENALTIES}
    penalty = max(PENALTIES, key=lambda p: area_under_curve(scores[p], y))
    weight, bias = _logistic(x, y, penalty)
    threshold = float(torch.quantile(scores[penalty][y == 0], recall))
    head = JudgeHead(weight, bias, target, min(max(threshold, 0.0), 1.0))
    score = head.score(hidden[test])
    facts = {
        "examples": labels.numel(),
        "right": int(labels.sum()),
        "held_out": int(test.sum()),
        "auc": round(area_under_curve(score, labels[test]), 4),
        "auc_cross_validated": round(area_under_curve(scores[penalty], y), 4),
        "recall": recall,
        "recall_held_out": round(float((score[labels[test] == 0] <= threshold).float().mean()), 4),
        "accepted_held_out": round(float((score > threshold).float().mean()), 4),
        "penalty": penalty,
    }
    return JudgeHead(weight, bias, target, head.threshold, facts)


def _cross_scores(
    x: torch.Tensor, y: torch.Tensor, fold: torch.Tensor, penalty: float
) -> torch.Tensor:
    """Return [N] scores by heads that have not seen the row's group."""
    scores = torch.zeros_like(y)
    for number in range(FOLDS):
        mine = fold == number
        if mine.any() and 0 < float(y[~mine].sum()) < int((~mine).sum()):
            weight, bias = _logistic(x[~mine], y[~mine], penalty)
            scores[mine] = torch.sigmoid(x[mine] @ weight + bias)
    return scores


def _logistic(
    x: torch.Tensor, y: torch.Tensor, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight [H] and bias [] for hidden states as they are, the scaling folded in."""
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    scaled = (x - mean) / std
    share = y.mean()
    importance = torch.where(y > 0, 0.5 / share, 0.5 / (1 - share))
    weight = torch.zeros(x.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            scaled @ weight + bias, y, weight=importance
        )
        loss = loss + penalty * weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    folded = (weight / std).detach()
    return folded, (bias.detach() - folded @ mean)


def area_under_curve(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of (right, wrong) pairs that are scored in order, ties half."""
    right, wrong = scores[labels > 0], scores[labels == 0]
    order = (right[:, None] > wrong).float() + 0.5 * (right[:, None] == wrong)
    return float(order.mean())


def precision_recall(scores: torch.Tensor, labels: torch.Tensor) -> list[tuple[float, float]]:
    """Return (recall, precision) at every threshold, from the highest score down."""
    found = labels[scores.argsort(descending=True)].cumsum(dim=0)
    recall = found / labels.sum()
    precision = found / torch.arange(1, len(labels) + 1)
    return list(zip(recall.tolist(), precision.tolist(), strict=True))


def in_share(groups: Sequence[str], share: float) -> torch.Tensor:
    """Return [N] bool, the same groups in every run."""
    return torch.tensor([_digest(group) % 1000 < 1000 * share for group in groups])


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def read_features(settings: Fit, examples: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Return [N, H] hidden states on marked tokens; batches that are on disk are not computed."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder = settings.data.with_suffix(".features")
    folder.mkdir(parents=True, exist_ok=True)
    parts, model = [], None
    some_at = list(batches(examples, settings.batch))
    for number, some in enumerate(tqdm(some_at, desc="read", unit="batch")):
        path = folder / f"{number:05d}.safetensors"
        dtype = "" if settings.dtype == "float32" else settings.dtype
        digest = str(_digest(settings.model + dtype + json.dumps(some)))
        if path.exists():
            with safe_open(str(path), "pt") as file:
                if (file.metadata() or {}).get("digest") == digest:
                    parts.append(file.get_tensor("hidden"))
                    continue
        model = model or load_model(settings.model, settings.dtype)[0]
        places = [[mark[0] for mark in example["marks"]] for example in some]
        parts.append(hidden_states(model, [example["ids"] for example in some], places))
        save_file({"hidden": parts[-1]}, str(path), {"digest": digest})
    return torch.cat(parts)
