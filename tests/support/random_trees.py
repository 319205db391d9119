"""Random trees of Multiverse blocks, as scripts and as the text they must come out as."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.support.player import EOS

RANDOM = settings(
    deadline=None, max_examples=40, derandomize=True, suppress_health_check=list(HealthCheck)
)


@st.composite
def paths(draw, name: str, depth: int) -> str | tuple:
    """Draw the body of a branch: words, and below the deepest level perhaps a block."""
    words = "".join(draw(st.lists(st.sampled_from([" a", " b", "\n", ".", " 7"]), max_size=6)))
    if depth >= 2 or not draw(st.booleans()):
        return words
    names = [f"{name}{i + 1}" for i in range(draw(st.integers(2, 3)))]
    inner = [(n, draw(paths(f"{n}.", depth + 1)), draw(st.booleans())) for n in names]
    return words, inner, draw(paths(name, 2))


def write(body, address: tuple[str, int], scripts: dict, tail: tuple) -> str:
    """Fill in the scripts of a Multiverse tree; return the text it must come out as."""
    lane, index = address
    here = f"{lane}.{index}"
    if isinstance(body, str):
        scripts[here] = (body, *tail)
        return body
    words, inner, rest = body
    outlines = "".join(f"<Outline>\n{name}: o\n</Outline>\n" for name, _, _ in inner)
    head = f"{words}<Parallel>\n<Goal>\n{outlines}</Goal>"
    scripts[here] = (head,)
    text = head + "\n"
    for number, (name, inside, by_tag) in enumerate(inner):
        end = ("\n</Path>",) if by_tag else (EOS,)
        place = (f"{lane}.{index + 1}/{number}", 0)
        text += f"<Path>\n{name}:{write(inside, place, scripts, end)}\n</Path>\n"
    joined = f"{rest}</Conclusion>\n</Parallel>\n"
    scripts[f"{lane}.{index + 2}"] = (joined, *tail)
    return f"{text}<Conclusion>\n{joined}"
