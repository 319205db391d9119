"""What of vLLM's is replaced: declared, once, only where it is what we know, and documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vllm_parallel_think.__main__ import main
from vllm_parallel_think.compat.patches import PATCHES
from vllm_parallel_think.compat.patching import Patch, parameters_of
from vllm_parallel_think.core.errors import OptionError

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_parallel_think"

STATE = {
    # Configuration: what an operator could have set.
    "scheduler_cls": "vLLM's own seam",
    "worker_cls": "vLLM's own seam",
    "block_size": "a setting",
    "user_specified_block_size": "says that block_size was set",
    "async_scheduling": "a setting",
    "backend": "a setting",
    # Requests: what vLLM writes at admission, or the scheduler as it goes.
    "prompt_token_ids": "the profile's opening is appended to the prompt",
    "num_prompt_tokens": "follows the prompt",
    "max_tokens": "the server's limit",
    "status": "how a branch ended",
    "num_computed_tokens": "K/V that came back from the host",
    "next_decode_eligible_step": "a branch that waits for its siblings",
    # Outputs that the client gets in place of a branch's.
    "request_id": "outputs of branches carry the client's",
    "new_token_ids": "cut at a branch's end",
    "new_logprobs": "cut at a branch's end",
    "finish_reason": "of the whole answer",
    "stop_reason": "of the whole answer",
    "events": "once an answer",
    "prefill_stats": "once an answer",
    "kv_transfer_params": "where summaries travel",
    # Queues, while a step is chosen; put back at its end.
    "waiting": "newcomers, held back while others wait for blocks",
    "kv_holding_waiting": "its order, while members of gangs enter first",
    # Model Runner V2's graphs: what a declared patch of `dispatch` chooses from.
    "_candidates": "part of a patch",
    # Not vLLM's but prometheus_client's: values in files, while instruments are made.
    "ValueClass": "put back at once",
}
"""Attributes of vLLM's objects that hold a value and that this package sets. None of them is a
function or a class: those are patches."""


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_a_declaration_is_complete(patch: Patch) -> None:
    assert patch.target.startswith("vllm.")
    for words in (patch.why, patch.until):
        assert words.endswith((".", ".)")) and "\n" not in words and "|" not in words


def test_nothing_is_replaced_twice() -> None:
    targets = [patch.target for patch in PATCHES]
    assert len(targets) == len(set(targets)) > 20


def test_the_command_prints_what_architecture_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patches", "--markdown"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(PATCHES) + 2
    section = _section((ROOT / "ARCHITECTURE.md").read_text("utf-8"), "Patches")
    written = [line for line in section if line.startswith("|")]
    assert written == printed, "run `vllm-parallel-think patches --markdown`"


def test_the_command_prints_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patches"]) == 0
    printed = capsys.readouterr().out
    for patch in PATCHES:
        assert f"{patch.target}\n  why:   {patch.why}\n  until: {patch.until}\n" in printed


def test_the_table_needs_no_vllm() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None; sys.modules['torch'] = None; "
        "from vllm_parallel_think.__main__ import main; sys.exit(main(['patches']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("until:") == len(PATCHES)


def _section(text: str, title: str) -> list[str]:
    lines = text.splitlines()
    start = lines.index(f"## {title}") + 1
    end = next((i for i in range(start, len(lines)) if lines[i].startswith("## ")), len(lines))
    return lines[start:end]


class Stock:
    """Stands for a class of vLLM's."""

    def method(self, known: int, *, other: int = 0) -> Any:
        return [known]

    @classmethod
    def of_class(cls, known: int) -> Any:
        return [cls, known]

    @staticmethod
    def static(known: int) -> Any:
        return [known]


def declared(name: str, *parameters: str, owner: str = "Stock") -> Patch:
    return Patch(f"vllm.somewhere.{owner}.{name}", "Why.", "Until.", parameters)


def more(original: Any) -> Any:
    return lambda *args, **kwargs: [*original(*args, **kwargs), "more"]


def test_a_target_that_is_not_the_one_declared_is_refused() -> None:
    class Other:
        def method(self, known: int, *, other: int = 0) -> Any:
            return [known]

    form = "known, *, other="
    with pytest.raises(OptionError, match=r"has no vllm\.somewhere\.Stock\.gone, which parallel"):
        declared("gone", form).apply(Stock, more)
    with pytest.raises(OptionError, match=r"has no vllm\.somewhere\.Stock\.method"):
        declared("method", form).apply(Other, more)
    for parameters in (("known, other=",), ("known, *, other",), ("known",), ("",)):
        with pytest.raises(OptionError, match=r"method\(known, \*, other=\), and parallel_think"):
            declared("method", *parameters).apply(Stock, more)
    assert Stock().method(1) == [1]


def test_a_class_keeps_its_first_replacement() -> None:
    class Stock:
        def method(self, known: int) -> Any:
            return [known]

        @classmethod
        def of_class(cls, known: int) -> Any:
            return [cls, known]

    method, of_class = declared("method", "other", "known"), declared("of_class", "known")
    for _ in range(2):
        method.apply(Stock, more)
        of_class.apply(Stock, more)
    assert Stock().method(1) == [1, "more"]
    assert Stock.of_class(1) == [Stock, 1, "more"]
    second = Patch("vllm.elsewhere.Stock.method", "Why.", "Until.", ("known",))
    with pytest.raises(OptionError, match=r"replaced already, for vllm\.somewhere\.Stock\.method"):
        second.apply(Stock, more)


def test_an_object_takes_the_newest_replacement() -> None:
    stock = Stock()
    for patch in (declared("method", "known, *, other="), declared("static", "known")):
        for word in ("first", "second"):
            patch.apply(stock, lambda original, word=word: lambda known: [*original(known), word])
    assert stock.method(1) == stock.static(1) == [1, "second"]
    assert Stock().method(1) == [1]


def test_a_replacement_for_a_while() -> None:
    stock = Stock()
    with declared("method", "known, *, other=").applied(stock, more):
        assert stock.method(1) == [1, "more"]
    assert stock.method(1) == [1] and "method" not in vars(stock)


def test_a_function_of_a_module() -> None:
    module: Any = ModuleType("vllm.somewhere")
    module.function = lambda known: [known]
    patch = Patch("vllm.somewhere.function", "Why.", "Until.", ("known",))
    for _ in range(2):
        patch.apply(module, more)
    assert module.function(1) == [1, "more"]


def test_a_changed_class() -> None:
    class Ours(Stock):
        def method(self, known: int, *, other: int = 0) -> Any:
            return ["ours", *super().method(known, other=other)]

    class Wrong(Stock):
        def method(self, known: int) -> Any:
            return []

    patch = Patch(f"{__name__}.Stock", "Why.", "Until.")
    stock = Stock()
    with pytest.raises(OptionError, match=r"Stock\.method\(known, \*, other=\), and parallel"):
        patch.change_class(stock, Wrong)
    for _ in range(2):
        patch.change_class(stock, Ours)
    assert stock.method(1) == ["ours", 1]
    with pytest.raises(OptionError, match=r"has a \S+Ours in place of"):
        patch.change_class(stock, Wrong)


def test_a_backend_that_somebody_else_replaced() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backend = AttentionBackendEnum.FLASHINFER
    patch = Patch("vllm.v1.attention.backends.registry.AttentionBackendEnum.FLASHINFER", "W.", "U.")
    try:
        for _ in range(2):
            patch.override_backend(backend, "ours.Backend")
        with pytest.raises(OptionError, match=r"replaced already, by ours\.Backend"):
            patch.override_backend(backend, "theirs.Backend")
    finally:
        backend.clear_override()


def test_withheld_entries_come_back() -> None:
    entries = {1: "a", 2: "b"}
    with pytest.raises(RuntimeError), declared("x").withheld(entries, [2, 3]):
        assert entries == {1: "a"}
        raise RuntimeError
    assert entries == {1: "a", 2: "b"}


def test_parameters_in_a_line() -> None:
    def function(self: Any, a: int, b: int = 1, *, c: int, d: int = 2, **e: Any) -> None: ...

    assert parameters_of(function) == "a, b=, *, c, d=, **e"
    assert parameters_of(lambda a, *b: 0) == "a, *b"


def test_nothing_else_sets_what_is_vllms() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {what}"
        for file, tree in _modules()
        if file != PACKAGE / "compat" / "patching.py" and PACKAGE / "core" not in file.parents
        for line, what in _foreign_writes(tree, _own_names())
    ]
    assert not found, "declare a patch, or name the state: " + ", ".join(found)


def test_every_named_state_is_set_somewhere() -> None:
    used = {
        target.attr
        for _, tree in _modules()
        for target in _written(tree)
        if isinstance(target, ast.Attribute)
    }
    assert set(STATE) <= used, f"no longer set: {sorted(set(STATE) - used)}"


@pytest.mark.parametrize(
    "source",
    [
        "platform.check_and_update_config = ours",
        "sampler.__class__ = Ours",
        "self.coordinator.cache_blocks = ours",
        "setattr(owner, 'method', ours)",
        "object.__setattr__(owner, 'method', ours)",
        "vars(owner)['method'] = ours",
        "owner.__dict__['method'] = ours",
        "owner.__dict__.update(method=ours)",
        "register_backend(backend, 'ours.Backend')",
        "module.function, other = ours, 1",
    ],
)
def test_the_scan_sees_a_patch(source: str) -> None:
    assert list(_foreign_writes(ast.parse(source), frozenset()))


def test_the_scan_lets_own_state_be() -> None:
    source = "self.x = 1\nclass A:\n    def f(self): self.y = self.z.count = 2\nvalue = other.x"
    assert not list(_foreign_writes(ast.parse(source), frozenset({"count"})))


def _modules() -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        yield file, ast.parse(file.read_text("utf-8"))


def _own_names() -> frozenset[str]:
    """Return the data attributes that classes of ours declare or give themselves."""
    names: set[str] = set()
    for _, tree in _modules():
        for owner in ast.walk(tree):
            if not isinstance(owner, ast.ClassDef):
                continue
            for node in ast.walk(owner):
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    names.add(node.target.id)
            names.update(
                target.attr
                for target in _written(owner)
                if isinstance(target, ast.Attribute) and _is_self(target.value)
            )
    return frozenset(names)


def _written(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield from target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            yield node.target
        elif isinstance(node, ast.Delete):
            yield from node.targets


def _foreign_writes(tree: ast.AST, own: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Return writes to attributes that are neither ours nor named as state, and calls that set."""
    for target in _written(tree):
        if isinstance(target, ast.Attribute):
            if not _is_self(target.value) and target.attr not in own | STATE.keys():
                yield target.lineno, ast.unparse(target)
        elif isinstance(target, ast.Subscript) and _is_namespace(target.value):
            yield target.lineno, ast.unparse(target)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")
            if called[2] in ("setattr", "delattr", "__setattr__", "register_backend") or (
                isinstance(node.func, ast.Attribute)
                and _is_namespace(node.func.value)
                and called[2] in ("update", "setdefault", "pop")
            ):
                yield node.lineno, ast.unparse(node)


def _is_self(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def _is_namespace(value: ast.expr) -> bool:
    if isinstance(value, ast.Attribute):
        return value.attr == "__dict__"
    return isinstance(value, ast.Call) and ast.unparse(value.func) == "vars"
