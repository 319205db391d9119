"""Reading an answer whose outline the client did not see, by its headings."""

from __future__ import annotations

import re

from ..branch_graph import PathName
from ..config.profile import Profile
from .cursor import Cursor
from .steps import Block, Step
from .wording import text_of

_NOTHING = re.compile(r"(?!)")


def read_points(text: str, profile: Profile) -> list[Step]:
    """Return the steps of the trunk: up to the first heading, and from the conclusion on.

    What the draft of the outline cost is not in a finished text.

    Raises:
        GrammarError: The opening or the conclusion is missing.

    """
    cursor = Cursor(text, _NOTHING)
    opening = text_of(profile.opening)
    if not cursor.take(opening):
        raise cursor.error("the engine's opening is missing", [repr(opening)])
    heads = _heads(text, cursor.pos, profile)
    if len(heads) < 2:
        return [Step(text[cursor.pos :], None)]
    starts = [text_of(start) for start in (profile.join.start, *_others(profile))]
    join = _join(text, heads[-1].end(), starts)
    if join is None:
        raise cursor.error("the conclusion is missing", [repr(starts[0])], len(text))
    ends = [*(head.start() for head in heads[1:]), join.start()]
    paths = [[Step(text[head.end() : end], None)] for head, end in zip(heads, ends, strict=True)]
    names = tuple(PathName(str(n + 1), head["title"]) for n, head in enumerate(heads))
    block = Block(names, True, paths)
    return [Step(text[cursor.pos : heads[0].start()], block), Step(text[join.end() :], None)]


def _heads(text: str, pos: int, profile: Profile) -> list[re.Match[str]]:
    """Return the headings before the points, numbered from 1 on."""
    heads: list[re.Match[str]] = []
    while True:
        head = text_of(profile.path.start, PathName(str(len(heads) + 1), "{title}"))
        title = re.escape(head).replace(re.escape("{title}"), "(?P<title>[^\\n]+?)", 1)
        found = re.compile("^" + title, re.MULTILINE).search(text, pos)
        if found is None:
            return heads
        heads.append(found)
        pos = found.end()


def _others(profile: Profile) -> list[tuple[str | int, ...]]:
    return [rule.start for rule in profile.join.starts]


def _join(text: str, pos: int, starts: list[str]) -> re.Match[str] | None:
    """Return the last place at which a line begins as conclusions do."""
    start = re.compile("^(?:" + "|".join(map(re.escape, starts)) + ")", re.MULTILINE)
    return max(start.finditer(text, pos), key=lambda found: found.start(), default=None)
