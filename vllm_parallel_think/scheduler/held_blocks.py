"""References that groups hold on KV blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from ..core.branch_graph import Node
from .block_headers import BlockHeaderBook


class HeldBlocks:
    """Keeps finished branches' blocks alive for as long as somebody will attend to them.

    Every held block carries one reference of a group, beside those of vLLM's requests.
    """

    def __init__(self, pool: BlockPool, headers: BlockHeaderBook, block_size: int) -> None:
        self._pool = pool
        self._headers = headers
        self._block_size = block_size
        self._blocks: dict[Node, list[KVCacheBlock]] = {}
        self._held: Counter[int] = Counter()

    @property
    def num_held(self) -> int:
        """Number of distinct physical blocks that groups hold."""
        return len(self._held)

    @property
    def references(self) -> Counter[int]:
        """How many references groups hold on each block, counted anew."""
        return Counter(block.block_id for blocks in self._blocks.values() for block in blocks)

    def __contains__(self, node: Node) -> bool:
        """Return whether a node's blocks are held."""
        return node in self._blocks

    def blocks(self, node: Node) -> Sequence[KVCacheBlock]:
        """Return the blocks of a sealed node."""
        return self._blocks[node]

    def prefix(self, node: Node) -> list[KVCacheBlock]:
        """Return the blocks a branch starts from, in order."""
        return [block for seen in node.prefix for block in self._blocks[seen]]

    def hold(self, node: Node, blocks: Sequence[KVCacheBlock]) -> None:
        """Take references on a finished node's blocks and seal the last one."""
        self._pool.touch(blocks)
        self._blocks[node] = list(blocks)
        self._held.update(block.block_id for block in blocks)
        if hole := len(node.tokens) % self._block_size:
            self._headers.seal(blocks[-1].block_id, hole)

    def adopt(self, node: Node, blocks: Sequence[KVCacheBlock]) -> None:
        """Take over fresh blocks, with the reference they came with, as a finished node's."""
        self._blocks[node] = list(blocks)
        self._held.update(block.block_id for block in blocks)
        if hole := len(node.tokens) % self._block_size:
            self._headers.seal(blocks[-1].block_id, hole)

    def release(self, node: Node) -> None:
        """Give a node's blocks back to the pool, last ones first, so that they go first."""
        blocks = self._blocks.pop(node, [])
        for block in blocks:
            self._held[block.block_id] -= 1
            if not self._held[block.block_id]:
                del self._held[block.block_id]
        self.forget(blocks)
        self._pool.free_blocks(reversed(blocks))

    def forget(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Reset the headers of blocks that a branch lets go and no group holds."""
        self._headers.reset(b.block_id for b in blocks if b.block_id not in self._held)
