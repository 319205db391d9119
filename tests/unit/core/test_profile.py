"""Profiles say what is wrong with them."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from vllm_parallel_think.core.config import loading as profile_module
from vllm_parallel_think.core.config.loading import builtin_profiles, load_profile, parse_profile
from vllm_parallel_think.core.config.profile import (
    ForkRule,
    JoinRule,
    OutlineRule,
    PathRule,
    Profile,
    StartRule,
)
from vllm_parallel_think.core.errors import OptionError

GOOD = """
name = "toy"
summary = "a toy"
[fork]
trigger = "<F>"
num_paths = 2
[path]
start = "<P>"
end = "</P>"
[join]
start = "<J>"
"""


def test_built_in_profiles_load_under_their_own_names():
    names = builtin_profiles()
    known = {"multiverse", "npr", "parallel-r1", "skeleton", "threadweaver"}
    assert set(names) == known | {"parathinker", "parathinker-text", "hogwild", "hogwild-think"}
    assert [load_profile(name).name for name in names] == list(names)


def test_every_key_is_documented():
    text = (Path(profile_module.__file__).parents[2] / "profiles" / "README.md").read_text("utf-8")
    sections = re.split(r"\| `\[+", text.partition("## Lists that")[0])
    rules = (Profile, ForkRule, OutlineRule, PathRule, JoinRule, StartRule)
    for section, rule in zip(sections, rules, strict=True):
        keys = {field.name for field in fields(rule)} - {"fork", "path", "join", "outline"}
        assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == keys


def test_file_is_a_profile_with_defaults(tmp_path):
    file = tmp_path / "toy.toml"
    file.write_text(GOOD)
    profile = load_profile(str(file))
    assert (profile.fork.trigger, profile.path.start) == (("<F>",), ("<P>",))
    assert (profile.join.mode, profile.max_depth, profile.opening) == ("kv", 8, ())
    assert profile.join.end == ()


@pytest.mark.parametrize("text", ['"</J>"', '["</J>", 7]'])
def test_tags_that_end_the_answer_are_one_or_several(text):
    profile = parse_profile(GOOD + f"end = {text}\n", "toy")
    assert profile.join.end == (("</J>",) if "[" not in text else ("</J>", 7))


def test_lists_mix_text_and_token_ids_and_drop_empty_text():
    profile = parse_profile(GOOD.replace('"<P>"', '["<P>", 12, ""]'), "toy")
    assert profile.path.start == ("<P>", 12)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "toy"', "name = ", "not valid TOML"),
        ("[join]", "[joint]", "the table [join] is missing"),
        ('name = "toy"\n', "", "missing key 'name'"),
        ('start = "<P>"\n', "", r"\[path\]: missing key 'start'"),
        ('start = "<P>"', 'start = ""', "[path]: start must not be empty"),
        ('start = "<J>"', 'start = ""', "[join]: start must not be empty"),
        ('end = "</P>"', "end = []", "must name at least one tag"),
        ('end = "</P>"', "end = 1.5", "expected text or a token id, got 1.5"),
        ('end = "</P>"', "end = true", "expected text or a token id, got True"),
        ("num_paths = 2", "num_paths = 1", "num_paths must be at least 2"),
        ("num_paths = 2", "num_paths = true", "num_paths has the wrong type"),
        ("num_paths = 2", "numpaths = 2", "unknown key 'numpaths'; allowed: ["),
        ("num_paths = 2", "", "set exactly one of names and num_paths"),
        ("num_paths = 2", "num_paths = 2\nnames = '(a)'", "set exactly one of names and num_paths"),
        ("num_paths = 2", "names = '('", "names must be a regular expression"),
        ("num_paths = 2", "names = 'a'", "names needs a group"),
        ('start = "<J>"', 'start = "<J>"\nend = 1.5', "[join], end: expected text or a token id"),
        ('start = "<J>"', 'start = "<J>"\nmode = "copy"', "mode must be 'kv' or 'reprefill'"),
        ('name = "toy"', 'name = "toy"\nmax_depth = 0', "max_depth must be at least 1"),
        ('start = "<J>"', 'start = "<J>"\nfirst_only = "x"', "first_only must be how"),
    ],
)
def test_wrong_profile_names_the_key_and_what_is_allowed(old, new, message):
    assert old in GOOD
    with pytest.raises(OptionError) as caught:
        parse_profile(GOOD.replace(old, new), "toy.toml")
    assert message.replace("\\", "") in str(caught.value)
    assert "toy.toml" in str(caught.value)


def test_unknown_profile_and_missing_file_are_named():
    with pytest.raises(OptionError, match=r"unknown profile 'x'; allowed: hogwild, hogwild-think"):
        load_profile("x")
    with pytest.raises(OptionError, match=r"'/nowhere/x.toml' does not exist"):
        load_profile("/nowhere/x.toml")


def test_file_that_is_not_text_is_named(tmp_path):
    file = tmp_path / "x.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match=r"x\.toml"):
        load_profile(str(file))


def test_core_needs_neither_torch_nor_vllm():
    code = (
        "import sys, vllm_parallel_think.core.trace, vllm_parallel_think.core.fork_join.group;"
        "print(sorted({'torch', 'vllm', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('trigger = "<F>"', "trigger = [-1]", "token ids of at least 0"),
        ("num_paths = 2", 'num_paths = 2\nopen = ""', "not empty"),
        ("num_paths = 2", "num_paths = 2\nmax_outline_tokens = 0", "must be at least 1, got 0"),
        ("num_paths = 2", "num_paths = 2\nmin_tokens_left = -1", "must be at least 0, got -1"),
        ("num_paths = 2", "names = '(a*)'", "must not match an empty text"),
        ('end = "</P>"', 'end = "</P>"\nmax_tokens = -3', "must be at least 1, got -3"),
        ('end = "</P>"', 'end = "</P>"\nstride = -1', "stride must be 0 or more"),
        ('end = "</P>"', 'end = "</P>"\nnum_tags = 0', "num_tags must be at least 1"),
        ('start = "<J>"', 'start = "<J>"\nposition = "first"', "'longest' or 'total'"),
        ('trigger = "<F>"', "", "trigger (or at_start)"),
        ('trigger = "<F>"', "at_start = true", "needs num_paths, and max_depth = 1"),
    ],
)
def test_values_without_a_meaning_are_refused(old, new, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        parse_profile(GOOD.replace(old, new), "toy")


@pytest.mark.parametrize("number", ["1_000_000_000", "65", "9" * 400])
def test_a_billion_paths_are_refused(number):
    for at_start in ("", "at_start = true\n"):
        text = GOOD.replace("num_paths = 2", f"{at_start}num_paths = {number}")
        text = text.replace('trigger = "<F>"\n', "" if at_start else 'trigger = "<F>"\n')
        text = ("max_depth = 1\n" if at_start else "") + text
        with pytest.raises(OptionError, match="num_paths must be at most 64, got") as caught:
            parse_profile(text, "toy")
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "key", ["min_tokens_left", "max_outline_tokens", "[path] max_tokens", "[path] num_tags"]
)
def test_numbers_that_no_process_could_hold_are_refused(key):
    table, _, own = key.rpartition(" ")
    line = f"{own} = 99999999999\n"
    place = 'end = "</P>"\n' if table else "num_paths = 2\n"
    with pytest.raises(OptionError, match=f"{own} must be at most 2147483647"):
        parse_profile(GOOD.replace(place, place + line), "toy")


WORKERS = '[workers]\nnames = ["A", "B"]\nstep = "{name}:"\n[answer]\nforced = "="\n'


@pytest.mark.parametrize("name", ["", "  ", r"a\nb", r"a\u0000", "x" * 65])
def test_a_name_is_a_line(name):
    message = "must be 1 to 64 characters without line breaks"
    with pytest.raises(OptionError, match=f"name {message}"):
        parse_profile(GOOD.replace('name = "toy"', f'name = "{name}"'), "toy")
    recipe = 'name = "toy"\nsummary = "s"\n' + WORKERS
    parse_profile(recipe, "toy")
    with pytest.raises(OptionError, match=f"name {message}"):
        parse_profile(recipe.replace('name = "toy"', f'name = "{name}"'), "toy")
    with pytest.raises(OptionError, match=f"each of names {message}"):
        parse_profile(recipe.replace('"B"', f'"{name}"'), "toy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = " + "[" * 50_000, "nested too deeply"),
        ("x = " + "9" * 5000, "not valid TOML"),
        (GOOD.replace("num_paths = 2", "names = '" + "(" * 300 + "'"), "names must be a regular"),
        (GOOD.replace("num_paths = 2", "names = '(a{99999999999})'"), "names must be a regular"),
        (GOOD.replace('"<F>"', "[" + "[" * 400 + "]" * 401), "expected text or a token id"),
        (GOOD.replace('"<F>"', "[{a = '" + "x" * 100_000 + "'}]"), "expected text or a token id"),
        ("y" * 100_000 + " = 1\n" + GOOD, "unknown key"),
    ],
)
def test_hostile_files_end_in_a_short_sentence(text, message):
    with pytest.raises(OptionError, match=message) as caught:
        parse_profile(text, "toy")
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_end_in_a_sentence(tmp_path):
    for name in ("x" * 5000 + ".toml", "a\0.toml"):
        with pytest.raises(OptionError, match=r"does not exist|cannot be read"):
            load_profile(name)
    (tmp_path / "dir.toml").mkdir()
    with pytest.raises(OptionError, match="does not exist"):
        load_profile(str(tmp_path / "dir.toml"))
