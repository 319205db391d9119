"""``label``: which draft tokens matter to the answer.

By machine, after AutoJudge (arXiv 2504.20039): where the draft would have written another token
than the target, its token is put in and the target goes on greedily from there; the token matters
if the answer changes. By hand, after Judge Decoding (arXiv 2501.19309): all tokens of a right
answer and those of a wrong one up to its error are right, the error is not.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import records
from ..dtypes import Dtype
from ..judge_head import model_name
from ..tasks.arithmetic import read_answer
from ..vocabulary import check_pair
from .collect import batches, texts_of
from .generation import load_model, next_tokens, stop_ids, write_greedily


@dataclass(frozen=True)
class Label:
    """Settings of the command.

    Attributes:
        model: Path of the target.
        out: JSONL file of examples: a text as token ids, and marks [place, 1 right or 0 wrong].
        draft: Path of the draft; needed with ``data``.
        data: Records of ``collect`` to be mined.
        hand: JSONL file of hand labels: question, right, wrong, first_wrong (text of the wrong
            answer's first wrong token, or its number).
        per_problem: Most draft tokens tried in one answer.
        max_tokens: Longest answer.
        batch: Texts that are continued at once.
        dtype: What target and draft are loaded in: float32, bfloat16, float16, or auto for their
            files'.

    """

    model: str
    out: Path
    draft: str | None = None
    data: Path | None = None
    hand: Path | None = None
    per_problem: int = 6
    max_tokens: int = 40
    batch: int = 48
    dtype: Dtype = "float32"


@dataclass(frozen=True)
class Swap:
    """An answer of the target with one token of the draft's in it."""

    key: str
    group: str
    prompt: list[int]
    text: list[int]
    given: str


def run(settings: Label) -> None:
    """Label everything that has no record yet.

    Raises:
        ValueError: There is nothing to label, or the draft is missing or has another vocabulary.

    """
    if settings.data is None and settings.hand is None:
        raise ValueError("label needs --data (and --draft), or --hand")
    if settings.data is not None and settings.draft is None:
        raise ValueError("label --data needs the draft whose tokens are tried: --draft")
    if settings.data is not None and settings.draft is not None:
        check_pair(settings.model, settings.draft)
    target, tokenizer = load_model(settings.model, settings.dtype)
    done, name = records.finished(settings.out), model_name(settings.model)
    if settings.hand is not None:
        marked = [r for r in _by_hand(settings.hand, tokenizer) if r["key"] not in done]
        records.append(settings.out, [{**record, "model": name} for record in marked])
    if settings.data is None:
        return
    ends = stop_ids(target, tokenizer)
    swaps = [swap for swap in _swaps(settings, target, ends) if swap.key not in done]
    with tqdm(total=len(swaps), desc="label", unit="token") as bar:
        for some in batches(swaps, settings.batch):
            rest = write_greedily(
                target, [s.prompt + s.text for s in some], settings.max_tokens, ends
            )
            found = []
            for swap, tail in zip(some, rest, strict=True):
                text = (swap.text + tail)[: settings.max_tokens]
                answer = read_answer(tokenizer.decode(text, skip_special_tokens=True))
                ids = swap.prompt + swap.text
                marks = [[len(ids) - 1, int(answer == swap.given)]]
                about = {"key": swap.key, "group": swap.group, "model": name}
                found.append({**about, "ids": ids, "marks": marks})
            records.append(settings.out, found)
            bar.update(len(some))


def _swaps(settings: Label, target: Any, ends: Collection[int]) -> Iterator[Swap]:
    """Yield draft tokens to be tried: where draft and target differ, and neither ends the text."""
    assert settings.data is not None and settings.draft is not None
    draft, _ = load_model(settings.draft, settings.dtype)
    written = texts_of(settings.data, settings.model, ends)
    answered = [record for record in written if record["given"] is not None]
    for some in tqdm(list(batches(answered, settings.batch)), desc="compare", unit="batch"):
        prompts, texts = ([r[name] for r in some] for name in ("prompt", "text"))
        chosen = next_tokens(draft, prompts, texts, target.config.vocab_size)
        for record, tokens in zip(some, chosen, strict=True):
            text = record["text"]
            places = [
                i
                for i, (ours, theirs) in enumerate(zip(tokens, text, strict=True))
                if ours != theirs and ours not in ends
            ]
            rng = random.Random(record["key"])
            for i in sorted(rng.sample(places, min(len(places), settings.per_problem))):
                yield Swap(
                    key=f"{record['key']}/{i}",
                    group=record["key"],
                    prompt=record["prompt"],
                    text=[*text[:i], tokens[i]],
                    given=record["given"],
                )


def _by_hand(path: Path, tokenizer: Any) -> Iterator[dict[str, Any]]:
    for number, record in enumerate(records.read(path)):
        try:
            question, right, wrong = (record[name] for name in ("question", "right", "wrong"))
            error = _error_place(tokenizer, wrong, record["first_wrong"])
        except (KeyError, ValueError) as reason:
            raise ValueError(f"{path}, record {number + 1}: {reason}") from None
        prompt = list(tokenizer.encode(question))
        for name, text in (("right", right), ("wrong", wrong)):
            ids = list(tokenizer.encode(text, add_special_tokens=False))
            last = len(ids) if name == "right" else error + 1
            marks = [[len(prompt) + i, 1] for i in range(last)]
            if name == "wrong":
                marks[-1][1] = 0
            key = f"hand-{number}/{name}"
            yield {"key": key, "group": f"hand-{number}", "ids": prompt + ids, "marks": marks}


def _error_place(tokenizer: Any, wrong: str, error: int | str) -> int:
    ids = tokenizer.encode(wrong, add_special_tokens=False)
    if isinstance(error, str):
        start = wrong.find(error)
        if start < 0 or not error:
            raise ValueError(f"first_wrong {error!r} does not occur in the wrong answer")
        lengths = (len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids)))
        return next(i for i, length in enumerate(lengths) if length > start)
    if not 0 <= error < len(ids):
        raise ValueError(f"first_wrong must be between 0 and {len(ids) - 1}, got {error}")
    return error
