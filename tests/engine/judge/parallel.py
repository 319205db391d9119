"""Two tensor-parallel workers verify as one does, and as transformers does.

Hidden states behind the final norm are whole on every rank, and so are the logits that the sampler
gets: all ranks come to the same verdict without a word to each other. The tiny model has two KV
heads, one for each worker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spec_decode.judge_head import load_head
from spec_decode.reference_decoding import speculate
from spec_decode.rules import Judge
from tests.support.oracle import Budget, Oracle, prompts
from tests.support.speculation import EOS, NUM_DRAFTS, make_head, make_models, params, speculation
from tests.support.tiny import IdGrammar

MAX_TOKENS = 40
PATH_TOKENS = 16


def check_tensor_parallel(folder: Path) -> None:
    """Serve plain requests under the judge, then groups whose text is the target's own."""
    from transformers import AutoModelForCausalLM
    from vllm import LLM

    from vllm_parallel_think.plugin import register

    register()
    target, draft = make_models(folder)
    models = [
        AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for path in (target, draft)
    ]
    weights = make_head(folder, "random")
    judge = Judge(load_head(weights))
    grammar = IdGrammar(num_paths=3, triggers=tuple(range(10, 20)), path_after=(11,))
    options: dict[str, Any] = {"profile": grammar.write(folder)}
    options["judge"] = {"rule": "judge", "weights": str(weights)}
    llm = LLM(
        str(target),
        additional_config={"parallel_think": options},
        tensor_parallel_size=2,
        speculative_config=speculation(draft),
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=8,
    )
    asked = prompts(4, seed=7)

    def serve(max_tokens: int, **extra: Any) -> list[Any]:
        given = [{"prompt_token_ids": prompt} for prompt in asked]
        return llm.generate(given, params(max_tokens, extra_args=extra), use_tqdm=False)

    num_changed = 0
    for output in serve(MAX_TOKENS, parallel_think="off"):
        expected, standard = (
            speculate(
                *models, output.prompt_token_ids, rule=rule, num_drafts=NUM_DRAFTS,
                max_tokens=MAX_TOKENS, stop_ids=[EOS], protected=special_tokens(target),
            ).tokens
            for rule in (judge, None)
        )  # fmt: skip
        assert list(output.outputs[0].token_ids) == expected
        num_changed += expected != standard
    assert num_changed, "the judge accepted nothing that the target would not have written"
    budget = Budget(max_tokens=2 * MAX_TOKENS, path_tokens=PATH_TOKENS)
    num_forks = 0
    for output in serve(2 * MAX_TOKENS, pt_path_tokens=PATH_TOKENS, pt_judge=False):
        answer = Oracle(models[0], grammar, budget).answer(output.prompt_token_ids)
        assert list(output.outputs[0].token_ids) == answer.visible
        num_forks += answer.num_forks
    assert num_forks
    llm.llm_engine.engine_core.shutdown()


def special_tokens(model: Path) -> torch.Tensor:
    """Return [V] bool, what no rule accepts without a grammar."""
    from transformers import AutoTokenizer

    mask = torch.zeros(256, dtype=torch.bool)
    mask[AutoTokenizer.from_pretrained(model).all_special_ids] = True
    return mask
