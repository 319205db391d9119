"""A Hogwild profile in the words of one tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from ..config.hogwild_profile import HogwildProfile, Text
from ..errors import OptionError, quoted
from ..vocabulary import Vocabulary

BLANK_LINE = "\n\n"


class HogwildPrompts:
    """Tokens that the engine writes for the writers, and what it reads in theirs."""

    def __init__(self, profile: HogwildProfile, vocabulary: Vocabulary) -> None:
        self.profile = profile
        self.vocabulary = vocabulary
        self.others = self._tokens(profile.workers.others)
        self.own = self._tokens(profile.workers.own)
        self.question = self._tokens(profile.check.text)
        close = profile.workers.close
        if close is None:
            close = () if profile.workers.end else (BLANK_LINE,)
        # Without words before a step there is nothing to keep apart.
        self.close = self._tokens(close) if profile.workers.step else []
        self.close_text = vocabulary.text(self.close)
        self.found = self._tokens(profile.answer.found)
        self.forced = self._tokens(profile.answer.forced)
        starts = [self.step(writer, 999) for writer in range(len(profile.workers.names))]
        longest = max(map(len, starts)) + len(self.question)
        self.longest_step = 1 + max(longest, len(self.close))
        """Tokens that the start of a step can have, with a check, or what closes one."""
        self.ends = frozenset(self._single_tokens(profile.workers.end))

    def opening(self, num_writers: int) -> list[int]:
        """Return the rules after the prompt, for so many writers."""
        return self._tokens(self.profile.opening, others=_list(self._names(num_writers)[1:]))

    def step(self, writer: int, number: int) -> list[int]:
        """Return how a writer's step starts; steps count from 1."""
        name = self.profile.workers.names[writer]
        return self._tokens(self.profile.workers.step, name=name, number=str(number))

    def check(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have.

        Raises:
            OptionError: Names the profile and the id.

        """
        profile = self.profile
        texts = (profile.opening, profile.workers.step, profile.workers.others, profile.workers.own)
        more = (
            profile.workers.end,
            profile.workers.close or (),
            profile.check.text,
            profile.answer.found,
            profile.answer.forced,
        )
        for item in (part for text in (*texts, *more) for part in text):
            if isinstance(item, int) and not 0 <= item < vocab_size:
                raise OptionError(
                    f"profile {profile.name}: token id {item} is outside the vocabulary of "
                    f"{vocab_size} tokens"
                )

    def _names(self, num_writers: int) -> Sequence[str]:
        return self.profile.workers.names[:num_writers]

    def _tokens(self, text: Text, **values: str) -> list[int]:
        """Return the tokens of a forced text; neighbouring pieces of text are joined first."""
        tokens: list[int] = []
        words = ""
        for part in (*text, None):
            if isinstance(part, str):
                words += part
                continue
            for key, value in values.items():
                words = words.replace("{" + key + "}", value)
            tokens += self.vocabulary.encode(words) if words else []
            words = ""
            if part is not None:
                tokens.append(part)
        return tokens

    def _single_tokens(self, text: Text) -> list[int]:
        ends = []
        for part in text:
            tokens = [part] if isinstance(part, int) else self.vocabulary.encode(part)
            if len(tokens) != 1:
                raise OptionError(
                    f"profile {self.profile.name}, [workers]: end {quoted(part)} is not one token "
                    "of this model"
                )
            ends += tokens
        return ends


def _list(names: Sequence[str]) -> str:
    """Return names as a sentence lists them."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
