"""The grid, and the tensors of one of its points."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

# Query heads, KV heads, head dim.
MODELS = {
    "SmolLM2-135M": (9, 3, 64),
    "Qwen2.5-7B": (28, 4, 128),
    "Llama-3.1-8B": (32, 8, 128),
}
# Group sizes that these models do not have, for the rule of when to share.
HEADS = MODELS | {"4/4 x 64": (4, 4, 64), "32/4 x 128": (32, 4, 128)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the grid: `width` rows of one query token over prefix + own suffix.

    shared: the prefix is one for all rows; otherwise each row has its own.
    """

    model: str
    dtype: str
    prefix: int
    width: int
    suffix: int
    block_size: int
    shared: bool = True

    @property
    def key(self) -> str:
        return " ".join(map(str, asdict(self).values()))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in one layer."""
        _, num_kv_heads, head_dim = HEADS[self.model]
        return 2 * num_kv_heads * head_dim * DTYPES[self.dtype].itemsize

    @property
    def unique_bytes(self) -> int:
        """What must be read at least: every block once."""
        prefixes = 1 if self.shared else self.width
        return (prefixes * self.prefix + self.width * self.suffix) * self.bytes_per_token

    @property
    def multiply_adds(self) -> int:
        """Products of queries with keys, and of weights with values; sharing saves none."""
        heads, _, head_dim = HEADS[self.model]
        return 2 * self.width * heads * head_dim * (self.prefix + self.suffix)

    @property
    def bound(self) -> float:
        """Bytes that rows read one by one over bytes there are: W(P+S) / (P+WS)."""
        rows = self.width * (self.prefix + self.suffix) * self.bytes_per_token
        return rows / self.unique_bytes


@dataclass(frozen=True, eq=False)
class Layer:
    """Tensors of one layer of a model at one point."""

    point: Point
    query: torch.Tensor  # [W, Hq, D]
    cache: torch.Tensor  # vLLM's: [num_blocks, Hkv, block_size, 2 * D]
    table: torch.Tensor  # [W, B] int32
    seq_lens: torch.Tensor  # [W] int32
    starts: torch.Tensor  # [W + 1] int32

    @property
    def scale(self) -> float:
        return float(self.query.shape[2]) ** -0.5

    def caches(self, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as [num_blocks, block_size, Hkv, D].

        transposed: as vLLM's CPU cache holds them, keys as [D, block_size] before the values;
        otherwise as its GPU cache does, keys and values of a slot side by side.
        """
        head_dim = self.query.shape[2]
        if not transposed:
            keys, values = self.cache.transpose(1, 2).split(head_dim, dim=-1)
            return keys, values
        num_blocks, num_kv_heads, block_size, _ = self.cache.shape
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        block, head = self.cache.stride()[:2]
        keys = self.cache.as_strided(shape, (block, 1, head, block_size))
        values = self.cache.as_strided(shape, (block, head_dim, head, 1), block_size * head_dim)
        return keys, values


def make_layer(point: Point, device: str, seed: int) -> Layer:
    """Random tensors; blocks lie in random order, as after hours of serving."""
    heads, num_kv_heads, head_dim = HEADS[point.model]
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {
        "device": device,
        "dtype": DTYPES[point.dtype],
        "generator": generator,
    }
    prefix, suffix = (-(-n // point.block_size) for n in (point.prefix, point.suffix))
    prefixes = 1 if point.shared else point.width
    num_blocks = prefixes * prefix + point.width * suffix
    ids = torch.randperm(num_blocks, generator=generator, device=device).to(torch.int32)
    first = ids[: prefixes * prefix].view(prefixes, prefix).expand(point.width, prefix)
    own = ids[prefixes * prefix :].view(point.width, suffix)
    shape = (num_blocks, num_kv_heads, point.block_size, 2 * head_dim)
    length = prefix * point.block_size + point.suffix
    return Layer(
        point=point,
        query=torch.randn(point.width, heads, head_dim, **options),
        cache=torch.randn(shape, **options),
        table=torch.cat([first, own], dim=1).contiguous(),
        seq_lens=torch.full((point.width,), length, dtype=torch.int32, device=device),
        starts=torch.arange(point.width + 1, dtype=torch.int32, device=device),
    )


def expected(layer: Layer, row: int, transposed: bool) -> torch.Tensor:
    """[Hq, D] fp64: what row `row` should come out as."""
    keys, values = layer.caches(transposed)
    blocks, length = layer.table[row].long(), int(layer.seq_lens[row])
    key = keys[blocks].flatten(0, 1)[:length].double()
    value = values[blocks].flatten(0, 1)[:length].double()
    query = layer.query[row].double().view(key.shape[1], -1, key.shape[2])
    weights = (torch.einsum("hgd,nhd->hgn", query, key) * layer.scale).softmax(dim=-1)
    return torch.einsum("hgn,nhd->hgd", weights, value).flatten(0, 1)
