"""A recipe in the words of one tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from ..config.hogwild_profile import HogwildProfile, Text
from ..errors import OptionError, quoted
from ..fork_join.tag_scanner import Vocabulary

BLANK_LINE = "\n\n"


class HogwildPrompts:
    """Tokens that the engine writes for workers, and what it reads in theirs."""

    def __init__(self, recipe: HogwildProfile, vocabulary: Vocabulary) -> None:
        self.recipe = recipe
        self.vocabulary = vocabulary
        self.others = self._tokens(recipe.workers.others)
        self.own = self._tokens(recipe.workers.own)
        self.question = self._tokens(recipe.check.text)
        close = recipe.workers.close
        if close is None:
            close = () if recipe.workers.end else (BLANK_LINE,)
        # Without words in front of a step there is nothing to keep apart.
        self.close = self._tokens(close) if recipe.workers.step else []
        self.close_text = vocabulary.text(self.close)
        self.found = self._tokens(recipe.answer.found)
        self.forced = self._tokens(recipe.answer.forced)
        starts = [self.step(worker, 999) for worker in range(len(recipe.workers.names))]
        longest = max(map(len, starts)) + len(self.question)
        self.longest_step = 1 + max(longest, len(self.close))
        """Tokens that the start of a step can have, with a check, or what closes one."""
        self.ends = frozenset(self._single_tokens(recipe.workers.end))

    @property
    def profile(self) -> HogwildProfile:
        """Return the recipe, under the name that grammars have for theirs."""
        return self.recipe

    def opening(self, num_workers: int) -> list[int]:
        """Return the rules behind the prompt, for so many workers."""
        return self._tokens(self.recipe.opening, others=_list(self._names(num_workers)[1:]))

    def step(self, worker: int, number: int) -> list[int]:
        """Return how a worker's step starts; steps count from 1."""
        name = self.recipe.workers.names[worker]
        return self._tokens(self.recipe.workers.step, name=name, number=str(number))

    def check(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have.

        Raises:
            OptionError: Names the profile and the id.

        """
        recipe = self.recipe
        texts = (recipe.opening, recipe.workers.step, recipe.workers.others, recipe.workers.own)
        more = (
            recipe.workers.end,
            recipe.workers.close or (),
            recipe.check.text,
            recipe.answer.found,
            recipe.answer.forced,
        )
        for item in (part for text in (*texts, *more) for part in text):
            if isinstance(item, int) and not 0 <= item < vocab_size:
                raise OptionError(
                    f"profile {recipe.name}: token id {item} is outside the vocabulary of "
                    f"{vocab_size} tokens"
                )

    def _names(self, num_workers: int) -> Sequence[str]:
        return self.recipe.workers.names[:num_workers]

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
                    f"profile {self.recipe.name}, [workers]: end {quoted(part)} is not one token "
                    "of this model"
                )
            ends += tokens
        return ends


def _list(names: Sequence[str]) -> str:
    """Return names as a sentence lists them."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
