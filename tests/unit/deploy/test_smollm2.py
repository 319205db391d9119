"""The converter of the local test model: layout against llama.cpp's, and the model's own words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

from deploy.local import smollm2

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, VOCAB = 4, 2, 16, 64, 96, 32


def llama_cpp_permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows i and i + D/2 of each head `[D, hidden]` become neighbours, written row by row."""
    rows = len(weight)
    head_dim = rows // num_heads
    order = [
        head * head_dim + half * (head_dim // 2) + i
        for head in range(num_heads)
        for i in range(head_dim // 2)
        for half in (0, 1)
    ]
    return weight[order]


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> GGUFReader:
    """A one-layer model in the types of the real file: Q4_1, Q8_0 and F32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    rng = np.random.default_rng(0)
    q4, q8, f32 = (getattr(GGMLQuantizationType, name) for name in ("Q4_1", "Q8_0", "F32"))
    layout = {
        "token_embd": ((VOCAB, HIDDEN), q8),
        "output_norm": ((HIDDEN,), f32),
        "blk.0.attn_norm": ((HIDDEN,), f32),
        "blk.0.ffn_norm": ((HIDDEN,), f32),
        "blk.0.attn_q": ((HEADS * HEAD_DIM, HIDDEN), q4),
        "blk.0.attn_k": ((KV_HEADS * HEAD_DIM, HIDDEN), q4),
        "blk.0.attn_v": ((KV_HEADS * HEAD_DIM, HIDDEN), q4),
        "blk.0.attn_output": ((HIDDEN, HEADS * HEAD_DIM), q4),
        "blk.0.ffn_gate": ((FFN, HIDDEN), q4),
        "blk.0.ffn_up": ((FFN, HIDDEN), q4),
        "blk.0.ffn_down": ((HIDDEN, FFN), q4),
    }
    for name, (shape, kind) in layout.items():
        weight = rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFReader(path)


def test_permutation_is_undone() -> None:
    weight = np.arange(6 * 8 * 3, dtype=np.float32).reshape(6 * 8, 3)
    permuted = llama_cpp_permute(weight, 6)
    assert not np.array_equal(permuted, weight)
    np.testing.assert_array_equal(smollm2.undo_rope_permutation(permuted, 6), weight)


def test_tensors_are_those_of_gguf(tiny_gguf: GGUFReader) -> None:
    converted = smollm2.convert_tensors(tiny_gguf)
    source = {t.name: dequantize(t.data, t.tensor_type) for t in tiny_gguf.tensors}
    assert len(converted) == len(source) == 11
    for name, weight in source.items():
        ours = converted[smollm2.hf_name(name)]
        assert ours.dtype == np.float32
        if "attn_q" in name or "attn_k" in name:
            ours = llama_cpp_permute(ours, HEADS if "attn_q" in name else KV_HEADS)
        np.testing.assert_array_equal(ours, weight, err_msg=name)


def test_tensors_fill_the_model_that_the_config_describes(tiny_gguf: GGUFReader) -> None:
    from transformers import LlamaForCausalLM

    config = smollm2.convert_config(tiny_gguf, tied=True)
    model = LlamaForCausalLM(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    converted = {name: w.shape for name, w in smollm2.convert_tensors(tiny_gguf).items()}
    assert converted == expected
    assert config.head_dim == HEAD_DIM
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters["rope_theta"] == 100000.0


def test_unknown_metadata_is_named(tiny_gguf: GGUFReader) -> None:
    with pytest.raises(KeyError, match=r"llama\.expert_count"):
        smollm2.metadata(tiny_gguf, "llama.expert_count")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("VLLM_PT_CACHE", raising=False)
    assert smollm2.model_path().parent == tmp_path / "xdg" / "vllm-parallel-think"
    monkeypatch.setenv("VLLM_PT_CACHE", str(tmp_path / "own"))
    assert smollm2.model_path().parent == tmp_path / "own"


def test_publish_replaces_outdated_and_keeps_complete(tmp_path: Path) -> None:
    def made(scratch: str, source: object) -> Path:
        folder = tmp_path / scratch / "model"
        folder.mkdir(parents=True)
        (folder / "source.json").write_text(json.dumps(source))
        (folder / "from").write_text(scratch)
        return folder

    final = made("final", {"conversion": 0})
    assert not smollm2.is_complete(final)
    smollm2.publish(made("first", smollm2.SOURCE), final)
    smollm2.publish(made("second", smollm2.SOURCE), final)
    assert smollm2.is_complete(final)
    assert (final / "from").read_text() == "first"


@pytest.fixture(scope="module")
def smollm2_folder() -> Path:
    """The real model; `make test` makes it first, so only a bare `pytest` can lack it."""
    try:
        return smollm2.ensure_model()
    except RuntimeError as reason:
        pytest.skip(f"the model cannot be made here: {reason}")


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder)


def test_every_digit_and_the_space_before_it_stand_alone(tokenizer: Any) -> None:
    text = "a  123 don't"
    assert tokenizer.tokenize(text) == ["a", "ĠĠ", "1", "2", "3", "Ġdon", "'t"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template_and_special_tokens(tokenizer: Any) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    messages = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(tokenizer.bos_token_id) == 3


def test_model_knows_the_capital_of_france(smollm2_folder: Path, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    answer = output[prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id, "the answer is short and ends by itself"


@pytest.mark.slow
def test_weights_of_the_real_file(smollm2_folder: Path, tmp_path: Path) -> None:
    reader = GGUFReader(smollm2.download_gguf(tmp_path))
    stored = load_file(smollm2_folder / "model.safetensors")
    assert len(stored) == len(reader.tensors) == 272
    for tensor in reader.tensors:
        ours = stored[smollm2.hf_name(tensor.name)]
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            ours = llama_cpp_permute(ours, 9 if "attn_q" in tensor.name else 3)
        np.testing.assert_array_equal(
            ours, dequantize(tensor.data, tensor.tensor_type), err_msg=tensor.name
        )
