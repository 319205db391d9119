"""Rules against each other in vLLM: accepted length, speed, answers right, share of lossy tokens.

One engine speculates with a draft under one rule after another, on word problems the judge was not
trained on; the draft alone and the target alone stand beside them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .engine import make_llm

console = Console()


@dataclass(frozen=True)
class Result:
    """One rule's answers."""

    name: str
    right: int
    answers: int
    tokens: int
    seconds: float
    length: float = 1.0
    lossy: int = 0


class Exam:
    """Problems, and how they are asked and marked."""

    def __init__(self, model: str, num: int, seed: int, max_tokens: int) -> None:
        from transformers import AutoTokenizer
        from vllm import SamplingParams

        from spec_decode.problems import make_problems

        tokenizer = AutoTokenizer.from_pretrained(model)
        line = tokenizer.encode("\n", add_special_tokens=False)[-1]
        self.problems = make_problems(num, seed)
        self.prompts = [{"prompt_token_ids": tokenizer.encode(p.question)} for p in self.problems]
        self.params = SamplingParams(temperature=0, max_tokens=max_tokens, stop_token_ids=[line])

    def sit(self, name: str, llm: Any) -> Result:
        """Answer all problems at once."""
        from spec_decode.problems import read_answer

        start = time.perf_counter()
        outputs = llm.generate(self.prompts, self.params, use_tqdm=False)
        seconds = time.perf_counter() - start
        right = sum(
            read_answer(output.outputs[0].text) == problem.answer
            for output, problem in zip(outputs, self.problems, strict=True)
        )
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        console.print(f"{name}: {tokens} tokens in {seconds:.0f} s", style="dim")
        return Result(name, right, len(outputs), tokens, seconds)


def with_rules(args: argparse.Namespace, exam: Exam) -> list[Result]:
    """Run one engine under every rule."""
    from dataclasses import replace

    from spec_decode.evaluate import rules

    llm = make_llm(
        args.model,
        {"profile": "off", "judge": {"rule": "judge", "weights": str(args.judge)}},
        speculative_config={
            "method": "draft_model",
            "model": str(args.draft),
            "num_speculative_tokens": args.drafts,
        },
        max_model_len=512,
    )
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    verifier, sampler = worker._verifier, worker.model_runner.rejection_sampler
    ours, stock = type(sampler), type(sampler).__mro__[1]
    exam.sit("warm-up", llm)
    results = []
    for name, rule in rules(args.judge, args.model).items():
        if name.startswith("KL"):
            continue  # Model Runner V1 keeps no draft probabilities of greedy requests.
        before = verifier.counts
        # Our sampler under a rule that accepts nothing counts; vLLM's own is timed.
        if rule is not None:
            verifier.rule = rule
            results.append(exam.sit(name, llm))
        else:
            verifier.rule = replace(verifier.rule, threshold=1.0)
            counted = exam.sit(name, llm)
            sampler.__class__ = stock
            results.append(replace(exam.sit(name, llm), name=name))
            sampler.__class__ = ours
            assert results[-1].tokens == counted.tokens, "the standard rule is not vLLM's own"
        after = verifier.counts
        steps = (after.drafts - before.drafts) / args.drafts
        length = 1 + (after.kept - before.kept) / max(1, steps)
        results[-1] = replace(results[-1], length=length, lossy=after.lossy - before.lossy)
        console.print(
            f"  length {length:.2f}, lossy {results[-1].lossy}, right {results[-1].right}"
        )
    return results


def alone(name: str, model: str, exam: Exam) -> Result:
    """Run a model without speculation."""
    llm = make_llm(model, None, max_model_len=512)
    exam.sit("warm-up", llm)
    result = exam.sit(name, llm)
    llm.llm_engine.engine_core.shutdown()
    return result


def show(results: Sequence[Result], args: argparse.Namespace) -> None:
    from spec_decode.evaluate import interval

    title = f"{args.num} held-out word problems, {args.drafts} drafts a step, {args.model}"
    table = Table(title=title)
    for column in ("rule", "mean length", "tokens/s", "lossy", "right", "95 %"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for result in results:
        low, high = interval(result.right, result.answers)
        table.add_row(
            result.name,
            f"{result.length:.2f}",
            f"{result.tokens / result.seconds:.0f}",
            f"{result.lossy / result.tokens:.1%}",
            f"{result.right / result.answers:.1%}",
            f"{low:.1%}-{high:.1%}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--draft", required=True, type=Path)
    parser.add_argument("--judge", required=True, type=Path)
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1, help="not the one of training")
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--picture", type=Path, default=Path("judge.svg"))
    args = parser.parse_args()
    exam = Exam(args.model, args.num, args.seed, args.max_tokens)
    # After .engine has set the environment, which vLLM reads when it is imported.
    from tests.engine.engine import _register_kernels_once

    _register_kernels_once()
    results = [alone("target alone", args.model, exam)]
    results.append(alone("draft alone", str(args.draft), exam))
    results += with_rules(args, exam)
    show(results, args)
    judged = [r for r in results if r.name.startswith(("standard", "judge "))]
    from spec_decode.picture import curve_svg

    points = sorted((r.right / r.answers, r.length) for r in judged)
    picture = curve_svg(
        points, "share of right answers", "mean acceptance length", top=args.drafts + 1
    )
    args.picture.write_text(picture, "utf-8")
    console.print(f"accepted length against right answers, a point a threshold: {args.picture}")


if __name__ == "__main__":
    main()
