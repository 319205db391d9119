"""Both kinds of groups keep to one contract, without a word for each other."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap

import pytest

from vllm_parallel_think.core.fork_join.group import ForkJoinGroup
from vllm_parallel_think.core.hogwild.group import HogwildGroup
from vllm_parallel_think.core.interface import Group
from vllm_parallel_think.core.summary import (
    FallbackReason,
    HogwildFigures,
    Summary,
    Votes,
    WriterFigures,
)

CONTRACT = {name: value for name, value in vars(Group).items() if not name.startswith("_")}


@pytest.mark.parametrize("kind", [ForkJoinGroup, HogwildGroup])
@pytest.mark.parametrize("name", CONTRACT)
def test_a_group_has_what_the_contract_says(kind, name):
    asked, given = CONTRACT[name], inspect.getattr_static(kind, name)
    assert isinstance(given, property) == isinstance(asked, property)
    if not isinstance(asked, property):
        assert inspect.signature(given) == inspect.signature(asked)
    assert asked.__doc__, "the contract says what it means"


@pytest.mark.parametrize("kind", [ForkJoinGroup, HogwildGroup])
def test_a_method_of_one_kind_only_is_no_business_of_the_other(kind):
    """What a group answers for the sake of the other kind alone is written once, in the base."""
    for name, value in vars(kind).items():
        if name.startswith("_") or not inspect.isfunction(value):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
        (function,) = tree.body
        assert isinstance(function, ast.FunctionDef)
        body = function.body[1:]  # after the docstring
        constant = isinstance(body[0], ast.Return) and isinstance(
            body[0].value, ast.Constant | ast.List | ast.Tuple
        )
        assert not (len(body) == 1 and constant), name


def test_clients_get_a_summary_as_they_always_did():
    figures = dict(
        profile="p",
        join="kv",
        forks=1,
        paths=2,
        widest_fork=2,
        depth=1,
        generated_tokens=20,
        forced_tokens=3,
        critical_path_tokens=12,
        reused_kv_tokens=7,
        cut_paths=0,
    )
    plain = Summary(**figures, fallbacks={FallbackReason.MAX_PATHS: 2}).as_dict()
    assert json.dumps(plain) == (
        '{"profile": "p", "join": "kv", "forks": 1, "paths": 2, "widest_fork": 2, "depth": 1, '
        '"generated_tokens": 20, "forced_tokens": 3, "critical_path_tokens": 12, '
        '"parallelism_ratio": 1.6667, "reused_kv_tokens": 7, "cut_paths": 0, '
        '"fallbacks": {"max_paths": 2}}'
    )
    assert {type(key) for key in plain["fallbacks"]} == {str}, "msgpack knows no others"
    more = Summary(
        **figures,
        fallbacks={},
        reused_tags=0,
        votes=Votes("5", {"5": 2}, 2),
        hogwild=HogwildFigures("combined", 3, 1, 0, (WriterFigures("Ann", 3, 9),)),
    ).as_dict()
    assert list(more) == [*plain, "reused_tags", "votes", "hogwild"]
    assert more["votes"] == {"answer": "5", "counts": {"5": 2}, "paths": 2}
    assert more["hogwild"] == {
        "layout": "combined",
        "steps": 3,
        "checks_yes": 1,
        "checks_no": 0,
        "workers": [{"name": "Ann", "steps": 3, "tokens": 9}],
    }
    assert Summary(**{**figures, "critical_path_tokens": 0}, fallbacks={}).parallelism_ratio == 1.0
