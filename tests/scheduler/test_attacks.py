"""Faults and odd input: one request may suffer, the engine and its neighbours may not."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.request import Request

from tests.support.repository import VISIBLE_OUTLINE
from tests.support.schedules import MODES, Script, prompt, simulate, simulation_of, write_profile
from tests.support.tiny import EOS, VOCAB_SIZE, IdGrammar
from vllm_parallel_think.core.interface import Cause


@pytest.mark.parametrize("seed", [3, 19, 29])
def test_preempted_newcomer_is_no_reason_to_fail_a_group(
    seed: int, tiny_model: Path, tmp_path: Path
) -> None:
    """A plain request that preempts itself frees blocks: nobody is stuck, the next step goes on."""
    rng = random.Random(seed)
    num_blocks = rng.choice([24, 28, 32, 40])
    simulation = simulate(
        tiny_model,
        tmp_path,
        IdGrammar(num_paths=3),
        asynchronous=False,
        num_blocks=num_blocks,
        max_model_len=(num_blocks - 1) * 16,
    )
    group = simulation.add([rng.randrange(170, VOCAB_SIZE) for _ in range(20)], max_tokens=150)
    for _ in range(rng.randrange(30)):
        simulation.step()
    words = [rng.randrange(170, VOCAB_SIZE) for _ in range(rng.choice([16, 100, 200]))]
    plain = simulation.add(words, parallel=False, max_tokens=300)
    simulation.scheduler.requests[plain.request_id].sampling_params._eos_token_id = None
    simulation.run()
    assert group.finish in ("stop", "length")


@MODES
@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("cause", [Cause.EOS, Cause.LENGTH, Cause.CLOSED])
def test_fault_while_a_branch_ends_leaves_no_request_behind(
    asynchronous: bool, cause: Cause, late: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """INV-5: whatever step of a branch's end raises, its request leaves the engine."""
    rng = random.Random(5)
    simulation = simulate(
        tiny_model, tmp_path, IdGrammar(), asynchronous=asynchronous, num_blocks=100
    )
    for _ in range(4):
        simulation.add(
            prompt(rng), pt_path_tokens=20, max_tokens=12 if cause is Cause.LENGTH else 80
        )
    for state in simulation.scheduler.groups:
        end = state.group.end

        def fail(node: Any, why: Cause, *args: Any, end: Any = end) -> None:
            if late:
                end(node, why, *args)
            if why is cause:
                raise RuntimeError("bug")
            if not late:
                end(node, why, *args)

        state.group.end = fail
    simulation.run()
    assert any("internal error" in (c.finish or "") for c in simulation.clients.values())
    assert not any("bug" in (c.finish or "") for c in simulation.clients.values())


def test_name_pattern_with_an_optional_title(tiny_model: Path, tmp_path: Path) -> None:
    """A group that did not take part in a match is ``None``, not text."""
    profile = write_profile(
        tmp_path, "names = 'w(4[0-9])(w50)?'\non_end = true", '[5, 6, "{name}"]'
    )
    simulation = simulation_of(tiny_model, profile, asynchronous=False)
    Script(simulation, lambda tokens: {1: 40, 2: 41, 3: EOS}.get(len(tokens) - 9, 60))
    client = simulation.add([200] * 10, max_tokens=60)
    simulation.run(300)
    assert client.finish in ("stop", "length"), client.finish


def test_first_output_of_an_opening_carries_prefill_stats(tiny_model: Path, tmp_path: Path) -> None:
    """vLLM's front end reads prefill stats from a request's first output only."""
    profile = write_profile(tmp_path, "num_paths = 2", "[5, 6]", more="opening = [41, 42]")
    simulation = simulation_of(tiny_model, profile, asynchronous=False)
    outputs: list[Any] = []
    update = simulation.scheduler.update_from_output

    def record(*args: Any) -> Any:
        result = update(*args)
        outputs.extend(out for each in result.values() for out in each.outputs)
        return result

    simulation.scheduler.update_from_output = record
    simulation.add([200] * 10, max_tokens=30)
    simulation.run()
    assert outputs[0].new_token_ids == [41, 42]
    assert outputs[0].prefill_stats is not None


def test_end_of_sequence_of_the_generation_config_ends_a_path_only(
    tiny_model: Path, tmp_path: Path
) -> None:
    """vLLM puts all but one end-of-sequence id of generation_config.json into stop_token_ids.

    A path that ends by such an id ended like any other; the answer must go on.
    """
    second_eos = 63
    profile = write_profile(tmp_path, "num_paths = 2", "[5, 6]")
    simulation = simulation_of(tiny_model, profile, asynchronous=False)

    def choose(tokens: list[int]) -> int:
        if len(tokens) < 12:
            return 20 if len(tokens) == 11 else 60
        if tokens[-2:] == [8, 9] or 8 in tokens:
            return EOS if tokens[-1] == 61 else 61
        return second_eos if tokens[-1] == 62 else 62

    Script(simulation, choose)
    add = simulation.scheduler.add_request

    def from_server(request: Request) -> None:
        # As SamplingParams.update_from_generation_config({"eos_token_id": [EOS, 63]}, EOS) does.
        params = request.sampling_params
        params.update_from_generation_config({"eos_token_id": [EOS, second_eos]}, EOS)
        add(request)

    simulation.scheduler.add_request = from_server
    simulation.scheduler.token_feed.eos_tokens = {EOS, second_eos}
    client = simulation.add([200] * 10, max_tokens=200)
    simulation.run(500)
    assert client.tokens[-1] == EOS, "both paths and the conclusion are in the answer"


def test_refused_fork_is_counted_once(tiny_model: Path, tmp_path: Path) -> None:
    """An outline that may not fork is one refusal, not one (and several tokenisations) a token."""
    profile = write_profile(
        tmp_path, "names = 'w(4[0-9])'\nmax_outline_tokens = 5", '[5, 6, "{name}"]'
    )
    simulation = simulation_of(tiny_model, profile, asynchronous=False)
    encoded = 0
    grammar = simulation.scheduler.opening.grammars["attack"]
    encode = grammar.vocabulary.encode

    def count(text: str) -> list[int]:
        nonlocal encoded
        encoded += 1
        return encode(text)

    grammar.vocabulary.encode = count
    newline = grammar.vocabulary._pieces
    newline[99] = "\n"
    line = [40, 41, 99]
    Script(simulation, lambda t: line[len(t) - 10] if len(t) - 10 < 3 else 60)
    client = simulation.add([200] * 10, max_tokens=100, pt_max_depth=0)
    group = next(iter(simulation.scheduler.groups)).group
    simulation.run(500)
    assert client.finish == "length"
    assert group.fallbacks["max_depth"] <= 2, dict(group.fallbacks)


def test_titles_of_characters_that_span_tokens(tmp_path: Path) -> None:
    """Byte-level tokens hold parts of characters: titles and tags are read all the same."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from vllm_parallel_think.core.config.loading import load_profile
    from vllm_parallel_think.core.fork_join.tag_scanner import ForkSeen, Grammar
    from vllm_parallel_think.tokenizer import TokenizerVocabulary

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    vocabulary = TokenizerVocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    scanner = Grammar(load_profile(VISIBLE_OUTLINE), vocabulary).scanner(
        in_path=False, max_names=2, seed="1."
    )
    text = " Caf\u00e9\n2. \u8133 \u601d\u8003\n"
    seen = [event for token in vocabulary.encode(text) if (event := scanner.feed(token))]
    assert isinstance(seen[0], ForkSeen)
    assert [name.title for name in seen[0].names] == ["Caf\u00e9", "\u8133 \u601d\u8003"]


@MODES
def test_fault_in_a_new_group_is_a_plain_request(
    asynchronous: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-5: add_request has no fence of vLLM's around it."""
    import vllm_parallel_think.scheduler.group_opening as ours

    def broken(*args: Any) -> None:
        raise RuntimeError("bug")

    simulation = simulate(tiny_model, tmp_path, IdGrammar(), asynchronous=asynchronous)
    monkeypatch.setattr(ours, "ForkJoinGroup", broken)
    client = simulation.add([200] * 10, max_tokens=20)
    simulation.run()
    assert client.finish in ("stop", "length")


@MODES
def test_fault_while_penalties_are_counted_fails_one_request(
    asynchronous: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-5: this runs inside schedule(), where an exception would end the engine."""
    from vllm_parallel_think.core.fork_join.group import ForkJoinGroup

    def broken(*args: Any) -> None:
        raise RuntimeError("bug")

    simulation = simulate(tiny_model, tmp_path, IdGrammar(), asynchronous=asynchronous)
    monkeypatch.setattr(ForkJoinGroup, "written_before", broken)
    client = simulation.add([200] * 10, max_tokens=20)
    other = simulation.add([201] * 10, max_tokens=20, parallel=False)
    for state in simulation.scheduler.groups:
        state.root.sampling_params.presence_penalty = 0.5
    simulation.run()
    assert client.finish.startswith("parallel_think: internal error")
    assert "bug" not in client.finish, "an exception's words are no client's business"
    assert other.finish in ("stop", "length")


def test_workers_for_whom_no_room_will_come_are_told_how_much_they_need(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows from the refusal, K/V that is not there, must not hide it from the client."""
    from tests.support.hogwild_cases import write_recipe
    from vllm_parallel_think.core.hogwild.group import HogwildGroup

    simulation = simulation_of(
        tiny_model, write_recipe(tmp_path), asynchronous=False, max_num_batched_tokens=256
    )
    client = simulation.add([200] * 10, max_tokens=200, pt_worker_tokens=40)
    for _ in range(6):
        simulation.step()
    (state,) = simulation.scheduler.groups
    assert state.group.branched
    simulation.reset()
    state.stash.append((state.group.trunk, 1000, 0))
    monkeypatch.setattr(HogwildGroup, "blocks_needed", property(lambda group: 1000))
    simulation.run()
    assert client.finish == (
        "parallel_think: the answer needs 1000 KV blocks of 16 tokens, the whole pool has 63"
    )


@MODES
def test_lost_blocks_of_a_prefix_tell_nobody_what_was_written(
    asynchronous: bool, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A node in an exception is a name: its tokens are one client's, and stay out of the log."""
    simulation = simulate(
        tiny_model, tmp_path, IdGrammar(num_paths=2, at_start=True), asynchronous=asynchronous
    )
    secret = [201 + i for i in range(20)]
    client = simulation.add(secret, max_tokens=60)
    (state,) = simulation.scheduler.groups
    while not state.group.trunk.sealed:
        simulation.step()
    blocks = simulation.scheduler.held_blocks._blocks
    kept = blocks.pop(state.group.trunk)
    with caplog.at_level("ERROR"), capture_vllm(caplog):
        output = simulation.scheduler.schedule()
        blocks[state.group.trunk] = kept
        simulation.pending.append((output, simulation.worker.execute(output)))
        simulation.run()
    assert client.finish.startswith("parallel_think: internal error")
    told = client.finish + caplog.text
    assert "KeyError" in caplog.text and "<trunk 0, done>" in caplog.text
    assert ", ".join(map(str, secret[:3])) not in told


@contextmanager
def capture_vllm(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Let pytest see what vLLM's own handlers keep to themselves."""
    logger = logging.getLogger("vllm.parallel_think")
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)
