"""Lists that an answer begins: where that may be, their titles, and where a point ends.

The titles are found out in a draft that the client never sees. It is written item by item, each
after the titles before it, so that the model goes on to the next title instead of explaining
the last one. All three readers take text, token by token, and keep only what they still need.
"""

from __future__ import annotations

import re

_COLONS = ":："
_WIDE_STOPS = "。！？"
_STOPS = ".!?…" + _WIDE_STOPS
_CLOSERS = "\"'`)]}*_”’»）】」』"
"""May stand between the end of a sentence and the blank after it."""

CLOSE_FENCE = "\n```"
"""Forced after a point that its budget ends inside a block of code."""

_FENCES = ("```", "~~~")
_MATH = {"$$": "$$", "\\[": "\\]"}
_MARKS = (*_FENCES, *_MATH, *_MATH.values())

_HEADING = re.compile(
    r"\s*(?:#{1,6}\s+)?(?:\*\*|__)?\s*(?:(\d{1,2})[.)、．]|[-–•*](?=\s))?\s*(?:\*\*|__)?\s*"
)
"""What stands before a title; group 1 is its number."""

_MAX_HEADING = 24
"""Characters in which a heading has begun, if it ever does."""

_MAY_BE_HEADING = "#*_-–•"
_TITLE_END = re.compile(r"\n|(?<!\d):|：|\s[-–—]\s|\.\s|。|\*\*|__|[!?！？]")
_NO_TITLE = re.compile(r"[{}<>|=\\]|```|[+*/×÷]\s*\d")
"""Code, tables and sums are no headings."""


class Prose:
    """Follows text: its lines, its sentences, and whether code or math is open."""

    def __init__(self) -> None:
        self.last = ""
        """The last character that is no blank and no closing mark."""
        self.num_breaks = 0
        """Line breaks since the last character that is no blank."""
        self.has_code = False
        self._fence = ""
        self._math = ""
        self._run = ""

    @property
    def in_block(self) -> bool:
        """Whether code or math is open."""
        return bool(self._fence or self._math)

    @property
    def in_code(self) -> bool:
        """Whether a block of code is open."""
        return bool(self._fence)

    def feed(self, piece: str) -> None:
        """Take more text."""
        for char in piece:
            self._feed(char)

    def _feed(self, char: str) -> None:
        if char == "\n":
            self.num_breaks += 1
            self._run = ""
            return
        if char.isspace():
            self._run = ""
            return
        self.num_breaks = 0
        run = self._run + char
        self._run = run if any(mark.startswith(run) for mark in _MARKS) else char
        if char not in _CLOSERS:
            self.last = char
        if self._run in _MARKS:
            self._toggle(self._run)
            self._run = ""

    def _toggle(self, mark: str) -> None:
        if self._fence or (mark in _FENCES and not self._math):
            if self._fence in ("", mark):
                self._fence = "" if self._fence else mark
                self.has_code = True
            if not self._fence:
                self.last = mark[-1]
        elif self._math:
            self._math = "" if mark == self._math else self._math
            self.last = ":"  # what the formula means is still to come
        else:
            self._math = _MATH.get(mark, "")


class PlaceReader:
    """Finds places in an answer where a list may begin: between two paragraphs, after a colon."""

    def __init__(self) -> None:
        self._prose = Prose()
        self._seen = False

    def feed(self, piece: str) -> bool:
        """Take a token's text; return whether a list may begin after it."""
        prose = self._prose
        prose.feed(piece)
        if prose.num_breaks == 0:
            self._seen = False
            return False
        is_place = prose.num_breaks > 1 or self.after_colon
        if self._seen or not is_place or not prose.last or prose.in_block or prose.has_code:
            return False
        self._seen = True
        return True

    @property
    def after_colon(self) -> bool:
        """Whether the text announces what comes now: then it is up to the model what that is."""
        return self._prose.last != "" and self._prose.last in _COLONS


class TitleReader:
    """Reads one title of the draft, after a number that is there already or not.

    Attributes:
        title: The title, once it is complete; empty if the model writes no heading.

    """

    def __init__(self, number: int, *, numbered: bool) -> None:
        self.title: str | None = None
        self._number = number
        self._numbered = numbered
        self._text = ""

    def feed(self, piece: str) -> bool:
        """Take a token's text; return whether it is decided what the title is."""
        self._text += piece
        return self._decide()

    def end(self) -> None:
        """Take note that nothing follows."""
        self._text += "\n"
        if not self._decide():
            self.title = ""

    def _decide(self) -> bool:
        heading = _HEADING.match(self._text)
        assert heading is not None, "it matches an empty text"
        begun = bool(heading[0].strip())
        body = self._text[heading.end() :]
        if not (begun or self._numbered):
            # A number is two tokens or more, its digits and its dot.
            may_be = (body.isdigit() and len(body) < 3) or body[:1] in _MAY_BE_HEADING
            if not may_be or len(self._text) > _MAX_HEADING:
                self.title = ""
            return self.title is not None
        if heading[1] is not None and int(heading[1]) != self._number:
            self.title = ""
            return True
        end = _TITLE_END.search(body)
        if end is None:
            return False
        title = body[: end.start()].strip(" \t*_#")
        self.title = "" if _NO_TITLE.search(title) else title
        return True


class Draft:
    """The outline that is written where a list may begin.

    Args:
        max_titles: Where it is full.
        invited: Whether the first item's number is written for the model. Otherwise the list must
            be its own idea.

    """

    def __init__(self, max_titles: int, *, invited: bool) -> None:
        self.titles: list[str] = []
        self._max_titles = max_titles
        self._invited = invited

    @property
    def text(self) -> str:
        """What stands before the next title."""
        lines = "".join(f"{n + 1}. {title}\n" for n, title in enumerate(self.titles))
        return f"{lines}{len(self.titles) + 1}." if self._numbered else lines

    def reader(self) -> TitleReader:
        """Return a reader for the next title."""
        return TitleReader(len(self.titles) + 1, numbered=self._numbered)

    @property
    def _numbered(self) -> bool:
        # The second number shows that no explanation is wanted; then the model may end the list.
        return self._invited if not self.titles else len(self.titles) == 1

    def take(self, title: str) -> bool:
        """Take the next title; return whether another one may follow."""
        folded = {_folded(known) for known in self.titles}
        if not _folded(title) or _folded(title) in folded:
            return False
        self.titles.append(title)
        return len(self.titles) < self._max_titles


def _folded(title: str) -> str:
    """Return what two titles that say the same have in common."""
    return re.sub(r"\W+", "", title).casefold()


class PointReader:
    """Finds where a point ends: at a blank line or before the next heading.

    Neither counts inside code and math, nor a blank line after a colon or a formula: the sentence
    goes on.

    Args:
        following: Number of the next heading; ``None`` takes any number for one.
        sentence_after: Tokens after which the end of a sentence ends the point, too.

    """

    def __init__(self, following: int | None, sentence_after: int | None) -> None:
        self._prose = Prose()
        self._following = following
        self._sentence_after = sentence_after
        self._num_tokens = 0

    @property
    def open_fence(self) -> bool:
        """Whether a block of code is open."""
        return self._prose.in_code

    @property
    def num_breaks(self) -> int:
        """Line breaks at the end of the text."""
        return self._prose.num_breaks

    def ends_before(self, piece: str) -> bool:
        """Whether the point ended before a token, whose text this is."""
        prose = self._prose
        if prose.in_block or not prose.last:
            return False
        if prose.num_breaks and self._begins_heading(piece.strip()):
            return True
        return self._is_long and piece[:1].isspace() and prose.last in _STOPS

    def _begins_heading(self, word: str) -> bool:
        if not word.isdecimal():
            return word.startswith("#")
        return self._following is None or str(self._following).startswith(word)

    def ends_with(self, piece: str) -> bool:
        """Take a token's text; return whether the point ends with it."""
        prose = self._prose
        prose.feed(piece)
        self._num_tokens += 1
        if prose.in_block or not prose.last:
            return False
        if prose.num_breaks > 1:
            return prose.last not in _COLONS
        return self._is_long and prose.last in _WIDE_STOPS

    @property
    def _is_long(self) -> bool:
        return self._sentence_after is not None and self._num_tokens >= self._sentence_after
