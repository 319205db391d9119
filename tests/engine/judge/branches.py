"""Speculative decoding inside branches: tokens, K/V of target and draft, and lossy rules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spec_decode.judge_head import load_head
from spec_decode.rules import Judge
from tests.support.oracle import Budget, DenseGraph, Oracle, assert_equal, prompts
from tests.support.speculation import make_head, make_models, params, speculation
from tests.support.tiny import IdGrammar

PATH_TOKENS = 16
MAX_TOKENS = 70
KV_TOLERANCE = 2e-4


def check_branches(folder: Path, runner: str) -> None:
    """Serve groups with a judge that accepts nothing, then with one that accepts much."""
    from transformers import AutoModelForCausalLM

    from tests.support.engine import Engine

    target, draft = make_models(folder, noise=0.005)
    models = [
        AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for path in (target, draft)
    ]
    grammar = IdGrammar(num_paths=3, triggers=tuple(range(10, 20)), path_after=(11,))
    weights = make_head(folder, "random", bias=1.0)
    judge = Judge(load_head(weights))
    engine = Engine(
        str(target),
        options={
            "profile": grammar.write(folder),
            "judge": {"rule": "judge", "weights": str(weights)},
        },
        speculative_config=speculation(draft),
        block_size=16 if runner == "v2" else 32,
        max_num_seqs=8,
        max_num_batched_tokens=64,
    )
    verifier = engine.core.model_executor.driver_worker.worker._verifier
    asked = prompts(3 if runner == "v2" else 8, seed=7)
    sampling = params(MAX_TOKENS, extra_args={"pt_path_tokens": PATH_TOKENS})

    def serve(rule: Judge) -> list[Any]:
        verifier.rule = rule
        verifier._counts.zero_()
        engine.snapshots.clear()
        outputs = engine.generate(asked, sampling)
        engine.assert_all_blocks_free()
        return outputs

    budget = Budget(max_tokens=MAX_TOKENS, path_tokens=PATH_TOKENS)
    answers = [Oracle(models[0], grammar, budget).answer(prompt) for prompt in asked]
    assert sum(answer.num_forks for answer in answers) >= 2

    def check_standard() -> None:
        for output, answer in zip(serve(replace(judge, threshold=1.0)), answers, strict=True):
            if answer.num_forks:
                snapshot = engine.snapshot(output)
                assert_kv(models[1], snapshot.nodes, _layers(snapshot, 1, runner))
                assert_same(output, answer, _layers(snapshot, 0, runner))
            else:
                assert list(output.outputs[0].token_ids) == answer.visible
        counts = verifier.counts
        assert counts.lossy == 0 and counts.kept > 0.2 * counts.drafts, counts

    check_standard()
    for output in serve(judge):
        if output.kv_transfer_params["parallel_think"]["forks"]:
            snapshot = engine.snapshot(output)
            for which, model in enumerate(models):
                assert_kv(model, snapshot.nodes, _layers(snapshot, which, runner))
    assert verifier.counts.lossy > 0
    engine.preempt_every(5)
    check_standard()
    engine.close()


def check_siblings(folder: Path) -> None:
    """Serve groups whose paths write alike with drafts looked up in siblings' texts."""
    from transformers import AutoModelForCausalLM

    from tests.support.engine import Engine
    from tests.support.tiny import make_model
    from vllm_parallel_think.judge import proposer

    target = make_model(folder / "target")
    model = AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    grammar = IdGrammar(num_paths=3, triggers=tuple(range(10, 20)))
    engine = Engine(
        str(target),
        options={"profile": grammar.write(folder)},
        speculative_config={
            "method": "custom_class",
            "model": f"{proposer.__name__}.SiblingProposer",
            "num_speculative_tokens": 3,
        },
        max_num_seqs=2,
        disable_log_stats=False,
    )
    looked_up = proposer.continuation
    num_from_siblings = 0

    def count(own: Any, others: Any, num: int) -> list[int]:
        nonlocal num_from_siblings
        drafts = looked_up(own, others, num, shortest=1)
        num_from_siblings += bool(drafts) and not looked_up(own, [], num, shortest=1)
        return drafts

    proposer.continuation = count
    asked = prompts(6, seed=7)
    sampling = params(MAX_TOKENS, extra_args={"pt_path_tokens": PATH_TOKENS})
    budget = Budget(max_tokens=MAX_TOKENS, path_tokens=PATH_TOKENS)
    for output in engine.generate(asked, sampling):
        answer = Oracle(model, grammar, budget).answer(output.prompt_token_ids)
        assert list(output.outputs[0].token_ids) == answer.visible
    engine.assert_all_blocks_free()
    assert num_from_siblings > 0
    accepted = {m.name: m.value for m in engine.llm.get_metrics() if hasattr(m, "value")}
    assert accepted["vllm:spec_decode_num_accepted_tokens"] > 0
    engine.close()


def assert_same(output: Any, answer: Any, snapshot: Any) -> None:
    """Compare with the oracle; a sibling that speculates may have forked behind the cut."""
    num_forks = output.kv_transfer_params["parallel_think"]["forks"]
    assert num_forks >= answer.num_forks
    assert_equal(output, replace(answer, num_forks=num_forks), snapshot)


def _layers(snapshot: Any, which: int, runner: str) -> Any:
    """Return the K/V of the target (0) or the draft (1): two layers each, in turn or in a row."""
    chosen = slice(which, None, 2) if runner == "v1" else slice(2 * which, 2 * which + 2)
    return replace(
        snapshot,
        keys=[keys[chosen] for keys in snapshot.keys],
        values=[values[chosen] for values in snapshot.values],
    )


def assert_kv(model: Any, nodes: list[Any], snapshot: Any) -> None:
    """Compare held K/V with a dense forward over the very tokens that were written."""
    graph, behind = DenseGraph(model), {}
    for node in nodes[: len(snapshot.keys)]:
        context = [index for seen in node.prefix for index in behind[seen]]
        own: list[int] = []
        for offset, token in enumerate(node.tokens):
            own.append(graph.add(token, node.start + offset, [*context, *own]))
        behind[node] = own
    cache = graph.forward().past_key_values
    for kind, ours in (("keys", snapshot.keys), ("values", snapshot.values)):
        dense = torch.stack([getattr(layer, kind)[0].transpose(0, 1) for layer in cache.layers])
        error = (torch.cat(ours, dim=1) - dense).abs().max().item()
        assert error < KV_TOLERANCE, f"{kind} differ by {error}"
