"""Workers that see each other write, in the engine, against a dense oracle."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .hogwild_oracle import Dense, HogwildOracle, Plan, Written

TOLERANCE = 1e-3
"""Of K/V whose values go up to 10; a token too much or too little moves them by 0.1 and more."""

NUMBER = 100
NAMES = (41, 42, 43, 44)
OTHERS, OWN = (50, 51, 52), (53, 54, 55, 56)
QUESTION, FORCED, FOUND = (60, 61, 62), (63, 64), (65, 66, 67)
ENDS = tuple(range(10, 34, 2))


def start_of(worker: int, number: int) -> list[int]:
    """The tokens of "{name} {number} w45"."""
    return [NAMES[worker], NUMBER + number, 45]


def write_recipe(folder: Path, **changes: Any) -> str:
    """Write a recipe of bare token ids; return its path."""
    values: dict[str, Any] = {
        "names": [f"w{name}" for name in NAMES],
        "num_workers": 2,
        "step": "{name} {number} w45",
        "others": list(OTHERS),
        "own": list(OWN),
        "end": list(ENDS),
        **changes,
    }
    every, found = values.pop("every", 0), values.pop("found", list(FOUND))
    workers = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
    path = folder / "workers.toml"
    path.write_text(
        f"""
name = "workers"
summary = "token ids"
[workers]
{workers}
[check]
every = {every}
text = {json.dumps(list(QUESTION))}
[answer]
found = {json.dumps(found)}
forced = {json.dumps(list(FORCED))}
max_tokens = 8
""",
        "utf-8",
    )
    return str(path)


def plan_of(num_workers: int, layout: str, **changes: Any) -> Plan:
    """What the recipe says, for the oracle."""
    values: dict[str, Any] = {
        "worker_tokens": 40,
        "ends": frozenset(ENDS),
        "others": OTHERS,
        "own": OWN,
        "steps": start_of,
        "question": QUESTION,
        "found": FOUND,
        "forced": FORCED,
    }
    return Plan(num_workers, layout, **{**values, **changes})


def params(plan: Plan, written: Written, **extra: Any) -> Any:
    """Sampling parameters for the same answer, as long as the oracle's."""
    from vllm import SamplingParams

    options = {
        "parallel_think": "workers",
        "pt_layout": plan.layout,
        "pt_worker_tokens": plan.worker_tokens,
        "pt_check_every": plan.check_every,
    }
    if plan.num_workers > 1:
        options["pt_num_workers"] = plan.num_workers
    return SamplingParams(
        temperature=0, max_tokens=1024, logprobs=0, extra_args={**options, **extra}
    )


def prompts(count: int) -> list[list[int]]:
    """Prompts of odd lengths."""
    rng = torch.Generator().manual_seed(3)
    return [
        torch.randint(70, 99, (length,), generator=rng).tolist()
        for length in (19, 45, 33, 70, 27, 64)[:count]
    ]


def assert_same(engine: Any, output: Any, oracle: HogwildOracle) -> None:
    """Compare an answer's tokens, log-probabilities and K/V with the oracle's."""
    written, got = oracle.written, output.outputs[0]
    assert list(got.token_ids)[: len(written.visible)] == written.visible
    sampled = [
        step[token].logprob
        for token, step in zip(got.token_ids, got.logprobs, strict=True)
        if step[token].logprob != 0.0  # forced tokens have probability 1
    ]
    expected = torch.tensor(written.log_probs)
    assert torch.allclose(torch.tensor(sampled[: len(expected)]), expected, atol=2e-3)
    assert_same_kv(engine, output, oracle.dense, written)
    assert output.kv_transfer_params["parallel_think"]["fallbacks"] == {}


def assert_same_kv(engine: Any, output: Any, dense: Dense, written: Written) -> None:
    """Compare what lay in the cache, layer by layer."""
    snapshot = engine.snapshot(output)
    keys, values = torch.cat(snapshot.keys, 1), torch.cat(snapshot.values, 1)
    ids = [i for step in written.history for i in step]
    places = [at for step in written.history for at in range(len(step))]
    assert keys.shape[1] == len(ids)
    for layer in range(keys.shape[0]):
        wanted = dense.rotate(torch.stack([dense.keys[i][layer] for i in ids]), places)
        assert (keys[layer] - wanted).abs().max() < TOLERANCE
        wanted = torch.stack([dense.values[i][layer] for i in ids])
        assert (values[layer] - wanted).abs().max() < TOLERANCE


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
    assert "budget" in ends


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
def test_groups_that_give_way_come_back_with_the_same_kv(
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
    plan = plan_of(3, "combined")
    texts = prompts(2)
    oracles = [HogwildOracle(hf_model, plan) for _ in texts]
    wanted = [oracle.answer(text) for oracle, text in zip(oracles, texts, strict=True)]
    outputs = engine.generate(texts, [params(plan, written) for written in wanted])
    for output, oracle in zip(outputs, oracles, strict=True):
        assert_same(engine, output, oracle)
    engine.assert_all_blocks_free()


def count_swaps(engine: Any) -> Counter[str]:
    """Count copies to the host and back."""
    counts: Counter[str] = Counter()
    swap = engine.worker._swap

    def counting(swaps: Any) -> None:
        for one in swaps:
            counts["out" if one.out else "in" if one.blocks else "dropped"] += 1
        swap(swaps)

    engine.worker._swap = counting
    return counts


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

    from .tiny import EOS, VOCAB_SIZE, make_model

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
    left = 0
    for step in range(400):
        if step % 3 == 0 and step < 60:
            core.add_request(f"r{step}", {"prompt_token_ids": prompts(6)[step % 6]}, asked)
        if step % 5 == 4 and step < 100:
            ids = [family.root.request_id for family in engine.scheduler._families]
            if ids:
                core.abort_request([ids[step % len(ids)]], internal=True)
                left += 1
        core.step()
        if step > 60 and not core.has_unfinished_requests():
            break
    assert left > 10
    assert not core.has_unfinished_requests()
    core.step()
    engine.assert_all_blocks_free()
    assert not engine.worker._tables.teams._teams
    engine.generate(
        [prompts(1)[0]], SamplingParams(max_tokens=2, extra_args={"parallel_think": "off"})
    )
    assert engine.worker._copies is None or not engine.worker._copies.teams


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
