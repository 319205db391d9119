"""The distribution of sampled verification on a vocabulary of eight tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

VOCAB_SIZE = 8
DRAWS = 40_000


def chi_square(plain: Any, rule: Any, with_draft_logits: bool) -> float:
    """Verify one draft token a request many times; compare the first token with the formula."""
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    g = torch.Generator().manual_seed(11)
    p, q = (torch.randn(VOCAB_SIZE, generator=g).softmax(0) for _ in range(2))
    if with_draft_logits:
        drafts = torch.multinomial(q, DRAWS, replacement=True, generator=g)
    else:
        q = torch.zeros(VOCAB_SIZE)
        q[torch.randint(VOCAB_SIZE // 2, (1,), generator=g) * 2 + 1] = 1
        drafts = q.argmax().expand(DRAWS)
    sampler, verifier = plain.sampler, plain.verifier
    kept = verifier.rule, verifier._protected, sampler.runner
    ids = [f"draw-{i}" for i in range(DRAWS)]
    verifier.requests._requests.update(dict.fromkeys(ids, verifier.requests._read(_params())))
    verifier.rule, verifier._protected = rule, torch.zeros(1, VOCAB_SIZE, dtype=torch.bool)
    verifier.hidden = torch.zeros(2 * DRAWS, 64)
    sampler.runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=ids))
    try:
        output = sampler(
            SpecDecodeMetadata.make_dummy([[int(x)] for x in drafts], torch.device("cpu")),
            q.expand(DRAWS, VOCAB_SIZE).contiguous() if with_draft_logits else None,
            p.log().repeat(2 * DRAWS, 1),
            _sampling_metadata(),
        )
    finally:
        verifier.rule, verifier._protected, sampler.runner = kept
        verifier.hidden = None
    seen = torch.bincount(output.sampled_token_ids[:, 0].long(), minlength=VOCAB_SIZE)
    lossy = torch.arange(VOCAB_SIZE) % 2 == 0 if not hasattr(rule, "head") else torch.tensor(False)
    expected = DRAWS * _expected(p, q, lossy)
    return float((((seen - expected) ** 2) / expected.clamp(min=1e-9)).sum())


def _expected(p: torch.Tensor, q: torch.Tensor, lossy: torch.Tensor) -> torch.Tensor:
    """Accept lossily, or with min(1, p/q), or draw from what p has more than q."""
    accepted = torch.where(lossy & (q > 0), q, torch.minimum(p, q))
    residual = (p - q).clamp(min=0)
    return accepted + (1 - accepted.sum()) * residual / residual.sum()


def _params() -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=1)


def _sampling_metadata() -> Any:
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    empty = torch.empty(0)
    return SamplingMetadata(
        temperature=torch.ones(DRAWS),
        all_greedy=False,
        all_random=True,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=empty,
        presence_penalties=empty,
        repetition_penalties=empty,
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
