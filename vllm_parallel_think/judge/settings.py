"""The server's ``judge`` key: which rule verifies, and what it cannot be combined with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.tokenizers import cached_get_tokenizer, cached_tokenizer_from_config

from spec_decode.judge_head import load_head
from spec_decode.rules import RULES, FLy, Rule, parameters
from spec_decode.vocabulary import VocabularyContents, refuse_other

from ..compat.logger import init_logger
from ..core.errors import OptionError, quoted, shortened
from ..validation import refuse_speculation

logger = init_logger(__name__)

WHERE = "--additional-config: parallel_think.judge"


@dataclass(frozen=True)
class JudgeSettings:
    """A rule that fits the served model.

    Attributes:
        rule: What accepts draft tokens beside the standard test.
        threshold: Least threshold of requests, for a rule that has one.

    """

    rule: Rule
    threshold: float | None


def load(raw: Mapping[str, Any], config: VllmConfig) -> JudgeSettings:
    """Check the key, load the weights, and refuse what the rule cannot work with.

    Raises:
        OptionError: Names the key, the value and what is allowed.

    """
    refuse_speculation(config, WHERE)
    name = raw.get("rule")
    if not isinstance(name, str) or name not in RULES:
        raise OptionError(f"{WHERE}: rule must be one of {', '.join(RULES)}; got {quoted(name)}")
    values = {key: value for key, value in raw.items() if key != "rule"}
    allowed = ["weights" if key == "head" else key for key in parameters(name)]
    if unknown := sorted(set(values) - set(allowed)):
        raise OptionError(
            f"{WHERE}: unknown key {quoted(unknown[0])}; rule {name} allows {', '.join(allowed)}"
        )
    try:
        if name == "judge":
            values = _with_head(values, config)
        rule: Rule = RULES[name](**values)
    except ValueError as error:
        raise OptionError(f"{WHERE}: {shortened(str(error), 500)}") from None
    _refuse_mismatch(rule, name, config)
    return JudgeSettings(rule, getattr(rule, "threshold", None))


def _with_head(values: dict[str, Any], config: VllmConfig) -> dict[str, Any]:
    weights = values.pop("weights", None)
    if not isinstance(weights, str):
        raise ValueError(f"weights must be the path of a judge head, got {quoted(weights)}")
    model = config.model_config
    served = model.served_model_name
    names = [model.model, *([served] if isinstance(served, str) else served or [])]
    head = load_head(weights, targets=names, hidden_size=model.get_hidden_size())
    return {"threshold": head.threshold, **values, "head": head}


def refuse_other_vocabulary(config: VllmConfig) -> None:
    """Refuse a draft model to which token ids mean something else than to the served model.

    vLLM compares sizes, and gives both the served model's tokenizer.

    Raises:
        OptionError: Says what differs, and what to do.

    """
    spec, model = config.speculative_config, config.model_config
    tokenizer = cached_tokenizer_from_config(model)
    if spec is None or spec.method != "draft_model" or tokenizer is None:
        return
    draft = spec.draft_model_config
    try:
        other = cached_get_tokenizer(
            draft.model,
            tokenizer_mode=model.tokenizer_mode,
            revision=draft.revision,
            trust_remote_code=draft.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        logger.warning(
            "%s: draft model %s has no tokenizer to compare with the served model's; make sure "
            "that their vocabularies are the same: %s", WHERE, draft.model, error
        )  # fmt: skip
        return
    try:
        refuse_other(
            VocabularyContents.of(model.model, tokenizer, model.get_vocab_size()),
            VocabularyContents.of(draft.model, other, draft.get_vocab_size()),
        )
    except ValueError as error:
        raise OptionError(f"{WHERE}: {error}") from None


def _refuse_mismatch(rule: Rule, name: str, config: VllmConfig) -> None:
    spec = config.speculative_config
    assert spec is not None
    if rule.needs_draft_logits and spec.draft_sample_method != "probabilistic":
        raise OptionError(
            f"{WHERE}: rule {name} compares with the draft model's probabilities: set "
            "draft_sample_method 'probabilistic' in --speculative-config"
        )
    if isinstance(rule, FLy) and spec.num_speculative_tokens <= rule.window:
        raise OptionError(
            f"{WHERE}: rule {name} looks {rule.window} drafts ahead and would accept nothing with "
            f"num_speculative_tokens {spec.num_speculative_tokens}: raise that, or lower window"
        )
