"""Options of the server and of a request; a client's input ends in a message, never in a crash."""

from __future__ import annotations

import re
import string
from dataclasses import fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_parallel_think.core.config.loading import load_profile
from vllm_parallel_think.core.config.request_options import (
    REQUEST_KEYS,
    RequestOptions,
    parse_request,
)
from vllm_parallel_think.core.config.server_options import ServerOptions
from vllm_parallel_think.core.errors import OptionError

PROFILES = {name: load_profile(name) for name in ("multiverse", "npr", "parathinker")}


def request(extra, server=None) -> RequestOptions:
    return parse_request(extra, server or ServerOptions(), PROFILES, "multiverse")


def test_empty_settings_are_the_defaults():
    assert ServerOptions.parse({}) == ServerOptions()
    assert request(None) == request({}) == RequestOptions("multiverse", 8, 2)


@pytest.mark.parametrize("extra", [{}, {"parallel_think": "npr", "pt_max_paths": 3}])
def test_a_request_for_one_token_is_left_alone(extra):
    options = request(extra)
    assert options.within(1).profile is None
    assert options.within(2) == options.within(None) == options


def test_server_settings_are_taken():
    raw = {"profile": "npr", "profiles": ["a.toml"], "max_paths": 4, "held_kv_fraction": 1}
    options = ServerOptions.parse(raw)
    assert (options.profile, options.profiles, options.max_paths) == ("npr", ("a.toml",), 4)
    assert options.held_kv_fraction == 1


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "expected an object, got []"),
        ({"max_path": 4}, "unknown key 'max_path'; allowed: profile, profiles, max_paths"),
        ({"max_paths": 1}, "max_paths must be a whole number between 2 and 64, got 1"),
        ({"max_paths": 65}, "between 2 and 64, got 65"),
        ({"max_paths": True}, "got True"),
        ({"max_paths": None}, "got None"),
        ({"max_depth": 0}, "max_depth must be a whole number between 1 and 8"),
        ({"max_forks": 0}, "max_forks must be a whole number between 1"),
        ({"max_total_tokens": 0}, "max_total_tokens must be a whole number of at least 1"),
        ({"block_size": 16.0}, "block_size must be a whole number between 1 and 1024, got 16.0"),
        ({"held_kv_fraction": 0}, "above 0 and at most 1, got 0"),
        ({"held_kv_fraction": float("nan")}, "above 0 and at most 1, got nan"),
        ({"held_kv_fraction": "1"}, "must be a number, got '1'"),
        ({"profile": 3}, "profile must be a name, got 3"),
        ({"profiles": "a.toml"}, "profiles must be a list of .toml paths, got 'a.toml'"),
        ({"profiles": [1]}, "profiles must be a list"),
    ],
)
def test_wrong_server_setting_names_flag_key_and_range(raw, message):
    with pytest.raises(OptionError) as caught:
        ServerOptions.parse(raw)
    assert message in str(caught.value)
    assert "--additional-config" in str(caught.value)


def test_request_keys_are_taken_and_foreign_ones_left_alone():
    extra = {"other": object(), "parallel_think": "npr", "pt_max_paths": 3, "pt_max_depth": 0}
    extra |= {"pt_path_tokens": 9, "pt_critical_tokens": 8, "pt_join": "reprefill"}
    assert request(extra) == RequestOptions("npr", 3, 0, 9, 8, "reprefill")


@pytest.mark.parametrize(("value", "live"), [(True, True), (1, True), (False, False), (0, False)])
def test_live_view_is_off_unless_asked_for(value, live):
    assert request({"pt_live": value}).live is live
    assert request({}).live is False


def test_off_leaves_a_request_alone():
    assert request({"parallel_think": "off"}).profile is None
    assert parse_request(None, ServerOptions(), PROFILES, "off").profile is None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"pt_max_path": 4}, "vllm_xargs.pt_max_path is unknown; allowed: parallel_think, pt_max"),
        ({"parallel_think": "x"}, "must be one of multiverse, npr, parathinker, off; got 'x'"),
        ({"parallel_think": ["npr"]}, "got ['npr']"),
        ({"pt_max_paths": 9}, "pt_max_paths must be a whole number between 1 and 8, got 9"),
        ({"pt_max_paths": "2"}, "got '2'"),
        ({"pt_max_depth": 3}, "pt_max_depth must be a whole number between 0 and 2, got 3"),
        ({"pt_path_tokens": 0}, "pt_path_tokens must be a whole number of at least 1, got 0"),
        ({"pt_critical_tokens": None}, "got None"),
        ({"pt_join": "copy"}, "pt_join must be kv or reprefill; got 'copy'"),
        ({"pt_join": []}, "got []"),
        ({"pt_live": "yes"}, "vllm_xargs.pt_live must be true or false; got 'yes'"),
        ({"pt_live": None}, "pt_live must be true or false; got None"),
        ({"pt_live": 2}, "pt_live must be true or false; got 2"),
    ],
)
def test_wrong_request_key_names_value_and_range(extra, message):
    with pytest.raises(OptionError) as caught:
        request(extra)
    assert message in str(caught.value)


KEYS = st.sampled_from(
    ["parallel_think", "pt_max_paths", "pt_max_depth", "pt_path_tokens", "pt_critical_tokens"]
    + ["pt_join", "pt_live", "pt_", "other"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=3,
)


@settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_request_is_answered_and_stays_within_the_servers_limits_INV4_INV5(extra):
    server = ServerOptions(max_paths=4, max_depth=1)
    try:
        options = request(extra, server)
    except OptionError as error:
        assert "vllm_xargs" in str(error)
    else:
        assert 1 <= options.max_paths <= 4 and 0 <= options.max_depth <= 1
        assert options.profile in (*PROFILES, None)


def at_start(**extra) -> RequestOptions:
    return request({"parallel_think": "parathinker", **extra})


def test_keys_of_profiles_that_fork_at_the_start():
    options = at_start(pt_num_paths=3, pt_summary_tokens=9, pt_path_temperature=0.5, pt_vote=True)
    assert (options.num_paths, options.summary_tokens, options.path_temperature) == (3, 9, 0.5)
    assert options.vote
    shares = {"first": 0.0, "half": 0.5, "all": 1.0, 0.1: 0.1, "0.25": 0.25, 1: 1.0}
    for value, share in shares.items():
        assert at_start(pt_termination=value).termination == share


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"pt_num_paths": 9}, "pt_num_paths must be a whole number between 1 and 8, got 9"),
        ({"pt_summary_tokens": 0}, "of at least 1, got 0"),
        ({"pt_termination": "last"}, "must be first, half, all or a number above 0"),
        ({"pt_termination": 0}, "got 0"),
        ({"pt_termination": True}, "got True"),
        ({"pt_termination": "nan"}, "got nan"),
        ({"pt_path_temperature": -1}, "between 0 and 2; got -1"),
        ({"pt_path_temperature": 2.5}, "between 0 and 2; got 2.5"),
        ({"pt_path_temperature": "hot"}, "got 'hot'"),
        ({"pt_vote": 2}, "pt_vote must be true or false; got 2"),
    ],
)
def test_wrong_values_for_them(extra, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        at_start(**extra)


@pytest.mark.parametrize("name", ["multiverse", "off"])
def test_other_profiles_have_no_use_for_them(name):
    with pytest.raises(OptionError, match=r"forks at the start \(parathinker\); got"):
        request({"parallel_think": name, "pt_num_paths": 2})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"vote_pattern": "("}, "vote_pattern must be a regular expression"),
        ({"vote_pattern": 3}, "vote_pattern must be a regular expression"),
        ({"thought_embeddings": 3}, "thought_embeddings must be a path, got 3"),
    ],
)
def test_wrong_server_settings_for_them(raw, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        ServerOptions.parse(raw)


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


HUGE = {
    "long text": "x" * 100_000,
    "lines": "a\nb" * 100,
    "nested": nested(20_000),
    "long list": ["y"] * 100_000,
    "big number": 10**5000,
    "object": {"k" * 100_000: 1},
}


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
def test_errors_quote_no_more_of_a_value_than_a_line(value):
    keys = [key for key in REQUEST_KEYS if key != "pt_vote"]
    for key in keys:
        with pytest.raises(OptionError) as caught:
            parse_request(
                {"parallel_think": "parathinker", key: value},
                ServerOptions(judge={"rule": "judge"}),
                PROFILES,
                "multiverse",
            )
        assert len(str(caught.value)) < 800 and "\n" not in str(caught.value), key
    for field in fields(ServerOptions):
        if isinstance(value, str) and field.type == "str | None" and field.name != "vote_pattern":
            continue
        raw = {field.name: value}
        with pytest.raises(OptionError) as caught:
            load(raw)
        assert len(str(caught.value)) < 800 and "\n" not in str(caught.value), field.name
    with pytest.raises(OptionError) as caught:
        ServerOptions.parse(value)
    assert len(str(caught.value)) < 800


def load(raw: dict[str, object]) -> None:
    """Read settings as far as can be done without a model."""
    options = ServerOptions.parse(raw)
    for path in (*options.profiles, options.profile):
        load_profile(path)
    if options.vote_pattern is not None or options.judge is not None:
        raise OptionError("fine")


@pytest.mark.parametrize("key", ["pt_" + "x" * 100_000, "pt_\n\x1b"])
def test_errors_show_unknown_keys_in_one_line(key):
    with pytest.raises(OptionError, match="is unknown; allowed") as caught:
        request({key: 1})
    assert len(str(caught.value)) < 700 and str(caught.value).isprintable()
    with pytest.raises(OptionError, match="unknown key") as caught:
        ServerOptions.parse({key: 1})
    assert len(str(caught.value)) < 700 and str(caught.value).isprintable()


@pytest.mark.parametrize("pattern", ["(", 0, 3, [], "a{99999999999}", "(" * 5000])
def test_patterns_that_are_none_are_refused(pattern):
    with pytest.raises(OptionError, match="vote_pattern must be a regular expression") as caught:
        ServerOptions.parse({"vote_pattern": pattern})
    assert len(str(caught.value)) < 300
