"""A profile as a finished answer shows it: its tags and forced texts, without limits."""

from __future__ import annotations

import re
from dataclasses import replace

from ..branch_graph import PathName
from ..config.profile import Forced, Profile
from ..vocabulary import Vocabulary

PLENTY = 10**12
"""Stands for no limit, as a text does not show those it was written under."""


def for_reading(profile: Profile, vocabulary: Vocabulary) -> Profile:
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
        join,
        start=texts(join.start),
        first_only=texts(join.first_only),
        end=texts(join.end),
        starts=tuple(replace(rule, start=texts(rule.start)) for rule in join.starts),
    )
    early = profile.fork.on_end or profile.fork.when_full or profile.fork.max_outline_tokens
    return replace(
        profile,
        fork=fork if early else replace(fork, on_end=False),
        path=path,
        join=join,
        opening=texts(profile.opening),
    )


def text_of(parts: Forced, path: PathName | None = None) -> str:
    """Return forced text, with ``{name}``, ``{title}`` and ``{tag}`` filled in for a path."""
    text = "".join(map(str, parts))
    if path is not None:
        text = text.replace("{name}", path.name).replace("{title}", path.title)
        text = text.replace("{tag}", path.tag)
    return text


def loose(forced: str) -> str:
    """Return a pattern for forced text in which white space may differ."""
    words = forced.split()
    if not words:
        return r"[^\S\n]*\n?"
    tail = forced[len(forced.rstrip()) :]
    end = f"(?:{re.escape(tail)})?" if tail else ""
    return r"\s*" + r"\s*".join(map(re.escape, words)) + end
