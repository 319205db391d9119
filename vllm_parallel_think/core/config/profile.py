"""Profiles: one data file per grammar of parallel thinking.

A profile says which tags the model writes, which tokens the engine writes for it, and which
positions paths and conclusions get. A client can only name one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tag = str | int
"""A tag the model writes: its text, or the id of a single special token."""

Forced = tuple[Tag, ...]
"""Text the engine writes: pieces of text (``{name}``, ``{title}`` are filled in) or token ids."""

MAX_PATHS_LIMIT = 64
"""Most paths that one fork may have, whatever anybody sets."""


@dataclass(frozen=True)
class ForkRule:
    """When a branch forks, and what its paths are called.

    Attributes:
        trigger: Any of these tags, once generated, forks.
        open: Tag that must have been generated before the trigger; ``None`` asks for none.
        names_after: The names are read from the text after the last occurrence of this tag.
        names: Regular expression; group 1 is a path's name, group 2 (if any) its title.
        num_paths: Number of paths for grammars whose blocks do not name them (``names`` absent).
        min_tokens_left: No fork when fewer tokens than this are left in the request's budget.
        on_end: An end-of-sequence token forks too, if enough names were written.
        max_outline_tokens: Fork after this many tokens of a branch, if enough names were written.
        when_full: Fork as soon as ``max_paths`` names were written and the line is complete.
        once: Only the first branch of a request may fork.
        at_start: The answer forks right after the prompt, before anything is generated; the client
            may choose the number of paths. Such a profile has no ``trigger``.
        after: Forced once after the trigger, before all paths; the first path's position is
            that of its own first token all the same.

    """

    trigger: tuple[Tag, ...] = ()
    open: Tag | None = None
    names_after: Tag | None = None
    names: str | None = None
    num_paths: int | None = None
    min_tokens_left: int = 0
    on_end: bool = False
    max_outline_tokens: int | None = None
    when_full: bool = False
    once: bool = False
    at_start: bool = False
    after: Forced = ()


@dataclass(frozen=True)
class PathRule:
    """How a path starts and ends.

    Attributes:
        start: Forced at the start of a path; must not be empty.
        end: Any of these tags, once generated, ends the path.
        close: Forced when a path ends in any other way (end of sequence, budget).
        after: Forced after every path's end tag; does not count for the conclusion's position.
        stride: Path ``i`` (from 0) starts at the position after the trigger plus ``i * stride``;
            0 starts all of them there.
        num_tags: How many paths the model's control tokens tell apart: ``{tag}`` in ``start`` and
            ``close`` counts from 1 to this and starts again; ``None`` never starts again.
        open: Tag a model writes to open a path by itself; pairs with ``end`` in sequential blocks.
        max_tokens: Budget of a path unless the request sets its own; ``None`` is unlimited.

    """

    start: Forced
    end: tuple[Tag, ...] = ()
    close: Forced = ()
    after: Forced = ()
    stride: int = 0
    num_tags: int | None = None
    open: Tag | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class OutlineRule:
    """How an outline comes about that the client does not see.

    Attributes:
        tries: Places of an answer in which a list is looked for, before it goes on as text.
        max_title_tokens: A heading longer than this is none.
        invite: Whether the first number is written for the model after a paragraph; after a colon
            a list is always the model's own idea.

    """

    tries: int = 2
    max_title_tokens: int = 24
    invite: bool = False


@dataclass(frozen=True)
class StartRule:
    """A conclusion's start in answers that read like something.

    Attributes:
        match: Regular expression that is looked for in the text before the list and its
            titles.
        start: Forced in place of ``[join] start``.

    """

    match: str
    start: Forced


@dataclass(frozen=True)
class JoinRule:
    """How the conclusion starts.

    Attributes:
        start: Forced at the start of the conclusion; must not be empty.
        mode: ``kv`` reuses the K/V of all paths; ``reprefill`` computes a linear, causal copy.
        position: Where a conclusion over reused K/V starts: after the ``longest`` path (the one
            that reaches furthest), or after the ``total`` of all paths laid end to end. A linear
            copy has the positions of its text.
        first_only: Forced text at the start of every path that only the first one keeps in the
            answer (it must be how ``[path] start`` begins).
        end: Any of these tags, once generated in a conclusion of the trunk, ends the answer; empty
            for models that end it themselves.
        starts: Other starts, for answers in other languages; the first that matches is taken.

    """

    start: Forced
    mode: Literal["kv", "reprefill"] = "kv"
    position: Literal["longest", "total"] = "longest"
    first_only: Forced = ()
    end: tuple[Tag, ...] = ()
    starts: tuple[StartRule, ...] = ()


@dataclass(frozen=True)
class Profile:
    """A grammar of parallel thinking (see ``docs`` of each rule).

    Attributes:
        name: Name that requests use.
        summary: One line for people.
        outline: How the paths' titles are found out, for models that write no outline.
        opening: Forced at the very start of the answer; empty for models trained on a grammar.
        max_depth: Deepest nesting of the grammar, whatever the server allows.

    """

    name: str
    summary: str
    fork: ForkRule
    path: PathRule
    join: JoinRule
    outline: OutlineRule | None = None
    opening: Forced = ()
    max_depth: int = 8

    @property
    def tags(self) -> tuple[Tag, ...]:
        """All tags that mean something when the model writes them."""
        single = (self.fork.open, self.fork.names_after, self.path.open)
        several = (*self.fork.trigger, *self.path.end, *self.join.end)
        return (*several, *(tag for tag in single if tag is not None))

    @property
    def all_tags(self) -> tuple[Tag, ...]:
        """Every text and token id of the profile, those that are forced included."""
        fork, path, join = self.fork, self.path, self.join
        forced = (*self.opening, *fork.after, *path.start, *path.close, *path.after)
        starts = (tag for rule in join.starts for tag in rule.start)
        return (*self.tags, *forced, *join.start, *starts, *join.first_only)
