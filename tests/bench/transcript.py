"""One run of workers that see each other, as Markdown: what each wrote, in which order."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tests.bench.engine import make_llm

QUESTION = "How do I stay healthy? Give short tips, each in a paragraph of its own."


def render(
    question: str, text: str, summary: dict[str, Any], command: str, model: str, seed: int
) -> str:
    """Return the transcript of a run."""
    figures = summary["hogwild"]
    workers = ", ".join(
        f"{w['name']} {w['steps']} steps and {w['tokens']} tokens" for w in figures["workers"]
    )
    quoted = "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines())
    return f"""# A run of workers that see each other

{model}, temperature 0.7, seed {seed}, float32. A model of this size hardly
cooperates (the paper finds little below 8B): the transcript shows the mechanics, in the order in
which the client gets it: each finished step with its worker's name, what the budget cut off, then
the forced answer.

    {command}

**Question:** {question}

{quoted}

**Summary:** {workers}; layout {figures["layout"]};
{figures["checks_yes"]} checks answered with yes, {figures["checks_no"]} with no or otherwise;
{summary["generated_tokens"]} tokens sampled on a critical path of
{summary["critical_path_tokens"]} (parallelism ratio {summary["parallelism_ratio"]}).
"""


def main() -> None:
    from vllm import SamplingParams

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", default="SmolLM2-135M-Instruct")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--check-every", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=600, help="default: %(default)s")
    args = parser.parse_args()
    llm = make_llm(args.model, {"profile": "hogwild"}, max_model_len=4096)
    options = {
        "pt_num_workers": args.workers,
        "pt_worker_tokens": args.tokens,
        "pt_check_every": args.check_every,
    }
    params = SamplingParams(
        temperature=0.7,
        seed=args.seed,
        repetition_penalty=1.15,
        max_tokens=args.max_tokens,
        # A model of this size ends its text at once. This lifts the limit of the answer, too.
        ignore_eos=True,
        extra_args=options,
    )
    chat: Any = [{"role": "user", "content": args.question}]
    (output,) = llm.chat(chat, params, use_tqdm=False)
    summary = output.kv_transfer_params["parallel_think"]
    command = "python -m tests.bench.transcript --model MODEL " + " ".join(sys.argv[3:])
    print(
        render(
            args.question, output.outputs[0].text, summary, command.strip(), args.name, args.seed
        )
    )


if __name__ == "__main__":
    main()
