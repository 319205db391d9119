"""INV-2 with LoRA: every branch of a request runs with the request's adapter, and with no other."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from tests.support.oracle import Budget, Oracle, assert_equal, prompts
from tests.support.tiny import IdGrammar

RANK = 4
TARGETS = ("q_proj", "v_proj")


def write_adapter(hf_model: Any, folder: Path) -> Any:
    """Write a random adapter for attention; return a copy of the model with it merged."""
    from safetensors.torch import save_file

    merged = deepcopy(hf_model)
    random = torch.Generator().manual_seed(5)
    weights = {}
    for number, layer in enumerate(merged.model.layers):
        for name in TARGETS:
            weight = getattr(layer.self_attn, name).weight
            down = torch.randn(RANK, weight.shape[1], generator=random) * 0.3
            up = torch.randn(weight.shape[0], RANK, generator=random) * 0.3
            weight.data += up @ down
            prefix = f"base_model.model.model.layers.{number}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = down
            weights[f"{prefix}.lora_B.weight"] = up
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(TARGETS),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return merged


def test_branches_run_with_the_adapter_of_their_request(
    hf_model: Any, make_engine: Any, tmp_path: Path
) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    grammar = IdGrammar(num_paths=3, path_after=(11,))
    adapted = write_adapter(hf_model, tmp_path / "adapter")
    engine = make_engine(
        options={"profile": grammar.write(tmp_path)},
        block_size=16,
        enable_lora=True,
        max_lora_rank=8,
        max_loras=2,  # on a CPU, vLLM gives rows without an adapter the weights in the last place
    )
    adapter = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
    budget = Budget(max_tokens=90, path_tokens=16)
    params = SamplingParams(max_tokens=90, temperature=0, extra_args={"pt_path_tokens": 16})
    asked = prompts(4, seed=12)
    outputs = engine.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in [*asked, *asked]],
        params,
        lora_request=[adapter] * 4 + [None] * 4,
        use_tqdm=False,
    )
    answers = [
        Oracle(model, grammar, budget).answer(p) for model in (adapted, hf_model) for p in asked
    ]
    assert sum(answer.num_forks for answer in answers[:4]) >= 2, "the adapter hardly branched"
    assert [a.visible for a in answers[:4]] != [a.visible for a in answers[4:]]
    for output, answer in zip(outputs, answers, strict=True):
        assert_equal(output, answer, engine.snapshot(output))
    engine.assert_all_blocks_free()
