"""Where vLLM keeps the parser of `vllm serve`: one place in 0.32, another in 0.33."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.ray.serve_options import PLACES, cli_args
from tests.support.repository import ROOT

FIND = "from deploy.ray.serve_options import cli_args; print(cli_args().make_arg_parser(None))"


def find_in(folder: Path, modules: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Look for the parser in a vLLM that has these modules, given as source, and no other."""
    for name, source in modules.items():
        path = folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        for parent in path.relative_to(folder).parents[:-1]:
            (folder / parent / "__init__.py").touch()
    search = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, "-c", FIND], env=search, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("place", PLACES)
def test_it_is_found_where_it_is(place: str, tmp_path: Path) -> None:
    others = {p.rpartition(".")[0] + ".other": "" for p in PLACES}
    source = "def make_arg_parser(parser): return __name__"
    done = find_in(tmp_path, {**others, place: source})
    assert done.stdout.strip() == place, done.stderr


@pytest.mark.parametrize("place", PLACES)
def test_it_is_found_beside_missing_packages(place: str, tmp_path: Path) -> None:
    done = find_in(tmp_path, {place: "def make_arg_parser(parser): return __name__"})
    assert done.stdout.strip() == place, done.stderr


def test_a_vllm_without_it_is_named(tmp_path: Path) -> None:
    done = find_in(tmp_path, {"vllm.entrypoints.other": ""})
    assert "ImportError: vLLM has none of" in done.stderr
    assert all(place in done.stderr for place in PLACES)


def test_a_broken_one_says_what_is_missing(tmp_path: Path) -> None:
    """What a place itself cannot import must not send the search on to the next."""
    broken = {PLACES[0]: "import nothing_of_this_name", PLACES[1]: "make_arg_parser = print"}
    done = find_in(tmp_path, broken)
    assert "No module named 'nothing_of_this_name'" in done.stderr


def test_the_installed_vllm_has_it() -> None:
    found = cli_args()
    assert callable(found.make_arg_parser) and callable(found.validate_parsed_serve_args)
