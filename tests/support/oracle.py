"""A dense oracle: forks and joins as a mask over one sequence, without blocks or schedules.

It generates its own tokens with transformers in float32: every token keeps an explicit list of the
tokens it sees and a RoPE position, and nothing of the plugin is imported.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.support.tiny import EOS, FIRST_NUMBER, VOCAB_SIZE, IdGrammar

KV_TOLERANCE = 2e-4
"""Of keys and values of the tiny model, float32 sums in another order."""


@dataclass(frozen=True)
class Penalty:
    """OpenAI's presence and frequency penalties, on what stands behind the prompt."""

    num_prompt: int
    presence: float
    frequency: float


class DenseGraph:
    """Tokens with positions and explicit visibility, computed by one masked forward."""

    def __init__(self, model: Any, vectors: torch.Tensor | None = None) -> None:
        self.model = model
        self.vectors = vectors
        self.thought = 0
        self.thoughts: list[int] = []
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.sees: list[list[int]] = []

    def add(self, token: int, position: int, context: list[int]) -> int:
        """Append a token that sees ``context`` and itself; return its index."""
        index = len(self.tokens)
        self.tokens.append(token)
        self.positions.append(position)
        self.sees.append([*context, index])
        self.thoughts.append(self.thought)
        return index

    def truncate(self, size: int) -> None:
        """Forget all tokens from an index on."""
        del self.tokens[size:], self.positions[size:], self.sees[size:], self.thoughts[size:]

    @torch.inference_mode()
    def forward(self) -> Any:
        """Run the model over all tokens."""
        num = len(self.tokens)
        mask = torch.full((num, num), torch.finfo(torch.float32).min)
        for row, seen in enumerate(self.sees):
            mask[row, seen] = 0.0
        hooks = [] if self.vectors is None else self._add_thoughts(self.vectors)
        try:
            return self.model(
                torch.tensor([self.tokens]),
                attention_mask=mask[None, None],
                position_ids=torch.tensor([self.positions]),
                use_cache=True,
            )
        finally:
            for hook in hooks:
                hook.remove()

    def _add_thoughts(self, vectors: torch.Tensor) -> list[Any]:
        """Add thought embeddings to what the projections of keys and values return."""
        table = torch.cat([torch.zeros_like(vectors[:1]), vectors])[self.thoughts]
        return [
            projection.register_forward_hook(lambda _m, _i, output, n=number: output + table[:, n])
            for number, layer in enumerate(self.model.model.layers)
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        ]

    def next_token(self, context: list[int], penalty: Penalty, may_end: bool = True) -> int:
        """Return the most likely token behind the last one of a context.

        Args:
            context: Tokens that are seen, the last one included.
            penalty: Penalties on what was written.
            may_end: Whether the end of the text may be written.

        """
        logits = self.forward().logits[0, context[-1]]
        if penalty.presence or penalty.frequency:
            written = torch.tensor(
                [self.tokens[i] for i in context[penalty.num_prompt :]], dtype=torch.int64
            )
            counts = torch.bincount(written, minlength=len(logits))
            logits = logits - penalty.presence * (counts > 0) - penalty.frequency * counts
        if not may_end:
            logits = logits.clone()
            logits[EOS] = -torch.inf
        return int(logits.argmax())


@dataclass
class Answer:
    """What the oracle wrote: the visible tokens, and the graph they came from."""

    graph: Any
    prompt_len: int
    visible: list[int] = field(default_factory=list)
    num_forks: int = 0
    finish: str = ""


@dataclass(frozen=True)
class Budget:
    """Limits of a request that the oracle reproduces."""

    max_tokens: int
    max_depth: int = 2
    termination: float = 1.0
    summary_tokens: int | None = None
    path_tokens: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    ignore_eos: bool = False


class _Full(Exception):
    """The client's budget is used up."""


class Oracle:
    """Writes an answer in the id grammar, depth first, in visible order.

    Takes a transformers model, or a class of graphs with the interface of :class:`DenseGraph`.
    """

    def __init__(
        self, model: Any, grammar: IdGrammar, budget: Budget, vectors: torch.Tensor | None = None
    ) -> None:
        self._make_graph: Callable[[], Any] = (
            model if isinstance(model, type) else lambda: DenseGraph(model, vectors)
        )
        self._grammar, self._budget = grammar, budget

    def answer(self, prompt: list[int]) -> Answer:
        """Write an answer to a prompt."""
        self._answer = Answer(self._make_graph(), len(prompt))
        budget = self._budget
        self._penalty = Penalty(len(prompt), budget.presence_penalty, budget.frequency_penalty)
        context = self._given([], prompt, 0, visible=False)
        try:
            self._trunk(context, len(prompt))
            self._answer.finish = "stop"
        except _Full:
            self._answer.finish = "length"
        return self._answer

    def _trunk(self, context: list[int], position: int) -> None:
        if not self._grammar.at_start or self._budget.max_depth == 0:
            self._lane(context, position, 0, 0, None)
            return
        context, position, critical = self._block(context, position, 0, 0, None)
        summary = self._budget.summary_tokens
        self._lane(context, position, critical, 0, summary and critical + summary)

    def _show(self, token: int) -> None:
        self._answer.visible.append(token)
        if len(self._answer.visible) == self._budget.max_tokens:
            raise _Full

    def _given(
        self, context: list[int], tokens: Any, position: int, visible: bool = True
    ) -> list[int]:
        for offset, token in enumerate(tokens):
            if visible:
                self._show(token)
            context = [*context, self._answer.graph.add(token, position + offset, context)]
        return context

    def _lane(
        self, context: list[int], position: int, critical: int, depth: int, budget: int | None
    ) -> tuple[list[int], int, int]:
        """Write one lane; return its context, the position behind its end tag, and its length."""
        grammar = self._grammar
        while True:
            enough = len(self._answer.visible) >= self._budget.min_tokens
            token = self._answer.graph.next_token(context, self._penalty, depth > 0 or enough)
            if token == EOS and not self._budget.ignore_eos:
                if depth == 0:
                    self._answer.visible.append(token)
                    return context, position, critical
                return *self._end(context, position, grammar.path_close), critical
            self._show(token)
            context = [*context, self._answer.graph.add(token, position, context)]
            position, critical = position + 1, critical + 1
            used = position - self._answer.prompt_len
            left = self._budget.max_tokens - (len(self._answer.visible) if grammar.stride else used)
            room = left >= grammar.num_paths
            may_fork = token in grammar.triggers and not grammar.at_start
            if may_fork and depth < self._budget.max_depth and room:
                context, position, critical = self._block(
                    context, position, critical, depth, budget
                )
            elif depth and token in grammar.ends:
                return *self._end(context, position, ()), critical
            elif self._ends_answer(token, depth):
                return context, position, critical
            elif budget is not None and critical >= budget:
                if depth == 0:
                    raise _Full
                return *self._end(context, position, grammar.path_close), critical

    def _ends_answer(self, token: int, depth: int) -> bool:
        """Whether a tag ends the answer: in a conclusion of the trunk, once it is long enough."""
        concludes = depth == 0 and self._answer.num_forks > 0 and token in self._grammar.join_end
        enough = len(self._answer.visible) >= self._budget.min_tokens
        return concludes and enough and not self._budget.ignore_eos

    def _end(
        self, context: list[int], position: int, close: tuple[int, ...]
    ) -> tuple[list[int], int]:
        context = self._given(context, close, position)
        position += len(close)
        return self._given(context, self._grammar.path_after, position), position

    def _block(
        self, context: list[int], position: int, critical: int, depth: int, budget: int | None
    ) -> tuple[list[int], int, int]:
        grammar = self._grammar
        self._answer.num_forks += 1
        fork = self._given(context, grammar.fork_after, position)
        joined, longest, slowest, total = list(fork), position, critical, position
        own = None if self._budget.path_tokens is None else critical + self._budget.path_tokens
        if self._budget.termination < 1:
            cut = critical + self._cut_length(fork, position, self._budget.path_tokens)
            own = cut if own is None else min(own, cut)
        limits = [b for b in (own, budget) if b is not None]
        for number in range(grammar.num_paths):
            start = (*grammar.path_start, FIRST_NUMBER + number + 1)
            first = position + number * grammar.stride
            self._think(number)
            lane = self._given(fork, start, first)
            lane, end, length = self._lane(
                lane, first + len(start), critical, depth + 1, min(limits, default=None)
            )
            self._think(None)
            total += end - first
            joined += lane[len(fork) :]
            longest, slowest = max(longest, end), max(slowest, length)
        if grammar.join_mode == "reprefill":
            copies = [self._answer.graph.tokens[i] for i in joined[len(fork) :]]
            joined = self._given(fork, copies, position, visible=False)
            longest = position + len(copies)
        elif grammar.join_position == "total":
            longest = total
        joined = self._given(joined, grammar.join_start, longest)
        return joined, longest + len(grammar.join_start), slowest

    def _think(self, path: int | None) -> None:
        """Say which path's thought the next tokens hold."""
        if self._grammar.num_tags is not None:
            number = 0 if path is None else path % self._grammar.num_tags + 1
            self._answer.graph.thought = number

    def _cut_length(self, fork: list[int], position: int, budget: int | None) -> int:
        """Return the step in which enough paths have ended, if all of them run in lock-step."""
        grammar, graph = self._grammar, self._answer.graph
        most = self._budget.max_tokens if budget is None else budget
        size, lengths = len(graph.tokens), []
        for number in range(grammar.num_paths):
            start = (*grammar.path_start, FIRST_NUMBER + number + 1)
            self._think(number)
            lane, length, token = self._given(fork, start, position, visible=False), 0, None
            while token != EOS and token not in grammar.ends and length < most:
                token = graph.next_token(lane, self._penalty)
                lane = [*lane, graph.add(token, position + len(start) + length, lane)]
                length += 1
            lengths.append(length)
        self._think(None)
        graph.truncate(size)
        needed = max(1, math.ceil(self._budget.termination * grammar.num_paths))
        return sorted(lengths)[needed - 1]


def dense_forward(model: Any, nodes: list[Any]) -> tuple[torch.Tensor, Any]:
    """Run all nodes as one sequence: a token sees its node's prefix, and its own node causally.

    Returns:
        [T, vocab] logits and the K/V cache, in the order of the nodes.

    """
    offsets, tokens, positions = {}, [], []
    for node in nodes:
        offsets[node] = len(tokens)
        positions += range(node.start, node.start + len(node.tokens))
        tokens += node.tokens
    mask = torch.full((len(tokens), len(tokens)), torch.finfo(torch.float32).min)
    for node in nodes:
        own = slice(offsets[node], offsets[node] + len(node.tokens))
        for seen in node.prefix:
            mask[own, offsets[seen] : offsets[seen] + len(seen.tokens)] = 0
        mask[own, own] = torch.triu(mask[own, own], diagonal=1)
    with torch.inference_mode():
        output = model(
            torch.tensor([tokens]),
            attention_mask=mask[None, None],
            position_ids=torch.tensor([positions]),
            use_cache=True,
        )
    return output.logits[0], output.past_key_values


def prompts(num: int, seed: int) -> list[list[int]]:
    """Draw prompts of 3 to 70 words."""
    rng = random.Random(seed)
    return [[rng.randrange(40, VOCAB_SIZE) for _ in range(rng.randint(3, 70))] for _ in range(num)]


def assert_equal(output: Any, answer: Answer, snapshot: Any) -> None:
    """Compare visible tokens, then K/V of everything the group held, layer by layer."""
    completion = output.outputs[0]
    assert list(completion.token_ids) == answer.visible
    assert completion.finish_reason == answer.finish
    if answer.num_forks == 0:
        return
    assert output.kv_transfer_params["parallel_think"]["forks"] == answer.num_forks
    # Either may know more than the client saw: the oracle stops at the cut, siblings run on behind
    # it.
    num = min(len(snapshot.tokens), len(answer.graph.tokens))
    assert num and snapshot.tokens[:num] == answer.graph.tokens[:num]
    cache = answer.graph.forward().past_key_values
    for kind, ours in (("keys", snapshot.keys), ("values", snapshot.values)):
        dense = torch.stack([getattr(layer, kind)[0].transpose(0, 1) for layer in cache.layers])
        error = (torch.cat(ours, dim=1)[:, :num] - dense[:, :num]).abs().max().item()
        assert error < KV_TOLERANCE, f"{kind} differ by {error}"
