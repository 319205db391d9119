"""Reading tags out of generated tokens.

Tags count only when generated: a scanner starts empty for every branch and sees sampled tokens
only. Matching is done on text, so a tag that is one special token and a tag that tokenises into
several pieces (whatever the split) are found alike; a tag given as a token id matches that id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ..branch_graph import PathName
from ..characters import Characters
from ..config.profile import Forced, OutlineRule, Profile, Tag
from ..errors import OptionError
from ..vocabulary import Vocabulary
from .names import NameReader
from .outline import CLOSE_FENCE, PlaceReader, PointReader, TitleReader


@dataclass(frozen=True)
class ForkSeen:
    """A branch wrote the fork trigger, with these paths (possibly too few or too many)."""

    names: tuple[PathName, ...]
    opened: bool


@dataclass(frozen=True)
class BranchEnd:
    """A path wrote its end tag, or a conclusion the tag that ends the answer.

    Attributes:
        before: Whether the branch ended before its last token, which is none of its text.

    """

    before: bool = False


@dataclass(frozen=True)
class ListDue:
    """The trunk came to a place where a list may begin.

    Attributes:
        invited: Whether the first number is written for the model.

    """

    invited: bool


@dataclass(frozen=True)
class TitleSeen:
    """A draft's title is complete; an empty one is none."""

    title: str


Event = ForkSeen | BranchEnd | ListDue | TitleSeen


_SENTENCE_SHARE = 0.75
"""Share of its budget after which a point ends with a sentence rather than in the next one."""


def _late(budget: int | None) -> int | None:
    return None if budget is None else int(_SENTENCE_SHARE * budget)


@dataclass(frozen=True)
class Grammar:
    """A profile bound to a tokenizer."""

    profile: Profile
    vocabulary: Vocabulary

    def check(self, vocab_size: int) -> None:
        """Refuse a profile that the model cannot follow.

        Args:
            vocab_size: Token ids the model has.

        Raises:
            OptionError: A token id is not one of the model's, or a forced start is no token with
                this tokenizer: a branch needs a first one.

        """
        for tag in self.profile.all_tags:
            if isinstance(tag, int) and tag >= vocab_size:
                raise OptionError(
                    f"profile {self.profile.name}: token id {tag} is not one of the model's "
                    f"{vocab_size}"
                )
        for table, rule in (("path", self.profile.path), ("join", self.profile.join)):
            if not self.forced(rule.start, PathName("1", "title", "1")):
                raise OptionError(
                    f"profile {self.profile.name}, [{table}]: the model's tokenizer makes no token "
                    f"of start = {list(rule.start)}; it must make at least one"
                )

    def forced(self, parts: Forced, path: PathName | None = None) -> tuple[int, ...]:
        """Tokenise forced text, filling in ``{name}``, ``{title}`` and ``{tag}``."""
        tokens: list[int] = []
        for part in parts:
            if isinstance(part, int):
                tokens.append(part)
                continue
            if path is not None:
                part = part.replace("{name}", path.name).replace("{title}", path.title)
                part = part.replace("{tag}", path.tag)
            tokens.extend(self.vocabulary.encode(part))
        return tuple(tokens)

    def join_start(self, text: str) -> Forced:
        """Return what starts the conclusion of an answer that reads like this text."""
        join = self.profile.join
        if not join.starts:
            return join.start
        return next((s.start for s in join.starts if re.search(s.match, text)), join.start)

    @cached_property
    def longest_join_start(self) -> int:
        """Tokens of the longest start of a conclusion."""
        join = self.profile.join
        starts = (join.start, *(other.start for other in join.starts))
        return max(len(self.forced(start)) for start in starts)

    def numbered(self, num_paths: int) -> tuple[PathName, ...]:
        """Return names of paths that a block does not name: 1, 2, ..., with their tags."""
        num_tags = self.profile.path.num_tags or num_paths
        return tuple(PathName(str(i + 1), tag=str(i % num_tags + 1)) for i in range(num_paths))

    def scanner(
        self,
        *,
        in_path: bool,
        max_names: int,
        concludes: bool = False,
        seed: str = "",
        forks: bool = True,
        name: str = "",
        budget: int | None = None,
    ) -> Scanner:
        """Return a scanner for one branch.

        Args:
            in_path: Whether the branch belongs to a path, which ends at the path's end tag.
            concludes: Whether the branch is a conclusion of the trunk, which may end the answer.
            max_names: Paths that the request may open at once.
            seed: Forced text before the branch that its path names may start in.
            forks: Whether the branch may fork at all; otherwise only a path's end is looked for.
            name: The path's name.
            budget: Tokens that the path or the conclusion may sample, if that is bounded.

        """
        outline = self.profile.outline
        if outline is not None and (in_path or concludes):
            following = int(name) + 1 if in_path else None
            return PointScanner(self.vocabulary, PointReader(following, _late(budget)))
        if outline is not None and forks:
            return PlaceScanner(self.vocabulary, outline)
        ends: tuple[Tag, ...] = ()
        if in_path:
            ends = self.profile.path.end
        elif concludes:
            ends = self.profile.join.end
        return Scanner(
            self, in_path=in_path, ends=ends, max_names=max_names, seed=seed, forks=forks
        )


class Scanner:
    """Finds the tags of a grammar in one branch, token by token."""

    def __init__(
        self,
        grammar: Grammar,
        *,
        in_path: bool,
        ends: tuple[Tag, ...],
        max_names: int,
        seed: str,
        forks: bool,
    ) -> None:
        self._rule = grammar.profile.fork
        self._grammar = grammar
        self.characters = Characters(grammar.vocabulary)
        self._inner_open = grammar.profile.path.open if in_path else None
        self._ends = ends
        self._max_names = max_names
        self._forks = forks
        self._names: NameReader | None = None
        if forks and self._rule.names is not None:
            self._names = NameReader(re.compile(self._rule.names), max_names)
        self._longest_tag = max(len(tag) for tag in self._tags())
        self._num_tokens = 0
        self._inner_paths = 0
        self._is_over = False
        self._opened = False
        self._text = ""
        """The end of the text, as long as the longest tag."""
        self._start_block(seed)

    def feed(self, token_id: int) -> Event | None:
        """Take the next sampled token; return what it completed, if anything."""
        piece = self.characters.feed(token_id)
        text = self._text + piece
        self._num_tokens += 1
        if self._names is not None:
            self._names.feed(piece)

        def end_of(tag: Tag | None) -> int:
            """Where a tag that this token completes ends in the text; 0 if it completes none."""
            if tag is None or isinstance(tag, int):
                return len(text) if tag == token_id else 0
            at = text.rfind(tag, max(0, len(text) - len(piece) - len(tag) + 1))
            return at + len(tag) if at >= 0 else 0

        self._opened = self._opened or end_of(self._rule.open) > 0
        begin = end_of(self._rule.names_after)
        if begin and self._names is not None:
            self._names.start(text[begin:])
        # No tag is longer, and what was before the names is none of theirs.
        self._text = text[max(begin, len(text) - self._longest_tag) :]
        # Ends first, as a grammar may fork and end paths by the same text.
        if end_of(self._inner_open):
            self._inner_paths += 1
        elif any(map(end_of, self._ends)):
            if self._inner_paths == 0:
                return BranchEnd()
            self._inner_paths -= 1
        if not self._forks:
            return None
        if any(map(end_of, self._rule.trigger)):
            seen = ForkSeen(self._read_names(), self._opened)
            if self._rule.names_after is not None:
                self._start_block()
            return seen
        return self._outline_is_full(piece)

    def _tags(self) -> Iterator[str]:
        """Yield the texts to look for, which bound how much of the past must be kept."""
        rule = self._rule
        for tag in (*rule.trigger, rule.open, rule.names_after, self._inner_open, *self._ends):
            yield tag if isinstance(tag, str) else ""

    def _start_block(self, text: str = "") -> None:
        """Forget what was opened: the next fork needs an opening and names of its own."""
        self._opened = self._rule.open is None
        self._text = text[max(0, len(text) - self._longest_tag) :]
        if self._names is not None:
            self._names.stop()
            if self._rule.names_after is None:
                self._names.start(text)

    def stop_forks(self) -> None:
        """Look for the branch's end only, from now on."""
        self._forks = False
        self._names = None

    def at_end(self) -> ForkSeen | None:
        """Return the fork that an end-of-sequence token stands for, if the grammar has that."""
        if not self._rule.on_end or not self._forks:
            return None
        names = self._read_names()
        return ForkSeen(names, self._opened) if len(names) >= 2 else None

    def _outline_is_full(self, piece: str) -> ForkSeen | None:
        rule = self._rule
        was_over, whole = self._is_over, self.characters.whole
        over = rule.max_outline_tokens is not None and self._num_tokens >= rule.max_outline_tokens
        self._is_over = was_over or (over and whole)
        # Names are complete at the end of a line.
        at_limit = self._is_over and not was_over
        if not at_limit and not ("\n" in piece and (over or rule.when_full)):
            return None
        names = self._read_names(whole_lines=True)
        if len(names) >= 2 and (over or len(names) >= self._max_names):
            return ForkSeen(names[: self._max_names], self._opened)
        return None

    def _read_names(self, *, whole_lines: bool = False) -> tuple[PathName, ...]:
        """Return the distinct path names of the block, in order of appearance."""
        if self._rule.names is None:
            return self._grammar.numbered(self._rule.num_paths or 0)
        return self._names.read(whole_lines=whole_lines) if self._names is not None else ()


class PlaceScanner(Scanner):
    """Finds places in a trunk where a list may begin, as often as the profile allows."""

    def __init__(self, vocabulary: Vocabulary, rule: OutlineRule) -> None:
        self.characters = Characters(vocabulary)
        self._reader = PlaceReader()
        self._invites = rule.invite
        self._tries = rule.tries

    def feed(self, token_id: int) -> Event | None:
        """Take the next sampled token; return the place that it came to, if it is one."""
        if not self._reader.feed(self.characters.feed(token_id)) or not self._tries:
            return None
        self._tries -= 1
        return ListDue(self._invites and not self._reader.after_colon)

    def stop_forks(self) -> None:
        """Look for no more places."""
        self._tries = 0

    def at_end(self) -> ForkSeen | None:
        """Return nothing: an answer that ends begins no list."""
        return None


class TitleScanner(Scanner):
    """Reads one title of a draft."""

    def __init__(self, vocabulary: Vocabulary, reader: TitleReader) -> None:
        self.characters = Characters(vocabulary)
        self._reader = reader

    def feed(self, token_id: int) -> Event | None:
        """Take the next sampled token; return the title that it completes."""
        if self._reader.feed(self.characters.feed(token_id)):
            return TitleSeen(self._reader.title or "")
        return None

    def end(self) -> TitleSeen:
        """Return what the title is if nothing follows."""
        self._reader.end()
        return TitleSeen(self._reader.title or "")


class PointScanner(Scanner):
    """Finds the end of a point, or of a conclusion."""

    def __init__(self, vocabulary: Vocabulary, reader: PointReader) -> None:
        self.characters = Characters(vocabulary)
        self._reader = reader
        self._num_breaks = 0

    def feed(self, token_id: int) -> Event | None:
        """Take the next sampled token; return whether the point ends with it or before it."""
        piece = self.characters.feed(token_id)
        before, self._num_breaks = self._reader.ends_before(piece), self._reader.num_breaks
        # A token that may not end an answer is text, so it is read in any case.
        ends = self._reader.ends_with(piece)
        if not before:
            self._num_breaks = self._reader.num_breaks
        return BranchEnd(before) if before or ends else None

    def close(self, close: str) -> str:
        """Return what must follow the point's text, without the line breaks it has already."""
        fence = CLOSE_FENCE if self._reader.open_fence else ""
        given = 0 if fence else self._num_breaks
        for _ in range(given):
            close = close.removeprefix("\n")
        return fence + close

    def stop_forks(self) -> None:
        """Do nothing: it never looks for any."""

    def at_end(self) -> ForkSeen | None:
        """Return nothing: points do not fork."""
        return None
