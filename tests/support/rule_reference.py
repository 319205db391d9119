"""The rules once more, a row and a token at a time, in Python floats."""

from __future__ import annotations

import math
from typing import Any

from spec_decode.draft_rows import DraftRows


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    exps = [math.exp((x - top) / temperature) for x in logits]
    return [x / sum(exps) for x in exps]


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def argmax(values: list[float]) -> int:
    return values.index(max(values))


def judge(rows: DraftRows, i: int, weight: list[float], bias: float, threshold: float) -> bool:
    assert rows.hidden is not None
    z = sum(w * h for w, h in zip(weight, rows.hidden[i].tolist(), strict=True)) + bias
    if rows.threshold is not None:
        threshold = max(threshold, float(rows.threshold[i]))
    return 1 / (1 + math.exp(-z)) > threshold


def top_n_delta(rows: DraftRows, i: int, n: int, delta: float) -> bool:
    logits = rows.logits[i].tolist()
    x = int(rows.draft_ids[i])
    p = softmax(logits)
    return sum(other > logits[x] for other in logits) < n and p[x] >= max(p) - delta


def typical(rows: DraftRows, i: int, epsilon: float, alpha: float) -> bool:
    p = softmax(rows.logits[i].tolist())
    return p[int(rows.draft_ids[i])] > min(epsilon, alpha * math.exp(-entropy(p)))


def kl(rows: DraftRows, i: int, tau: float, max_top: float) -> bool:
    if rows.draft_logits is None:
        return False
    p, q = softmax(rows.logits[i].tolist()), softmax(rows.draft_logits[i].tolist())
    divergence = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)
    return max(p) <= max_top and divergence < tau


def fly(rows: DraftRows, i: int, entropy_: float, window: int) -> bool:
    p = softmax(rows.logits[i].tolist())
    if entropy(p) / math.log(len(p)) < entropy_:
        return False
    for j in range(i + 1, i + 1 + window):
        if j >= len(rows.draft_ids) or rows.request[j] != rows.request[i]:
            return False
        if argmax(rows.logits[j].tolist()) != int(rows.draft_ids[j]):
            return False
    return True


def accepted(
    rows: DraftRows, standard: list[bool], lossy: list[bool], protected: list[bool]
) -> list[bool]:
    """Walk through each request's drafts and stop at the first that is not kept."""
    result, stopped = [False] * len(standard), set[int]()
    for i, ok in enumerate(standard):
        request = int(rows.request[i])
        keep = (ok or (lossy[i] and not protected[i])) and int(rows.draft_ids[i]) >= 0
        if request not in stopped and keep:
            result[i] = True
        else:
            stopped.add(request)
    return result


def each(rule: Any, rows: DraftRows, *args: Any) -> list[bool]:
    """Apply a rule row by row; filler rows never pass."""
    ids = rows.draft_ids.tolist()
    return [x >= 0 and rule(rows, i, *args) for i, x in enumerate(ids)]
