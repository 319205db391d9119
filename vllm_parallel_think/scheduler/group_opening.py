"""New groups: from a client's request and its options, before vLLM queues the request."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.request import Request

from ..compat.logger import init_logger
from ..core.config.hogwild_profile import HogwildProfile
from ..core.config.loading import builtin_profiles
from ..core.config.request_options import parse_request
from ..core.errors import OptionError, short_id
from ..core.fork_join.group import ForkJoinGroup
from ..core.fork_join.tag_scanner import Grammar
from ..core.hogwild.group import HogwildGroup
from ..core.hogwild.prompts import HogwildPrompts
from ..core.interface import Group, Limits
from ..settings import Settings
from ..tokenizer import TokenizerVocabulary
from ..validation import workers_refusal
from .group_table import GroupState

logger = init_logger(__name__)


@dataclass(frozen=True)
class EngineLimits:
    """What an engine has, for one request or one step.

    Attributes:
        block_size: Tokens of a KV block.
        num_blocks: KV blocks of the pool.
        model_len: Most tokens of a vLLM request.
        step_tokens: Most tokens of a step.
        step_rows: Most rows of a step.

    """

    block_size: int
    num_blocks: int
    model_len: int
    step_tokens: int
    step_rows: int


class GroupOpening:
    """Makes groups for requests that ask for one.

    Attributes:
        grammars: Profiles that requests may name, bound to the tokenizer.

    """

    def __init__(self, config: VllmConfig, settings: Settings, engine: EngineLimits) -> None:
        self._settings = settings
        self._engine = engine
        self.grammars = _usable_grammars(config, settings)
        self._profiles = {name: grammar.profile for name, grammar in self.grammars.items()}
        self._no_workers = workers_refusal(config)
        pattern = settings.options.vote_pattern
        self._vote_pattern = re.compile(pattern) if pattern is not None else None

    def open(self, request: Request, has_room: Callable[[int], bool]) -> GroupState | None:
        """Return a group for a request that may branch, and write its opening; never raises.

        Args:
            request: The client's; vLLM does not know it yet.
            has_room: Whether the pool can take this many more held blocks.

        """
        params = request.sampling_params
        if params is None or request.prompt_token_ids is None or request.resumable:
            return None
        if request.mm_features or request.prompt_embeds is not None:
            return None  # a replay computes token ids only
        try:
            group = self._group(request, has_room)
        except OptionError as error:
            # The front end answers such a request with HTTP 400; other ways in get a plain request.
            request_id = short_id(request.request_id)
            logger.warning("request %s runs without branches: %s", request_id, error)
            return None
        except Exception:  # a fault of one group must not end the engine
            logger.exception("request %s runs without branches", short_id(request.request_id))
            return None
        if group is None or not self._write_opening(request, group):
            return None
        state = GroupState(request, group)
        if isinstance(group, HogwildGroup):
            state.error = self._too_wide(group)
        return state

    def _group(self, request: Request, has_room: Callable[[int], bool]) -> Group | None:
        assert request.sampling_params is not None
        options = parse_request(
            request.sampling_params.extra_args,
            self._settings.options,
            self._profiles,
            self._settings.default,
            no_workers=self._no_workers,
        ).within(request.max_tokens)
        if options.profile is None:
            return None
        words, prompt = self.grammars[options.profile], request.prompt_token_ids
        if isinstance(words, HogwildPrompts):
            return HogwildGroup(prompt, words, options, self._limits(request, has_room))
        return ForkJoinGroup(prompt, words, options, self._limits(request, has_room))

    def _limits(self, request: Request, has_room: Callable[[int], bool]) -> Limits:
        options, engine = self._settings.options, self._engine
        assert request.sampling_params is not None
        max_tokens = request.max_tokens
        if options.max_total_tokens is not None:
            max_tokens = min(max_tokens, options.max_total_tokens)
        return Limits(
            block_size=engine.block_size,
            index_blocks=min((engine.model_len - 1) // engine.block_size, engine.num_blocks),
            max_tokens=max_tokens,
            max_forks=options.max_forks,
            has_room=has_room,
            min_tokens=request.sampling_params.min_tokens,
            ignore_eos=request.sampling_params.ignore_eos,
            vote_pattern=self._vote_pattern,
        )

    def _write_opening(self, request: Request, group: Group) -> bool:
        """Append the profile's opening to the prompt; return whether there is room for it."""
        opening = list(group.opening)
        limit = self._settings.options.max_total_tokens
        if limit is not None:
            request.max_tokens = min(request.max_tokens, limit)
        if not opening:
            return True
        # Rules for workers are no part of the answer.
        visible = 0 if isinstance(group, HogwildGroup) else len(opening)
        total = request.num_tokens + len(opening)
        if visible >= request.max_tokens or total >= self._engine.model_len:
            return False
        assert request.prompt_token_ids is not None
        request.prompt_token_ids = [*request.prompt_token_ids, *opening]
        request._all_token_ids.extend(opening)
        request.num_prompt_tokens += len(opening)
        request.max_tokens -= visible
        request.update_block_hashes()
        return True

    def _too_wide(self, group: HogwildGroup) -> str | None:
        """Return why no step could ever hold a gang, if none could."""
        tokens, rows = group.widest_step
        if tokens > self._engine.step_tokens:
            return (
                f"a step of its workers takes up to {tokens} tokens; raise "
                f"--max-num-batched-tokens ({self._engine.step_tokens}) or send fewer workers"
            )
        if rows > self._engine.step_rows:
            return (
                f"its workers and headers are {rows} rows; raise --max-num-seqs "
                f"({self._engine.step_rows}) or send fewer workers"
            )
        return None


def _usable_grammars(config: VllmConfig, settings: Settings) -> dict[str, Grammar | HogwildPrompts]:
    """Bind profiles to the tokenizer; a built-in one that nobody chose may not suit it."""
    model: Any = config.model_config
    vocabulary = TokenizerVocabulary.from_config(model)
    grammars: dict[str, Grammar | HogwildPrompts] = {}
    for name, profile in settings.profiles.items():
        try:
            grammar: Grammar | HogwildPrompts
            if isinstance(profile, HogwildProfile):
                grammar = HogwildPrompts(profile, vocabulary)
            else:
                grammar = Grammar(profile, vocabulary)
            grammar.check(model.get_vocab_size())
        except OptionError as error:
            if name == settings.default or name not in builtin_profiles():
                raise
            logger.info("requests cannot name %s: %s", name, error)
        else:
            grammars[name] = grammar
    return grammars
