"""Reading finished answers: the same tree, positions and figures as the group that wrote them."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from hypothesis import given

from tests.support.player import Player
from tests.support.random_trees import RANDOM, paths, write
from tests.support.samples import DEEP, MULTIVERSE, NPR, TEXTS, THREADS, TOYS, VISIBLE
from tests.support.vocabularies import ALL, tags
from vllm_parallel_think.__main__ import main
from vllm_parallel_think.core.branch_graph import Kind
from vllm_parallel_think.core.config.loading import load_profile, parse_profile
from vllm_parallel_think.core.config.profile import Profile
from vllm_parallel_think.core.errors import OptionError
from vllm_parallel_think.core.trace import GrammarError, PieceVocabulary, Trace, trace


def spans(player: Player) -> list[tuple[int, int, int]]:
    """Return depth, first and last position of every branch that a player wrote."""
    found: list[tuple[int, int, int]] = []
    for node in player.group.nodes:
        if node.kind is Kind.CLOSE:
            found[-1] = (*found[-1][:2], node.end - 1)
        else:
            found.append((node.depth, node.start + node.num_hidden, node.end - 1))
    return found


def assert_same(result: Trace, player: Player) -> None:
    assert [(b.depth, b.start, b.end) for b in result.branches] == spans(player)
    own = {key: value for key, value in player.summary.items() if key != "fallbacks"}
    assert {key: result.summary[key] for key in own} == own


@pytest.mark.parametrize("vocabulary", ALL)
@pytest.mark.parametrize("name", TOYS)
def test_trace_agrees_with_the_group_that_wrote_the_text_INV2(name, vocabulary):
    player = Player(name, TOYS[name], vocabulary=vocabulary(), prompt="").run()
    assert_same(trace(player.text, load_profile(name), player.vocabulary), player)


@pytest.mark.parametrize("vocabulary", ALL)
def test_trace_of_nested_blocks_names_every_branch(vocabulary):
    player = Player("multiverse", DEEP, vocabulary=vocabulary(), prompt="").run()
    result = trace(player.text, load_profile("multiverse"), player.vocabulary)
    assert_same(result, player)
    labels = ["trunk", "path 1", "path 1.1", "path 1.2", "conclusion", "path 2", "conclusion"]
    assert [branch.label for branch in result.branches] == labels
    assert [branch.depth for branch in result.branches] == [0, 1, 2, 2, 1, 1, 0]
    assert result.notes == () and result.num_sequential == 0


@RANDOM
@given(paths("", 0))
def test_trace_agrees_on_random_trees_INV2(body):
    scripts: dict[str, tuple] = {}
    write(body, ("0", 0), scripts, ())
    # A path that ended without its tag was closed by the engine, which a finished text cannot show.
    tagged = {at: ("\n</Path>" if t == -1 else t for t in parts) for at, parts in scripts.items()}
    player = Player("multiverse", tagged, prompt="").run()
    assert_same(trace(player.text, load_profile("multiverse"), player.vocabulary), player)


def test_words_and_tags_are_counted_without_a_tokenizer():
    text = "Two words. <Path>\n1.2:  x"
    vocabulary = PieceVocabulary()
    pieces = [vocabulary.piece(token) for token in vocabulary.encode(text)]
    assert pieces == [*("Two", " words", ".", " ", "<Path>", "\n", "1", ".", "2", ":"), "  ", "x"]
    result = trace(TEXTS["multiverse"], load_profile("multiverse"))
    by_tags = trace(TEXTS["multiverse"], load_profile("multiverse"), tags())
    assert [b.num_forced for b in result.branches] == [b.num_forced for b in by_tags.branches]


def test_outline_that_ends_without_a_tag_is_found_by_the_first_heading():
    heads = "\n**1. Apples**\n\nThis a.\n\n**2. Pears**\n\nThis b.\n\nIn short, x"
    for outline in (" Apples\n2. Pears", " Apples\n2. Pears\n", " Apples\n2. Pears\n3. Half a l"):
        result = trace(f"Short outline:\n1.{outline}{heads}", load_profile(VISIBLE))
        labels = [branch.label for branch in result.branches]
        assert labels == ["trunk", "path 1", "path 2", "conclusion"]
        assert result.branches[0].text == outline
        assert result.notes == ()


def test_numbered_text_after_a_grammar_that_forks_once_is_text():
    text = TEXTS[VISIBLE] + "\n\n1. a\n2. b\n\nend"
    result = trace(text, ending(VISIBLE))
    assert result.summary["forks"] == 1 and result.notes == ()
    assert result.branches[-1].text == " fruit.\n\n\n1. a\n2. b\n\nend"


def ending(name: str, *tags: str | int) -> Profile:
    """Return a built-in profile in which these tags, if any, end the answer."""
    profile = load_profile(name)
    return replace(profile, join=replace(profile.join, end=tags))


class TestConclusionEnd:
    """What is read behind a conclusion that ends the answer."""

    @pytest.mark.parametrize("vocabulary", ALL)
    def test_in_nested_conclusions_and_paths_ends_nothing_INV2(self, vocabulary):
        scripts = {**DEEP, "0.2": DEEP["0.2"].rstrip()}
        profile = ending("multiverse", "</Parallel>")
        player = Player(profile, scripts, vocabulary=vocabulary(), prompt="").run()
        result = trace(player.text, profile, player.vocabulary)
        assert_same(result, player)
        assert result.notes == () and len(result.branches) == 7

    @pytest.mark.parametrize("tail", ["\n", "\n\n", " "])
    def test_white_space_behind_it_is_noted_and_not_counted(self, tail):
        result = trace(TEXTS[VISIBLE] + tail, load_profile(VISIBLE))
        plain = trace(TEXTS[VISIBLE], load_profile(VISIBLE))
        assert plain.notes == () and plain.branches[-1].text == " fruit.\n"
        assert result.branches == plain.branches
        assert result.summary == plain.summary
        note = f"line 15, column 1: the engine ends the answer here, not with {tail!r}"
        assert result.notes == (note,)

    def test_answer_without_it_ended_at_its_end_of_sequence(self):
        result = trace(TEXTS[VISIBLE].rstrip(), load_profile(VISIBLE))
        assert result.branches[-1].text == " fruit." and result.notes == ()

    @pytest.mark.parametrize("tag", ["</Conclusion>", "</Parallel>", "\n"])
    def test_may_leave_the_blocks_own_tags_open(self, tag):
        full = TEXTS["multiverse"]
        text = full[: full.index(tag, full.index("<Conclusion>\n") + 13) + len(tag)]
        result = trace(text, ending("multiverse", tag))
        assert [b.label for b in result.branches] == ["trunk", "path 1", "path 2", "conclusion"]
        with pytest.raises(GrammarError, match="text behind the end of the answer"):
            trace(text + " more", ending("multiverse", tag))

    def test_leaves_a_block_open_that_the_conclusion_began(self):
        text = TEXTS["multiverse"].replace("\ntext", "\n<Parallel> END")
        (note,) = trace(text, ending("multiverse", "END")).notes
        assert "the text ends inside <Parallel>" in note

    def test_in_a_trunk_that_forks_nothing_is_text(self):
        (branch,) = trace("a\nb\nc", ending("multiverse", "\n")).branches
        assert branch.text == "a\nb\nc"

    def test_begins_in_generated_text(self):
        """The tag's first half is forced, which does not count."""
        result = trace(TEXTS["multiverse"], ending("multiverse", ">\nc"))
        assert result.branches[-1].text.endswith("</Parallel>\ntext")

    @pytest.mark.parametrize("extra", ["</Parallel>", "<Goal>"])
    def test_is_found_where_it_is_part_of_another_tag(self, extra):
        text = TEXTS["multiverse"].replace("</Conclusion>\n</Parallel>\ntext", f"so {extra[:3]}")
        result = trace(text, ending("multiverse", extra[:3]))
        assert result.branches[-1].text.endswith(f"so {extra[:3]}")
        with pytest.raises(GrammarError, match="text behind the end of the answer"):
            trace(text + extra[3:], ending("multiverse", extra[:3]))

    def test_given_as_token_id_needs_the_tokenizer(self):
        vocabulary = tags()
        (tag,) = vocabulary.encode("END")
        profile = ending("multiverse", tag)
        with pytest.raises(OptionError, match="name the tokenizer"):
            trace(TEXTS["multiverse"], profile)
        text = TEXTS["multiverse"] + "\nEND"
        assert trace(text, profile, vocabulary).branches[-1].text.endswith("END")
        with pytest.raises(GrammarError, match="text behind the end of the answer"):
            trace(text + " x", profile, vocabulary)


@pytest.mark.parametrize("name", TOYS)
def test_plain_text_is_one_branch(name):
    text = "just text" if name != VISIBLE else "Short outline:\n1. just text"
    (branch,) = trace(text, load_profile(name)).branches
    assert branch.label == "trunk" and branch.start == 0
    assert trace(text, load_profile(name)).summary["parallelism_ratio"] == 1.0


def test_empty_answer_is_an_empty_trunk():
    (branch,) = trace("", load_profile("npr")).branches
    assert (branch.num_generated, branch.start, branch.end) == (0, 0, -1)


def test_other_white_space_is_noted_and_counted_as_the_engine_writes_it():
    text = TEXTS["multiverse"].replace("</Goal>\n<Path>", "</Goal>\n\n<Path>")
    result = trace(text, load_profile("multiverse"))
    plain = trace(TEXTS["multiverse"], load_profile("multiverse"))
    assert result.branches == plain.branches
    assert result.notes == (
        "line 10, column 1: the engine writes '<Path>\\n1:' here, not '\\n<Path>\\n1:'",
    )


ONE = "<Parallel>\n<Goal>\n<Outline>\n1: p\n</Outline>\n</Goal>\n<Path>\n1: p\n</Path>\n"
ONE += "<Conclusion>\nc\n</Conclusion>\n</Parallel>"


def test_block_with_one_path_is_sequential_text():
    result = trace(ONE + " more", load_profile("multiverse"))
    (branch,) = result.branches
    assert branch.num_forced == 0 and result.num_sequential == 1


def test_block_inside_a_path_of_a_sequential_block_may_fork():
    text = ONE.replace("1: p\n</Path>", f"1: p\n{TEXTS['multiverse']}\n</Path>")
    result = trace(text, load_profile("multiverse"))
    assert result.summary["forks"] == 1 and result.num_sequential == 1


def test_block_deeper_than_the_grammar_goes_is_sequential_text():
    inner = TEXTS["npr"].removesuffix("\n\n4")
    text = TEXTS["npr"].replace("1: p p p\n</step>", f"1: {inner}\n</step>")
    result = trace(text, load_profile("npr"))
    assert result.summary["forks"] == 1 and result.summary["depth"] == 1
    assert result.num_sequential == 1


PATH_1, PATH_2 = "\n<Path>\n1: p\n</Path>", "\n<Path>\n2: q r s\n</Path>"
END = "\n<Conclusion>\nc\n</Conclusion>\n</Parallel>"
BAD = {
    # what: (profile, text, message, line, column, found, allowed)
    "unclosed path": (
        *("multiverse", MULTIVERSE + "\n<Path>\n1: p"),
        *("the text ends inside <Path>", 11, 5, "end of text", "</Path>"),
    ),
    "unclosed outline": (
        *("multiverse", "<Parallel>\n<Goal>\n<Outline>\n1: p\n<Outline>\n2: q"),
        *("<Outline> inside <Outline>", 5, 1, "'<Outline>'", "</Outline>"),
    ),
    "path without outline": (
        *("multiverse", MULTIVERSE + PATH_1 + PATH_2 + "\n<Path>\n3: x\n</Path>" + END),
        *("path '3' has no outline", 16, 1, "'<Path>'", "'<Conclusion>\\n'"),
    ),
    "more outlines than paths": (
        *("multiverse", MULTIVERSE + PATH_1 + END),
        *("path '2' is missing", 13, 1, "'<Conclusion>'", "'<Path>\\n2:'"),
    ),
    "no path": (
        *("multiverse", MULTIVERSE + END),
        *("path '1' is missing", 10, 1, "'<Conclusion>'", "'<Path>\\n1:'"),
    ),
    "duplicate path name": (
        *("multiverse", MULTIVERSE + PATH_1 + PATH_1 + END),
        *("duplicate path name '1'", 13, 1, "'<Path>'", "'<Path>\\n2:'"),
    ),
    "duplicate path name behind the last": (
        *("multiverse", MULTIVERSE + PATH_1 + PATH_2 + PATH_1 + END),
        *("duplicate path name '1'", 16, 1, "'<Path>'", "'<Conclusion>\\n'"),
    ),
    "wrong path name": (
        *("multiverse", MULTIVERSE + PATH_1 + PATH_2.replace("2:", "7:") + END),
        *("wrong path name '7': no outline has it", 13, 1, "'<Path>'", "'<Path>\\n2:'"),
    ),
    "wrong order": (
        *("multiverse", MULTIVERSE + PATH_2 + PATH_1 + END),
        *("wrong path name '2': path '1' comes first", 10, 1, "'<Path>'", "'<Path>\\n1:'"),
    ),
    "conclusion missing": (
        *("multiverse", MULTIVERSE + PATH_1 + PATH_2 + "\n</Parallel>"),
        *("the conclusion is missing", 16, 1, "'</Parallel>'", "'<Conclusion>\\n'"),
    ),
    "text for a conclusion": (
        *("multiverse", MULTIVERSE + PATH_1 + PATH_2 + "\nSo it is."),
        *("the conclusion is missing", 16, 1, "'So it is.'", "'<Conclusion>\\n'"),
    ),
    "path outside a block": (
        *("multiverse", "a\n<Path>\n1: p\n</Path>"),
        *("<Path> outside a block", 2, 1, "'<Path>'", "<Parallel>"),
    ),
    "end outside a block": (
        *("multiverse", "a b </Path>"),
        *("</Path> closes nothing", 1, 5, "'</Path>'", "<Parallel>"),
    ),
    "outline outside a block": (
        *("multiverse", MULTIVERSE.removeprefix("<Parallel>\n")),
        *("<Goal> outside a block", 1, 1, "'<Goal>'", "<Parallel>"),
    ),
    "second outline in one block": (
        *("multiverse", ONE.replace("</Parallel>", "<Goal></Goal></Parallel>")),
        *("<Goal> inside <Parallel>", 13, 1, "'<Goal>'", "</Parallel>"),
    ),
    "block without outline": (
        *("multiverse", "<Parallel>\n</Parallel>"),
        *("<Parallel> has no outline", 2, 1, "'</Parallel>'", "<Goal>"),
    ),
    "sequential block, duplicate path": (
        *("multiverse", ONE.replace("\n<Conclusion>", PATH_1 + "\n<Conclusion>")),
        *("duplicate path name '1'", 10, 1, "'<Path>'", "'<Conclusion>\\n'"),
    ),
    "sequential block, no conclusion": (
        *("multiverse", ONE[: ONE.index("<Conclusion>")] + "</Parallel>"),
        *("the conclusion is missing", 10, 1, "'</Parallel>'", "<Conclusion>"),
    ),
    "sequential block, wrong path": (
        *("multiverse", ONE.replace("<Path>\n1:", "<Path>\n2:")),
        *("wrong path name '2': no outline has it", 7, 1, "'<Path>'", "'<Path>\\n1:'"),
    ),
    "npr, takeaway missing": (
        *("npr", NPR + "\n<step>\n1: a\n</step>\n<step>\n2: b\n</step>\nso"),
        *("the conclusion is missing", 11, 1, "'so'", "'<takeaway>\\n'"),
    ),
    "npr, sequential steps missing": (
        *("npr", "<guideline><plan>1: p</plan></guideline> so"),
        *("path '1' is missing", 1, 44, "end of text", "'<step>\\n1:'"),
    ),
    "npr, step outside": (
        *("npr", "<step>\n1: a</step>"),
        *("<step> outside a block", 1, 1, "'<step>'", "<guideline>"),
    ),
    "parallel-r1, one path": (
        *("parallel-r1", "<Parallel><Path>a</Path></Parallel>"),
        *("path '2' is missing", 1, 25, "'</Parallel>'", "'<Path>'"),
    ),
    "parallel-r1, no summary": (
        *("parallel-r1", "<Parallel><Path>a</Path><Path>b</Path></Parallel> so"),
        *("the conclusion is missing", 1, 39, "'</Parallel>'", "'</Parallel>\\n<Summary>'"),
    ),
    "parallel-r1, block in a path": (
        *("parallel-r1", "<Parallel><Path>a<Parallel><Path>b</Path></Parallel></Path>"),
        *("</Path> ends the path, but <Parallel> of line 1, column 18 is open", 1, 35),
        *("'</Path>'", "</Parallel>"),
    ),
    "threadweaver, path without outline": (
        "threadweaver",
        THREADS + "\n<Thread>\n1: a</Thread><Thread>\n2: b</Thread><Thread>\n3: c</Thread>",
        *("path '3' has no outline", 8, 14, "'<Thread>'", "</Parallel>"),
    ),
    "visible outline, no opening": (
        *(VISIBLE, "1. Apples"),
        *("the engine's opening is missing", 1, 1, "'1. Apples'", "'Short outline:\\n1.'"),
    ),
    "visible outline, heading missing": (
        *(VISIBLE, "Short outline:\n1. Apples\n2. Pears\n\nNow then"),
        *("path '1' is missing", 5, 1, "'Now then'", "'**1. Apples**\\n\\nThis'"),
    ),
    "visible outline, conclusion missing": (
        *(VISIBLE, TEXTS[VISIBLE].replace("In short,", "So,")),
        *("the conclusion is missing", 14, 1, "'So, fruit.'", "'\\nIn short,'"),
    ),
    "visible outline, second line in a path": (
        *(VISIBLE, TEXTS[VISIBLE].replace("is red.\n", "is red.\nAnd sweet.\n")),
        *("path '2' is missing", 9, 1, "'And sweet.'", "'**2. Pears**\\n\\nThis'"),
    ),
    "visible outline, path without its first word": (
        *(VISIBLE, TEXTS[VISIBLE].replace("This is green", "It is green")),
        *("path '2' is missing", 10, 1, "'**2. Pears**'", "'**2. Pears**\\n\\nThis'"),
    ),
    "visible outline, text behind the conclusion": (
        *(VISIBLE, TEXTS[VISIBLE] + "\n1. a\n2. b\n\nend"),
        *("text behind the end of the answer", 16, 1, "'1. a'", "end of text"),
    ),
}


NOTED = {
    # what: (profile, text, paths, note), as a model may go on behind a fork
    "unclosed block": (
        *("multiverse", MULTIVERSE + PATH_1 + PATH_2 + END.removesuffix("</Parallel>"), 2),
        "line 19, column 1: the text ends inside <Parallel> of line 1, column 1",
    ),
    "inner block left open": (
        *("multiverse", MULTIVERSE + "\n<Path>\n1: <Parallel>\n</Path>" + PATH_2 + END, 2),
        "line 12, column 1: <Parallel> of line 11, column 4 is not closed",
    ),
    "inner path left open": (
        *("multiverse", MULTIVERSE + "\n<Path>\n1: <Path>\n</Path>" + PATH_2 + END, 2),
        "line 11, column 4: <Path> inside <Path>",
    ),
    "outlines that are not closed": (
        *("multiverse", MULTIVERSE.replace("</Outline>\n", "") + PATH_1 + PATH_2 + END, 2),
        "line 5, column 1: <Outline> inside <Outline>",
    ),
    "threadweaver, outlines that are not closed": (
        "threadweaver",
        "<Parallel>\n<Outlines>\n<Outline>1: p\n<Outline>2: q\n</Outlines>\n<Thread>\n1: a</Thread>"
        "<Thread>\n2: b</Thread>\n</Parallel>",
        *(2, "line 4, column 1: <Outline> inside <Outline>"),
    ),
    "threadweaver, unfinished block": (
        "threadweaver",
        THREADS + "\n<Thread>\n1: a</Thread><Thread>\n2: b</Thread>\n",
        *(2, "line 9, column 1: the text ends inside <Parallel>"),
    ),
    "parallel-r1, three paths": (
        "parallel-r1",
        "<Parallel><Path>a</Path><Path>b</Path><Path>c</Path></Parallel>\n<Summary>d</Summary>",
        *(3, "line 1, column 11: 3 paths, the engine opens 2"),
    ),
}


@pytest.mark.parametrize("what", NOTED)
def test_form_that_a_fork_does_not_need_is_noted(what):
    profile, text, num_paths, note = NOTED[what]
    result = trace(text, load_profile(profile))
    assert (result.summary["forks"], result.summary["paths"]) == (1, num_paths)
    assert result.notes[0].startswith(note)


@pytest.mark.parametrize("what", BAD)
def test_first_break_of_the_grammar_is_named_with_its_place(what):
    profile, text, reason, line, column, found, allowed = BAD[what]
    with pytest.raises(GrammarError) as caught:
        trace(text, load_profile(profile))
    error = caught.value
    assert reason in error.reason
    assert (error.line, error.column, error.found) == (line, column, found)
    assert allowed in error.allowed
    assert f"line {line}, column {column}: " in str(error)


@pytest.mark.parametrize("name", ["multiverse", "npr", "parallel-r1", "threadweaver", VISIBLE])
def test_every_cut_of_an_answer_is_read_or_refused_with_a_place_INV5(name):
    text, refused = TEXTS[name], 0
    for length in range(len(text)):
        try:
            trace(text[:length], load_profile(name))
        except GrammarError as error:
            refused += 1
            assert error.line <= text[:length].count("\n") + 1
    assert refused > len(text) // 3


BY_ID = """
name = "ids"
summary = "tags as token ids"
[fork]
trigger = %d
num_paths = 2
[path]
start = "<P>"
end = "</P>"
[join]
start = "<J>"
"""


def test_tags_given_as_token_ids_need_the_tokenizer():
    vocabulary = tags()
    (tag,) = vocabulary.encode("<F>")
    profile = parse_profile(BY_ID % tag, "ids")
    with pytest.raises(OptionError, match="name the tokenizer"):
        trace("a<F><P>x</P><P>y</P><J>z", profile)
    result = trace("a<F><P>x</P><P>y</P><J>z</J></F>", profile, vocabulary)
    assert result.summary["paths"] == 2


@pytest.fixture
def answer(tmp_path):
    file = tmp_path / "answer.txt"
    file.write_text(TEXTS["multiverse"])
    return str(file)


def test_command_prints_the_tree(answer, capsys):
    assert main(["trace", "--profile", "multiverse", answer]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:5:3]] == ["trunk", "conclusion"]
    assert [line[:8] for line in lines[2:4]] == ["  path 1", "  path 2"]
    assert "generated 38, forced 13, critical path 35 tokens; parallelism ratio 1.0857" in lines
    assert any("tags, line breaks, words" in line for line in lines), "says how it counts"


def test_command_prints_json(answer, capsys):
    assert main(["trace", "--profile", "multiverse", "--json", answer]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [branch["label"] for branch in values["branches"]][1] == "path 1"
    assert values["summary"]["paths"] == 2


def test_command_reads_stdin_and_fails_with_the_place(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("a </Path>"))
    assert main(["trace", "--profile", "multiverse", "-"]) == 1
    assert "line 1, column 3: </Path> closes nothing" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("a </Path>"))
    assert main(["trace", "--profile", "multiverse", "--json", "-"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["line"], error["column"], error["found"]) == (1, 3, "'</Path>'")


def test_command_takes_a_profile_file(tmp_path, answer):
    file = tmp_path / "own.toml"
    file.write_text(BY_ID.replace("%d", '"<F>"'))
    assert main(["trace", "--profile", str(file), answer]) == 0


@pytest.mark.slow
def test_command_counts_a_models_tokens(tmp_path, answer, capsys):
    """Needs transformers, which takes seconds to import."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    model.add_tokens(sorted(set(TEXTS["multiverse"])))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="?")
    fast.save_pretrained(tmp_path / "model")
    arguments = ["trace", "--profile", "multiverse", "--json", answer]
    assert main([*arguments, "--tokenizer", str(tmp_path / "model")]) == 0
    figures = json.loads(capsys.readouterr().out)["summary"]
    assert figures["generated_tokens"] + figures["forced_tokens"] == len(TEXTS["multiverse"])


@pytest.mark.parametrize(
    "wrong", [["--profile", "x"], ["--profile", "npr", "--tokenizer", "/nowhere"], None]
)
def test_command_reports_wrong_settings_in_one_line(wrong, answer, capsys):
    arguments = ["trace", *(wrong or ["--profile", "npr"]), answer if wrong else "/nowhere.txt"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
