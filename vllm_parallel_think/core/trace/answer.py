"""A finished answer: read, replayed, and what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..config.profile import Profile
from ..errors import OptionError
from ..vocabulary import Vocabulary
from .cursor import GrammarError
from .pieces import PieceVocabulary
from .points import read_points
from .reader import Reader
from .replay import Replay, ReplayedBranch
from .steps import Step
from .wording import for_reading


@dataclass(frozen=True)
class Trace:
    """What a finished answer is made of.

    Attributes:
        branches: Branches in the order of the text.
        summary: Figures as :meth:`Summary.as_dict` gives them.
        num_sequential: Blocks that the model wrote one path after the other.
        notes: Places where the text differs from what the engine would write, without harm.

    """

    branches: tuple[ReplayedBranch, ...]
    summary: dict[str, Any]
    num_sequential: int
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the trace as plain values."""
        return asdict(self)


def trace(text: str, profile: Profile, vocabulary: Vocabulary | None = None) -> Trace:
    """Read a finished answer.

    Args:
        text: The answer, special tokens included, without the prompt.
        profile: The grammar it follows.
        vocabulary: Tokenizer to count with; :class:`PieceVocabulary` if ``None``.

    Raises:
        GrammarError: The text breaks the grammar, and is none that the engine writes at a fork.
        OptionError: The profile names tags by token id, and there is no tokenizer to look them up.

    """
    if vocabulary is None and any(isinstance(tag, int) for tag in profile.all_tags):
        raise OptionError(f"profile {profile.name} has tags given as token ids: name the tokenizer")
    known: Vocabulary = vocabulary or PieceVocabulary()
    profile = for_reading(profile, known)
    num_sequential = 0
    notes: tuple[str, ...] = ()
    if profile.outline is not None:
        steps = read_points(text, profile)
    else:
        reader, steps = _read(text, profile)
        num_sequential, notes = reader.num_sequential, tuple(reader.notes)
    replay = Replay(profile, known, steps)
    branches = replay.run()
    return Trace(tuple(branches), replay.group.summary().as_dict(), num_sequential, notes)


def _read(text: str, profile: Profile) -> tuple[Reader, list[Step]]:
    """Read a text by the grammar's form or, where a model broke that, as the engine reads it."""
    reader = Reader(text, profile)
    try:
        return reader, reader.read()
    except GrammarError as error:
        lenient = Reader(text, profile, by_form=False)
        try:
            steps = lenient.read()
        except GrammarError:
            raise error from None
        if not lenient.forked:
            raise
        lenient.notes.insert(0, f"line {error.line}, column {error.column}: {error.reason}")
        return lenient, steps
