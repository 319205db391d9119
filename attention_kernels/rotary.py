"""Rotation of queries by a number of positions (RoPE, Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Rotary:
    """How a model rotates. A shift is a pure rotation: no attention scaling is applied here.

    inv_freq: [rotary_dim / 2], radians per position. rotary_dim: how many leading dims of a head
    rotate. is_neox_style: dim i pairs with i + rotary_dim / 2; otherwise 2i pairs with 2i + 1.
    Raises ValueError if rotary_dim is odd, not positive, or does not match inv_freq.
    """

    inv_freq: torch.Tensor
    rotary_dim: int
    is_neox_style: bool

    def __post_init__(self) -> None:
        if self.rotary_dim <= 0 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be positive and even, got {self.rotary_dim}")
        if tuple(self.inv_freq.shape) != (self.rotary_dim // 2,):
            raise ValueError(
                f"inv_freq must have shape ({self.rotary_dim // 2},), "
                f"got {tuple(self.inv_freq.shape)}"
            )

    def tables(self, shifts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, fp32 [*shifts.shape, rotary_dim / 2], from fp64 angles.

        shifts: integer positions, any shape; angle = shift * inv_freq.
        """
        inv_freq = self.inv_freq.to(device=shifts.device, dtype=torch.float64)
        angle = shifts.to(torch.float64)[..., None] * inv_freq
        return angle.cos().float(), angle.sin().float()

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [..., D] turned by the angles whose cos/sin [..., rotary_dim / 2] broadcast to it."""
        turning, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        if self.is_neox_style:
            left, right = turning.chunk(2, dim=-1)
            turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
        else:
            left, right = turning[..., ::2], turning[..., 1::2]
            pairs = (left * cos - right * sin, right * cos + left * sin)
            turned = torch.stack(pairs, dim=-1).flatten(-2)
        return torch.cat((turned, rest), dim=-1)
