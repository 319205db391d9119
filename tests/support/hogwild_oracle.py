"""A dense oracle for workers that see each other write: no blocks, no shifts, no schedules.

It keeps every token's key before rotation. In every step it lays out what each worker sees as one
sequence, rotates all keys to their places in it, and attends as any transformer does. It writes its
own tokens with a transformers model in float32; nothing of the plugin is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

EOS = 2


@dataclass(frozen=True)
class Plan:
    """What a recipe and a request say, in tokens."""

    num_workers: int
    layout: str
    worker_tokens: int
    ends: frozenset[int] = frozenset()
    max_step_tokens: int | None = None
    others: tuple[int, ...] = ()
    own: tuple[int, ...] = ()
    steps: Any = None
    """Function of worker and number of the step (from 1): the tokens it starts with."""
    check_every: int = 0
    question: tuple[int, ...] = ()
    found: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    answer_tokens: int = 8
    close: tuple[int, ...] = ()
    marks: frozenset[int] = frozenset()
    """A step with one of these tokens holds the answer."""
    max_tokens: int = 1024
    min_tokens: int = 0
    ignore_eos: bool = False


@dataclass
class Written:
    """What the oracle wrote.

    Attributes:
        visible: Tokens of the answer, as the client sees them.
        history: Ids of the prompt's tokens, then of every finished step's.
        log_probs: Log-probability of every sampled token of the answer, in order.
        checks: How often the question was put.
        by: How the workers ended: ``budget`` or ``found``.
        gap: Least difference between the two best logits of a sampled token.

    """

    visible: list[int] = field(default_factory=list)
    history: list[list[int]] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    checks: int = 0
    by: str = "budget"
    gap: float = float("inf")


@dataclass
class _Row:
    view: list[int]
    tokens: list[int]
    ids: list[int]


class Dense:
    """A decoder of Llama's or Qwen3's family, token by token, with keys kept before rotation."""

    def __init__(self, model: Any) -> None:
        self.model, config = model, model.config
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        heads = config.hidden_size // config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or heads
        self.inv_freq = model.model.rotary_emb.inv_freq.double()
        self.scaling = float(getattr(model.model.rotary_emb, "attention_scaling", 1.0))
        self.keys: list[list[Any]] = []
        self.values: list[list[Any]] = []

    def rotate(self, x: torch.Tensor, positions: Any) -> torch.Tensor:
        """Rotate [n, heads, D] to positions, as the model does (halves of the head pair up)."""
        angle = torch.as_tensor(positions).double()[:, None] * self.inv_freq
        cos = (angle.cos() * self.scaling).float()[:, None]
        sin = (angle.sin() * self.scaling).float()[:, None]
        size = 2 * self.inv_freq.shape[0]
        turning, rest = x[..., :size], x[..., size:]
        left, right = turning.chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], -1)

    @torch.inference_mode()
    def step(self, rows: Sequence[_Row]) -> torch.Tensor:
        """Compute all rows at once; return the logits behind each row's last token."""
        layers = self.model.model.layers
        tokens = [token for row in rows for token in row.tokens]
        ids = [i for row in rows for i in row.ids]
        assert ids == list(range(len(self.keys), len(self.keys) + len(ids)))
        self.keys += [[None] * len(layers) for _ in ids]
        self.values += [[None] * len(layers) for _ in ids]
        x = self.model.model.embed_tokens(torch.tensor(tokens))
        for number, layer in enumerate(layers):
            hidden = layer.input_layernorm(x)
            attention = layer.self_attn
            query = attention.q_proj(hidden).view(len(ids), self.num_heads, self.head_dim)
            key = attention.k_proj(hidden).view(len(ids), self.num_kv_heads, self.head_dim)
            value = attention.v_proj(hidden).view(len(ids), self.num_kv_heads, self.head_dim)
            if hasattr(attention, "q_norm"):
                query, key = attention.q_norm(query), attention.k_norm(key)
            for at, i in enumerate(ids):
                self.keys[i][number], self.values[i][number] = key[at], value[at]
            # Everybody's keys are there before anybody attends.
            parts, at = [], 0
            for row in rows:
                parts.append(self._attend(row, query[at : at + len(row.tokens)], number))
                at += len(row.tokens)
            x = x + attention.o_proj(torch.cat(parts).reshape(len(ids), -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        last = torch.tensor([len(row.tokens) for row in rows]).cumsum(0) - 1
        return self.model.lm_head(self.model.model.norm(x[last]))

    def _attend(self, row: _Row, query: torch.Tensor, layer: int) -> torch.Tensor:
        num, size = len(row.view), len(row.tokens)
        group = self.num_heads // self.num_kv_heads
        keys = self.rotate(torch.stack([self.keys[i][layer] for i in row.view]), range(num))
        keys = keys.repeat_interleave(group, 1)
        values = torch.stack([self.values[i][layer] for i in row.view]).repeat_interleave(group, 1)
        turned = self.rotate(query, range(num - size, num))
        scores = torch.einsum("shd,nhd->hsn", turned, keys) / self.head_dim**0.5
        later = torch.arange(num)[None] > torch.arange(num - size, num)[:, None]
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return torch.einsum("hsn,nhd->shd", weights, values)


class _Worker:
    def __init__(self) -> None:
        self.own: list[int] = []
        """Ids of the unfinished step."""
        self.finished: list[list[int]] = []
        self.todo: list[int] = []
        self.text: list[int] = []
        """Visible tokens of the step."""
        self.log_probs: list[float] = []
        self.num_steps = 0
        self.num_sampled = 0
        self.in_step = 0
        self.closing = False
        self.natural = False
        """Whether the step came to the end that a step is to have."""
        self.tail = False
        """Whether what it computes only closes its last step."""
        self.stopped = False
        self.done = False


class HogwildOracle:
    """Runs workers in lock-step on a :class:`Dense` model."""

    def __init__(self, model: Any, plan: Plan) -> None:
        self.dense, self.plan = Dense(model), plan
        self.written = Written()

    def answer(self, prompt: Sequence[int]) -> Written:
        """Write an answer to a prompt, greedily."""
        plan, written = self.plan, self.written
        lone = plan.num_workers == 1 and not plan.steps(0, 1)
        head = list(prompt[:-1] if lone else prompt)
        self.prompt = self._new(len(head))
        self.dense.step([_Row(self.prompt, head, self.prompt)])
        written.history.append(self.prompt)
        self.workers = [_Worker() for _ in range(plan.num_workers)]
        for number, worker in enumerate(self.workers):
            worker.todo = list(prompt[-1:]) if lone else list(plan.steps(number, 1))
            worker.text = [] if lone else list(worker.todo)
        self.others: list[int] = []
        self.own: list[int] = []
        headers = plan.num_workers > 1 and plan.layout != "interleaved"
        self._first_headers = (list(plan.others), list(plan.own)) if headers else ([], [])
        self.since_check = 0
        self.shown: list[tuple[_Worker, list[int]]] = []
        while not all(worker.done for worker in self.workers):
            self._tick()
        written.visible = [token for _, part in self.shown for token in part]
        text = plan.found if written.by == "found" else plan.forced
        if text:
            self._answer(text)
        return written

    def _new(self, count: int) -> list[int]:
        first = getattr(self, "_next", 0)
        self._next = first + count
        return list(range(first, first + count))

    def _tick(self) -> None:
        rows, at = [], []
        for header, ids in zip(self._first_headers, (self.others, self.own), strict=True):
            if header:
                ids += self._new(len(header))
                rows.append(_Row([*self.prompt, *ids], header, list(ids)))
        self._first_headers = ([], [])
        fed = []
        for number, worker in enumerate(self.workers):
            if not worker.done:
                ids = self._new(len(worker.todo))
                worker.own += ids
                fed.append((number, worker, worker.todo, ids))
        for number, worker, tokens, ids in fed:
            at.append((worker, len(rows)))
            rows.append(_Row(self._view(number), tokens, ids))
        logits = self.dense.step(rows)
        ended = []
        for worker, row in at:
            if worker.tail or worker.closing:
                ended.append((worker, "tail" if worker.tail else None))
                continue
            token = self._sample(logits[row], worker)
            worker.natural = token in self.plan.ends
            if token is None:
                ended.append((worker, "eos"))
            elif worker.num_sampled >= self.plan.worker_tokens:
                worker.todo, worker.closing = [token], True
            elif worker.natural or worker.in_step == self.plan.max_step_tokens:
                ended.append((worker, token))
            else:
                worker.todo = [token]
        self._finish_steps(ended)

    def _sample(self, logits: torch.Tensor, worker: _Worker) -> int | None:
        token = int(logits.argmax())
        top = logits.topk(2).values
        self.written.gap = min(self.written.gap, float(top[0] - top[1]))
        if token == EOS and not self.plan.ignore_eos:
            return None
        worker.num_sampled += 1
        worker.in_step += 1
        self.since_check += 1
        worker.text.append(token)
        worker.log_probs.append(float(logits.log_softmax(-1)[token]))
        return token

    def _finish_steps(self, ended: list[tuple[_Worker, Any]]) -> None:
        wrote = [worker for worker, how in ended if how != "tail"]
        for worker, how in ended:
            if how == "tail":
                place = self.written.history.index(worker.finished[-1]) + 1
                self.written.history.insert(place, worker.own)
                worker.finished.append(worker.own)
                worker.own, worker.tail = [], False
        found = [self._finish_step(worker, how) for worker, how in ended if how != "tail"]
        if any(found):
            self.written.by = "found"
            for worker in self.workers:
                worker.stopped = True
                if worker not in wrote and not worker.tail:
                    worker.done, worker.own = True, []
        for worker, how in ended:
            close = self._closes(worker, wrote) if worker in wrote else []
            if close:
                carry = [how] if isinstance(how, int) else []
                worker.todo, worker.tail = [*carry, *close], True
                place = max(i for i, (who, _) in enumerate(self.shown) if who is worker) + 1
                self.shown.insert(place, (worker, close))
            elif worker.stopped:
                worker.done = True
            else:
                self._start_step(worker, [how] if isinstance(how, int) else [])

    def _finish_step(self, worker: _Worker, how: Any) -> bool:
        """Move a step into the history; return whether it holds the answer."""
        plan = self.plan
        self.written.history.append(worker.own)
        self.shown.append((worker, worker.text))
        self.written.log_probs += worker.log_probs
        worker.finished.append(worker.own)
        sampled = worker.text[len(worker.text) - worker.in_step :]
        worker.own, worker.log_probs, worker.in_step = [], [], 0
        worker.num_steps += 1
        worker.stopped = how is None or how == "eos"
        found = bool(plan.marks & set(sampled)) or (how == "eos" and not plan.marks)
        enough = sum(len(part) for _, part in self.shown) >= plan.min_tokens
        return found and enough and not plan.ignore_eos

    def _closes(self, worker: _Worker, wrote: list[_Worker]) -> list[int]:
        """Return what closes a step that was cut in front of another one's start."""
        followed = worker is not wrote[-1] or not all(other.stopped for other in self.workers)
        close = list(self.plan.close)
        is_open = not worker.natural and (not close or worker.text[-len(close) :] != close)
        return close if is_open and followed else []

    def _start_step(self, worker: _Worker, carry: list[int]) -> None:
        start = list(self.plan.steps(self.workers.index(worker), worker.num_steps + 1))
        if self.plan.check_every and self.since_check >= self.plan.check_every:
            self.since_check, self.written.checks = 0, self.written.checks + 1
            start += self.plan.question
        worker.todo, worker.text, worker.natural = [*carry, *start], list(start), False

    def _view(self, number: int) -> list[int]:
        mine, plan = self.workers[number], self.plan
        others = [(i, w) for i, w in enumerate(self.workers) if i != number]
        if plan.layout == "contiguous":
            seen = [i for _, w in others for step in (*w.finished, w.own) for i in step]
            before = [i for step in mine.finished for i in step]
            return [*self.prompt, *self.others, *seen, *self.own, *before, *mine.own]
        history = [i for step in self.written.history for i in step]
        if plan.layout == "interleaved":
            return [*history, *mine.own]
        live = [i for _, w in others for i in w.own]
        return [*history, *self.others, *live, *self.own, *mine.own]

    def _answer(self, text: Sequence[int]) -> None:
        plan = self.plan
        view = [i for step in self.written.history for i in step]
        todo, sampled = list(text), 0
        self.written.visible += text
        left = plan.max_tokens - len(self.written.visible)
        least = max(0, plan.min_tokens - len(self.written.visible))
        most = left if plan.ignore_eos else min(left, max(plan.answer_tokens, least))
        while True:
            ids = self._new(len(todo))
            view = [*view, *ids]
            logits = self.dense.step([_Row(view, todo, ids)])[0]
            allowed = logits.clone()
            if sampled < least:
                allowed[EOS] = -torch.inf
            token, sampled = int(allowed.argmax()), sampled + 1
            top = allowed.topk(2).values
            self.written.gap = min(self.written.gap, float(top[0] - top[1]))
            self.written.visible.append(token)
            self.written.log_probs.append(float(logits.log_softmax(-1)[token]))
            if (token == EOS and not plan.ignore_eos) or sampled == most:
                return
            todo = [token]
