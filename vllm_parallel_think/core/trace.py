"""Reading a finished answer: its tree, and the positions and figures the engine would give it.

The text is read as if the engine had written it without limits: whatever may fork by the profile
does. Blocks that may not (a single path, or nested deeper than the grammar goes) count as plain
text of the branch they stand in, as they do in the engine, but must have the grammar's form all the
same. An answer that the profile ends with its conclusion (``[join] end``) ends there: white space
behind that tag is noted, as a token may carry it along, and anything else breaks the grammar. Once
the text is understood, a :class:`~vllm_parallel_think.core.group.Group` replays it, so that
positions and figures are the engine's own. Two things a text does not show: whether a path's end
tag was forced because a budget ran out (it counts as generated), and end-of-sequence tokens (they
are not counted).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .errors import OptionError
from .graph import Kind, Lane, Node, State
from .group import Cause, Group, Limits, Verdict
from .options import RequestOptions
from .profile import Forced, ForkRule, JoinRule, PathRule, Profile
from .scan import BranchEnd, Event, ForkSeen, Grammar, PathName, Scanner, Vocabulary

_TAG = re.compile(r"</?[A-Za-z][\w-]*>")
_PIECE = re.compile(rf"{_TAG.pattern}|\n| ?\w+| ?(?!{_TAG.pattern})[^\w\s]|[^\S\n]+")
_PLENTY = 10**12

PIECE_RULE = "tags, line breaks, words and punctuation marks"
"""What counts as a token without a tokenizer; a blank belongs to the word behind it."""


class GrammarError(Exception):
    """The first place where a text breaks its grammar.

    Attributes:
        reason: What is wrong, in a few words.
        line: Line of the place, from 1.
        column: Column of the place, from 1.
        found: What stands there.
        allowed: What may stand there.

    """

    def __init__(self, reason: str, line: int, column: int, found: str, allowed: Sequence[str]):
        self.reason, self.line, self.column = reason, line, column
        self.found, self.allowed = found, tuple(allowed)
        super().__init__(
            f"line {line}, column {column}: {reason}\n"
            f"  found:   {found}\n  allowed: {' or '.join(self.allowed)}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the error as plain values."""
        keys = ("reason", "line", "column", "found", "allowed")
        return {key: getattr(self, key) for key in keys}


class PieceVocabulary:
    """Counts tokens without a tokenizer; see :data:`PIECE_RULE`."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._pieces: list[str] = []

    def piece(self, token_id: int) -> str:
        """Return the text of one token."""
        return self._pieces[token_id]

    def encode(self, text: str) -> list[int]:
        """Split text into pieces; joining them gives the text again."""
        ids = []
        for piece in _PIECE.findall(text):
            if piece not in self._ids:
                self._ids[piece] = len(self._pieces)
                self._pieces.append(piece)
            ids.append(self._ids[piece])
        return ids


@dataclass(frozen=True)
class Branch:
    """One line of a trace: what a lane wrote up to its next fork or its end.

    Attributes:
        label: ``trunk``, ``path NAME`` or ``conclusion``.
        depth: Nesting of the lane.
        num_generated: Tokens the model wrote.
        num_forced: Tokens the engine wrote.
        start: RoPE position of the first visible token; the answer's first token has 0.
        end: RoPE position of the last token.
        text: How the generated text begins.

    """

    label: str
    depth: int
    num_generated: int
    num_forced: int
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Trace:
    """What a finished answer is made of.

    Attributes:
        branches: Branches in the order of the text.
        summary: Figures as :meth:`Group.summary` gives them.
        num_sequential: Blocks that the model wrote one path after the other.
        notes: Places where the text differs from what the engine would write, without harm.

    """

    branches: tuple[Branch, ...]
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
        GrammarError: The text breaks the grammar.
        OptionError: The profile names tags by token id, and there is no tokenizer to look them up.

    """
    if vocabulary is None and any(isinstance(tag, int) for tag in _all_tags(profile)):
        raise OptionError(f"profile {profile.name} has tags given as token ids: name the tokenizer")
    known: Vocabulary = vocabulary or PieceVocabulary()
    profile = _for_reading(profile, known)
    reader = _Reader(text, profile)
    steps = reader.read()
    replay = _Replay(profile, known)
    branches = replay.run(steps)
    return Trace(
        tuple(branches), replay.group.summary(), reader.num_sequential, tuple(reader.notes)
    )


def _all_tags(profile: Profile) -> Iterator[str | int]:
    fork, path, join = profile.fork, profile.path, profile.join
    for tags in (fork.trigger, fork.after, path.start, path.end, path.close, path.after):
        yield from tags
    for tags in (join.start, join.first_only, join.end, profile.opening):
        yield from tags
    yield from (tag for tag in (fork.open, fork.names_after, path.open) if tag is not None)


def _for_reading(profile: Profile, vocabulary: Vocabulary) -> Profile:
    """Return a profile in text only, without what depends on a model's token counts."""

    def texts(tags: Forced) -> Forced:
        return tuple(tag if isinstance(tag, str) else vocabulary.piece(tag) for tag in tags)

    def text(tag: str | int | None) -> str | None:
        return None if tag is None else str(texts((tag,))[0])

    fork, path, join = profile.fork, profile.path, profile.join
    fork = replace(
        fork,
        trigger=texts(fork.trigger),
        open=text(fork.open),
        names_after=text(fork.names_after),
        after=texts(fork.after),
        min_tokens_left=0,
        on_end=True,
        when_full=False,
        max_outline_tokens=None,
    )
    path = replace(
        path,
        start=texts(path.start),
        end=texts(path.end),
        close=texts(path.close),
        after=texts(path.after),
        open=text(path.open),
        max_tokens=None,
    )
    join = replace(
        join, start=texts(join.start), first_only=texts(join.first_only), end=texts(join.end)
    )
    early = profile.fork.on_end or profile.fork.when_full or profile.fork.max_outline_tokens
    return replace(
        profile,
        fork=fork if early else replace(fork, on_end=False),
        path=path,
        join=join,
        opening=texts(profile.opening),
    )


def _text(parts: Forced, path: PathName | None = None) -> str:
    text = "".join(map(str, parts))
    if path is not None:
        text = text.replace("{name}", path.name).replace("{title}", path.title)
    return text


# -- the text --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    names: tuple[PathName, ...]
    by_end: bool
    """Whether the branch forked where no tag shows why: at its end of sequence, say."""
    paths: list[list[_Step]]


@dataclass(frozen=True)
class _Step:
    """What a branch generated, and the block it opened then; a lane's last step opens none."""

    text: str
    block: _Block | None


@dataclass
class _Frame:
    """An open tag (or a lane, which has no tag) and what must still come inside it."""

    tag: str | None
    offset: int
    names: tuple[PathName, ...] = ()
    num_seen: int = 0
    join: list[str] = field(default_factory=list)
    outlined: bool = False

    @property
    def close(self) -> list[str]:
        return [] if self.tag is None else [self.tag.replace("<", "</", 1)]


class _Tags:
    """The tags of a profile by their part in a block."""

    def __init__(self, fork: ForkRule, path: PathRule, join: JoinRule) -> None:
        openings = [tag for tag in map(str, fork.trigger) if _opens(tag)]
        block = fork.open or fork.names_after or (openings[0] if openings else None)
        self.block = str(block) if block is not None else None
        self.outline = str(fork.names_after) if fork.names_after is not None else None
        self.items = _TAG.findall(fork.names or "")
        self.join = _TAG.findall(_text(join.start))
        named = [*fork.trigger, *path.end, *path.start, *path.close, *join.start, *self.items]
        named += [tag for tag in (fork.open, fork.names_after, path.open) if tag is not None]
        found = {tag for text in named for tag in _TAG.findall(str(text))}
        found |= {"</" + tag[1:] if _opens(tag) else "<" + tag[2:] for tag in found}
        self.all = frozenset(found)
        others = [*found, *map(str, fork.trigger), *map(str, path.end)]
        self.lexer = re.compile(
            "|".join(sorted(map(re.escape, set(others)), key=len, reverse=True))
        )


def _opens(tag: str) -> bool:
    return _TAG.fullmatch(tag) is not None and not tag.startswith("</")


class _Reader:
    """Reads a text by its grammar, from left to right."""

    def __init__(self, text: str, profile: Profile) -> None:
        self._text = text
        self._profile = profile
        self._tags = _Tags(profile.fork, profile.path, profile.join)
        self._pieces: list[str] = []
        vocabulary = _Pieces(self._pieces)
        self._grammar = Grammar(profile, vocabulary)
        self._pos = 0
        self._forked = False
        self.num_sequential = 0
        self.notes: list[str] = []

    def read(self) -> list[_Step]:
        """Return the steps of the trunk.

        Raises:
            GrammarError: The text breaks the grammar.

        """
        opening = _text(self._profile.opening)
        if not self._take(opening):
            raise self._error("the engine's opening is missing", [repr(opening)])
        return self._lane([_Frame(None, 0)], 0, opening.rpartition("\n")[2])

    def _lane(self, frames: list[_Frame], depth: int, seed: str = "") -> list[_Step]:
        steps: list[_Step] = []
        while True:
            start = self._pos
            concludes = bool(steps) and depth == 0
            scanner = self._grammar.scanner(
                in_path=depth > 0, concludes=concludes, max_names=_PLENTY, seed=seed
            )
            fork = self._run(scanner, self._ends(depth, concludes), frames, depth)
            text = self._text[start : self._pos]
            if fork is None:
                if depth == 0:
                    self._check_nothing_behind()
                return [*steps, _Step(text, None)]
            steps.append(_Step(text, self._block(*fork, frames, depth)))
            seed = ""

    def _ends(self, depth: int, concludes: bool) -> tuple[str, ...]:
        """Return the tags that end a branch, as the engine's scanner looks for them."""
        rule = self._profile
        return tuple(map(str, rule.path.end if depth else rule.join.end if concludes else ()))

    def _run(
        self, scanner: Scanner, ends: Sequence[str], frames: list[_Frame], depth: int
    ) -> tuple[tuple[PathName, ...], bool] | None:
        """Read up to the next fork (its names, and whether no tag shows it) or the lane's end."""
        start, heading = self._pos, self._heading(depth)
        outer = list(frames)
        while self._pos < len(self._text):
            offset = self._pos
            piece = self._next_piece(self._first_end(ends, start), heading)
            if piece in self._tags.all:
                self._visit(piece, offset, frames)
            event = scanner.feed(len(self._pieces) - 1)
            if isinstance(event, BranchEnd):
                if depth:
                    self._check_path(piece, offset, frames)
                elif any(frames[-1] is frame for frame in outer):  # the block's own may stay open
                    self._check_complete(frames[-1], self._pos)
                else:
                    self._check_end(frames, depth)
                return None
            if isinstance(event, ForkSeen):
                if self._may_fork(event, depth):
                    return event.names, False
                if piece in self._tags.all:
                    self._start_sequential(event, frames[-1])
            if self._pos == heading:
                seen = scanner.at_end()
                if seen is not None and self._may_fork(seen, depth):
                    return seen.names, True
                heading = self._heading(depth)
        self._check_end(frames, depth)
        return None

    def _first_end(self, ends: Sequence[str], start: int) -> int | None:
        """Return where the next tag that ends the branch is complete, be it part of another tag."""
        found = ((tag, self._text.find(tag, max(start, self._pos - len(tag) + 1))) for tag in ends)
        return min((at + len(tag) for tag, at in found if at >= 0), default=None)

    def _next_piece(self, *stops: int | None) -> str:
        found = self._tags.lexer.search(self._text, self._pos)
        end = len(self._text) if found is None else found.start() or found.end()
        if found is not None and found.start() == self._pos:
            end = found.end()
        end = min([end, *(stop for stop in stops if stop is not None and self._pos < stop)])
        piece = self._text[self._pos : end]
        self._pos = end
        self._pieces.append(piece)
        return piece

    def _heading(self, depth: int) -> int | None:
        """Return where a first path's heading comes next, for grammars that fork without a tag."""
        if not self._profile.fork.on_end or depth or self._forked:
            return None
        found = self._head_pattern(0).search(self._text, self._pos + 1)
        if found is None:
            return None
        # White space in front of the heading is the outline's, but for what the engine writes.
        head = self._head(PathName(""), 0)
        lead = head[: len(head) - len(head.lstrip())]
        first = found.start() + len(found[0]) - len(found[0].lstrip())
        return first - len(lead) if self._text.endswith(lead, 0, first) else first

    def _may_fork(self, seen: ForkSeen, depth: int) -> bool:
        spent = self._profile.fork.once and self._forked
        return (
            len(seen.names) >= 2 and depth < self._profile.max_depth and seen.opened and not spent
        )

    # -- blocks that fork ----------------------------------------------------------------------

    def _block(
        self, names: tuple[PathName, ...], by_end: bool, frames: list[_Frame], depth: int
    ) -> _Block:
        """Read a block's paths, up to and including what is forced at the join."""
        self._forked = True
        frames[-1].outlined = True
        # An outline cut by a token limit may end in half a line, for which there is no path.
        cut = by_end and self._text[self._pos - 1] != "\n" and len(names) > 2
        self._take(_text(self._profile.fork.after))
        paths: list[list[_Step]] = []
        for index, name in enumerate(names):
            if (
                cut
                and index == len(names) - 1
                and not self._head_pattern(index).match(self._text, self._pos)
            ):
                names = names[:-1]
                break
            offset = self._pos
            if not self._take(self._head(name, index)):
                raise self._bad_head(names, index)
            tags = _TAG.findall(_text(self._profile.path.start))
            inside = [_Frame(None, offset), *(_Frame(tag, offset) for tag in tags if _opens(tag))]
            paths.append(self._lane(inside, depth + 1))
            self._take(_text(self._profile.path.after))
        self._take_join(names, frames)
        return _Block(names, by_end, paths)

    def _head(self, name: PathName, index: int) -> str:
        head = _text(self._profile.path.start, name)
        return head.removeprefix(_text(self._profile.join.first_only)) if index else head

    def _head_pattern(self, index: int) -> re.Pattern[str]:
        """Return what a path's head looks like, whatever its name; group 1 is the name, if any."""
        head = self._head(PathName("{name}", "{title}"), index)
        pattern = _loose(head).replace(re.escape("{name}"), r"([^\s:<]+?)", 1)
        return re.compile(pattern.replace(re.escape("{title}"), r"[^\n]*?"))

    def _take_join(self, names: tuple[PathName, ...], frames: list[_Frame]) -> None:
        start = _text(self._profile.join.start)
        offset = self._pos
        if not self._take(start):
            pattern = self._head_pattern(len(names))
            found = pattern.match(self._text, offset)
            if found is not None:
                raise self._surplus(names, found)
            raise self._error("the conclusion is missing", [repr(start)])
        if not start.strip() and (found := self._head_pattern(1).match(self._text, self._pos)):
            raise self._surplus(names, found)
        for tag in self._tags.join:
            if _opens(tag):
                frames.append(_Frame(tag, offset))
            elif frames[-1].close == [tag]:
                frames.pop()

    def _surplus(self, names: Sequence[PathName], found: re.Match[str]) -> GrammarError:
        allowed = [repr(_text(self._profile.join.start))] if self._tags.join else self._closers()
        if not found.re.groups:
            reason = f"path {len(names) + 1} is one more than the {len(names)} the profile opens"
        elif found[1] in {name.name for name in names}:
            reason = f"duplicate path name {found[1]!r}"
        else:
            reason = f"path {found[1]!r} has no outline"
        return self._error(reason, allowed, found.start())

    def _closers(self) -> list[str]:
        return [] if self._tags.block is None else [self._tags.block.replace("<", "</", 1)]

    def _bad_head(
        self, names: Sequence[PathName], index: int, offset: int | None = None
    ) -> GrammarError:
        """Say what is wrong where the path ``names[index]`` must start."""
        offset = self._pos if offset is None else offset
        allowed = [repr(self._head(names[index], index).strip())]
        found = self._head_pattern(index).match(self._text, offset)
        name = found[1] if found is not None and found.re.groups else None
        if name is None or name == names[index].name:
            reason = f"path {names[index].name!r} is missing"
        elif name in {before.name for before in names[:index]}:
            reason = f"duplicate path name {name!r}"
        elif name in {later.name for later in names}:
            reason = f"wrong path name {name!r}: path {names[index].name!r} comes first"
        else:
            reason = f"wrong path name {name!r}: no outline has it"
        return self._error(reason, allowed, offset)

    # -- tags in generated text ------------------------------------------------------------------

    def _start_sequential(self, seen: ForkSeen, top: _Frame) -> None:
        """Expect a block's paths in the generated text: it does not fork."""
        self.num_sequential += 1
        top.outlined = True
        top.names, top.num_seen, top.join = seen.names, 0, list(self._tags.join)

    def _visit(self, tag: str, offset: int, frames: list[_Frame]) -> None:
        """Check a tag that the model wrote against the tags that are open."""
        top = frames[-1]
        if not _opens(tag):
            self._visit_close(tag, offset, frames)
            return
        if top.num_seen < len(top.names):
            head = self._head(top.names[top.num_seen], top.num_seen).strip()
            if not re.compile(_loose(head)).match(self._text, offset):
                raise self._bad_head(top.names, top.num_seen, offset)
            top.num_seen += 1
        elif top.join:
            if tag != top.join[0]:
                raise self._not_joined(top, offset)
            top.join.pop(0)
        elif tag not in self._children(top):
            raise self._misplaced(tag, top, offset)
        frames.append(_Frame(tag, offset))

    def _visit_close(self, tag: str, offset: int, frames: list[_Frame]) -> None:
        top = frames[-1]
        self._check_complete(top, offset, tag)
        if top.close != [tag]:
            allowed = self._children(top) + top.close
            if top.tag is None:
                raise self._error(f"{tag} closes nothing", allowed or ["text"], offset)
            line, column = self._place(top.offset)
            reason = f"{top.tag} of line {line}, column {column} is not closed"
            raise self._error(reason, allowed, offset)
        frames.pop()
        if top.join:
            frames[-1].join = top.join[1:]

    def _check_complete(self, top: _Frame, offset: int, tag: str | None = None) -> None:
        """Refuse to leave a frame that still lacks an outline, a path or a conclusion."""
        if top.num_seen < len(top.names):
            raise self._bad_head(top.names, top.num_seen, offset)
        if top.join and tag != top.join[0]:
            raise self._not_joined(top, offset)
        leaves_block = tag is not None and top.close == [tag] and top.tag == self._tags.block
        if leaves_block and not top.outlined and self._tags.outline not in (None, top.tag):
            raise self._error(f"{top.tag} has no outline", [str(self._tags.outline)], offset)

    def _not_joined(self, top: _Frame, offset: int) -> GrammarError:
        found = self._head_pattern(top.num_seen).match(self._text, offset)
        if found is not None:
            return self._surplus(top.names, found)
        return self._error("the conclusion is missing", [top.join[0]], offset)

    def _children(self, top: _Frame) -> list[str]:
        """Return the tags that may open inside a frame in which nothing is due."""
        tags = self._tags
        if top.tag is not None and top.tag == (tags.outline or (tags.items and tags.block)):
            return [item for item in tags.items if _opens(item)]
        if top.tag in tags.items:
            return []
        if top.tag is not None and top.tag == tags.block:
            return [] if top.outlined or tags.outline is None else [tags.outline]
        return [] if tags.block is None else [tags.block]

    def _misplaced(self, tag: str, top: _Frame, offset: int) -> GrammarError:
        where = "outside a block" if top.tag is None else f"inside {top.tag}"
        if top.outlined and (found := self._head_pattern(1).match(self._text, offset)):
            where = "behind the block's last path"
            if found.re.groups:
                return self._surplus(top.names, found)
        return self._error(f"{tag} {where}", self._children(top) + top.close or ["text"], offset)

    def _check_path(self, tag: str, offset: int, frames: list[_Frame]) -> None:
        """Refuse a path's end that leaves tags open inside the path."""
        top = frames[-1]
        if top.tag is not None and tag in self._tags.all:
            line, column = self._place(top.offset)
            reason = f"{tag} ends the path, but {top.tag} of line {line}, column {column} is open"
            raise self._error(reason, top.close, offset)

    def _check_end(self, frames: list[_Frame], depth: int) -> None:
        top = frames[-1]
        if depth or top.tag is not None:
            line, column = self._place(top.offset)
            inside = top.tag or "a path"
            allowed = top.close or [repr(end) for end in self._profile.path.end]
            reason = f"the text ends inside {inside} of line {line}, column {column}"
            raise self._error(reason, allowed)
        self._check_complete(top, self._pos)

    def _check_nothing_behind(self) -> None:
        """Note white space behind the tag that ends the answer; refuse anything else."""
        rest = self._text[self._pos :]
        if rest.strip():
            raise self._error("text behind the end of the answer", ["end of text"])
        if rest:
            line, column = self._place(self._pos)
            self.notes.append(
                f"line {line}, column {column}: the engine ends the answer here, not with {rest!r}"
            )

    # -- text ------------------------------------------------------------------------------------

    def _take(self, forced: str) -> bool:
        """Step over forced text if it is there; white space may differ, which is noted."""
        if self._text.startswith(forced, self._pos):
            self._pos += len(forced)
            return True
        found = re.compile(_loose(forced)).match(self._text, self._pos)
        if found is None:
            return False
        line, column = self._place(self._pos)
        self.notes.append(
            f"line {line}, column {column}: the engine writes {forced!r} here, not {found[0]!r}"
        )
        self._pos = found.end()
        return True

    def _place(self, offset: int) -> tuple[int, int]:
        before = self._text[:offset]
        return before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1

    def _error(
        self, reason: str, allowed: Sequence[str], offset: int | None = None
    ) -> GrammarError:
        offset = self._pos if offset is None else offset
        rest = self._text[offset:].lstrip()
        offset = len(self._text) - len(rest)
        tag = self._tags.lexer.match(rest)
        found = tag[0] if tag is not None else rest.split("\n")[0][:30]
        line, column = self._place(offset)
        return GrammarError(reason, line, column, repr(found) if found else "end of text", allowed)


@dataclass(frozen=True)
class _Pieces:
    """The reader's pieces of text, as a vocabulary for a scanner."""

    pieces: list[str]

    def piece(self, token_id: int) -> str:
        return self.pieces[token_id]

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError("the reader forces no text")


def _loose(forced: str) -> str:
    """Return a pattern for forced text in which white space may differ."""
    words = forced.split()
    if not words:
        return r"[^\S\n]*\n?"
    tail = forced[len(forced.rstrip()) :]
    end = f"(?:{re.escape(tail)})?" if tail else ""
    return r"\s*" + r"\s*".join(map(re.escape, words)) + end


# -- the tree --------------------------------------------------------------------------------------


class _Told(Scanner):
    """A scanner that is told what it sees."""

    def __init__(self) -> None:
        self.event: Event | None = None

    def feed(self, token_id: int) -> Event | None:
        event, self.event = self.event, None
        return event

    def at_end(self) -> ForkSeen | None:
        return self.event if isinstance(self.event, ForkSeen) else None


class _ToldGrammar(Grammar):
    def scanner(
        self,
        *,
        in_path: bool,
        max_names: int,
        concludes: bool = False,
        seed: str = "",
        forks: bool = True,
    ) -> Scanner:
        return _Told()


class _Replay:
    """Plays a text that was read through a group, one branch after the other."""

    def __init__(self, profile: Profile, vocabulary: Vocabulary) -> None:
        self._profile = profile
        self._vocabulary = vocabulary
        options = RequestOptions(profile.name, max_paths=_PLENTY, max_depth=_PLENTY)
        limits = Limits(1, _PLENTY**3, _PLENTY, _PLENTY, has_room=lambda _: True)
        self.group = Group((), _ToldGrammar(profile, vocabulary), options, limits)
        self._names: dict[Lane, str] = {}
        self._texts: dict[Node, str] = {}

    def run(self, steps: list[_Step]) -> list[Branch]:
        """Play the trunk and everything inside it; return the branches in visible order."""
        self._settle()
        self._play(steps, self.group.trunk)
        return list(self._branches())

    def _play(self, steps: list[_Step], node: Node) -> list[Node]:
        """Play one lane, from its first node on; return the nodes that its end made ready."""
        for step in steps:
            ready = self._write(node, step)
            if step.block is None:
                return ready
            behind: list[Node] = []
            for name, path, inner in zip(step.block.names, ready, step.block.paths, strict=True):
                self._names[path.lane] = name.name
                behind = self._play(inner, path)
            (node,) = behind
        raise AssertionError("a lane's last step opens no block")

    def _write(self, node: Node, step: _Step) -> list[Node]:
        """Write a step's text into a node, end the node, and return what that made ready."""
        tokens = self._vocabulary.encode(step.text)
        self._texts[node] = step.text
        scanner = node.scanner
        assert isinstance(scanner, _Told)
        event = self._event(node, step)
        by_end = event is None or (step.block is not None and step.block.by_end)
        verdict = Verdict.CONTINUE
        for index, token in enumerate(tokens):
            if index == len(tokens) - 1 and not by_end:
                scanner.event = event
            verdict = self.group.feed(node, token)
        if by_end:
            scanner.event = event
            self.group.end(node, Cause.EOS)
        else:
            assert verdict is not Verdict.CONTINUE, "a tag that was read ends its branch"
            cause = Cause.CLOSED if verdict is Verdict.CLOSE else Cause.VERDICT
            self.group.end(node, cause)
        self.group.sealed(node, kept=True)
        return self._settle()

    @staticmethod
    def _event(node: Node, step: _Step) -> Event | None:
        if step.block is not None:
            return ForkSeen(step.block.names, opened=True)
        return BranchEnd() if node.depth else None

    def _settle(self) -> list[Node]:
        """Start what can start, run nodes that only compute, and return those that generate."""
        started: list[Node] = []
        while ready := self.group.ready():
            for node in ready:
                self.group.started(node)
                if node.kind is Kind.CLOSE:
                    self.group.end(node, Cause.CLOSED)
                    self.group.sealed(node, kept=True)
                else:
                    started.append(node)
        return started

    def _branches(self) -> Iterator[Branch]:
        nodes = [node for node in self.group.nodes if node.state is State.DONE]
        while nodes:
            node, last = nodes.pop(0), None
            run = [node]
            while nodes and nodes[0].kind is Kind.CLOSE:
                run.append(last := nodes.pop(0))
            label = f"path {self._names[node.lane]}" if node.kind is Kind.PATH else node.kind.value
            yield Branch(
                label=label,
                depth=node.depth,
                num_generated=sum(part.num_sampled for part in run),
                num_forced=sum(len(part.forced_visible) for part in run),
                start=node.start + node.num_hidden,
                end=(last or node).end - 1,
                text=self._texts[node],
            )


# -- for people ------------------------------------------------------------------------------------


def render(result: Trace, counted_by: str) -> str:
    """Return a trace as lines of text.

    Args:
        result: The trace.
        counted_by: What its tokens are.

    """
    labels = ["  " * branch.depth + branch.label for branch in result.branches]
    width = max(6, *map(len, labels))
    lines = [f"{'branch':{width}}  generated  forced     positions  text"]
    for label, branch in zip(labels, result.branches, strict=True):
        span = f"{branch.start}..{branch.end}" if branch.end >= branch.start else "-"
        lines.append(
            f"{label:{width}}  {branch.num_generated:9}  {branch.num_forced:6}  {span:>12}"
            f"  {_excerpt(branch.text)}"
        )
    figures = result.summary
    lines += [
        "",
        f"{figures['forks']} forks, {figures['paths']} paths, depth {figures['depth']}; "
        f"{result.num_sequential} blocks written sequentially; join: {figures['join']}",
        f"generated {figures['generated_tokens']}, forced {figures['forced_tokens']}, "
        f"critical path {figures['critical_path_tokens']} tokens; "
        f"parallelism ratio {figures['parallelism_ratio']}",
        f"tokens are {counted_by}; positions count from the answer's first token",
    ]
    return "\n".join(lines + [f"note: {note}" for note in result.notes])


def _excerpt(text: str, length: int = 32) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def render_json(result: Trace | GrammarError, counted_by: str) -> str:
    """Return a trace, or the error in its place, as a JSON object."""
    if isinstance(result, GrammarError):
        return json.dumps({"error": result.as_dict()}, ensure_ascii=False, indent=2)
    values = {"tokens": counted_by, **result.as_dict()}
    return json.dumps(values, ensure_ascii=False, indent=2)
