"""Tags are found in generated text, however a tokenizer splits them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.samples import MULTIVERSE, NPR, THREADS, VISIBLE
from tests.support.vocabularies import ALL, Pieces, chars, odd, tags
from vllm_parallel_think.core.branch_graph import PathName
from vllm_parallel_think.core.config.loading import load_profile
from vllm_parallel_think.core.config.profile import Profile
from vllm_parallel_think.core.errors import OptionError
from vllm_parallel_think.core.fork_join.tag_scanner import BranchEnd, Event, ForkSeen, Grammar


def events(
    profile: str | Profile,
    text: str,
    vocabulary: Pieces,
    *,
    in_path: bool = False,
    concludes: bool = False,
    forks: bool = True,
    max_names: int = 8,
    seed: str = "",
) -> list[tuple[str, Event]]:
    """Return what a scanner sees, each with the text up to there."""
    loaded = load_profile(profile) if isinstance(profile, str) else profile
    scanner = Grammar(loaded, vocabulary).scanner(
        in_path=in_path, concludes=concludes, forks=forks, max_names=max_names, seed=seed
    )
    seen, read = [], ""
    for token in vocabulary.encode(text):
        read += vocabulary.piece(token)
        event = scanner.feed(token)
        if event is not None:
            seen.append((read, event))
    return seen


def names(*pairs: tuple[str, str] | str) -> tuple[PathName, ...]:
    return tuple(PathName(p) if isinstance(p, str) else PathName(*p) for p in pairs)


@pytest.mark.parametrize("vocabulary", ALL)
@pytest.mark.parametrize(
    ("profile", "outline"), [("multiverse", MULTIVERSE), ("npr", NPR), ("threadweaver", THREADS)]
)
def test_trigger_and_names_whatever_the_split(profile, outline, vocabulary):
    ((read, event),) = events(profile, outline + " more", vocabulary())
    assert event == ForkSeen(names("1", "2"), opened=True)
    assert read == outline


@pytest.mark.parametrize("vocabulary", ALL)
def test_names_right_behind_the_tag_they_are_read_after(vocabulary):
    """A token may end one tag and begin the next, as ``><`` does."""
    outline = "<guideline><plan>1: p</plan><plan>2: q</plan></guideline>"
    ((_, event),) = events("npr", outline, vocabulary())
    assert event == ForkSeen(names("1", "2"), opened=True)


def test_tag_tail_merged_with_the_line_break_counts_once():
    vocabulary = odd()
    assert ">\n" in map(vocabulary.piece, vocabulary.encode("</Path>\n"))
    ((read, event),) = events("multiverse", " p\n</Path>\n", vocabulary, in_path=True)
    assert (read, event) == (" p\n</Path>\n", BranchEnd())


@pytest.mark.parametrize("vocabulary", ALL)
def test_forced_text_is_never_scanned(vocabulary):
    """A scanner starts empty: an end tag in the prompt or in forced text ends nothing."""
    ((read, _),) = events("multiverse", "x</Path>", vocabulary(), in_path=True)
    assert read == "x</Path>"
    assert events("multiverse", "ath>", vocabulary(), in_path=True) == []


@pytest.mark.parametrize("vocabulary", ALL)
def test_path_end_outside_a_path_means_nothing(vocabulary):
    assert events("multiverse", "x</Path> y", vocabulary()) == []


@pytest.mark.parametrize("vocabulary", ALL)
def test_paths_written_inside_a_path_do_not_end_it(vocabulary):
    text = "<Path>\n1: a\n</Path>\n<Path>\n2: b\n</Path> then\n</Path>"
    ((read, event),) = events("multiverse", text, vocabulary(), in_path=True)
    assert event == BranchEnd()
    assert read == text


@pytest.mark.parametrize("vocabulary", ALL)
def test_trigger_without_its_opening_tag_is_seen_as_such(vocabulary):
    text = MULTIVERSE.removeprefix("<Parallel>\n")
    ((_, event),) = events("multiverse", text, vocabulary())
    assert event == ForkSeen(names("1", "2"), opened=False)


@pytest.mark.parametrize("vocabulary", ALL)
def test_names_come_from_the_last_outline_each_once(vocabulary):
    text = MULTIVERSE + "\n<Parallel>\n<Goal>\n<Outline>3: x</Outline><Outline>3: y</Outline>"
    text += "<Outline>4.1: z</Outline></Goal>"
    (_, (_, event)) = events("multiverse", text, vocabulary())
    assert event == ForkSeen(names("3", "4.1"), opened=True)


def test_no_names_before_the_tag_they_are_read_after():
    (event,) = [e for _, e in events("multiverse", "<Parallel><Outline>1:</Goal>", chars())]
    assert event == ForkSeen((), opened=True)


def test_tag_given_as_token_id_matches_that_token_only():
    vocabulary = tags()
    (tag,) = vocabulary.encode("</Goal>")
    profile = load_profile("multiverse")
    by_id = replace(profile, fork=replace(profile.fork, trigger=(tag,)))
    ((_, event),) = events(by_id, MULTIVERSE, vocabulary)
    assert event == ForkSeen(names("1", "2"), opened=True)
    split = chars()
    assert split.encode("x")[0] not in split.encode(MULTIVERSE)
    absent = replace(profile, fork=replace(profile.fork, trigger=(10_000,)))
    assert events(absent, MULTIVERSE, split) == []


def test_unnamed_paths_are_numbered():
    ((_, event),) = events("parallel-r1", "so<Parallel>", tags())
    numbered = tuple(PathName(number, tag=number) for number in "12")
    assert event == ForkSeen(numbered, opened=True)


class TestVisibleOutline:
    """A grammar without tags: a numbered outline, in several ways to end."""

    OUTLINE = " Apples\n2. **Pears**: sweet\n3) Plums.\n"
    NAMES = names(("1", "Apples"), ("2", "Pears"), ("3", "Plums"))

    @pytest.mark.parametrize("vocabulary", ALL)
    def test_blank_line_forks_with_titles(self, vocabulary):
        ((_, event),) = events(VISIBLE, self.OUTLINE + "\n", vocabulary(), seed="1.")
        assert event == ForkSeen(self.NAMES, opened=True)

    def test_full_outline_forks_at_the_end_of_its_line(self):
        read, event = events(VISIBLE, self.OUTLINE, chars(), seed="1.", max_names=2)[0]
        assert event == ForkSeen(self.NAMES[:2], opened=True)
        assert read.endswith("sweet\n")

    def test_long_outline_forks_by_its_complete_lines(self):
        text = self.OUTLINE + "4. A fourth point that goes on and on" + " and on" * 30
        read, event = events(VISIBLE, text, chars(), seed="1.")[0]
        assert event == ForkSeen(self.NAMES, opened=True)
        assert len(read) == load_profile(VISIBLE).fork.max_outline_tokens

    def test_end_of_sequence_forks_if_there_are_two_names(self):
        grammar = Grammar(load_profile(VISIBLE), chars())
        for text, count in ((" Apples", 0), (" Apples\n2. Pears", 2)):
            scanner = grammar.scanner(in_path=False, max_names=8, seed="1.")
            for token in grammar.vocabulary.encode(text):
                assert scanner.feed(token) is None
            seen = scanner.at_end()
            assert (len(seen.names) if seen else 0) == count

    def test_end_of_sequence_means_nothing_in_other_grammars(self):
        vocabulary = tags()
        scanner = Grammar(load_profile("npr"), vocabulary).scanner(in_path=False, max_names=8)
        for token in vocabulary.encode(NPR.removesuffix("</guideline>")):
            scanner.feed(token)
        assert scanner.at_end() is None

    @pytest.mark.parametrize("vocabulary", ALL)
    def test_line_break_ends_a_path_before_a_blank_line_can_fork(self, vocabulary):
        seen = events(VISIBLE, "Red.\n\nmore", vocabulary(), in_path=True)
        assert seen == [("Red.\n", BranchEnd()), ("Red.\n\n", BranchEnd())]

    @pytest.mark.parametrize("vocabulary", ALL)
    def test_text_that_also_forks_ends_a_path(self, vocabulary):
        profile = load_profile(VISIBLE)
        same = replace(profile, path=replace(profile.path, end=("\n\n",)))
        ((read, event),) = events(same, "Red.\n\nmore", vocabulary(), in_path=True)
        assert (read, event) == ("Red.\n\n", BranchEnd())

    def test_token_that_ends_a_path_and_completes_a_fork_ends_the_path(self):
        merged = Pieces(r"\.\n\n|.")
        ((read, event),) = events(VISIBLE, "Red.\n\nmore", merged, in_path=True)
        assert (read, event) == ("Red.\n\n", BranchEnd())

    @pytest.mark.parametrize("in_path", [False, True])
    @pytest.mark.parametrize("vocabulary", ALL)
    def test_scanner_told_not_to_fork_sees_ends_only(self, vocabulary, in_path):
        grammar = Grammar(load_profile(VISIBLE), vocabulary())
        scanner = grammar.scanner(in_path=in_path, max_names=2, seed="1.", forks=False)
        seen = [scanner.feed(token) for token in grammar.vocabulary.encode(self.OUTLINE + "\n")]
        assert set(seen) == ({None, BranchEnd()} if in_path else {None})
        assert scanner.at_end() is None

    def test_title_ends_at_a_colon_or_full_stop_without_marks(self):
        outline = " **Apples**. Red\n2. *Pears:* sweet\n3. Plums. Blue: dark.\n\n"
        ((_, event),) = events(VISIBLE, outline, chars(), seed="1.")
        assert event == ForkSeen(self.NAMES, opened=True)


class TestConclusionEnd:
    """A tag that ends the answer counts in a conclusion of the trunk only."""

    @pytest.mark.parametrize("vocabulary", ALL)
    def test_is_seen_where_it_is_complete(self, vocabulary):
        profile = load_profile("multiverse")
        ending = replace(profile, join=replace(profile.join, end=("</Parallel>", "END")))
        text = "c\n</Conclusion>\n</Parallel>"
        assert events(ending, text, vocabulary(), concludes=True) == [(text, BranchEnd())]
        assert events(ending, "so END", vocabulary(), concludes=True) == [("so END", BranchEnd())]

    @pytest.mark.parametrize("vocabulary", ALL)
    def test_means_nothing_anywhere_else(self, vocabulary):
        profile = load_profile("multiverse")
        ending = replace(profile, join=replace(profile.join, end=("</Parallel>",)))
        text = "c\n</Conclusion>\n</Parallel> x"
        assert events(ending, text, vocabulary()) == []
        assert events(ending, text, vocabulary(), in_path=True) == []
        assert events(profile, text, vocabulary(), concludes=True) == []

    def test_path_end_does_not_end_a_conclusion(self):
        assert events("multiverse", "x</Path> y", tags(), concludes=True) == []
        assert events(VISIBLE, "x y", tags(), concludes=True) == []

    def test_given_as_token_id_matches_that_token(self):
        vocabulary = tags()
        (tag,) = vocabulary.encode("END")
        profile = load_profile("multiverse")
        ending = replace(profile, join=replace(profile.join, end=(tag,)))
        seen = events(ending, "so\nEND.", vocabulary, concludes=True)
        assert seen == [("so\nEND", BranchEnd())]


def test_forced_text_is_filled_in_and_token_ids_are_kept():
    vocabulary = tags()
    grammar = Grammar(load_profile("multiverse"), vocabulary)
    tokens = grammar.forced(("\n{name}: {title}", 7, "{name}"), PathName("2", "Pears"))
    assert tokens == (*vocabulary.encode("\n2: Pears"), 7, *vocabulary.encode("2"))
    assert vocabulary.text(list(grammar.forced(("{name}",)))) == "{name}"


@pytest.mark.parametrize("vocabulary", ALL)
def test_every_block_needs_an_opening_of_its_own(vocabulary):
    text = MULTIVERSE + "\n<Goal>\n<Outline>3: x</Outline><Outline>4: y</Outline></Goal>"
    (_, (_, event)) = events("multiverse", text, vocabulary())
    assert event == ForkSeen(names("3", "4"), opened=False)


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("**Pears** are sweet", "Pears are sweet"),
        ("**Budget**: Determine it.", "Budget"),
        ("Node.js and more. Really", "Node.js and more"),
        ("Sunday with friends.", "Sunday with friends"),
    ],
)
def test_titles_of_a_visible_outline_are_the_first_clause_without_emphasis(line, title):
    text = f" {line}\n2. Other\n3. **\n\n"
    ((_, event),) = events(VISIBLE, text, ALL[0](), seed="1.")
    assert isinstance(event, ForkSeen)
    assert [path.title for path in event.names] == [title, "Other"]


def test_token_ids_that_the_model_does_not_have_are_refused():
    profile = load_profile("parallel-r1")
    profile = replace(profile, join=replace(profile.join, start=(151669,)))
    Grammar(profile, tags()).check(151670)
    with pytest.raises(OptionError, match="token id 151669 is not one of the model's 49152"):
        Grammar(profile, tags()).check(49152)


def test_forced_starts_without_a_token_are_refused():
    profile = load_profile("threadweaver")
    deaf = Pieces("[a-z]")
    with pytest.raises(OptionError, match=r"\[join\]: the model's tokenizer makes no token"):
        Grammar(profile, deaf).check(1000)
