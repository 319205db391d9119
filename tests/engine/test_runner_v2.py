"""INV-2 on Model Runner V2: tokens and K/V equal the dense oracle's, preempted or not.

V2 is vLLM's runner on GPUs. On a CPU its Triton kernels run in Triton's interpreter, which has to
be turned on before anything imports Triton: so the engine lives in a process of its own, this file
run as a script.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.oracle import Answer, Budget, Oracle, assert_equal, prompts
from tests.support.runners import pretend_triton_runs_on_cpus, run_script
from tests.support.tiny import IdGrammar, write_vectors


@pytest.mark.parametrize(
    "case",
    [
        "two-paths",
        pytest.param("three-paths", marks=pytest.mark.slow),
        pytest.param("penalties", marks=pytest.mark.slow),
        pytest.param("thoughts", marks=pytest.mark.slow),
    ],
)
def test_greedy_equals_dense_mask(case: str, tiny_model: Path, tmp_path: Path) -> None:
    """Two or three paths, one of them forking again, prompts in chunks, beside plain requests."""
    printed = run_script(__name__, case, str(tiny_model), str(tmp_path), runner="v2")
    assert printed.endswith(f"{case}: equal\n")


class DepthOracle(Oracle):
    """Also counts the blocks inside blocks."""

    num_nested = 0

    def _block(self, context: Any, position: Any, critical: Any, depth: int, budget: Any) -> Any:
        self.num_nested += depth > 0
        return super()._block(context, position, critical, depth, budget)


CASES = {
    # Paths, tokens, prompts, penalties: the first answer forks inside a path, the last ends itself.
    "two-paths": (2, 48, (7, 2), {}),
    "three-paths": (3, 150, (0, 38), {}),
    "thoughts": (3, 60, (1, 3), {}),
    "penalties": (2, 48, (20, 37), {"presence_penalty": 1.5, "frequency_penalty": 0.75}),
}


def answers(
    hf_model: Any, grammar: IdGrammar, budget: Budget, numbers: tuple[int, ...], vectors: Any
) -> list[tuple[list[int], Answer]]:
    """Return prompts with the oracle's answers, if these exercise the grammar."""
    asked = [prompt[:30] for prompt in prompts(60, seed=7)]
    oracles = [DepthOracle(hf_model, grammar, budget, vectors) for _ in numbers]
    pairs = [
        (asked[number], oracle.answer(asked[number]))
        for number, oracle in zip(numbers, oracles, strict=True)
    ]
    assert oracles[0].num_nested or grammar.at_start, "no block in a block"
    assert pairs[-1][1].num_forks and (pairs[-1][1].finish == "stop" or grammar.at_start)
    return pairs


def main(case: str, model: str, folder: str) -> None:
    """Serve a batch twice, undisturbed and with branches preempted, and compare with the oracle."""
    pretend_triton_runs_on_cpus()
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    from tests.support.engine import Engine, Preempter

    num_paths, max_tokens, numbers, penalties = CASES[case]
    thinks = case == "thoughts"
    grammar = IdGrammar(
        num_paths=num_paths,
        triggers=tuple(range(10, 22)),
        at_start=thinks,
        num_tags=2 if thinks else None,
    )
    budget = Budget(max_tokens=max_tokens, path_tokens=10, max_depth=2, **penalties)
    file = Path(folder) / "thoughts.safetensors"
    vectors = write_vectors(file, 2) if thinks else None
    hf_model = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    chosen = answers(hf_model, grammar, budget, numbers, vectors)
    engine = Engine(
        model,
        options={"profile": grammar.write(Path(folder))}
        | ({"thought_embeddings": str(file)} if thinks else {}),
        block_size=16,
        max_num_batched_tokens=24,
        max_num_seqs=6,
    )
    assert type(engine.core.model_executor.driver_worker.worker.model_runner).__module__ == (
        "vllm.v1.worker.cpu.model_runner"
    )
    limits = {"pt_path_tokens": budget.path_tokens, "pt_max_depth": budget.max_depth}
    params = [
        SamplingParams(
            max_tokens=max_tokens,
            temperature=0,
            extra_args=limits,
            **penalties,
            # Too small to change the oracle's answer, but not if padding counted as written.
            min_tokens=len(answer.visible) - 1 - len(grammar.join_start)
            if answer.finish == "stop"
            else 0,
        )
        for _, answer in chosen
    ]
    plain = SamplingParams(max_tokens=12, temperature=0, extra_args={"parallel_think": "off"})
    asked = [prompt for prompt, _ in chosen]
    alone = engine.generate(asked[:1], plain)

    def serve() -> None:
        outputs = engine.generate([*asked, asked[0]], [*params, plain])
        for output, (_, answer) in zip(outputs, chosen, strict=False):
            request_id = next(i for i in engine.snapshots if i.startswith(f"{output.request_id}-"))
            assert_equal(output, answer, engine.snapshots[request_id])
        assert outputs[-1].outputs[0].token_ids == alone[0].outputs[0].token_ids
        engine.assert_all_blocks_free()

    serve()
    preempter = Preempter(engine.scheduler, every=3)
    serve()
    assert preempter.num_branches >= 3, "preemption hardly met a branch"
    engine.close()
    print(f"{case}: equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
