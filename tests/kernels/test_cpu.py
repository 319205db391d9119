"""What only the CPU provider promises: the same bits whatever runs beside a row."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attention_kernels import Row, SegmentPlan, segmented_attention
from attention_kernels.cpu import kernel, launch, vectors
from attention_kernels.cpu.threads import num_workers
from tests.support.segment_cases import Case, Memory


def batch() -> Case:
    memory = Memory(300, 16)
    shared = memory.segment(1400)
    rows = [
        Row(1, (shared, memory.segment(70))),
        Row(40, (shared, memory.segment(50))),
        Row(3, (memory.segment(700),)),
        Row(1, (shared, memory.segment(9), memory.segment(2))),
    ]
    return memory.case(rows, heads=(9, 3), dim=64)


def attend(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    plan = SegmentPlan.build(case.rows)
    out, lse = segmented_attention(
        case.query, case.key_cache, case.value_cache, plan, scale=case.scale, provider="cpu"
    )
    assert lse is not None
    return out, lse


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    case, before = batch(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = attend(case)
        torch.set_num_threads(threads)
        assert num_workers() == threads
        results = [attend(case) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for out, lse in results:
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_other_rows_do_not_change_a_bit() -> None:
    case = batch()
    out, lse = attend(case)
    start = 0
    for row in case.rows:
        own = slice(start, start + row.query_len)
        start += row.query_len
        alone = attend(replace(case, rows=(row,), query=case.query[own]))
        assert torch.equal(alone[0], out[own]) and torch.equal(alone[1], lse[own])


def test_calls_from_several_python_threads_do_not_mix() -> None:
    cases = [batch(), replace(batch(), query=-batch().query)]
    expected = [attend(case)[0] for case in cases]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not torch.equal(attend(cases[number])[0], expected[number]):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_without_openmp_one_thread_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    case = batch()
    expected = attend(case)
    monkeypatch.setattr("attention_kernels.cpu.threads._openmp_parallel", lambda: None)
    assert num_workers() == 1
    assert torch.equal(attend(case)[0], expected[0])


def test_the_threads_are_torchs_own_and_stay() -> None:
    """No second pool, and no smaller team: one would end threads that a server has bound."""
    before = torch.get_num_threads()
    case = batch()
    tiny = (Row(1, case.rows[3].segments[1:]),)
    small = replace(case, rows=tiny, query=case.query[:1, :6], **_first_heads(case, 2))
    try:
        torch.set_num_threads(4)
        torch.ones(1000, 1000).exp_()
        threads = set(os.listdir("/proc/self/task"))
        assert num_workers() == 4
        for problem in (case, small, case):
            attend(problem)
        torch.ones(1000, 1000).exp_()
        assert set(os.listdir("/proc/self/task")) == threads
    finally:
        torch.set_num_threads(before)


def _first_heads(case: Case, number: int) -> dict[str, torch.Tensor]:
    return {
        "key_cache": case.key_cache[:, :, :number],
        "value_cache": case.value_cache[:, :, :number],
    }


def test_warm_up_compiles_the_kernel() -> None:
    launch.warm_up()


def test_every_file_of_the_machine_code_is_in_its_key() -> None:
    """Numba sees the time stamp of the file of `run` only: a change elsewhere must change a key."""
    folder = Path(kernel.__file__).parent
    compiled = {
        path
        for path in folder.glob("*.py")
        if re.search(r"^from (numba|llvmlite)\b", path.read_text("utf-8"), re.M)
    }
    assert compiled == {*kernel.SOURCES, Path(kernel.__file__)}
    assert Path(vectors.__file__) in compiled


@pytest.mark.parametrize("changed", kernel.SOURCES, ids=lambda path: path.stem)
def test_a_change_in_any_source_changes_the_key(changed: Path, tmp_path: Path) -> None:
    copies = [tmp_path / path.name for path in kernel.SOURCES]
    for copy, path in zip(copies, kernel.SOURCES, strict=True):
        copy.write_bytes(path.read_bytes())
    key = kernel.sources_key(copies)
    assert key == kernel.sources_key(kernel.SOURCES) != 0
    with (tmp_path / changed.name).open("a") as file:
        file.write("\n")
    assert kernel.sources_key(copies) not in (0, key)
