"""Replacing something of vLLM's where it offers no hook: declared, once, and only what we know.

Every replacement is a :class:`Patch` of :mod:`.patches`; nothing else in this package sets what is
vLLM's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

Make = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Returns the replacement of the function it is given."""

_MARK = "_parallel_think_patch"


@dataclass(frozen=True)
class Patch:
    """A replacement of something of vLLM's.

    Attributes:
        target: Dotted path of what is replaced.
        why: What is missing in vLLM.
        until: What would let the patch go.
        parameters: The target's parameters as :func:`parameters_of` writes them, one entry for each
            form that a supported vLLM has; none for what is not called.

    """

    target: str
    why: str
    until: str
    parameters: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The last part of the target's path."""
        return self.target.rpartition(".")[2]

    def apply(self, owner: Any, make: Make) -> None:
        """Replace a function of a class, a module or an object.

        A class or a module keeps its first replacement, however often it is asked for. On an object
        a later replacement takes the place of the first.

        Args:
            owner: What has the function.
            make: Called with the original; of a classmethod that is the function inside it, and the
                replacement becomes a classmethod again.

        Raises:
            OptionError: This vLLM has no such function, it takes other parameters, or another patch
                replaced it already.

        """
        self.check(owner)
        found = getattr(owner, self.name)
        marked = _marked(found)
        if marked is not None and isinstance(owner, type | ModuleType):
            return
        original = found if marked is None else marked.original
        is_classmethod = isinstance(owner, type) and inspect.ismethod(found)
        replacement = make(getattr(original, "__func__", original) if is_classmethod else original)
        setattr(replacement, _MARK, _Mark(self, original))
        setattr(owner, self.name, classmethod(replacement) if is_classmethod else replacement)

    @contextmanager
    def applied(self, owner: Any, make: Make) -> Iterator[None]:
        """Replace a method of an object for a while.

        Raises:
            OptionError: As :meth:`apply`.

        """
        self.check(owner)
        replacement = make(getattr(owner, self.name))
        setattr(replacement, _MARK, _Mark(self, getattr(owner, self.name)))
        setattr(owner, self.name, replacement)
        try:
            yield
        finally:
            delattr(owner, self.name)

    def check(self, owner: Any) -> None:
        """Refuse a target that is not the one declared.

        Raises:
            OptionError: As :meth:`apply`.

        """
        found = getattr(owner, self.name, None)
        if not callable(found) or not self._is_declared(owner):
            raise _error(f"has no {self.target}, which parallel_think replaces")
        marked = _marked(found)
        if marked is not None and marked.patch.target != self.target:
            raise _error(f"has its {self.target} replaced already, for {marked.patch.target}")
        parameters = parameters_of(found if marked is None else marked.original)
        if parameters not in self.parameters:
            raise _error(
                f"has {self.target}({parameters}), and parallel_think replaces "
                f"{self.name}({') or ('.join(self.parameters)})"
            )

    def change_class(self, instance: Any, subclass: type) -> None:
        """Make an object one of a subclass whose methods take what those that they replace take.

        Raises:
            OptionError: The object is not of the declared class, or a method's parameters differ.

        """
        base = type(instance)
        if base is subclass:
            return
        if f"{base.__module__}.{base.__qualname__}" != self.target or base not in subclass.__mro__:
            raise _error(f"has a {base.__qualname__} in place of {self.target}")
        for name, method in vars(subclass).items():
            stock = getattr(base, name, None)
            if not inspect.isfunction(method) or not inspect.isfunction(stock):
                continue
            if parameters_of(method) != parameters_of(stock):
                raise _error(
                    f"has {self.target}.{name}({parameters_of(stock)}), and parallel_think "
                    f"replaces {name}({parameters_of(method)})"
                )
        instance.__class__ = subclass

    def override_backend(self, backend: Any, path: str) -> None:
        """Register a class in place of one of vLLM's attention backends.

        Args:
            backend: Member of ``AttentionBackendEnum``.
            path: Dotted path of the class.

        Raises:
            OptionError: Another class is registered already.

        """
        from vllm.v1.attention.backends.registry import register_backend

        if backend.name != self.name:
            raise ValueError(f"{self.target} is not the patch of {backend.name}")
        if backend.is_overridden() and backend.get_path() != path:
            raise _error(f"has its {self.target} replaced already, by {backend.get_path()}")
        register_backend(backend, path)

    @contextmanager
    def withheld(self, entries: MutableMapping[Any, Any], keys: Collection[Any]) -> Iterator[None]:
        """Take entries out of a mapping that vLLM reads, for a while."""
        held = {key: entries.pop(key) for key in keys if key in entries}
        try:
            yield
        finally:
            entries.update(held)

    def _is_declared(self, owner: Any) -> bool:
        """Return whether an owner is the one that the target's path names, or one of its kind."""
        wanted = self.target.rpartition(".")[0].rpartition(".")[2]
        if isinstance(owner, ModuleType):
            return owner.__name__ == self.target.rpartition(".")[0]
        kind = owner if isinstance(owner, type) else type(owner)
        return wanted in {base.__name__ for base in kind.__mro__}


@dataclass(frozen=True)
class _Mark:
    """Which patch made a replacement, and of what."""

    patch: Patch
    original: Callable[..., Any]


def _marked(function: Any) -> _Mark | None:
    mark = getattr(function, _MARK, None)
    return mark if isinstance(mark, _Mark) else None


def parameters_of(function: Callable[..., Any]) -> str:
    """Return a function's parameters in a line, without ``self`` and types; ``=``: may be left out.

    For example ``request, token_ids=, *, finished, **more``.
    """
    return _parameters(getattr(function, "__func__", function))


@cache
def _parameters(function: Callable[..., Any]) -> str:
    parts: list[str] = []
    keyword_only = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            parts.append(f"*{parameter.name}")
            keyword_only = True
        elif parameter.kind is parameter.VAR_KEYWORD:
            parts.append(f"**{parameter.name}")
        else:
            if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
                parts.append("*")
                keyword_only = True
            has_default = parameter.default is not parameter.empty
            parts.append(f"{parameter.name}=" if has_default else parameter.name)
    is_method = bool(parts) and parts[0] in ("self", "cls")
    return ", ".join(parts[1:] if is_method else parts)


def _error(what: str) -> Exception:
    """Return what to raise; imported late, as every vLLM process loads this module."""
    import vllm

    from ..core.errors import OptionError

    return OptionError(
        f"vLLM {vllm.__version__} {what}: install a supported vLLM, or remove parallel_think from "
        "--additional-config"
    )
