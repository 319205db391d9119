"""vLLM's offline `LLM`: one question, its answer, and what its paths were worth.

    python deploy/examples/offline.py MODEL
    python deploy/examples/offline.py MODEL --question "List four tips to sleep well."

`MODEL` is a folder or a name on the hub. Settings of the server stand in `additional_config`,
settings of a request in `extra_args`: the same keys that HTTP clients send in `vllm_xargs`.
vLLM's log is on stdout, too, unless `VLLM_LOGGING_STREAM=ext://sys.stderr` is set.
"""

from __future__ import annotations

import argparse
import json

from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--question", default="How do I stay healthy?")
    parser.add_argument("--path-tokens", type=int, default=96, help="default: %(default)s")
    parser.add_argument("--dtype", default="auto", help="float32 is faster on most CPUs")
    args = parser.parse_args()
    llm = LLM(
        args.model,
        dtype=args.dtype,
        max_model_len=4096,
        enforce_eager=True,  # starts sooner; leave it out on a GPU
        additional_config={"parallel_think": {"profile": "skeleton"}},
    )
    params = SamplingParams(
        temperature=0, max_tokens=600, extra_args={"pt_path_tokens": args.path_tokens}
    )
    (output,) = llm.chat([{"role": "user", "content": args.question}], params)
    print(output.outputs[0].text)
    print(json.dumps(output.kv_transfer_params["parallel_think"]))


if __name__ == "__main__":
    main()
