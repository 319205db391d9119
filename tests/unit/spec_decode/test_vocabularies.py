"""Answers that end in tokens of more than a line break, and drafts with another vocabulary."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import EngineArgs

from spec_decode import records
from spec_decode.__main__ import main
from spec_decode.reference_decoding import speculate
from spec_decode.tasks.arithmetic import read_answer
from spec_decode.training.generation import end_ids, load_model, stop_ids
from spec_decode.vocabulary import VocabularyContents, check_pair, line_ids, refuse_other
from tests.bench import judge as bench
from tests.support.chain_models import FOLLOWS, QUESTION, make_chain, make_tokenizer, token
from tests.support.speculation import make_models
from vllm_parallel_think.configure import configure
from vllm_parallel_think.core.errors import OptionError


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_chain(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    records.append(path, [{"key": str(i), "question": QUESTION, "answer": "9"} for i in range(2)])
    return path


def texts(model: str, questions: Path) -> Path:
    """Return what a model writes, as ``collect`` keeps it."""
    out = questions.with_name("texts.jsonl")
    arguments = ["collect", "--model", model, "--data", str(questions), "--out", str(out)]
    assert main(arguments) == 0
    return out


def test_every_token_with_a_line_break_ends_an_answer(target: str) -> None:
    model, tokenizer = load_model(target)
    ends = {i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])}
    assert line_ids(tokenizer) == ends
    assert {token(tokenizer, text) for text in ("\n", "\n\n", "?\n")} <= ends
    assert not {token(tokenizer, text) for text in (" ", "9", "?")} & ends
    assert stop_ids(model, tokenizer) == ends | {tokenizer.eos_token_id}
    model.generation_config.eos_token_id = [5, 7]
    assert end_ids(model, tokenizer) == {5, 7, tokenizer.eos_token_id}


def test_line_breaks_of_a_vocabulary_with_bytes() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<0x0A>": 1, "<0x0B>": 2, "▁a": 3, "\n\n": 4}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    assert line_ids(PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == {1, 4}


def test_an_answer_is_what_stands_in_front_of_the_line_break() -> None:
    assert read_answer(" 3 + 4. Answer: 7\n\nQ: and 1? Answer: 8") == "7"
    assert read_answer(" It is 7.\nQ: 12") == "7"
    assert read_answer("\nAnswer: 3") is None


def test_collect_ends_at_an_empty_line(target: str, questions: Path) -> None:
    _, tokenizer = load_model(target)
    for record in records.read(texts(target, questions)):
        assert tokenizer.decode(record["text"]) == " 9\n\n"
        assert record["given"] == record["answer"] == "9"


@pytest.mark.parametrize(("draft", "mark"), [({" ": "7"}, 0), ({":": "9"}, 1)])
def test_labels_do_not_come_from_the_next_question(
    target: str, questions: Path, tmp_path: Path, draft: dict[str, str], mark: int
) -> None:
    other = make_chain(tmp_path / "draft", {**FOLLOWS, **draft})
    out = tmp_path / "labels.jsonl"
    arguments = ["label", "--model", target, "--draft", other, "--out", str(out)]
    assert main([*arguments, "--data", str(texts(target, questions))]) == 0
    found = list(records.read(out))
    assert len(found) == 2
    assert {m[1] for example in found for m in example["marks"]} == {mark}


def test_evaluation_ends_at_an_empty_line(target: str, tmp_path: Path) -> None:
    draft = make_chain(tmp_path / "draft", {**FOLLOWS, " ": "7"})
    out = tmp_path / "results.jsonl"
    arguments = ["evaluate", "--model", target, "--draft", draft, "--out", str(out), "--num", "2"]
    assert main(arguments) == 0
    found = list(records.read(out))
    assert {record["tokens"] for record in found} == {3}


@pytest.mark.parametrize("command", ["label", "distill"])
def test_texts_that_go_on_are_refused(
    command: str, target: str, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = texts(target, questions)
    first, *rest = records.read(path)
    first["text"] = [*first["text"], *first["text"]]
    path.write_text("".join(json.dumps(record) + "\n" for record in [first, *rest]))
    out = path.with_name("out")
    arguments = [command, "--model", target, "--data", str(path), "--out", str(out)]
    arguments += ["--draft", target] if command == "label" else ["--layers", "0"]
    assert main(arguments) == 1
    assert "target/0: the text goes on behind the end of its line" in capsys.readouterr().err
    assert not out.exists()


def test_word_problems_of_the_benchmark_end_at_an_empty_line(target: str) -> None:
    _, tokenizer = load_model(target)
    exam = bench.word_problems(tokenizer, 2, seed=1)
    assert exam.params.stop == ["\n"] and not exam.params.stop_token_ids
    assert exam.ends == line_ids(tokenizer)
    rule: Any = None
    args = SimpleNamespace(model=target, draft=target, dtype="float32", drafts=4)
    result = bench.in_transformers("standard", rule, exam, args)  # type: ignore[arg-type]
    assert result.tokens == 3 * result.answers


def vocabulary(*tokens: str, extra: tuple[int, ...] = (), rows: int = 8) -> VocabularyContents:
    return VocabularyContents("org/model", dict(enumerate(tokens)), extra, rows)


def test_vocabularies_that_fit() -> None:
    pairs = [
        (vocabulary("a", "b"), vocabulary("a", "b", rows=2)),
        (vocabulary("a", "b"), vocabulary("a", "b", "<think>", extra=(2,))),
        (vocabulary("a", "b", "<think>", extra=(2,)), vocabulary("a", "b", rows=9)),
    ]
    for target, draft in pairs:
        refuse_other(target, draft)


@pytest.mark.parametrize(
    ("draft", "says"),
    [
        (vocabulary("a", "c", "b"), "2 of 3 token ids stand for other tokens, the first is 1, 'b'"),
        (vocabulary("a", "b"), "lacks 1 tokens of org/model, the first is 'c' (2)"),
        (vocabulary("a", "b", "c", "d"), "lacks 1 tokens of org/model, the first is 'd' (3)"),
        (vocabulary(*"abcdefgh", "<x>", extra=(3, 4, 5, 6, 7, 8)), "'<x>' (8)"),
    ],
)
def test_vocabularies_that_do_not_fit(draft: VocabularyContents, says: str) -> None:
    with pytest.raises(ValueError) as error:
        refuse_other(vocabulary("a", "b", "c"), draft)
    assert says in str(error.value)
    assert "take a smaller model of the target's family" in str(error.value)


def test_padding_of_gguf_files_is_no_token() -> None:
    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "[PAD1]": 1, "<s>": 2, "[PADDED]": 3}

        def get_added_vocab(self) -> dict[str, int]:
            return {"<s>": 2}

    found = VocabularyContents.of("m", Tokenizer(), 4)
    assert set(found.extra) == {1, 2}
    assert found.tokens[3] == "[PADDED]"


@pytest.fixture(params=["draft is wider", "draft is narrower", "same size"])
def strangers(request: pytest.FixtureRequest, target: str, tmp_path: Path) -> tuple[str, str]:
    """Folders of a target and of a draft with another vocabulary."""
    words = {"draft is wider": "so much more, or less, of anything", "same size": "how mnay"}
    other = make_tokenizer(words.get(request.param, "how many"))
    if request.param == "draft is narrower":
        target = make_chain(tmp_path / "target", tokenizer=make_tokenizer("of all these things"))
    return target, make_chain(tmp_path / "stranger", tokenizer=other)


def test_no_command_takes_a_draft_with_another_vocabulary(
    strangers: tuple[str, str],
    questions: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, draft = strangers
    data, out = texts(model, questions), questions.with_name("out.jsonl")
    pair = ["--model", model, "--draft", draft]
    for command in (["label", *pair, "--data", str(data)], ["evaluate", *pair]):
        assert main([*command, "--out", str(out)]) == 1
        says = capsys.readouterr().err.splitlines()[-1]
        assert f"{draft} cannot draft for {model}" in says
        assert "distill" in says
        assert not out.exists()
    monkeypatch.setattr(sys, "argv", ["judge", *pair, "--judge", "judge.safetensors"])
    with pytest.raises(SystemExit):
        bench.main()
    assert f"{draft} cannot draft for {model}" in capsys.readouterr().err


def engine_config(model: str, draft: str) -> Any:
    spec = {"method": "draft_model", "model": draft, "num_speculative_tokens": 2}
    options = {"parallel_think": {"profile": "off", "judge": {"rule": "typical"}}}
    arguments: dict[str, Any] = {"speculative_config": spec, "additional_config": options}
    return EngineArgs(
        model=model, dtype="float32", max_model_len=256, **arguments
    ).create_engine_config()


def test_the_server_refuses_a_draft_with_another_vocabulary(target: str, tmp_path: Path) -> None:
    rows = len(make_tokenizer())
    words = make_tokenizer("how mnay")
    assert len(words) == rows
    stranger = make_chain(tmp_path / "stranger", tokenizer=words)
    configure(engine_config(target, make_chain(tmp_path / "draft")))
    with pytest.raises(OptionError, match=r"judge: .*stranger cannot draft for .*stand for other"):
        configure(engine_config(target, stranger))
    bare = shutil.copytree(stranger, tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    # vLLM takes the served model's tokenizer; that nothing was compared is said in the log.
    configure(engine_config(target, str(bare)))


@pytest.mark.parametrize(("target_rows", "draft_rows"), [(None, 400), (400, None)])
def test_a_padded_embedding_is_no_other_vocabulary(
    target_rows: int | None, draft_rows: int | None, questions: Path, tmp_path: Path
) -> None:
    model = make_chain(tmp_path / "padded", num_rows=target_rows)
    draft = make_chain(tmp_path / "draft", {**FOLLOWS, " ": "7"}, num_rows=draft_rows)
    check_pair(model, draft)
    out, results = tmp_path / "labels.jsonl", tmp_path / "results.jsonl"
    pair = ["--model", model, "--draft", draft]
    data = texts(model, questions)
    assert main(["label", *pair, "--data", str(data), "--out", str(out)]) == 0
    assert len(list(records.read(out))) == 2
    assert main(["evaluate", *pair, "--out", str(results), "--num", "1"]) == 0
    assert {record["tokens"] for record in records.read(results)} == {3}


def test_nothing_is_chosen_from_padding(tmp_path: Path) -> None:
    (model, tokenizer), (draft, _) = (
        load_model(make_chain(tmp_path / name, num_rows=rows))
        for name, rows in (("target", None), ("draft", 400))
    )
    with torch.no_grad():
        draft.lm_head.weight[399] = 9.0
    prompt = tokenizer.encode(QUESTION)
    trace = speculate(
        model, draft, prompt, rule=None, num_drafts=2, max_tokens=9,
        stop_ids=stop_ids(model, tokenizer),
    )  # fmt: skip
    assert tokenizer.decode(trace.tokens) == " 9\n\n"
    assert trace.kept


def test_labels_of_another_model_are_refused(
    target: str, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = make_chain(tmp_path / "draft", {**FOLLOWS, " ": "7"})
    out, data = tmp_path / "labels.jsonl", texts(target, questions)
    label = ["label", "--model", target, "--draft", draft, "--data", str(data), "--out", str(out)]
    assert main(label) == 0
    assert main(["fit", "--model", draft, "--data", str(out), "--out", str(tmp_path / "h")]) == 1
    assert "a label of target, not of draft" in capsys.readouterr().err


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, int]]:
    """Precision and bytes of the models that are loaded from here on."""
    from transformers import AutoModelForCausalLM

    seen: list[tuple[torch.dtype, int]] = []
    load = AutoModelForCausalLM.from_pretrained

    def spy(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        seen.append((model.dtype, sum(p.nbytes for p in model.parameters())))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    return seen


def test_precision_of_a_loaded_model(target: str, loaded: list[tuple[torch.dtype, int]]) -> None:
    for dtype in ("float32", "bfloat16", "float16", "auto"):
        load_model(target, dtype)  # type: ignore[arg-type]
    types, sizes = zip(*loaded, strict=True)
    assert types == (torch.float32, torch.bfloat16, torch.float16, torch.float32)
    assert sizes[0] == 2 * sizes[1] == 2 * sizes[2] == sizes[3]
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, auto"):
        load_model(target, "int8")  # type: ignore[arg-type]


def mark_by_turns(labels: Path) -> None:
    """Call every second label right, so that there is something to fit."""
    found = list(records.read(labels))
    labels.unlink()
    for number, example in enumerate(found):
        example["marks"] = [[place, number % 2] for place, _ in example["marks"]]
    records.append(labels, found)


def test_every_command_loads_in_the_precision_asked_for(
    tmp_path: Path, loaded: list[tuple[torch.dtype, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    target, draft = map(str, make_models(tmp_path))
    data, labels, head = (str(tmp_path / name) for name in ("texts", "labels", "head"))
    distilled, results = str(tmp_path / "distilled"), str(tmp_path / "results")
    pair = ["--model", target, "--draft", draft]
    commands = [
        ["collect", "--model", target, "--out", data, "--num", "40"],
        ["label", *pair, "--data", data, "--out", labels],
        ["fit", "--model", target, "--data", labels, "--out", head],
        ["evaluate", *pair, "--judge", head, "--out", results, "--num", "1"],
        ["distill", "--model", target, "--data", data, "--out", distilled, "--layers", "0",
         "--epochs", "1"],
    ]  # fmt: skip
    loaded.clear()
    for command in commands:
        assert main([*command, "--dtype", "bfloat16"]) == 0, capsys.readouterr().err
        if command[0] == "label":
            mark_by_turns(Path(labels))
    assert [dtype for dtype, _ in loaded] == [torch.bfloat16] * 7
    # A draft is trained and kept in full: steps are too small for bfloat16.
    assert load_model(distilled, "auto")[0].dtype == torch.float32
    num_loaded = len(loaded)
    assert main([*commands[2], "--dtype", "bfloat16"]) == 0
    assert len(loaded) == num_loaded, "hidden states are on disk"
    assert main(commands[2]) == 0
    assert loaded[-1][0] == torch.float32, "those of another precision are not taken"
    with pytest.raises(SystemExit):
        main([*commands[0], "--dtype", "int8"])
    assert "float32" in capsys.readouterr().err
