"""Workers that see each other write, in the engine, against a dense oracle."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.hogwild_cases import (
    CLOSE,
    MARKS,
    assert_same,
    count_swaps,
    params,
    plan_of,
    prompts,
    write_recipe,
)
from tests.support.hogwild_oracle import HogwildOracle

PLAIN = {"parallel_think": "off"}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def options(**changes: Any) -> dict[str, Any]:
        return {"profile": write_recipe(tmp_path, **changes)}

    return options


@pytest.mark.parametrize("layout", ["combined", "interleaved", "contiguous"])
def test_workers_write_what_a_dense_forward_writes(
    make_engine: Any, hf_model: Any, recipe: Any, layout: str
) -> None:
    engine = make_engine(options=recipe(), enable_prefix_caching=True)
    ends = set()
    for num_workers in (2, 3, 4):
        plan = plan_of(num_workers, layout, check_every=25)
        for prompt in prompts(3):
            oracle = HogwildOracle(hf_model, plan)
            written = oracle.answer(prompt)
            (output,) = engine.generate([prompt], params(plan, written))
            assert_same(engine, output, oracle)
            figures = output.kv_transfer_params["parallel_think"]["hogwild"]
            assert figures["checks_yes"] + figures["checks_no"] == written.checks
            assert figures["steps"] == len(written.history) - 1
            ends.add(written.by)
            engine.assert_all_blocks_free()
    assert ends == {"budget", "found"}


@pytest.mark.parametrize("layout", ["combined", "interleaved", "contiguous"])
def test_cut_steps_are_closed_and_marks_and_ends_keep_to_the_clients_bounds(
    make_engine: Any, hf_model: Any, recipe: Any, layout: str
) -> None:
    """INV-2 where steps are cut by their own limit, a budget, an end of the text, or a mark."""
    changes = {"max_step_tokens": 6, "close": CLOSE, "marks": frozenset(MARKS)}
    engine = make_engine(options=recipe(max_step_tokens=6, close=CLOSE, marks=MARKS))
    ends, closed = Counter[str](), 0
    bounds: list[dict[str, Any]] = [
        {},
        {"min_tokens": 120},
        {"ignore_eos": True, "max_tokens": 170},
    ]
    for number, prompt in enumerate(prompts(4)):
        for bound in bounds:
            plan = plan_of(2 + number % 2, layout, worker_tokens=16, **changes, **bound)
            oracle = HogwildOracle(hf_model, plan)
            written = oracle.answer(prompt)
            assert written.gap > 5e-4, "float32 does not decide between two tokens: another prompt"
            (output,) = engine.generate([prompt], params(plan, written))
            assert_same(engine, output, oracle)
            ends[written.by] += not bound
            closed += sum(written.visible[i : i + 2] == list(CLOSE) for i in range(200))
            assert len(output.outputs[0].token_ids) >= plan.min_tokens
            if plan.ignore_eos:
                assert len(output.outputs[0].token_ids) == plan.max_tokens
            engine.assert_all_blocks_free()
    assert ends["budget"] and ends["found"]
    assert closed > 10


def test_a_lone_worker_writes_what_plain_decoding_writes(make_engine: Any, recipe: Any) -> None:
    """W = 1: steps are sealed every nine tokens, and nothing else differs."""
    from vllm import SamplingParams

    engine = make_engine(
        options=recipe(num_workers=1, step=[], end=[], max_step_tokens=9, found=[])
    )
    for prompt in prompts(4):
        alone, plain = engine.generate(
            [prompt, prompt],
            [
                SamplingParams(
                    temperature=0,
                    max_tokens=70,
                    extra_args={"pt_worker_tokens": 50, **one}
                    if one is not None
                    else {"parallel_think": "off"},
                )
                for one in ({}, None)
            ],
        )
        written = list(alone.outputs[0].token_ids)
        figures = alone.kv_transfer_params["parallel_think"]
        num = figures["hogwild"]["workers"][0]["tokens"]
        assert written[:num] == list(plain.outputs[0].token_ids)[:num]
        assert num == 50 or plain.outputs[0].finish_reason == "stop"
        assert figures["hogwild"]["steps"] >= num // 9
        engine.assert_all_blocks_free()


def test_text_does_not_depend_on_what_runs_beside(
    make_engine: Any, hf_model: Any, recipe: Any
) -> None:
    """Groups of all sizes, plain requests, long prompts that are prefilled in chunks."""
    from vllm import SamplingParams

    engine = make_engine(
        options=recipe(), max_num_batched_tokens=64, max_num_seqs=12, enable_chunked_prefill=True
    )
    plans = [plan_of(n, layout) for n in (2, 3, 4) for layout in ("combined", "contiguous")]
    texts = prompts(6)
    oracles = [HogwildOracle(hf_model, plan) for plan in plans]
    wanted = [oracle.answer(text) for oracle, text in zip(oracles, texts, strict=True)]
    plain = SamplingParams(temperature=0, max_tokens=40, extra_args={"parallel_think": "off"})
    long = [[70 + i % 29 for i in range(start, start + 400)] for start in range(4)]
    alone = [output.outputs[0].token_ids for output in engine.generate(long, plain)]
    asks = [params(plan, written) for plan, written in zip(plans, wanted, strict=True)]
    outputs = engine.generate([*texts, *long], [*asks, *[plain] * len(long)])
    for output, oracle in zip(outputs, oracles, strict=False):
        assert_same(engine, output, oracle)
    for output, text in zip(outputs[len(texts) :], alone, strict=True):
        assert output.outputs[0].token_ids == text
    engine.assert_all_blocks_free()


@pytest.mark.parametrize("num_blocks", [48, 34])
def test_evicted_groups_come_back_with_the_same_kv(
    make_engine: Any, hf_model: Any, recipe: Any, num_blocks: int
) -> None:
    """Too few blocks for all groups at once: some wait on the host as a whole."""
    engine = make_engine(
        options=recipe(), num_gpu_blocks_override=num_blocks, max_model_len=1024, block_size=32
    )
    plan = plan_of(4, "combined")
    texts = prompts(6)
    oracles = [HogwildOracle(hf_model, plan) for _ in texts]
    wanted = [oracle.answer(text) for oracle, text in zip(oracles, texts, strict=True)]
    swaps = count_swaps(engine)
    outputs = engine.generate(texts, [params(plan, written) for written in wanted])
    for output, oracle in zip(outputs, oracles, strict=True):
        assert_same(engine, output, oracle)
    assert swaps["out"] and swaps["out"] == swaps["in"]
    engine.assert_all_blocks_free()
    assert not engine.worker._copies.teams


def test_forced_preemption_changes_nothing(make_engine: Any, hf_model: Any, recipe: Any) -> None:
    """A worker is preempted every few steps: its whole group leaves, and comes back."""
    engine = make_engine(options=recipe())
    swaps = count_swaps(engine)
    engine.preempt_every(7)
    plans = [plan_of(n, layout) for n in (2, 4) for layout in ("combined", "contiguous")]
    texts = prompts(4)
    oracles = [HogwildOracle(hf_model, plan) for plan in plans]
    wanted = [oracle.answer(text) for oracle, text in zip(oracles, texts, strict=True)]
    asks = [params(plan, written) for plan, written in zip(plans, wanted, strict=True)]
    for output, oracle in zip(engine.generate(texts, asks), oracles, strict=True):
        assert_same(engine, output, oracle)
    assert swaps["out"] > 10
    engine.assert_all_blocks_free()
    assert not engine.worker._copies.teams


def test_a_reset_of_the_prefix_cache_changes_nothing(
    make_engine: Any, hf_model: Any, recipe: Any
) -> None:
    """As a weight update or a pause asks for it: all groups leave, and come back."""
    engine = make_engine(options=recipe())
    scheduler, schedule = engine.scheduler, engine.scheduler.schedule
    steps = itertools.count(1)

    def resetting(*args: Any, **kwargs: Any) -> Any:
        if next(steps) % 11 == 0:
            assert scheduler.reset_prefix_cache(reset_running_requests=True)
        return schedule(*args, **kwargs)

    scheduler.schedule = resetting
    swaps = count_swaps(engine)
    plan = plan_of(3, "combined")
    texts = prompts(2)
    oracles = [HogwildOracle(hf_model, plan) for _ in texts]
    wanted = [oracle.answer(text) for oracle, text in zip(oracles, texts, strict=True)]
    outputs = engine.generate(texts, [params(plan, written) for written in wanted])
    for output, oracle in zip(outputs, oracles, strict=True):
        assert_same(engine, output, oracle)
    assert swaps["out"] >= 3
    engine.assert_all_blocks_free()


def test_by_priority_others_wait_instead_of_preempting_a_worker(
    make_engine: Any, hf_model: Any, recipe: Any
) -> None:
    """Plain requests of better priority outgrow the pool beside a group that steps on."""
    from vllm import SamplingParams

    engine = make_engine(
        options=recipe(end=[], max_step_tokens=100),
        scheduling_policy="priority",
        num_gpu_blocks_override=26,
        max_model_len=512,
    )
    plan = plan_of(3, "combined", ends=frozenset(), max_step_tokens=100, worker_tokens=80)
    for text in prompts(6):  # one whose workers write on until their budget
        oracle = HogwildOracle(hf_model, plan)
        written = oracle.answer(text)
        if written.by == "budget":
            break
    assert written.by == "budget"
    waited = count_waiting_rows(engine)
    plain = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True, extra_args=PLAIN)
    texts = [text, *([70 + (i + k) % 29 for i in range(20)] for k in range(6))]
    outputs = engine.llm.generate(
        [{"prompt_token_ids": text} for text in texts],
        [params(plan, written), *[plain] * 6],
        priority=[5, *[0] * 6],
        use_tqdm=False,
    )
    assert_same(engine, outputs[0], oracle)
    assert [len(output.outputs[0].token_ids) for output in outputs[1:]] == [90] * 6
    assert waited["rows"], "no plain row had to wait for a block"
    engine.assert_all_blocks_free()


def count_waiting_rows(engine: Any) -> Counter[str]:
    """Count running plain rows that sit out a step in which workers run."""
    counts: Counter[str] = Counter()
    scheduler, schedule = engine.scheduler, engine.scheduler.schedule

    def counting(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        taken = output.num_scheduled_tokens
        members = [scheduler.groups.is_gang_member(r) for r in scheduler.running]
        rows = zip(members, scheduler.running, strict=True)
        if any(m and r.request_id in taken for m, r in rows):
            counts["rows"] += sum(
                r.request_id not in taken
                for r in scheduler.running
                if not scheduler.groups.is_gang_member(r)
            )
        return output

    scheduler.schedule = counting
    return counts


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"max_num_seqs": 4}, "raise --max-num-seqs"),
        (
            {"max_num_batched_tokens": 24, "max_num_seqs": 8, "max_model_len": 512},
            "raise --max-num-batched-tokens",
        ),
        ({"num_gpu_blocks_override": 9, "max_model_len": 256}, "the whole pool has 8"),
    ],
)
def test_a_group_that_can_never_fit_fails_alone(
    make_engine: Any, recipe: Any, limits: dict[str, int], says: str
) -> None:
    from vllm import SamplingParams

    engine = make_engine(options=recipe(), **limits)
    options = {"pt_num_workers": 4, "pt_worker_tokens": 60}
    asked = SamplingParams(temperature=0, max_tokens=200, extra_args=options)
    plain = SamplingParams(temperature=0, max_tokens=9, extra_args={"parallel_think": "off"})
    group, other = engine.generate(prompts(2), [asked, plain])
    assert group.outputs[0].finish_reason == "abort"
    assert says in group.outputs[0].stop_reason
    assert len(other.outputs[0].token_ids) == 9
    engine.assert_all_blocks_free()


@pytest.mark.parametrize("kind", ["qk-norm", "yarn", "partial"])
def test_models_that_rotate_otherwise(
    make_engine: Any, tmp_path: Path, recipe: Any, kind: str
) -> None:
    """Norms on queries and keys; YaRN, whose factor a shift must not apply twice; partial RoPE."""
    model, hf_model = make_other_model(tmp_path / kind, kind)
    engine = make_engine(model=model, options=recipe())
    plan = plan_of(3, "combined")
    for prompt in prompts(2):
        oracle = HogwildOracle(hf_model, plan)
        written = oracle.answer(prompt)
        (output,) = engine.generate([prompt], params(plan, written))
        assert_same(engine, output, oracle)
    engine.assert_all_blocks_free()


def make_other_model(folder: Path, kind: str) -> tuple[Path, Any]:
    """Write a tiny random model with the tiny model's tokenizer; return it in transformers too."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, StableLmConfig

    from tests.support.tiny import EOS, VOCAB_SIZE, make_model

    make_model(folder)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 192,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if kind == "yarn":
        rope = {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
        }
    if kind == "partial":
        rope["partial_rotary_factor"] = 0.5
    kinds = {"qk-norm": Qwen3Config, "yarn": LlamaConfig, "partial": StableLmConfig}
    config_class = kinds[kind]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config_class(**shape, rope_parameters=rope)).float()
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return folder, loaded.eval()


def test_clients_that_leave_take_nothing_with_them(make_engine: Any, recipe: Any) -> None:
    """Groups are aborted at every stage, those on the host included."""
    from vllm import SamplingParams

    engine = make_engine(options=recipe(), num_gpu_blocks_override=48, max_model_len=1024)
    asked = SamplingParams(
        temperature=0, max_tokens=400, extra_args={"pt_num_workers": 4, "pt_worker_tokens": 60}
    )
    core = engine.llm.llm_engine
    swaps = count_swaps(engine)
    left = 0
    for step in range(400):
        if step % 3 == 0 and step < 60:
            core.add_request(f"r{step}", {"prompt_token_ids": prompts(6)[step % 6]}, asked)
        if step % 5 == 4 and step < 100:
            groups = list(engine.scheduler.groups)
            on_host = [state for state in groups if state.evicted]
            if groups:
                leaving = (on_host or groups)[step % len(on_host or groups)]
                core.abort_request([leaving.root.request_id], internal=True)
                left += 1
        core.step()
        if step > 60 and not core.has_unfinished_requests():
            break
    assert left > 10
    assert not core.has_unfinished_requests()
    core.step()
    engine.assert_all_blocks_free()
    assert not engine.worker._tables.hogwild._layouts
    engine.generate(
        [prompts(1)[0]], SamplingParams(max_tokens=2, extra_args={"parallel_think": "off"})
    )
    assert swaps["dropped"], "no client left while its group was on the host"
    assert not engine.worker._copies.teams


def test_seeds_make_sampled_answers_repeatable(make_engine: Any, recipe: Any) -> None:
    """Each step derives its own seed; what runs beside, and preemption, change nothing."""
    from vllm import SamplingParams

    engine = make_engine(options=recipe())
    asked = SamplingParams(
        temperature=0.8,
        seed=11,
        max_tokens=300,
        extra_args={"pt_num_workers": 3, "pt_worker_tokens": 40},
    )
    texts = prompts(3)
    first = [engine.generate([text], asked)[0].outputs[0].token_ids for text in texts]
    engine.preempt_every(9)
    again = [output.outputs[0].token_ids for output in engine.generate(texts, asked)]
    assert again == first
    assert len({tuple(text) for text in first}) == len(texts)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_writes_what_a_dense_forward_writes(
    make_engine: Any, smollm2: Path, tmp_path: Path
) -> None:
    """Words of a real tokenizer, thirty layers, nine heads over three; several finished steps."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(smollm2)

    def encode(text: str) -> list[int]:
        return list(words.encode(text, add_special_tokens=False))

    names = ["Alice", "Bob", "Carol"]
    options = {
        "names": names,
        "num_workers": 3,
        "step": "**{name} [{number}]:** ",
        "others": "### Others\n\n",
        "own": " <...>\n\n### Own\n\n",
        "end": [],
        "max_step_tokens": 11,
    }
    plan = plan_of(
        3,
        "combined",
        worker_tokens=30,
        ends=frozenset(),
        max_step_tokens=11,
        others=tuple(encode("### Others\n\n")),
        own=tuple(encode(" <...>\n\n### Own\n\n")),
        steps=lambda worker, number: encode(f"**{names[worker]} [{number}]:** "),
        check_every=40,
        close=tuple(encode("\n\n")),
    )
    hf_model = AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    engine = make_engine(model=smollm2, options={"profile": write_recipe(tmp_path, **options)})
    oracle = HogwildOracle(hf_model, plan)
    written = oracle.answer(encode("Three ways to stay healthy:\n\n"))
    (output,) = engine.generate([encode("Three ways to stay healthy:\n\n")], params(plan, written))
    assert written.checks >= 1 and len(written.history) > 6
    assert_same(engine, output, oracle)
    engine.assert_all_blocks_free()
