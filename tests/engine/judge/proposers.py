"""Drafts of EAGLE heads and of n-grams: a judge reads the target's own hidden states on them.

A tiny random EAGLE head, and words that occurred before, agree with the target by chance only;
which drafts are kept is what is tested, in and out of branches, not how many.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spec_decode.judge_head import load_head
from spec_decode.rules import Judge
from tests.engine.judge.branches import assert_same
from tests.support.oracle import Budget, Oracle, prompts
from tests.support.speculation import NUM_DRAFTS, make_head, params
from tests.support.tiny import IdGrammar, make_model

MAX_TOKENS = 60
PATH_TOKENS = 16


def make_eagle(target: Path, folder: Path) -> Path:
    """Write an EAGLE head of one random layer, in the form of the authors' checkpoints."""
    from safetensors.torch import load_file, save_file

    weights = load_file(target / "model.safetensors")
    layer = {n.removeprefix("model."): w for n, w in weights.items() if ".layers.0." in n}
    del layer["layers.0.input_layernorm.weight"]
    size = layer["layers.0.self_attn.o_proj.weight"].shape[0]
    generator = torch.Generator().manual_seed(2)
    layer["fc.weight"] = torch.randn(size, 2 * size, generator=generator) * 0.2
    folder.mkdir()
    config = json.loads((target / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: weight.contiguous() for name, weight in layer.items()},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    return folder


def check_eagle(folder: Path) -> None:
    """Serve plain requests and groups with an EAGLE head."""
    target = make_model(folder / "target")
    model = str(make_eagle(target, folder / "eagle"))
    check(folder, target, {"method": "eagle", "model": model})


def check_ngram(folder: Path) -> None:
    """Serve plain requests and groups with drafts looked up in their own text."""
    lookup = {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    check(folder, make_model(folder / "target"), lookup)


def check(folder: Path, target: Path, proposer: dict[str, Any]) -> None:
    """Serve plain requests and groups, standard and lossy."""
    from transformers import AutoModelForCausalLM

    from tests.support.engine import Engine

    model = AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    weights = make_head(folder, "random")
    judge = Judge(load_head(weights))
    grammar = IdGrammar(num_paths=3, triggers=tuple(range(10, 20)), path_after=(11,))
    engine = Engine(
        str(target),
        options={
            "profile": grammar.write(folder),
            "judge": {"rule": "judge", "weights": str(weights)},
        },
        speculative_config={**proposer, "num_speculative_tokens": NUM_DRAFTS},
        max_num_seqs=8,
        max_num_batched_tokens=64,
    )
    worker = engine.core.model_executor.driver_worker.worker
    print("runner:", type(worker.model_runner).__module__)
    verifier = worker._verifier
    asked = prompts(6, seed=7)

    def serve(rule: Judge, **extra: Any) -> list[Any]:
        verifier.rule = rule
        verifier._counts.zero_()
        engine.snapshots.clear()
        outputs = engine.generate(asked, params(MAX_TOKENS, extra_args=extra))
        engine.assert_all_blocks_free()
        assert verifier.counts.drafts > 0
        return outputs

    never = replace(judge, threshold=1.0)
    for output in serve(never, parallel_think="off"):
        expected = greedy(model, output.prompt_token_ids)
        assert list(output.outputs[0].token_ids) == expected
    num_lossy = sum(
        check_scores(model, judge, output) for output in serve(judge, parallel_think="off")
    )
    # Drafts behind the last token of a text are kept and cut off.
    assert 0 < num_lossy <= verifier.counts.lossy
    budget = Budget(max_tokens=MAX_TOKENS, path_tokens=PATH_TOKENS)
    num_forks = 0
    for output in serve(never, pt_path_tokens=PATH_TOKENS):
        answer = Oracle(model, grammar, budget).answer(output.prompt_token_ids)
        num_forks += answer.num_forks
        if answer.num_forks:
            snapshot = engine.snapshot(output)
            layers = replace(
                snapshot,
                keys=[keys[:2] for keys in snapshot.keys],
                values=[values[:2] for values in snapshot.values],
            )
            assert_same(output, answer, layers)
        else:
            assert list(output.outputs[0].token_ids) == answer.visible
    assert num_forks
    engine.close()


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """Return what the target writes alone."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        text = model.generate(ids, max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0)
    return text[0, len(prompt) :].tolist()


def check_scores(model: Any, judge: Judge, output: Any) -> int:
    """Check that every token the target would not have written was right to the judge."""
    prompt, written = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
    with torch.inference_mode():
        hidden = model.model(torch.tensor([[*prompt, *written]])).last_hidden_state[0]
        chosen = model.lm_head(hidden).argmax(dim=-1)[len(prompt) - 1 : -1].tolist()
    scores = judge.head.score(hidden[len(prompt) :])
    lossy = [i for i, token in enumerate(written) if token != chosen[i]]
    for i in lossy:
        assert scores[i] > judge.threshold - 1e-3, (i, float(scores[i]))
    return len(lossy)
