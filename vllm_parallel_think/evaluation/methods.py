"""Ways to answer a question: lines of configuration, and the requests they make."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..core.config.request_options import is_ours
from .errors import ExamError

BUILT_IN = Path(__file__).with_name("methods.toml")
ENGINE_OPTIONS = "vllm_xargs"
KEYS = frozenset({"request", "shares", "suffix"})
OUR_FIELDS = frozenset({"model", "messages", "stream", "seed", "max_tokens"})
"""Fields of a request that the exam sets itself."""


@dataclass(frozen=True)
class Method:
    """A way to answer.

    Attributes:
        name: What tables call it.
        request: Fields of the chat request's body.
        shares: Limits of the request (``max_tokens`` or an option of the engine) as parts of the
            budget of all generated tokens. Without ``max_tokens`` that limit is the whole budget.
        suffix: Words put behind the prompt.

    """

    name: str
    request: Mapping[str, Any] = field(default_factory=dict)
    shares: Mapping[str, Fraction] = field(default_factory=dict)
    suffix: str = ""

    @property
    def num_choices(self) -> int:
        """How many answers a request asks for; more than one are put to a vote at the client."""
        return int(self.request.get("n", 1))

    @property
    def is_greedy(self) -> bool:
        """Whether another seed would give the same answer."""
        return self.request.get("temperature") == 0 and self.num_choices == 1

    @property
    def engine_options(self) -> Mapping[str, Any]:
        """The plugin's options of the request."""
        options: Mapping[str, Any] = self.request.get(ENGINE_OPTIONS, {})
        return options

    def limits(self, budget: int) -> dict[str, int]:
        """Return what the budget leaves to each limit, rounded down, at least one token."""
        shares = {"max_tokens": Fraction(1), **self.shares}
        return {key: max(1, int(budget * share)) for key, share in shares.items()}

    def body(self, model: str, prompt: str, budget: int, seed: int) -> dict[str, Any]:
        """Return the body of a chat request that keeps a budget of all generated tokens."""
        limits = self.limits(budget)
        options = {**self.engine_options, **{k: v for k, v in limits.items() if is_ours(k)}}
        text = f"{prompt}\n{self.suffix}" if self.suffix else prompt
        return {
            **{key: value for key, value in self.request.items() if key != ENGINE_OPTIONS},
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "seed": seed,
            **{key: value for key, value in limits.items() if not is_ours(key)},
            **({ENGINE_OPTIONS: options} if options else {}),
        }

    def described(self) -> dict[str, Any]:
        """Return the line of configuration, as plain values."""
        shares = {key: str(share) for key, share in self.shares.items()}
        return {"request": dict(self.request), "shares": shares, "suffix": self.suffix}


def load_methods(names: Sequence[str], file: Path | None = None) -> list[Method]:
    """Return methods by name, in order and each once.

    Args:
        names: Names of methods or groups; ``name+key=value`` changes an option of one, such as
            ``chain+pt_judge=false`` or ``parathinker-text4+pt_join=reprefill``.
        file: Further methods in the form of ``methods.toml``; they replace built-in ones.

    Raises:
        ExamError: A file or a name is not usable.

    """
    tables = [_read(BUILT_IN), *([_read(file)] if file is not None else [])]
    methods: dict[str, Method] = {}
    groups: dict[str, list[str]] = {}
    defaults: dict[str, Any] = {}
    for table in tables:
        defaults |= table.get("defaults", {}).get("request", {})
    for table in tables:
        for name, line in table.get("methods", {}).items():
            methods[name] = _method(name, line, defaults)
        groups |= table.get("groups", {})
    chosen: dict[str, Method] = {}
    for given in names:
        name, *changes = given.split("+")
        for each in groups.get(name, [name]):
            if each not in methods:
                known = ", ".join(sorted({*methods, *groups}))
                raise ExamError(f"--methods: {each!r} is none of {known}")
            method = methods[each]
            for change in changes:
                method = _changed(method, change)
            chosen[method.name] = method
    return list(chosen.values())


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ExamError(f"{file}: {error}") from None


def _method(name: str, line: Mapping[str, Any], defaults: Mapping[str, Any]) -> Method:
    if unknown := set(line) - KEYS:
        allowed = ", ".join(sorted(KEYS))
        raise ExamError(f"method {name}: unknown key {min(unknown)!r}; allowed: {allowed}")
    request = {**defaults, **line.get("request", {})}
    if taken := OUR_FIELDS & set(request):
        raise ExamError(f"method {name}: {min(taken)!r} of a request is set by the exam itself")
    try:
        shares = {key: Fraction(str(share)) for key, share in line.get("shares", {}).items()}
    except (ValueError, ZeroDivisionError) as error:
        raise ExamError(f"method {name}: shares: {error}") from None
    for key, share in shares.items():
        if not 0 < share <= 1:
            raise ExamError(f"method {name}: share {key} must be above 0 and at most 1, is {share}")
        if key != "max_tokens" and not is_ours(key):
            raise ExamError(f"method {name}: {key!r} is no limit; max_tokens and pt_* are")
    return Method(name, request, shares, line.get("suffix", ""))


def _changed(method: Method, change: str) -> Method:
    key, equals, text = change.partition("=")
    if not equals or not key or key in OUR_FIELDS:
        raise ExamError(f"--methods: {method.name}+{change}: expected key=value of a request")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    changed = {**method.request}
    if is_ours(key):
        changed[ENGINE_OPTIONS] = {**method.engine_options, key: value}
    else:
        changed[key] = value
    shares = {other: share for other, share in method.shares.items() if other != key}
    return replace(method, name=f"{method.name}+{change}", request=changed, shares=shares)
