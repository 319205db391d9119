"""How large things may get; ``python -m tests.contracts.bars`` prints the figures."""

from __future__ import annotations

from tests.contracts import bars

MOST_ROOT_MODULES = 8
MOST_FILE_LINES = 450
MOST_METHODS = 25
MOST_FUNCTION_LINES, MOST_LINES_OF_NINE_IN_TEN = 115, 24
LEAST_DOCSTRINGS = 0.8


def above(sizes: dict[str, int], most: int) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if size > most}


def test_few_modules_lie_loose() -> None:
    assert len(bars.root_modules()) <= MOST_ROOT_MODULES, bars.root_modules()


def test_a_file_is_one_idea() -> None:
    assert not above({file.name: file.num_lines for file in bars.files()}, MOST_FILE_LINES)
    assert not bars.catch_alls()


def test_a_class_can_be_overlooked() -> None:
    assert not above(bars.methods(), MOST_METHODS)
    assert not above(bars.mixin_depths(), 1), "hold an object instead"


def test_a_function_is_a_screen() -> None:
    sizes = bars.functions()
    assert not above(sizes, MOST_FUNCTION_LINES)
    assert bars.quantile(list(sizes.values()), 0.9) <= MOST_LINES_OF_NINE_IN_TEN


def test_every_function_says_what_it_returns() -> None:
    assert not bars.untyped()


def test_most_of_what_is_public_is_explained() -> None:
    known = bars.public_definitions()
    missing = [name for name, has in known.items() if not has]
    assert bars.share_of(list(known.values())) >= LEAST_DOCSTRINGS, missing


def test_no_comment_is_a_banner() -> None:
    assert not bars.banners()


def test_figures_see_what_is_there() -> None:
    """A bar over nothing would always hold."""
    assert {file.name.partition("/")[0] for file in bars.files()} == set(bars.PACKAGES)
    assert len(bars.files()) > 50 and len(bars.functions()) > 300
    assert "__init__.py" in bars.root_modules()
    assert bars.mixin_depths()
    assert bars.BANNER.search("    # -- parts ------") and not bars.BANNER.search("# a -- b")
    assert bars.quantile(range(1, 11), 0.9) == 10
