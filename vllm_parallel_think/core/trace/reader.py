"""Reading a text by its grammar: which branch wrote what, and where it forked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..branch_graph import PathName
from ..config.profile import MAX_PATHS_LIMIT, Profile
from ..fork_join.tag_scanner import BranchEnd, ForkSeen, Grammar, Scanner
from .cursor import Cursor
from .heads import TAG, Heads, Tags, opens
from .nesting import Frame, Nesting
from .steps import Block, Step
from .wording import PLENTY, text_of


class Reader:
    """Reads a text by its grammar, from left to right."""

    def __init__(self, text: str, profile: Profile, *, by_form: bool = True) -> None:
        """Start before a text.

        Args:
            text: A finished answer.
            profile: Its grammar.
            by_form: Whether all tags must stand where the grammar has them. The engine looks at
                those only that fork a branch or end it.

        """
        self._profile = profile
        self._by_form = by_form
        self._tags = Tags(profile.fork, profile.path, profile.join)
        self._cursor = Cursor(text, self._tags.lexer)
        self._heads = Heads(profile, self._tags, self._cursor)
        self._nesting = Nesting(profile, self._tags, self._heads, self._cursor)
        self._pieces: list[str] = []
        self._grammar = Grammar(profile, _Pieces(self._pieces))
        self.forked = False
        """Whether any block ran side by side."""

    @property
    def num_sequential(self) -> int:
        """Blocks that the model wrote one path after the other."""
        return self._nesting.num_sequential

    @property
    def notes(self) -> list[str]:
        """Places where the text differs from what the engine would write, without harm."""
        return self._cursor.notes

    def read(self) -> list[Step]:
        """Return the steps of the trunk.

        Raises:
            GrammarError: The text breaks the grammar.

        """
        opening = text_of(self._profile.opening)
        if not self._cursor.take(opening):
            raise self._cursor.error("the engine's opening is missing", [repr(opening)])
        frames = [Frame(None, 0)]
        if self._profile.fork.at_start:
            return self._lane(frames, 0, steps=[Step("", self._first_block(frames))])
        return self._lane(frames, 0, opening.rpartition("\n")[2])

    def _first_block(self, frames: list[Frame]) -> Block:
        """Read the paths of an answer that forks at the start, as many as there are."""
        self.forked = True
        names, paths = self._unnamed(1, 1)
        self._take_join(names, frames)
        return Block(names, False, paths)

    def _unnamed(self, least: int, depth: int) -> tuple[tuple[PathName, ...], list[list[Step]]]:
        """Read paths that no outline names, as many as there are."""
        named = self._grammar.numbered(MAX_PATHS_LIMIT)
        paths: list[list[Step]] = []
        for index in range(len(named)):
            if index >= least and not self._heads.pattern(index).match(
                self._cursor.text, self._cursor.pos
            ):
                break
            paths.append(self._path(named, index, depth, last=index + 1 >= least))
            self._cursor.take(text_of(self._profile.path.after))
        return named[: len(paths)], paths

    def _path(
        self, names: Sequence[PathName], index: int, depth: int, *, last: bool = False
    ) -> list[Step]:
        """Read a path from its head to its end."""
        offset, name = self._cursor.pos, names[index]
        if not self._cursor.take(self._heads.text(name, index)):
            raise self._heads.wrong(names, index)
        tags = TAG.findall(text_of(self._profile.path.start, name))
        inside = [Frame(None, offset), *(Frame(tag, offset) for tag in tags if opens(tag))]
        behind = [text_of(self._profile.join.start)] if last or index == len(names) - 1 else []
        if index + 1 < len(names):
            behind.append(self._heads.text(names[index + 1], index + 1))
        after = text_of(self._profile.path.after)
        return self._lane(inside, depth, behind=[after + start for start in behind])

    def _lane(
        self,
        frames: list[Frame],
        depth: int,
        seed: str = "",
        steps: Sequence[Step] = (),
        behind: Sequence[str] = (),
    ) -> list[Step]:
        steps = list(steps)
        while True:
            start = self._cursor.pos
            concludes = bool(steps) and depth == 0
            scanner = self._grammar.scanner(
                in_path=depth > 0, concludes=concludes, max_names=PLENTY, seed=seed
            )
            fork = self._run(scanner, self._ends(depth, concludes), frames, depth, behind)
            text = self._cursor.text[start : self._cursor.pos]
            if fork is None:
                if depth == 0:
                    self._cursor.check_nothing_behind()
                return [*steps, Step(text, None)]
            steps.append(Step(text, self._block(*fork, frames, depth)))
            seed = ""

    def _ends(self, depth: int, concludes: bool) -> tuple[str, ...]:
        """Return the tags that end a branch, as the engine's scanner looks for them."""
        rule = self._profile
        return tuple(map(str, rule.path.end if depth else rule.join.end if concludes else ()))

    def _run(
        self,
        scanner: Scanner,
        ends: Sequence[str],
        frames: list[Frame],
        depth: int,
        behind: Sequence[str],
    ) -> tuple[tuple[PathName, ...], bool] | None:
        """Read up to the next fork (its names, and whether no tag shows it) or the lane's end."""
        start, heading = self._cursor.pos, self._heading(depth)
        outer = list(frames)
        while self._cursor.pos < len(self._cursor.text):
            offset = self._cursor.pos
            piece = self._cursor.next_piece(self._cursor.first_end(ends, start), heading)
            self._pieces.append(piece)
            if piece in self._tags.all and self._by_form:
                self._nesting.visit(piece, offset, frames)
            event = scanner.feed(len(self._pieces) - 1)
            if not self._by_form and self._ends_by_close(offset, ends, behind):
                return None
            if isinstance(event, BranchEnd):
                if not self._by_form:
                    pass
                elif depth:
                    self._nesting.check_path(piece, offset, frames)
                elif any(frames[-1] is frame for frame in outer):  # the block's own may stay open
                    self._nesting.check_complete(frames[-1], self._cursor.pos)
                else:
                    self._nesting.check_end(frames, depth)
                return None
            if isinstance(event, ForkSeen):
                if self._may_fork(event, depth):
                    return event.names, False
                if piece in self._tags.all and self._by_form:
                    self._nesting.start_sequential(event, frames[-1])
            if self._cursor.pos == heading:
                seen = scanner.at_end()
                if seen is not None and self._may_fork(seen, depth):
                    return seen.names, True
                heading = self._heading(depth)
        if depth or self._by_form:
            self._nesting.check_end(frames, depth)
        return None

    def _ends_by_close(self, offset: int, ends: Sequence[str], behind: Sequence[str]) -> bool:
        """Say whether a path's end is here, by what the engine writes after it.

        A path that opened another one and left it open was closed by the engine, which a scanner
        takes for the inner one's end.
        """
        text, pos = self._cursor.text, self._cursor.pos
        closed = any(text.endswith(end, 0, pos) and pos - len(end) <= offset for end in ends)
        return closed and any(text.startswith(start, pos) for start in behind)

    def _heading(self, depth: int) -> int | None:
        """Return where a first path's heading comes next, for grammars that fork without a tag."""
        if not self._profile.fork.on_end or depth or self.forked:
            return None
        text, start = self._cursor.text, self._cursor.pos + 1
        # An outline may end in what looks like half a heading.
        found = self._heads.pattern(0, exact=True).search(text, start)
        found = found or self._heads.pattern(0).search(text, start)
        if found is None:
            return None
        # White space before the heading is the outline's, but for what the engine writes.
        head = self._heads.text(PathName(""), 0)
        lead = head[: len(head) - len(head.lstrip())]
        first = found.start() + len(found[0]) - len(found[0].lstrip())
        return first - len(lead) if text.endswith(lead, 0, first) else first

    def _may_fork(self, seen: ForkSeen, depth: int) -> bool:
        spent = self._profile.fork.once and self.forked
        fits = len(seen.names) >= 2 and depth < self._profile.max_depth
        return fits and seen.opened and not spent and (self._by_form or self._has_forked(seen))

    def _has_forked(self, seen: ForkSeen) -> bool:
        """Say whether the engine forked here: it may have had no room for that."""
        start = text_of(self._profile.fork.after) + self._heads.text(seen.names[0], 0)
        return self._cursor.text.startswith(start, self._cursor.pos)

    def _block(
        self, names: tuple[PathName, ...], by_end: bool, frames: list[Frame], depth: int
    ) -> Block:
        """Read a block's paths, up to and including what is forced at the join."""
        self.forked = True
        frames[-1].outlined = True
        # An outline cut by a token limit may end in half a line, for which there is no path.
        cut = by_end and self._cursor.text[self._cursor.pos - 1] != "\n" and len(names) > 2
        self._cursor.take(text_of(self._profile.fork.after))
        if self._profile.fork.names is None:
            offset = self._cursor.pos
            found, paths = self._unnamed(2, depth + 1)
            if len(found) != len(names):
                self._cursor.note(f"{len(found)} paths, the engine opens {len(names)}", offset)
            self._take_join(found, frames)
            return Block(found, by_end, paths)
        paths = []
        for index in range(len(names)):
            if (
                cut
                and index == len(names) - 1
                and not self._heads.pattern(index).match(self._cursor.text, self._cursor.pos)
            ):
                names = names[:-1]
                break
            paths.append(self._path(names, index, depth + 1))
            self._cursor.take(text_of(self._profile.path.after))
        self._take_join(names, frames)
        return Block(names, by_end, paths)

    def _take_join(self, names: tuple[PathName, ...], frames: list[Frame]) -> None:
        start = text_of(self._profile.join.start)
        offset = self._cursor.pos
        if not self._cursor.take(start):
            pattern = self._heads.pattern(len(names))
            found = pattern.match(self._cursor.text, offset)
            if found is not None:
                raise self._heads.surplus(names, found)
            raise self._cursor.error("the conclusion is missing", [repr(start)])
        if not start.strip() and (
            found := self._heads.pattern(1).match(self._cursor.text, self._cursor.pos)
        ):
            raise self._heads.surplus(names, found)
        for tag in self._tags.join:
            if opens(tag):
                # The end of the answer closes what stands around all of its text.
                last = self._profile.fork.at_start
                frames.append(Frame(tag, offset, may_stay_open=last))
            elif frames[-1].close == [tag]:
                frames.pop()


@dataclass(frozen=True)
class _Pieces:
    """The reader's pieces of text, as a vocabulary for a scanner."""

    pieces: list[str]

    def piece(self, token_id: int) -> str:
        return self.pieces[token_id]

    def text(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.piece, token_ids))

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError("the reader forces no text")
