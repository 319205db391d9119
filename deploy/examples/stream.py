"""A streaming client: the answer as it is released, then what its paths were worth.

    python deploy/examples/stream.py                 # beside `make serve`
    python deploy/examples/stream.py --live          # also how far every path is

Needs the package `openai`. The key of a guarded server comes from `VLLM_API_KEY`. Paths are sent
in the order of the text, so the first one comes word by word and the others in one piece each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import openai


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--question", default="How do I stay healthy?")
    parser.add_argument("--path-tokens", type=int, default=96, help="default: %(default)s")
    parser.add_argument("--live", action="store_true", help="show all paths grow, on stderr")
    args = parser.parse_args()
    client = openai.OpenAI(
        base_url=f"{args.url}/v1", api_key=os.environ.get("VLLM_API_KEY", "none")
    )
    xargs = {
        "parallel_think": "skeleton",
        "pt_path_tokens": args.path_tokens,
        "pt_live": args.live,
    }
    stream = client.chat.completions.create(
        model=args.model,
        messages=[{"role": "user", "content": args.question}],
        temperature=0,
        max_tokens=600,
        stream=True,
        extra_body={"vllm_xargs": xargs},
    )
    summaries = []
    for chunk in stream:
        extra = chunk.model_extra or {}
        if paths := extra.get("parallel_think_live"):
            far = ", ".join(f"{path['path']}: {path['tokens']}" for path in paths)
            print(f"[tokens a path: {far}]", file=sys.stderr)
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        summaries = extra.get("parallel_think", summaries)
    print()
    for summary in summaries:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
