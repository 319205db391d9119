"""One engine with a judge, asked for everything; run as a script, for one of the runners.

``python -m tests.engine.judge.runner_script v1|v2 WHAT FOLDER`` says what holds.
Model Runner V2 runs in Triton's interpreter, which has to be turned on before anything imports
Triton.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spec_decode.judge_head import JudgeHead, load_head
from spec_decode.reference_decoding import DecodingTrace, speculate
from spec_decode.rules import KL, FLy, Judge, Rule, TopNDelta, Typical
from tests.support.oracle import prompts
from tests.support.speculation import EOS, NUM_DRAFTS, make_head, make_models, params, speculation

PROMPTS = prompts(4, seed=7)
MAX_TOKENS = 40


def always() -> Judge:
    """A judge that finds everything right."""
    return Judge(JudgeHead(torch.zeros(64), torch.tensor(100.0), "target"))


class Plain:
    """An engine without branches, beside the same models in transformers."""

    def __init__(self, runner: str, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        from tests.support.engine import Engine

        self.runner = runner
        target, draft = make_models(folder)
        self.models = [
            AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            for path in (target, draft)
        ]
        weights = make_head(folder, "random")
        self.judge = Judge(load_head(weights))
        self.engine = Engine(
            str(target),
            options={"profile": "off", "judge": {"rule": "judge", "weights": str(weights)}},
            # Triton's interpreter cannot run V2's kernel that keeps the draft's probabilities.
            speculative_config=speculation(
                draft, draft_sample_method="greedy" if runner == "v2" else "probabilistic"
            ),
            max_num_seqs=8,
            max_model_len=512,
        )
        worker = self.engine.core.model_executor.driver_worker.worker
        self.verifier = worker._verifier
        self.sampler = worker.model_runner.rejection_sampler

    def serve(self, rule: Rule | None, sampling: Any) -> list[Any]:
        """Answer the prompts under a rule; ``None`` puts vLLM's own sampler back."""
        ours = type(self.sampler)
        if rule is None:
            self.sampler.__class__ = ours.__mro__[1]
        else:
            self.verifier.rule = rule
        self.verifier._counts.zero_()
        # Model Runner V1 samples drafts without regard to a request's seed.
        torch.manual_seed(0)
        try:
            return self.engine.generate(PROMPTS, sampling)
        finally:
            self.sampler.__class__ = ours

    def expect(self, prompt: list[int], rule: Rule | None, **more: Any) -> DecodingTrace:
        """Return what transformers makes of it."""
        target, draft = self.models
        values: dict[str, Any] = {"max_tokens": MAX_TOKENS, "stop_ids": [EOS], **more}
        protected = self.verifier._protected[0]
        return speculate(
            target, draft, prompt, rule=rule, num_drafts=NUM_DRAFTS, protected=protected, **values
        )


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def check_standard(plain: Plain) -> None:
    """A rule that accepts nothing is vLLM's own verification, greedy and sampled."""
    never = replace(plain.judge, threshold=1.0)
    sampled = params(MAX_TOKENS, temperature=0.8, seed=3)
    for sampling in (params(MAX_TOKENS), sampled):
        assert tokens(plain.serve(never, sampling)) == tokens(plain.serve(None, sampling))
    expected = [plain.expect(prompt, None).tokens for prompt in PROMPTS]
    assert tokens(plain.serve(never, params(MAX_TOKENS))) == expected
    counts = plain.verifier.counts
    assert counts.lossy == 0 < counts.kept < counts.drafts


def check_rules(plain: Plain) -> None:
    """Every rule writes what it writes in transformers, and counts the same."""
    rules: list[Rule] = [plain.judge, TopNDelta(3, 0.5), Typical(), FLy(0.1, 1), KL(0.5), always()]
    standard = [plain.expect(prompt, None).tokens for prompt in PROMPTS]
    for rule in rules:
        # Model Runner V1 keeps no draft probabilities of a greedy batch.
        inert = isinstance(rule, KL)
        expected = [plain.expect(prompt, None if inert else rule) for prompt in PROMPTS]
        assert tokens(plain.serve(rule, params(MAX_TOKENS))) == [t.tokens for t in expected], rule
        counts = plain.verifier.counts
        assert (counts.lossy > 0) != inert, rule
        assert ([t.tokens for t in expected] != standard) != inert, rule


def check_logprobs(plain: Plain) -> None:
    """Log probabilities are the target's, also of tokens it would not have written."""
    target = plain.models[0]
    for sampling in (params(MAX_TOKENS, logprobs=0), params(MAX_TOKENS, logprobs=0, temperature=1)):
        for prompt, output in zip(PROMPTS, plain.serve(always(), sampling), strict=True):
            written = list(output.outputs[0].token_ids)
            with torch.inference_mode():
                logits = target(torch.tensor([[*prompt, *written]])).logits[0]
            logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            for i, (token, given) in enumerate(
                zip(written, output.outputs[0].logprobs, strict=True)
            ):
                assert abs(given[token].logprob - float(logp[i, token])) < 1e-3
        assert plain.verifier.counts.lossy


def check_requests(plain: Plain) -> None:
    """In one batch, a request switches the judge off or raises its threshold."""
    wishes: list[dict[str, Any] | None] = [
        None,
        {"pt_judge": False},
        {"pt_judge_threshold": 0.9},
        {"pt_judge_threshold": 0.5},
    ]
    rules = [plain.judge, None, replace(plain.judge, threshold=0.9), plain.judge]
    sampling = [params(MAX_TOKENS, extra_args=wish) for wish in wishes]
    expected = [plain.expect(p, r).tokens for p, r in zip(PROMPTS, rules, strict=True)]
    assert tokens(plain.serve(plain.judge, sampling)) == expected


def check_protected(plain: Plain) -> None:
    """Ends are the target's own, and a forbidden token stays forbidden."""
    free = [token for text in tokens(plain.serve(always(), params(MAX_TOKENS))) for token in text]
    stop = max(set(free), key=free.count)
    sampling = params(MAX_TOKENS, stop_token_ids=[stop])
    expected = [plain.expect(p, always(), stop_ids=[EOS, stop]).tokens for p in PROMPTS]
    assert tokens(plain.serve(always(), sampling)) == expected
    allowed = [*range(40, 200)]
    for sampling in (
        params(MAX_TOKENS, allowed_token_ids=allowed),
        params(MAX_TOKENS, allowed_token_ids=allowed, temperature=0.8, seed=1),
    ):
        written = tokens(plain.serve(always(), sampling))
        assert {token for text in written for token in text} <= set(allowed)
        assert plain.verifier.counts.lossy


def check_sampled(plain: Plain) -> None:
    """Whatever temperature, top-k and top-p: what the rule accepts is accepted."""
    # Triton's interpreter cannot run V2's top-k kernel.
    cut: dict[str, Any] = {} if plain.runner == "v2" else {"top_k": 5, "top_p": 0.5}
    for more in ({}, cut):
        plain.serve(always(), params(MAX_TOKENS, temperature=0.8, seed=3, **more))
        counts = plain.verifier.counts
        # Special tokens, and what stands behind them, are not kept.
        assert counts.kept >= 0.8 * counts.drafts, (more, counts)
        assert counts.lossy


def check_kl_sampled(plain: Plain) -> None:
    """Sampled drafts have probabilities, and the wider the rule's gate, the more it keeps."""
    sampling = params(MAX_TOKENS, temperature=0.8, seed=3)
    standard = tokens(plain.serve(None, sampling))
    assert tokens(plain.serve(KL(1e-9), sampling)) == standard
    shares = []
    for tau in (1e-9, 0.8, 1e9):
        plain.serve(KL(tau, max_top=1.0), sampling)
        counts = plain.verifier.counts
        assert (counts.lossy > 0) == (tau > 1e-9), (tau, counts)
        shares.append(counts.kept / counts.drafts)
    assert shares == sorted(set(shares)), shares
    # Special tokens, and what stands behind them, are not kept.
    assert shares[-1] >= 0.8, shares


def check_distribution(plain: Plain) -> None:
    """A chi-square test of the sampled first token, standard and with a rule for even tokens."""
    from tests.engine.judge.sampling import chi_square

    for rule in (replace(plain.judge, threshold=1.0), EvenTokens()):
        for with_draft_logits in (False, True):
            value = chi_square(plain, rule, with_draft_logits)
            # 7 degrees of freedom, 99.9 %.
            assert value < 24.3, (rule, with_draft_logits, value)


class EvenTokens:
    """Accepts tokens by their number."""

    needs_hidden = False
    needs_draft_logits = False

    def __call__(self, rows: Any) -> torch.Tensor:
        return rows.draft_ids % 2 == 0


CHECKS: list[Callable[[Plain], None]] = [
    check_standard,
    check_rules,
    check_logprobs,
    check_requests,
    check_protected,
    check_sampled,
    check_kl_sampled,
    check_distribution,
]

NOT_ON_V2 = {
    check_kl_sampled: "Triton's interpreter cannot run the kernel that keeps draft probabilities",
    check_distribution: "a launch a draw takes minutes in Triton's interpreter",
}


def main(runner: str, what: str, folder: str) -> None:
    """Run all checks on a runner."""
    if runner == "v2":
        from tests.support.runners import pretend_triton_runs_on_cpus

        pretend_triton_runs_on_cpus()
    if what == "plain":
        plain = Plain(runner, Path(folder))
        for check in CHECKS:
            if runner == "v2" and check in NOT_ON_V2:
                print(f"{check.__name__} is not run on V2: {NOT_ON_V2[check]}")
                continue
            check(plain)
            print(check.__name__, "holds", flush=True)
        plain.engine.close()
    elif what == "branches":
        from tests.engine.judge.branches import check_branches

        check_branches(Path(folder), runner)
        print("branches hold", flush=True)
    elif what == "eagle":
        from tests.engine.judge.proposers import check_eagle

        check_eagle(Path(folder))
        print("eagle holds", flush=True)
    elif what == "ngram":
        from tests.engine.judge.proposers import check_ngram

        check_ngram(Path(folder))
        print("ngram holds", flush=True)
    elif what == "parallel":
        from tests.engine.judge.parallel import check_tensor_parallel

        check_tensor_parallel(Path(folder))
        print("two workers hold", flush=True)
    else:
        from tests.engine.judge.branches import check_siblings

        check_siblings(Path(folder))
        print("siblings hold", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
