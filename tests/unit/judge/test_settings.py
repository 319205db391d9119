"""What the server's and a request's judge keys allow, and the sentences that refuse the rest."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from spec_decode.draft_rows import DraftRows
from spec_decode.judge_head import JudgeHead, save_head
from spec_decode.rules import FLy, Judge, TopNDelta
from vllm_parallel_think.compat import expand_batch_to_tokens
from vllm_parallel_think.core.branch_graph import Kind, State
from vllm_parallel_think.core.config.request_options import parse_request
from vllm_parallel_think.core.config.server_options import ServerOptions
from vllm_parallel_think.core.errors import OptionError
from vllm_parallel_think.judge.protected_tokens import StopStrings, protected_tokens
from vllm_parallel_think.judge.request_settings import JudgeRequestTable
from vllm_parallel_think.judge.settings import load
from vllm_parallel_think.judge.verifier import Verifier
from vllm_parallel_think.scheduler.branch_request import branch_params


def config(**spec: Any) -> Any:
    """Return what the judge reads of a vLLM configuration."""
    values = {
        "method": "draft_model",
        "rejection_sample_method": "standard",
        "draft_sample_method": "greedy",
        "enable_adaptive_verification": False,
        "num_speculative_tokens": 4,
        **spec,
    }
    model = SimpleNamespace(
        model="/models/tiny", served_model_name=["tiny"], get_hidden_size=lambda: 4
    )
    return SimpleNamespace(
        speculative_config=SimpleNamespace(**values),
        model_config=model,
        use_v2_model_runner=values.pop("v2", False),
        watermark_config=None,
    )


@pytest.fixture
def weights(tmp_path: Path) -> str:
    path = tmp_path / "judge.safetensors"
    save_head(JudgeHead(torch.ones(4), torch.tensor(0.0), "org/tiny", 0.7), path)
    return str(path)


def test_weights_bring_their_threshold(weights: str) -> None:
    settings = load({"rule": "judge", "weights": weights}, config())
    assert isinstance(settings.rule, Judge)
    assert settings.threshold == settings.rule.threshold == 0.7
    assert load({"rule": "judge", "weights": weights, "threshold": 0.4}, config()).threshold == 0.4


def test_rules_without_weights() -> None:
    assert load({"rule": "fly", "window": 3}, config()).rule == FLy(window=3)
    assert load({"rule": "typical"}, config()).threshold is None


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no rule": ({}, {}, "rule must be one of judge, top_n_delta, typical, kl, fly; got None"),
    "unknown rule": ({"rule": "best"}, {}, "got 'best'"),
    "unknown key": (
        {"rule": "typical", "weights": "x"},
        {},
        "unknown key 'weights'; rule typical allows epsilon, alpha",
    ),
    "no weights": ({"rule": "judge"}, {}, "weights must be the path of a judge head, got None"),
    "missing": ({"rule": "judge", "weights": "/no/file"}, {}, "/no/file: no such file"),
    "bad number": ({"rule": "kl", "tau": -1}, {}, "tau must be a number above 0"),
    "block": ({"rule": "typical"}, {"rejection_sample_method": "block"}, "'block'.*'standard'"),
    "adaptive": ({"rule": "typical"}, {"enable_adaptive_verification": True}, "adaptive"),
    "filler": ({"rule": "typical"}, {"method": "ngram", "v2": True}, "n-gram proposer"),
    "kl": ({"rule": "kl"}, {}, "draft_sample_method 'probabilistic'"),
    "fly": ({"rule": "fly"}, {}, "looks 6 drafts ahead .* num_speculative_tokens 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_start(name: str) -> None:
    raw, spec, says = REFUSED[name]
    with pytest.raises(OptionError, match=says):
        load(raw, config(**spec))


def test_refused_weights(weights: str) -> None:
    raw = {"rule": "judge", "weights": weights}
    with pytest.raises(OptionError, match="threshold must be a number between 0 and 1, got 2"):
        load({**raw, "threshold": 2}, config())
    other = config()
    other.model_config.get_hidden_size = lambda: 8
    with pytest.raises(OptionError, match=r"hidden size 4 .* has 8"):
        load(raw, other)
    other = config()
    other.model_config.model, other.model_config.served_model_name = "/models/huge", "huge"
    with pytest.raises(OptionError, match="trained for org/tiny, not for /models/huge or huge"):
        load(raw, other)
    with pytest.raises(OptionError, match="add --speculative-config"):
        load(raw, SimpleNamespace(speculative_config=None))


def test_server_key() -> None:
    assert ServerOptions.parse({}).judge is None
    assert ServerOptions.parse({"judge": {"rule": "kl"}}).judge == {"rule": "kl"}
    with pytest.raises(OptionError, match="judge must be an object such as"):
        ServerOptions.parse({"judge": True})


def test_request_keys() -> None:
    server = ServerOptions(profile="off", judge={"rule": "judge", "weights": "w"})

    def ask(server: ServerOptions, **extra: Any) -> None:
        parse_request(extra, server, {}, "off", 0.5)

    ask(server, pt_judge=True)
    ask(server, pt_judge=0, pt_judge_threshold=0.5)
    ask(ServerOptions(), pt_judge=False)
    for value in (0.4, 1.1, "high", True, float("nan")):
        with pytest.raises(OptionError, match=r"between 0\.5 \(the server's\) and 1"):
            ask(server, pt_judge_threshold=value)
    with pytest.raises(OptionError, match="pt_judge must be true or false; got 2"):
        ask(server, pt_judge=2)
    with pytest.raises(OptionError, match=r"pt_group is unknown"):
        ask(server, pt_group="another client's")
    with pytest.raises(OptionError, match="this server runs no judge"):
        ask(ServerOptions(), pt_judge=True)
    for without in (ServerOptions(), ServerOptions(judge={"rule": "kl"})):
        with pytest.raises(OptionError, match="no judge with a threshold"):
            ask(without, pt_judge_threshold=0.5)


def test_branches_keep_what_the_client_said() -> None:
    extra = {"pt_judge": 0, "parallel_think": "npr", "pt_max_paths": 3}
    params = SamplingParams(extra_args=extra)
    root: Any = SimpleNamespace(sampling_params=params, request_id="r")
    node: Any = SimpleNamespace(
        state=State.LIVE, kind=Kind.PATH, limit=9, most=9, least=0, address="0"
    )
    kept = branch_params(root, node).extra_args
    assert kept == {"pt_judge": 0, "parallel_think": "npr", "pt_group": "r"}
    assert params.extra_args == extra


PIECES = [" a", "b.", "\n\n", "cd", "Q", "xQ:"]


def stop_strings(num_rows: int = 2) -> StopStrings:
    return StopStrings(PIECES, 8, torch.device("cpu"), num_rows)


def test_tokens_at_the_edges_of_stop_strings_are_protected() -> None:
    stops = stop_strings()
    assert stops.acquire([]) == stops.acquire([""]) == 0
    row = stops.acquire(["Q:", "\n"])
    assert row and stops.masks[row].nonzero().flatten().tolist() == [2, 4, 5]
    assert stops.acquire(["\n", "Q:"]) == row, "equal sets share a row"
    other = stops.acquire(["unknown"])  # ends with n
    assert other and not stops.masks[other].any()
    assert stops.acquire(["third"]) is None, "all rows are in use"
    stops.release(row)
    assert stops.acquire(["third"]) is None, "its other request still uses it"
    stops.release(row)
    again = stops.acquire(["third c"])
    assert again == row and stops.masks[row].nonzero().flatten().tolist() == [3]
    assert not stops.masks[0].any()


def test_no_stop_string_is_completed_lossily() -> None:
    """The rule accepts all; a request's stop strings, and nobody else's, forbid some."""
    table = JudgeRequestTable({}, "off", stop_strings())
    new = [
        SimpleNamespace(req_id="free", sampling_params=SamplingParams()),
        SimpleNamespace(req_id="stops", sampling_params=SamplingParams(stop=["Q:"])),
    ]
    output: Any = SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=new)
    table.update(output)
    verifier = Verifier(TopNDelta(8, 1.0), torch.zeros(1, 8, dtype=torch.bool), table)
    rows = DraftRows(
        logits=torch.zeros(6, 8),
        draft_ids=torch.tensor([3, 4, 5, 3, 4, 5]),
        request=torch.tensor([0, 0, 0, 1, 1, 1]),
        position=torch.tensor([0, 1, 2, 0, 1, 2]),
    )
    verdict = verifier.judge(rows, ["free", "stops"])
    assert verdict.lossy.tolist() == [True, True, True, True, False, False]
    output = SimpleNamespace(finished_req_ids={"stops"}, scheduled_new_reqs=[])
    table.update(output)
    assert table.stops.acquire(["a", "b"]) and table.stops.acquire(["c"]), "the row is free again"


def test_what_requests_say() -> None:
    table = JudgeRequestTable({"npr": 1, "skeleton": 2}, "skeleton", stop_strings())

    def scheduled(req_id: str, **values: Any) -> Any:
        params = SamplingParams(**values)
        return SimpleNamespace(req_id=req_id, sampling_params=params)

    grammar: Any = {"json_object": True}
    from vllm.sampling_params import StructuredOutputsParams

    new = [
        scheduled("plain"),
        scheduled("off", extra_args={"pt_judge": 0, "parallel_think": "off"}),
        scheduled("raised", extra_args={"pt_judge_threshold": 0.9, "parallel_think": "npr"}),
        scheduled("grammar", structured_outputs=StructuredOutputsParams(**grammar)),
        scheduled("stops", stop_token_ids=[7, 5]),
        scheduled("bad", extra_args={"pt_judge_threshold": "x", "parallel_think": 3}),
    ]
    output: Any = SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=new)
    table.update(output)
    names = [request.req_id for request in new]
    batch = table.batch([*names, "unknown"], torch.device("cpu"))
    assert batch.enabled.tolist() == [True, False, True, False, True, True, False]
    assert batch.threshold.tolist() == pytest.approx([0, 0, 0.9, 0, 0, 1, 0])
    assert batch.grammar.tolist() == [2, 0, 1, 2, 2, 0, 0]
    assert batch.stop_ids[4].tolist() == [5, 7]
    assert batch.stop_ids[0].tolist() == [-1, -1]
    gone: Any = SimpleNamespace(finished_req_ids=set(names), scheduled_new_reqs=[])
    table.update(gone)
    assert not table._requests
    assert table.batch(["plain"], torch.device("cpu")).stop_ids.shape == (1, 0)


class Tokenizer:
    """Six tokens, one of them special."""

    pieces = ("a", "</", "Path>", "\n", "<end>", "b")
    all_special_ids = (4,)

    def __len__(self) -> int:
        return len(self.pieces)

    def get_added_vocab(self) -> dict[str, int]:
        return {"<end>": 4}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return []

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return "".join(self.pieces[i] for i in ids)


def test_protected_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "vllm_parallel_think.judge.protected_tokens.cached_tokenizer_from_config"
    monkeypatch.setattr(module, lambda _: Tokenizer())
    model: Any = SimpleNamespace(
        get_vocab_size=lambda: 8,
        try_get_generation_config=lambda: {"eos_token_id": [5]},
        hf_text_config=SimpleNamespace(eos_token_id=None),
    )
    profiles: Any = [SimpleNamespace(tags=("</Path>",)), SimpleNamespace(tags=("\n", 0))]
    masks = protected_tokens(model, profiles)
    protected = [mask.nonzero().flatten().tolist() for mask in masks]
    assert protected == [[4, 5, 6, 7], [1, 2, 4, 5, 6, 7], [0, 3, 4, 5, 6, 7]]


def test_expansion_of_requests_to_tokens() -> None:
    x = torch.tensor([0.0, 0.5, 2.0])
    totals = torch.tensor([2, 2, 5], dtype=torch.int32)
    assert expand_batch_to_tokens.expand_batch_to_tokens(x, totals, 5, 0, 1).tolist() == [
        1,
        1,
        2,
        2,
        2,
    ]
    top_k = torch.tensor([3, 9, 0], dtype=torch.int32)
    assert expand_batch_to_tokens.expand_batch_to_tokens(top_k, totals, 5).tolist() == [
        3,
        3,
        0,
        0,
        0,
    ]
