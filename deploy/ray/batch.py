"""Answer every line of a JSONL file with Ray Data, in parallel branches; go on where it stopped.

    python -m deploy.ray.batch --model MODEL questions.jsonl answers.jsonl

A line of the input has an `id` and either `prompt` (text) or `messages` (a chat); it may have
`max_tokens`, `temperature`, `seed` and `vllm_xargs`. A line of the output has the `id`, `text`,
`finish_reason`, and the plugin's `summary`, or an `error`. Answers that are in the output already
are not computed again; lines are written as batches finish, in any order.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEYS = ("max_tokens", "temperature", "seed")


class Answerer:
    """One engine, kept for all batches that its actor gets."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(model, **options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        lines = [json.loads(line) for line in batch["line"]]
        return {"answer": [json.dumps(answer) for answer in self._answer(lines)]}

    def _answer(self, lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Answer a batch at once; if that fails, line by line: one bad line is one error."""
        try:
            yield from self._generate(lines)
        except ValueError as error:
            if len(lines) == 1:
                yield {"id": lines[0]["id"], "error": str(error)}
                return
            for line in lines:
                yield from self._answer([line])

    def _generate(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        from vllm import SamplingParams

        params, prompts = [], []
        tokenizer = self._llm.get_tokenizer()
        for line in lines:
            wanted = {"max_tokens": 512, **{k: line[k] for k in KEYS if k in line}}
            params.append(SamplingParams(**wanted, extra_args=line.get("vllm_xargs")))
            prompts.append(
                tokenizer.apply_chat_template(
                    line["messages"], tokenize=False, add_generation_prompt=True
                )
                if "messages" in line
                else line["prompt"]
            )
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [
            {
                "id": line["id"],
                "text": output.outputs[0].text,
                "finish_reason": output.outputs[0].finish_reason,
                "summary": (output.kv_transfer_params or {}).get("parallel_think"),
            }
            for line, output in zip(lines, outputs, strict=True)
        ]


def read(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the questions of a file.

    Raises:
        ValueError: Names the line, and what is wrong with it.

    """
    seen: set[str] = set()
    for number, text in enumerate(file.read_text("utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: not JSON: {error}") from None
        if not isinstance(line, dict) or not isinstance(line.get("id"), (str, int)):
            raise ValueError(f"{file}:{number}: needs an `id`, text or a number")
        if ("prompt" in line) == ("messages" in line):
            raise ValueError(f"{file}:{number}: needs either `prompt` or `messages`")
        if (key := str(line["id"])) in seen:
            raise ValueError(f"{file}:{number}: id {line['id']!r} occurs twice")
        seen.add(key)
        yield line


def finished(file: Path) -> set[str]:
    """Return the ids that have an answer; a line that was cut off by an interruption has none."""
    done = set()
    if file.exists():
        for text in file.read_text("utf-8").splitlines():
            try:
                done.add(str(json.loads(text)["id"]))
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    return done


def run(
    questions: Path,
    answers: Path,
    model: str,
    options: dict[str, Any],
    *,
    engines: int = 1,
    batch_size: int = 16,
    gpus: float = 0,
) -> int:
    """Answer what has no answer yet; return how many answers were written.

    Args:
        questions: The input.
        answers: The output; answers are added to it.
        model: Name or folder of the model.
        options: Options of `vllm.LLM`.
        engines: Engines side by side, each an actor.
        batch_size: Lines that an engine gets at once.
        gpus: GPUs of each engine; 0 for CPUs.

    Raises:
        ValueError: A line of the input cannot be used; nothing was computed.

    """
    import ray
    from tqdm import tqdm

    lines = list(read(questions))
    done = finished(answers)
    left = [line for line in lines if str(line["id"]) not in done]
    print(f"{len(lines) - len(left)} of {len(lines)} have an answer already", file=sys.stderr)
    if not left:
        return 0
    data = ray.data.from_items([{"line": json.dumps(line)} for line in left])
    data = data.repartition(-(-len(left) // batch_size)).map_batches(
        Answerer,
        fn_constructor_kwargs={"model": model, "options": options},
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=engines),
        **({"num_gpus": gpus} if gpus else {"num_cpus": 1}),
    )
    written = 0
    torn = answers.exists() and not answers.read_bytes().endswith(b"\n")
    with answers.open("a", encoding="utf-8") as out, tqdm(total=len(left), unit="answer") as bar:
        if torn and answers.stat().st_size:
            out.write("\n")
        for batch in data.iter_batches(batch_size=None):
            for answer in batch["answer"]:
                out.write(f"{answer}\n")
                written += 1
            out.flush()
            os.fsync(out.fileno())
            bar.update(len(batch["answer"]))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("questions", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--profile", default="skeleton")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, for vllm.LLM")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--gpus", type=float, default=1, help="of each engine; 0 for CPUs")
    args = parser.parse_args()
    import ray

    ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
    config = {"additional_config": {"parallel_think": {"profile": args.profile}}}
    try:
        written = run(
            args.questions,
            args.answers,
            args.model,
            {**config, **args.options},
            engines=args.engines,
            batch_size=args.batch_size,
            gpus=args.gpus,
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{written} answers written to {args.answers}", file=sys.stderr)


if __name__ == "__main__":
    main()
