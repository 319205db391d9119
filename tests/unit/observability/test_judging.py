"""What a judge accepts, from a real worker to the metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.repository import ROOT
from tests.support.runners import ENVIRONMENT
from tests.support.scrape import growth, here
from vllm_parallel_think.judge.acceptance_metrics import JudgeCounter
from vllm_parallel_think.judge.verifier import Counts

SCRIPT = """
import json, sys
from pathlib import Path
from tests.support.engine import Engine
from tests.support.oracle import prompts
from tests.support.speculation import make_models, params, speculation
from tests.support.scrape import here

target, draft = make_models(Path(sys.argv[1]), noise=0.05)
engine = Engine(
    str(target),
    options={"profile": "off", "judge": {"rule": "top_n_delta", "n": 3, "delta": 0.5}},
    speculative_config=speculation(draft),
    max_num_seqs=8,
    max_model_len=512,
)
engine.generate(prompts(4, seed=7), params(40))
while engine.core.scheduler.has_requests():  # the step that a server does to say who has ended
    engine.core.step()
scrape = here()
kinds = ("drafted", "accepted_standard", "accepted_rule")
exported = [scrape.sum("vllm_pt_judge_tokens_total", kind=kind, engine="0") for kind in kinds]
counts = engine.core.model_executor.driver_worker.worker._verifier.counts
print(json.dumps([exported, [counts.drafts, counts.kept, counts.lossy]]))
"""


def test_a_worker_exports_what_its_judge_accepts(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (drafted, standard, rule), (drafts, kept, lossy) = json.loads(done.stdout.splitlines()[-1])
    assert (drafted, standard, rule) == (drafts, kept - lossy, lossy)
    assert 0 < standard < drafted
    assert rule > 0


def test_the_device_is_asked_once_a_second_and_when_there_is_nothing_to_do() -> None:
    asked = 0

    def totals() -> Counts:
        nonlocal asked
        asked += 1
        return Counts(10 * asked, 5 * asked, 2 * asked, 3 * asked)

    before = here()
    counter = JudgeCounter(totals, "7")
    for _ in range(100):
        counter.stepped(idle=False)
    assert asked == 1
    counter.stepped(idle=True)
    assert asked == 2
    grown = growth(before, here())
    assert grown("vllm_pt_judge_tokens_total", kind="drafted", engine="7") == 20
    assert grown("vllm_pt_judge_tokens_total", kind="accepted_standard", engine="7") == 6
    assert grown("vllm_pt_judge_tokens_total", kind="accepted_rule", engine="7") == 4


def test_a_fault_in_reading_ends_the_counting(caplog: pytest.LogCaptureFixture) -> None:
    def totals() -> Counts:
        raise RuntimeError("device lost")

    counter = JudgeCounter(totals, "7")
    counter.stepped(idle=True)
    counter.stepped(idle=True)
    assert counter._made is None
