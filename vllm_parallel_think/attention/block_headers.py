"""Block headers as the worker keeps them: small tensors indexed by physical block."""

from __future__ import annotations

import torch

from ..scheduler_output import NATURAL, BlockHeaders
from .hogwild_rows import HogwildState
from .thought_embeddings import ThoughtEmbeddings


class BlockHeaderTensors:
    """``fill``, ``position`` and ``thought`` of every physical KV block, on the worker's device.

    They are updated in place before a step and never move, so that captured graphs can read them.

    Attributes:
        fill: [num_blocks] int32, valid slots.
        position: [num_blocks] int64, RoPE position of slot 0, or ``NATURAL``.
        thought: [num_blocks] int64, thought embedding of the block's tokens; 0 is none.
        thoughts: The model's thought embeddings, if it is served with any.
        hogwild: Groups whose workers see each other.
        has_holes: Whether the current batch holds a branch with a prefix of its own.

    """

    def __init__(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.fill = torch.full((num_blocks,), block_size, dtype=torch.int32, device=device)
        self.position = torch.full((num_blocks,), NATURAL, dtype=torch.int64, device=device)
        self.thought = torch.zeros(num_blocks, dtype=torch.int64, device=device)
        self.thoughts: ThoughtEmbeddings | None = None
        self.hogwild: HogwildState | None = None
        self.has_holes = False

    @property
    def has_branches(self) -> bool:
        """Whether the current batch holds a row whose attention is not vLLM's."""
        return self.has_holes or (self.hogwild is not None and self.hogwild.is_active)

    def begin_dummy(self) -> None:
        """Prepare for a batch that comes without the scheduler's output: it holds no branch."""
        self.has_holes = False
        if self.hogwild is not None:
            self.hogwild.rest()

    def apply(self, headers: BlockHeaders) -> None:
        """Write changed headers; one copy to the device, ordered before the step's kernels."""
        fields = [headers.blocks, headers.fill, headers.position, headers.thought]
        rows = torch.tensor(fields, dtype=torch.int64)
        if self.fill.is_cuda:
            rows = rows.pin_memory().to(self.fill.device, non_blocking=True)
        blocks, fill, position, thought = rows
        self.fill[blocks] = fill.to(torch.int32)
        self.position[blocks] = position
        self.thought[blocks] = thought

    def move_positions(self, positions: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Set RoPE positions of tokens whose block has a position header, in place.

        Args:
            positions: [T] int, vLLM's positions; tokens of other blocks keep theirs.
            slot_mapping: [T] int64, physical slot of every token; negative for padding.

        """
        slots = slot_mapping[: positions.shape[0]]
        blocks = slots.clamp(min=0) // self.block_size
        base = self.position[blocks]
        moved = base + slots % self.block_size
        keep = (base == NATURAL) | (slots < 0)
        target = positions[: slots.shape[0]]
        target.copy_(torch.where(keep, target.to(torch.int64), moved))
        if self.thoughts is not None:
            ids = torch.where(slots < 0, 0, self.thought[blocks])
            self.thoughts.begin_step(ids, target)
