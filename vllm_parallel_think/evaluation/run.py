"""Asks what has no answer yet, grades what comes, and keeps it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from .. import __version__
from ..core.config.hogwild_profile import HogwildProfile
from ..core.config.loading import builtin_profiles, load_profile
from ..core.fork_join.vote import majority
from ..core.trace import GrammarError, trace
from .answers import AnswerFile
from .client import ExamClient, Reply, RequestFailed
from .errors import ExamError
from .grading import Grader, final_answer, states_an_answer
from .methods import ENGINE_OPTIONS
from .schedule import ExamTask
from .token_usage import TokenUsage, summaries, usage_of

GRAMMARS = frozenset({"multiverse", "npr", "parallel-r1", "threadweaver"})
"""Profiles whose blocks a model writes itself: its text can break them."""


@dataclass(frozen=True)
class Outcome:
    """How an exam ended.

    Attributes:
        asked: Requests that this run made.
        failed: Those of them that no answer came to.

    """

    asked: int
    failed: int


@dataclass(frozen=True)
class Answered:
    """An answer before it is graded.

    Attributes:
        text: The text that counts: a vote's winner, or the only one.
        texts: All texts, where there were several.
        cut: Whether the budget ended the answer.
        closed: Whether a closing text was put behind it.
        usage: What it cost, closing included.
        seconds: From the question to the last word, closing included, waits between attempts not.
        attempts: Requests that were needed.
        summary: The engine's figures, where it gives any.

    """

    text: str
    texts: Sequence[str]
    cut: bool
    closed: bool
    usage: TokenUsage
    seconds: float
    attempts: int
    summary: Mapping[str, Any] | None


async def answer(client: ExamClient, model: str, task: ExamTask) -> Answered:
    """Ask for one answer, and for the end of what the budget cut, if the exam has a closing text.

    Raises:
        RequestFailed: No answer came.

    """
    body = task.body(model)
    reply = await client.chat(body)
    usage = _usage(reply)
    choices = reply.body["choices"]
    texts = [choice["message"].get("content") or "" for choice in choices]
    kind = task.problems.kind
    cut = [choice.get("finish_reason") == "length" for choice in choices]
    open_ends = [i for i, text in enumerate(texts) if cut[i] and not states_an_answer(kind, text)]
    closings: list[Reply] = []
    if task.closing.text and open_ends:
        bodies = [_closing_body(body, texts[i] + task.closing.text, task) for i in open_ends]
        closings = list(await asyncio.gather(*map(client.chat, bodies)))
        for i, closing in zip(open_ends, closings, strict=True):
            ended = closing.body["choices"][0]["message"].get("content") or ""
            texts[i] += task.closing.text + ended
        usage = usage.then(_usage_of_closings(closings))
    winner = majority([final_answer(kind, text) for text in texts]).winner
    return Answered(
        text=texts[winner],
        texts=texts if len(texts) > 1 else (),
        cut=cut[winner],
        closed=winner in open_ends and bool(closings),
        usage=usage,
        seconds=reply.seconds + max((each.seconds for each in closings), default=0.0),
        attempts=reply.attempts + sum(each.attempts for each in closings),
        summary=summaries(reply.body)[winner],
    )


def _closing_body(body: Mapping[str, Any], text: str, task: ExamTask) -> dict[str, Any]:
    """Return the request that goes on behind a text, in one chain."""
    kept = ("model", "temperature", "top_p", "top_k", "min_p", "seed")
    said = {"role": "assistant", "content": text}
    return {
        **{key: body[key] for key in kept if key in body},
        "messages": [*body["messages"], said],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "max_tokens": task.closing.max_tokens,
        **({ENGINE_OPTIONS: {"parallel_think": "off"}} if ENGINE_OPTIONS in body else {}),
    }


def _usage(reply: Reply) -> TokenUsage:
    try:
        return usage_of(reply.body)
    except (KeyError, TypeError, ValueError) as error:
        message = f"the response does not say how many tokens it took: {error!r}"
        raise RequestFailed(message) from None


def _usage_of_closings(closings: Sequence[Reply]) -> TokenUsage:
    """Return what closings cost, which ran side by side and are no paths of the method."""
    tokens = [_usage(each).generated for each in closings]
    return TokenUsage(sum(tokens), max(tokens, default=0))


def valid_grammar(summary: Mapping[str, Any] | None, text: str) -> bool | None:
    """Return whether a text keeps its profile's grammar; ``None`` where no model writes tags."""
    name = (summary or {}).get("profile")
    if name not in GRAMMARS or name not in builtin_profiles():
        return None
    profile = load_profile(name)
    assert not isinstance(profile, HogwildProfile)
    try:
        trace(text, profile)
    except GrammarError:
        return False
    return True


@dataclass(frozen=True)
class Exam:
    """What one run of the exam works with.

    Attributes:
        client: The server.
        model: Its model.
        file: Where answers go.
        grader: What grades them.
        versions: Kept with every answer.
        give_up: Failed requests in a row that end the run.

    """

    client: ExamClient
    model: str
    file: AnswerFile
    grader: Grader
    versions: Mapping[str, str | None]
    give_up: int = 20

    async def run(self, waves: Sequence[Sequence[ExamTask]]) -> Outcome:
        """Ask everything that has no answer yet.

        Raises:
            ExamError: The folder has answers to other requests of the same name, or so many
                requests failed in a row that the server must be gone.

        """
        left = self._unanswered(waves)
        total = sum(map(len, waves))
        remaining = sum(map(len, left))
        asked = failed = in_a_row = 0
        with tqdm(total=total, initial=total - remaining, unit="answer", file=sys.stderr) as bar:
            for wave in left:
                limit = asyncio.Semaphore(wave[0].concurrency)
                for done in asyncio.as_completed([self._one(task, limit) for task in wave]):
                    succeeded = await done
                    asked, failed = asked + 1, failed + (not succeeded)
                    in_a_row = 0 if succeeded else in_a_row + 1
                    bar.set_postfix(failed=failed, refresh=False)
                    bar.update()
                if in_a_row >= self.give_up:
                    raise ExamError(
                        f"{in_a_row} requests in a row failed, see {self.file.path}; the same "
                        "command goes on where this one ended"
                    )
        return Outcome(asked, failed)

    def _unanswered(self, waves: Sequence[Sequence[ExamTask]]) -> list[list[ExamTask]]:
        there = self.file.answered()
        left = []
        for wave in waves:
            missing = []
            for task in wave:
                if task.key not in there:
                    missing.append(task)
                elif there[task.key] != task.fingerprint(self.model):
                    raise ExamError(
                        f"{self.file.folder} has an answer to another request under {task.key}: "
                        "model, prompt or method have changed; choose another --out"
                    )
            if missing:
                left.append(missing)
        return left

    async def _one(self, task: ExamTask, limit: asyncio.Semaphore) -> bool:
        """Ask, grade and keep one answer; return whether one came."""
        record: dict[str, Any] = {
            "key": task.key,
            "set": task.problems.name,
            "problem": task.problem.key,
            "method": task.method.name,
            "budget": task.budget,
            "seed": task.seed,
            "concurrency": task.concurrency,
            "request": task.fingerprint(self.model),
            "versions": dict(self.versions),
        }
        try:
            async with limit:
                found = await answer(self.client, self.model, task)
        except RequestFailed as error:
            self.file.add({**record, "status": "failed", "error": str(error)})
            return False
        kind = task.problems.kind
        grade = await asyncio.to_thread(self.grader.grade, kind, task.problem, found.text)
        question = {"question": task.problem.question, "gold": task.problem.answer}
        self.file.add(
            {
                **record,
                **question,
                "status": "ok",
                "text": found.text,
                **({"texts": list(found.texts)} if found.texts else {}),
                "cut": found.cut,
                "closed": found.closed,
                "tokens": found.usage.record(),
                "summary": dict(found.summary) if found.summary is not None else None,
                "valid_grammar": valid_grammar(found.summary, found.text),
                "seconds": round(found.seconds, 4),
                "attempts": found.attempts,
                "grade": grade.record(),
            }
        )
        return True


async def versions_of(client: ExamClient, model: str) -> dict[str, str | None]:
    """Return what answers depend on beside their request."""
    return {
        "model": model,
        "server": await client.version(),
        "exam": __version__,
        "math-verify": _version("math-verify"),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
