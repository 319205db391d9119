"""The tags of a profile."""

from __future__ import annotations

import re

from ..config.profile import ForkRule, JoinRule, PathRule
from .wording import text_of

TAG = re.compile(r"</?[A-Za-z][\w-]*>")


class Tags:
    """The tags of a profile by their part in a block."""

    def __init__(self, fork: ForkRule, path: PathRule, join: JoinRule) -> None:
        openings = [tag for tag in map(str, fork.trigger) if opens(tag)]
        block = fork.open or fork.names_after or (openings[0] if openings else None)
        self.block = str(block) if block is not None else None
        self.outline = str(fork.names_after) if fork.names_after is not None else None
        self.items = TAG.findall(fork.names or "")
        self.join = TAG.findall(text_of(join.start))
        named = [*fork.trigger, *path.end, *path.start, *path.close, *join.start, *self.items]
        named += [tag for tag in (fork.open, fork.names_after, path.open) if tag is not None]
        found = {tag for text in named for tag in TAG.findall(str(text))}
        found |= {"</" + tag[1:] if opens(tag) else "<" + tag[2:] for tag in found}
        self.all = frozenset(found)
        others = [*found, *map(str, fork.trigger), *map(str, path.end)]
        self.lexer = re.compile(
            "|".join(sorted(map(re.escape, set(others)), key=len, reverse=True))
        )


def opens(tag: str) -> bool:
    """Say whether a text is an opening tag."""
    return TAG.fullmatch(tag) is not None and not tag.startswith("</")
