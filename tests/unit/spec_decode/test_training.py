"""The training commands on a tiny model, from problems to a head, interrupted on the way."""

from __future__ import annotations

import json
import random
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from spec_decode import records
from spec_decode.__main__ import main
from spec_decode.judge_head import load_head
from spec_decode.tasks.arithmetic import make_problems, read_answer
from spec_decode.tasks.question_sets import SETS, load_problems
from spec_decode.training.collect import texts_of
from spec_decode.training.curve_svg import curve_svg
from spec_decode.training.evaluate import interval, row
from spec_decode.training.fit import area_under_curve, fit_head, in_share, precision_recall
from spec_decode.training.generation import (
    Batch,
    hidden_states,
    load_model,
    next_tokens,
    stop_ids,
    write_greedily,
)
from spec_decode.training.label import Label
from spec_decode.training.label import run as run_label
from tests.support.speculation import EOS, make_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a tiny target and draft."""
    target, draft = make_models(tmp_path_factory.mktemp("models"))
    return str(target), str(draft)


@pytest.fixture(scope="module")
def target(models: tuple[str, str]) -> Any:
    return load_model(models[0])


def texts(num: int, seed: int, shared: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    start = [rng.randrange(40, 250) for _ in range(shared)]
    return [start + [rng.randrange(40, 250) for _ in range(rng.randint(1, 20))] for _ in range(num)]


def plain(model: Any, tokens: list[int]) -> torch.Tensor:
    hidden: torch.Tensor = model.model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    return hidden


@pytest.mark.parametrize("shared", [0, 1, 12])
@torch.inference_mode()
def test_batches_read_as_single_texts(target: Any, shared: int) -> None:
    model, _ = target
    batch = texts(7, shared, shared)
    assert len(Batch.of(batch, "cpu").shared) >= min(shared, min(map(len, batch)) - 1)
    for text, written in zip(batch, write_greedily(model, batch, 15, [EOS]), strict=True):
        alone = list(text)
        while len(alone) - len(text) < 15 and alone[len(text) :][-1:] != [EOS]:
            alone.append(int(model.lm_head(plain(model, alone)[-1]).argmax()))
        assert written == alone[len(text) :]
    places = [[len(text) - 1, max(shared, len(text) - 3)] for text in batch]
    hidden = hidden_states(model, batch, places)
    expected = torch.cat([plain(model, t)[p] for t, p in zip(batch, places, strict=True)])
    assert torch.allclose(hidden, expected, atol=1e-4)
    (text,) = texts(1, shared + 90, 5)
    everywhere = range(len(text))
    for twins in ([text], [text, text]):
        hidden = hidden_states(model, twins, [everywhere for _ in twins])
        assert torch.allclose(hidden[-len(text) :], plain(model, text), atol=1e-4)
    tails = texts(7, 5)
    for prompt, tail, found in zip(batch, tails, next_tokens(model, batch, tails), strict=True):
        logits = model.lm_head(plain(model, [*prompt, *tail]))
        assert found == logits.argmax(-1)[len(prompt) - 1 : -1].tolist()


def test_problems_are_right_and_repeatable() -> None:
    problems = make_problems(200, 3)
    assert problems == make_problems(200, 3)
    assert len({p.question for p in problems}) > 190
    assert not {p.key for p in problems} & {p.key for p in make_problems(200, 4)}
    assert all(int(p.answer) > 0 for p in problems)
    assert read_answer(" 3 + 4 = 7. Answer: 7\n") == "7"
    assert read_answer("Answer: 1,250 cards, not 3") == "3"
    assert read_answer("A is 3. Answer: B\n") == "B"
    assert read_answer("so 12 in all. Answer: many") == "12"
    assert read_answer("no idea") is None


RAW = {
    "gsm8k": (
        {"question": "Two cats and a dog?", "answer": "2 + 1 = 3\n#### 1,003"},
        ("Q: Two cats and a dog?\nA:", "1003"),
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        ("Instruction: Add.\n\nInput: 1 2\n\nResponse:", ""),
    ),
    "arc": (
        {
            "question": "Warmest?",
            "choices": {"label": ["A", "B"], "text": ["Sun", "Moon"]},
            "answerKey": "A",
        },
        ('Q: Warmest?\nA. Sun\nB. Moon\nEnd with "Answer: " and the letter.\nA:', "A"),
    ),
}


@pytest.mark.parametrize("name", sorted(SETS))
def test_sets_in_the_form_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, (question, answer) = RAW[name]
    path = tmp_path / "raw.jsonl"
    path.write_text(json.dumps(raw) + "\n")
    (problem,) = load_problems(str(path), name)
    assert problem.question.endswith(question) and problem.answer == answer
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[Any]:
        asked.append((*args, kwargs["split"]))
        return [raw]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert load_problems(name) == [problem]
    assert asked == [(SETS[name].path, SETS[name].config, SETS[name].split)]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install .*\[hub\]"):
        load_problems(name)


def test_files_that_are_no_problems(tmp_path: Path) -> None:
    path = tmp_path / "raw.jsonl"
    path.write_text('{"question": "?"}\n')
    with pytest.raises(ValueError, match="a problem lacks 'key'"):
        load_problems(str(path))
    with pytest.raises(ValueError, match="record 1: not in the form of gsm8k: 'answer'"):
        load_problems(str(path), "gsm8k")
    with pytest.raises(ValueError, match="form must be one of"):
        load_problems(str(path), "other")
    with pytest.raises(ValueError, match="no such file, and no set of gsm8k, alpaca, arc"):
        load_problems("gsm9k")


def test_texts_of_several_models_share_a_file(models: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    for model in models:
        for _ in range(2):  # the second time there is nothing left to do
            arguments = ["collect", "--model", model, "--out", str(path), "--num", "5"]
            assert main(arguments) == 0
    names = [Path(model).name for model in models]
    assert [record["model"] for record in records.read(path)] == [n for n in names for _ in "12345"]
    for model, name in zip(models, names, strict=True):
        assert {record["model"] for record in texts_of(path, model)} == {name}
    with pytest.raises(ValueError, match="no text of other"):
        texts_of(path, "some/Other")


def test_records_survive_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.jsonl"
    records.append(path, [{"key": "a"}, {"key": "b"}])
    with path.open("a") as file:
        file.write('{"key": "c", "te')
    assert [r["key"] for r in records.read(path)] == ["a", "b"]
    assert records.finished(path) == {"a", "b"}
    records.append(path, [{"key": "c"}])
    assert [r["key"] for r in records.read(path)] == ["a", "b", "c"]
    path.write_text('{"key": "a"}\nnonsense\n{"key": "b"}\n')
    with pytest.raises(ValueError, match=r"file\.jsonl, line 2"):
        list(records.read(path))


def test_from_problems_to_a_head(
    models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, draft = models
    collected, labels = tmp_path / "texts.jsonl", tmp_path / "labels.jsonl"
    head, results = tmp_path / "judge.safetensors", tmp_path / "results.jsonl"

    def command(*arguments: Any) -> None:
        assert main([str(argument) for argument in arguments]) == 0

    collect = ("collect", "--model", target, "--out", collected, "--num", 40, "--batch", 16)
    command(*collect)
    whole = collected.read_bytes()
    collected.write_bytes(whole[: len(whole) // 2])
    command(*collect)
    assert sorted(collected.read_bytes().split(b"\n")) == sorted(whole.split(b"\n"))

    label = ("label", "--model", target, "--draft", draft, "--data", collected, "--out", labels)
    command(*label)
    whole = labels.read_bytes()
    labels.write_bytes(whole[: len(whole) // 3])
    command(*label)
    assert labels.read_bytes() == whole
    marks = {mark[1] for example in records.read(labels) for mark in example["marks"]}
    assert marks == {0, 1}

    fit = ("fit", "--model", target, "--data", labels, "--out", head)
    command(*fit)
    first = load_head(head, targets=["target"], hidden_size=64)
    assert first.facts["examples"] == len(list(records.read(labels)))
    shutil.rmtree(tmp_path / "labels.features" / "missing", ignore_errors=True)
    command(*fit)
    assert load_head(head).weight.equal(first.weight)
    ET.fromstring(head.with_suffix(".svg").read_text())

    evaluate = ("evaluate", "--model", target, "--draft", draft, "--judge", head, "--out", results)
    capsys.readouterr()
    command(*evaluate, "--num", 2, "--max-tokens", 12)
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("standard") and "lossy   0.0%" in table[0]
    assert len(table) == len({r["rule"] for r in records.read(results)}) > 8
    before = results.read_bytes()
    command(*evaluate, "--num", 2, "--max-tokens", 12)
    assert results.read_bytes() == before


def test_distillation_goes_on_where_it_stopped(models: tuple[str, str], tmp_path: Path) -> None:
    target, _ = models
    collected, out = tmp_path / "texts.jsonl", tmp_path / "draft"
    assert main(["collect", "--model", target, "--out", str(collected), "--num", "24"]) == 0
    start = ["distill", "--model", target, "--data", str(collected), "--out", str(out)]
    start += ["--layers", "0", "--batch", "8"]
    for epochs in (1, 3, 3):
        assert main([*start, "--epochs", str(epochs)]) == 0
        assert json.loads((out / "training.json").read_text())["epochs"] == epochs
    draft, tokenizer = load_model(str(out))
    model, _ = load_model(target)
    assert draft.config.num_hidden_layers == 1
    assert draft.lm_head.weight.equal(model.lm_head.weight)
    assert not draft.model.norm.weight.equal(model.model.norm.weight)
    assert stop_ids(draft, tokenizer) == stop_ids(model, tokenizer) == {EOS}


def test_hand_labels(models: tuple[str, str], tmp_path: Path) -> None:
    hand, out = tmp_path / "hand.jsonl", tmp_path / "labels.jsonl"
    asked = {"question": "w40 w41", "right": "w50 w51 w52", "wrong": "w50 w53 w54"}
    records.append(hand, [{**asked, "first_wrong": "w53"}, {**asked, "first_wrong": 2}])
    for _ in range(2):
        run_label(Label(models[0], out, hand=hand))
    found = {example["key"]: example for example in records.read(out)}
    assert len(found) == 4
    assert found["hand-0/right"]["marks"] == [[2, 1], [3, 1], [4, 1]]
    assert found["hand-0/wrong"]["marks"] == [[2, 1], [3, 0]]
    assert found["hand-1/wrong"]["marks"] == [[2, 1], [3, 1], [4, 0]]
    records.append(hand, [{**asked, "first_wrong": "w99"}])
    with pytest.raises(ValueError, match="record 3: first_wrong 'w99' does not occur"):
        run_label(Label(models[0], out, hand=hand))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["label", "--out", "x"], "label needs --data"),
        (["label", "--out", "x", "--data", "y"], "--draft"),
        (["fit", "--data", "/no/file", "--out", "x"], "run `python -m spec_decode label`"),
        (["distill", "--data", "/no/file", "--out", "x"], "run `python -m spec_decode collect`"),
    ],
)
def test_what_commands_refuse(
    models: tuple[str, str], arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--model", models[0]]) == 1
    assert says in capsys.readouterr().err


def test_fit_finds_a_direction_and_keeps_problems_apart() -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 8, generator=g) * 3 + 1
    noise = torch.randn(600, generator=g)
    labels = (hidden[:, 0] - 2 * hidden[:, 3] + noise > -3).float()
    groups = [f"problem-{i // 3}" for i in range(600)]
    head = fit_head(hidden, labels, groups, target="tiny", recall=0.9, held_out=0.25)
    assert head.facts["auc"] > 0.9
    assert head.facts["recall_held_out"] > 0.8
    assert 0.1 < head.facts["accepted_held_out"] < 0.95
    test = in_share(groups, 0.25).tolist()
    assert not {g for g, t in zip(groups, test, strict=True) if t} & {
        g for g, t in zip(groups, test, strict=True) if not t
    }
    with pytest.raises(ValueError, match="600 labels, 600 of them right, are too few"):
        fit_head(hidden, torch.ones(600), groups, target="tiny", recall=0.9, held_out=0.25)


def test_figures() -> None:
    scores, labels = torch.tensor([0.9, 0.8, 0.4, 0.4]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert area_under_curve(scores, labels) == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert precision_recall(scores, labels)[:2] == [(0.5, 1.0), (0.5, 0.5)]
    assert interval(0, 0) == (0, 1)
    low, high = interval(50, 100)
    assert (round(low, 3), round(high, 3)) == (0.404, 0.596)
    record = {"right": True, "tokens": 10, "steps": 4, "kept": 6, "lossy": 1}
    assert "length 2.50  lossy  10.0%  right 100.0%" in row("judge", [record, record])
    assert "NaN" not in curve_svg([(0.0, 1.0), (1.0, 0.5)], "a < b", "c")
