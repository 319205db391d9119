"""Reference provider: plain torch, one row at a time, fp32."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attention_kernels.provider import Problem

# Bounds the score matrix of a long prefill.
TOKENS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class _Keys:
    """The keys of one row, in order; holes are left out."""

    key: torch.Tensor  # [N, Hkv, D] fp32
    value: torch.Tensor  # [N, Hkv, D] fp32
    entry: torch.Tensor  # [N] index of the entry a key lies in
    slot: torch.Tensor  # [N] its place, from the entry's first valid slot


def attend(problem: Problem) -> None:
    """Provider entry point. Reads the plan on the host: not for graphs."""
    plan = problem.plan
    mask = [True] * plan.num_rows if plan.row_mask is None else plan.row_mask.tolist()
    starts, lengths = plan.query_start.tolist(), plan.query_len.tolist()
    for row, (live, start, length) in enumerate(zip(mask, starts, lengths, strict=True)):
        if not live or length == 0:
            continue
        keys = _gather(problem, row)
        for begin in range(0, length, TOKENS_AT_ONCE):
            end = min(begin + TOKENS_AT_ONCE, length)
            _attend_tokens(problem, row, keys, start, torch.arange(begin, end, device=plan.device))


def _gather(problem: Problem, row: int) -> _Keys:
    plan = problem.plan
    num_entries = int(plan.num_entries[row])
    first = plan.first[row, :num_entries, None]
    slots = torch.arange(plan.block_size, device=plan.device)
    valid = (slots >= first) & (slots < first + plan.count[row, :num_entries, None])
    entry, slot = valid.nonzero(as_tuple=True)
    block = plan.blocks[row, entry].long()
    key, value = problem.key_cache[block, slot].float(), problem.value_cache[block, slot].float()
    if problem.scales is not None:
        key *= problem.scales.key[:, None]
        value *= problem.scales.value[:, None]
    return _Keys(
        key=key,
        value=value,
        entry=entry,
        slot=slot - plan.first[row, entry],
    )


def _attend_tokens(
    problem: Problem, row: int, keys: _Keys, start: int, tokens: torch.Tensor
) -> None:
    """tokens [n]: indices within the row, whose first token is `start` of the query."""
    at = slice(start + int(tokens[0]), start + int(tokens[-1]) + 1)
    sees = _visibility(problem, row, keys, tokens)
    scores = _scores(problem, row, keys, problem.query[at].float(), tokens)
    scores = scores.masked_fill(~sees, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    weights = torch.exp(scores - lse[..., None]).masked_fill(~sees, 0.0)
    value = keys.value.masked_fill(~sees.any(dim=0)[:, None, None], 0.0)
    out = torch.einsum("hgtn,nhd->thgd", weights, value)
    problem.out[at] = out.flatten(1, 2).to(problem.out.dtype)
    problem.lse[at] = lse.flatten(0, 1).T


def _visibility(problem: Problem, row: int, keys: _Keys, tokens: torch.Tensor) -> torch.Tensor:
    """[n, N] bool: which keys each token sees."""
    plan = problem.plan
    sees = plan.bound[row, keys.entry] + keys.slot <= tokens[:, None]
    if plan.visible is not None:
        limit = plan.visible.values[plan.visible.index[row, keys.entry].long()].T[tokens]
        sees = sees & (plan.visible.offset[row, keys.entry] + keys.slot < limit)
    return sees


def _scores(
    problem: Problem, row: int, keys: _Keys, query: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """[Hkv, Hq / Hkv, n, N] scaled scores; each key meets the query turned for its segment."""
    num_kv_heads = keys.key.shape[1]

    def against(turned: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        grouped = turned.view(turned.shape[0], num_kv_heads, -1, turned.shape[2])
        return torch.einsum("thgd,nhd->hgtn", grouped, key) * problem.scale

    shifts, rotation = problem.plan.shifts, problem.rotation
    if shifts is None or rotation is None:
        return against(query, keys.key)
    vectors = shifts.index[row, keys.entry].long()
    group = query.shape[1] // num_kv_heads
    scores = query.new_empty(num_kv_heads, group, len(tokens), len(vectors))
    for vector in sorted(set(vectors.tolist())):
        cos, sin = (table[vector, tokens, None] for table in (rotation.cos, rotation.sin))
        here = (vectors == vector).nonzero().squeeze(1)
        turned = rotation.rotary.rotate(query, cos, sin)
        scores[..., here] = against(turned, keys.key[here])
    return scores
