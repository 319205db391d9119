"""Workers that see each other on Model Runner V2, vLLM's runner on GPUs.

In a process of its own, under Triton's interpreter: see ``test_runner_v2``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.runners import pretend_triton_runs_on_cpus, run_script


@pytest.mark.parametrize("layout", ["combined", pytest.param("contiguous", marks=pytest.mark.slow)])
def test_workers_write_what_a_dense_forward_writes(
    layout: str, tiny_model: Path, tmp_path: Path
) -> None:
    printed = run_script(__name__, layout, str(tiny_model), str(tmp_path), runner="v2")
    assert printed.endswith(f"{layout}: equal\n")


def main(layout: str, model: str, folder: str) -> None:
    """Serve two groups and a plain request, undisturbed and with workers preempted."""
    pretend_triton_runs_on_cpus()
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    from tests.support.engine import Engine, Preempter
    from tests.support.hogwild_cases import (
        assert_same,
        count_swaps,
        params,
        plan_of,
        prompts,
        write_recipe,
    )
    from tests.support.hogwild_oracle import HogwildOracle

    hf_model = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    engine = Engine(
        model, options={"profile": write_recipe(Path(folder))}, block_size=16, max_num_seqs=12
    )
    runner = type(engine.worker.model_runner).__module__
    assert runner == "vllm.v1.worker.cpu.model_runner", runner
    plans = [plan_of(n, layout, worker_tokens=14, check_every=10) for n in (2, 3)]
    texts = prompts(2)
    oracles = [HogwildOracle(hf_model, plan) for plan in plans]
    wanted = [oracle.answer(text) for oracle, text in zip(oracles, texts, strict=True)]
    plain = SamplingParams(max_tokens=12, temperature=0, extra_args={"parallel_think": "off"})
    asks = [params(plan, written) for plan, written in zip(plans, wanted, strict=True)]
    alone = engine.generate(texts[:1], plain)

    def serve() -> None:
        outputs = engine.generate([*texts, texts[0]], [*asks, plain])
        for output, oracle in zip(outputs, oracles, strict=False):
            assert_same(engine, output, oracle)
        assert outputs[-1].outputs[0].token_ids == alone[0].outputs[0].token_ids
        engine.assert_all_blocks_free()

    serve()
    swaps = count_swaps(engine)
    Preempter(engine.scheduler, every=5)
    serve()
    assert swaps["out"] >= 2
    engine.close()
    print(f"{layout}: equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
