"""Answer a JSONL file with Ray Data: engines side by side, every finished answer kept.

    python -m deploy.ray.batch --config deploy/ray/laptop.yaml --input questions.jsonl \
        --output answers.jsonl

A line of the input is ``{"id": …, "messages": […]}``, optionally with ``vllm_xargs`` and
parameters of vLLM's ``SamplingParams`` in ``sampling``. A line of the output has the same ``id``,
and ``text``, ``finish_reason`` and ``parallel_think`` (the summary), or ``error``. Answers are
appended as they come; started again, ids that the output already has are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.data
import yaml
from tqdm import tqdm
from vllm.exceptions import VLLMValidationError

from deploy.ray.app import parse


class Engine:
    """An engine of its own, in an actor of Ray Data."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        from vllm import LLM
        from vllm.engine.arg_utils import EngineArgs

        self._llm = LLM.from_engine_args(EngineArgs.from_cli_args(parse(options)))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Answer a batch of lines: JSON strings in, JSON strings out."""
        lines = [json.loads(line) for line in batch["line"]]
        try:
            answers = self._answers(lines)
        except (
            VLLMValidationError,
            ValueError,
            TypeError,
        ):  # one refused line must not take the others with it
            answers = [self._answer_or_error(line) for line in lines]
        return {"line": [json.dumps(answer, ensure_ascii=False) for answer in answers]}

    def _answer_or_error(self, line: Mapping[str, Any]) -> dict[str, Any]:
        try:
            (answer,) = self._answers([line])
        except (VLLMValidationError, ValueError, TypeError) as error:
            return {"id": line["id"], "error": str(error)}
        return answer

    def _answers(self, lines: list[Any]) -> list[dict[str, Any]]:
        from vllm import SamplingParams

        params = [
            SamplingParams(**line.get("sampling", {}), extra_args=line.get("vllm_xargs"))
            for line in lines
        ]
        outputs = self._llm.chat([line["messages"] for line in lines], params, use_tqdm=False)
        return [
            {
                "id": line["id"],
                "text": output.outputs[0].text,
                "finish_reason": output.outputs[0].finish_reason,
                "parallel_think": (output.kv_transfer_params or {}).get("parallel_think"),
            }
            for line, output in zip(lines, outputs, strict=True)
        ]


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the content of each line.

    Raises:
        ValueError: A line is no JSON object with `id` and `messages`, or an id comes twice.

    """
    seen = set()
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if not isinstance(line, dict) or not {"id", "messages"} <= line.keys():
                raise ValueError(f"{path}, line {number}: needs the keys `id` and `messages`")
            if line["id"] in seen:
                raise ValueError(f"{path}, line {number}: the id {line['id']!r} came before")
            seen.add(line["id"])
            yield number, line


def finished(path: Path) -> set[Any]:
    """Return the ids that an output already has; cut off a last line that was not written whole."""
    done: set[Any] = set()
    if not path.exists():
        return done
    whole = 0
    with path.open("rb") as file:
        for text in file:
            if not text.endswith(b"\n"):
                break
            done.add(json.loads(text)["id"])
            whole += len(text)
    os.truncate(path, whole)
    return done


def run(config: Mapping[str, Any], source: Path, target: Path, engines: int, batch: int) -> int:
    """Answer what is not answered yet; return how many answers were added.

    Args:
        config: A Serve config: ``args.vllm`` and the engine's ``ray_actor_options`` are used.
        source: The questions.
        target: The answers, appended to.
        engines: Engines side by side.
        batch: Lines that an engine takes at once, and that an interruption can lose.

    """
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    options = application["args"]["vllm"]
    resources = dict(deployment.get("ray_actor_options") or {})
    lines = [line for _, line in read_lines(source)]
    done = finished(target)
    todo = [{"line": json.dumps(line)} for line in lines if line["id"] not in done]
    if not todo:
        return 0
    blocks = -(-len(todo) // batch)
    answers = ray.data.from_items(todo, override_num_blocks=blocks).map_batches(
        Engine,
        fn_constructor_args=(options,),
        compute=ray.data.ActorPoolStrategy(size=engines),
        batch_size=batch,
        **resources,
    )
    added = 0
    with (
        target.open("a", encoding="utf-8") as file,
        tqdm(total=len(lines), initial=len(lines) - len(todo), unit="answer") as bar,
    ):
        for row in answers.iter_rows():
            file.write(row["line"] + "\n")
            file.flush()
            added += 1
            bar.update()
    return added


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Answer a JSONL file with Ray Data, resumable.")
    parser.add_argument("--config", type=Path, required=True, help="the Serve config file")
    parser.add_argument("--model", help="instead of the file's `model`")
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--engines", type=int, default=1, help="engines side by side (default: 1)")
    parser.add_argument("--batch", type=int, default=16, help="lines at once (default: 16)")
    given = parser.parse_args()
    config = yaml.safe_load(given.config.read_text())
    if given.model:
        config["applications"][0]["args"]["vllm"]["model"] = given.model
    ray.init(ignore_reinit_error=True)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # one bar, over answers, is ours
    added = run(config, given.input, given.output, given.engines, given.batch)
    print(f"{added} answers added to {given.output}")


if __name__ == "__main__":
    main()
