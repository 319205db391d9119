"""INV-2 on a real model: SmolLM2 with a visible outline against one dense masked forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.oracle import dense_forward
from tests.support.repository import VISIBLE_OUTLINE

KV_TOLERANCE = 5e-3
"""Keys of SmolLM2 reach several hundred: float32 sums in another order differ there."""


def test_visible_outline_on_smollm2(smollm2: Path, make_engine: Any) -> None:
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    engine = make_engine(model=smollm2, options={"profile": VISIBLE_OUTLINE})
    prompt = engine.llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": "What is good about living in a city?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    params = SamplingParams(max_tokens=400, temperature=0, extra_args={"pt_path_tokens": 40})
    (output,) = engine.generate([prompt], params)
    summary = output.kv_transfer_params["parallel_think"]
    assert summary["forks"] == 1
    assert summary["widest_fork"] >= 4
    assert summary["parallelism_ratio"] > 2.5
    snapshot = engine.snapshot(output)
    nodes = snapshot.nodes
    model = AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    logits, cache = dense_forward(model, nodes)
    offset, checked = 0, 0
    for node in nodes:
        for index in range(node.num_given, len(node.tokens)):
            row = logits[offset + index - 1]
            # A token that ties with the best one in float32 may go either way.
            assert row.max() - row[node.tokens[index]] < 1e-3, f"{node.address}, token {index}"
            checked += 1
        offset += len(node.tokens)
    # A token that lacked its K/V when its branch was cut is given to the next node.
    pending = sum(node.num_pending for node in nodes)
    assert checked + pending == summary["generated_tokens"]
    num = len(snapshot.tokens)
    assert num > len(prompt)
    for kind, ours in (("keys", snapshot.keys), ("values", snapshot.values)):
        dense = torch.stack([getattr(layer, kind)[0].transpose(0, 1) for layer in cache.layers])
        error = (torch.cat(ours, dim=1) - dense[:, :num]).abs().max().item()
        assert error < KV_TOLERANCE, f"{kind} differ by {error}"
    engine.assert_all_blocks_free()
