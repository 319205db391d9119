"""Reading a finished answer: its tree, and the positions and figures the engine would give it.

The text is read as if the engine had written it without limits: whatever may fork by the profile
does. Blocks that may not (a single path, or nested deeper than the grammar goes) count as plain
text of the branch they stand in, as they do in the engine, but must have the grammar's form all the
same. A text that breaks that form is read once more as the engine reads it, which knows the tags
only that fork a branch or end one: if the paths of a fork and its conclusion are all there, the
break is a note. An answer that the profile ends with its conclusion (``[join] end``) ends there:
white space after that tag is noted, as a token may carry it along, and anything else breaks the
grammar. Once the text is understood, a
:class:`~vllm_parallel_think.core.fork_join.group.ForkJoinGroup` replays it, so that positions and
figures are the engine's own. Two things a text does not show: whether a path's end tag was forced
because a budget ran out (it counts as generated), and end-of-sequence tokens (they are not
counted).
"""

from .answer import Trace, trace
from .cursor import GrammarError
from .pieces import PIECE_RULE, PieceVocabulary
from .replay import ReplayedBranch
from .report import render, render_json

__all__ = [
    "PIECE_RULE",
    "GrammarError",
    "PieceVocabulary",
    "ReplayedBranch",
    "Trace",
    "render",
    "render_json",
    "trace",
]
