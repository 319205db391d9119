"""INV-5: what a branch is sampled with is as valid as what a client may send."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from tests.support.schedules import MODES, simulate
from tests.support.tiny import EOS, VOCAB_SIZE, IdGrammar
from vllm_parallel_think.core.branch_graph import Fork, Kind, Lane, Node, State
from vllm_parallel_think.core.config.loading import load_profile
from vllm_parallel_think.core.config.server_options import ServerOptions
from vllm_parallel_think.core.errors import OptionError
from vllm_parallel_think.frontend import request_validation
from vllm_parallel_think.scheduler.branch_request import branch_params

TOKENS = st.integers(0, VOCAB_SIZE - 1)
MODEL: Any = SimpleNamespace(
    max_logprobs=20, get_vocab_size=lambda: VOCAB_SIZE, is_diffusion=False, max_model_len=2048
)


@st.composite
def clients(draw: Any) -> SamplingParams:
    """Sampling parameters that vLLM accepts from a client."""
    max_tokens = draw(st.integers(1, 300))
    logprobs = draw(st.none() | st.integers(0, 20))
    few = st.lists(TOKENS, min_size=1, max_size=5, unique=True)
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        temperature=draw(st.floats(0, 2)),
        top_p=draw(st.floats(0, 1, exclude_min=True)),
        top_k=draw(st.integers(-1, 50)),
        min_p=draw(st.floats(0, 1)),
        seed=draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
        presence_penalty=draw(st.floats(-2, 2)),
        frequency_penalty=draw(st.floats(-2, 2)),
        repetition_penalty=draw(st.floats(0.1, 2)),
        logprobs=logprobs,
        logprob_token_ids=draw(few) if logprobs is None and draw(st.booleans()) else None,
        stop=draw(st.none() | st.lists(st.text(min_size=1), max_size=3)),
        stop_token_ids=draw(st.none() | few),
        bad_words=draw(st.none() | st.lists(st.sampled_from(["w50", "w51"]), max_size=2)),
        allowed_token_ids=draw(st.none() | few),
        logit_bias=draw(st.none() | st.dictionaries(TOKENS, st.floats(-100, 100), max_size=3)),
        ignore_eos=draw(st.booleans()),
        skip_special_tokens=draw(st.booleans()),
        include_stop_str_in_output=draw(st.booleans()),
        extra_args=draw(st.none() | st.just({"pt_judge": False, "pt_max_paths": 3})),
    )
    params.update_from_generation_config({"eos_token_id": [EOS, 63]}, EOS)
    params._bad_words_token_ids = [[50]] if params.bad_words else None
    return params


@st.composite
def nodes(draw: Any) -> Node:
    """Nodes of every kind, with every bound that a group may set."""
    parent = Lane(depth=0, room=0, forks_left=0)
    kind = draw(st.sampled_from(Kind))
    depth = 1 if kind is Kind.PATH else draw(st.integers(0, 1))
    lane = Lane(depth=depth, room=0, forks_left=0)
    limit = None if kind in (Kind.TRUNK, Kind.CLOSE) else draw(st.integers(1, 300))
    node = Node(
        index=3,
        kind=kind,
        lane=lane,
        prefix=(),
        start=0,
        tokens=[4, 5],
        num_given=2,
        num_hidden=0,
        critical_before=0,
        limit=limit,
        most=None if limit is None else limit + draw(st.integers(0, 3)),
        least=draw(st.integers(0, 400)),
        state=draw(st.sampled_from([State.WAITING, State.DONE])),
    )
    lane.nodes.append(node)
    if depth:
        trunk = Node(0, Kind.TRUNK, parent, (), 0, [1], 1, 1, 0, None, None)
        parent.nodes.append(trunk)
        lane.fork = Fork(trunk, [lane])
    return node


@settings(max_examples=400, deadline=None)
@given(clients(), nodes(), st.none() | st.floats(0, 2))
def test_every_derived_set_passes_vllms_own_checks(
    client: SamplingParams, node: Node, temperature: float | None
) -> None:
    before = repr(client)
    root: Any = SimpleNamespace(sampling_params=client, request_id="r")
    params = branch_params(root, node, temperature)
    assert repr(client) == before, "the client's own parameters are still in use"
    params.verify(MODEL, None, None, None)
    for received in (
        pickle.loads(pickle.dumps(params)),
        MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(params)),
    ):
        assert repr(received) == repr(params)
        assert received.all_stop_token_ids == params.all_stop_token_ids
    assert params.min_tokens <= params.max_tokens
    if node.state is not State.DONE and node.kind is not Kind.CLOSE:
        assert params.max_tokens > (node.most or 0), "the group ends a branch, not vLLM"
        assert params.min_tokens == min(node.least, params.max_tokens)


def test_a_set_that_vllm_refuses_is_refused_with_a_sentence() -> None:
    client = SamplingParams(max_tokens=9)
    lane = Lane(depth=0, room=0, forks_left=0)
    node = Node(0, Kind.CONCLUSION, lane, (), 0, [1], 1, 0, 0, 5, None)
    lane.nodes.append(node)
    with pytest.raises(OptionError, match=r"cannot be sampled as asked: temperature must be in"):
        branch_params(SimpleNamespace(sampling_params=client, request_id="r"), node, 7.5)


@MODES
@pytest.mark.parametrize(
    ("sampling", "options"),
    [
        ({"max_tokens": 100, "min_tokens": 80}, {"pt_path_tokens": 8, "pt_summary_tokens": 8}),
        ({"max_tokens": 300, "min_tokens": 300}, {"pt_critical_tokens": 20}),
        ({"max_tokens": 1500, "min_tokens": 1500, "ignore_eos": True}, {}),
    ],
)
def test_a_budget_below_min_tokens_cuts_the_answer(
    asynchronous: bool,
    sampling: dict[str, Any],
    options: dict[str, Any],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """A conclusion that may write less than the client's least length: the engine goes on."""
    grammar = IdGrammar(num_paths=2, at_start=True)
    simulation = simulate(
        tiny_model, tmp_path, grammar, asynchronous=asynchronous, num_blocks=60, max_model_len=900
    )
    client = simulation.add([200] * 9, sampling=sampling, **options)
    other = simulation.add([201] * 9, max_tokens=20, parallel=False)
    simulation.run()
    assert client.finish == "length"
    assert other.finish in ("stop", "length")


@MODES
def test_a_refused_set_fails_one_request(
    asynchronous: bool, tiny_model: Path, tmp_path: Path
) -> None:
    simulation = simulate(
        tiny_model, tmp_path, IdGrammar(num_paths=2, at_start=True), asynchronous=asynchronous
    )
    client = simulation.add([200] * 9, max_tokens=40)
    other = simulation.add([201] * 9, max_tokens=20)
    (state, _) = simulation.scheduler.groups
    state.group.temperature = lambda node: 3.0
    simulation.run()
    assert client.finish.startswith(
        "parallel_think: a branch cannot be sampled as asked: temperature must be in [0, 2], got 3"
    )
    assert other.finish in ("stop", "length")


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt_logprob_token_ids": [[1, 2]]}, "prompt_logprob_token_ids"),
        ({"trace_decode_token_ids": [1, 2]}, "trace_decode_token_ids"),
    ],
)
def test_what_no_branch_can_be_sampled_with_is_refused_at_the_door(
    sampling: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = SimpleNamespace(
        options=ServerOptions(),
        profiles={"npr": load_profile("npr")},
        default="npr",
        judge_threshold=None,
        no_workers=None,
    )
    monkeypatch.setattr(request_validation, "_settings", server)
    request_validation.check(SamplingParams())
    with pytest.raises(VLLMValidationError, match=f"{says} cannot be combined"):
        request_validation.check(SamplingParams(**sampling))
    request_validation.check(SamplingParams(**sampling, extra_args={"parallel_think": "off"}))
