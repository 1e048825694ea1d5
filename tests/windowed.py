"""A windowed transformer block that can be any of the kinds found in the wild, for tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WindowBlock(nn.Module):
    """Pre-norm block on (B, H, W, C) whose attention has windows.

    Args:
        kind: "block", "grid" or "pad_first" (pads, then rolls; the others roll, then pad).
        core: "sdpa", "manual" or "cosine".
    """

    def __init__(
        self,
        dim: int = 16,
        heads: int = 2,
        window: tuple[int, int] = (4, 4),
        shift: tuple[int, int] = (0, 0),
        kind: str = "block",
        core: str = "manual",
        masked: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.kind, self.core, self.masked = kind, core, masked
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        count = window[0] * window[1]
        self.bias = nn.Parameter(torch.randn(heads, count, count)) if bias else None

    def _partition(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        tall, wide = self.window
        if self.kind == "grid":
            x = x.view(b, tall, h // tall, wide, w // wide, c).permute(0, 2, 4, 1, 3, 5)
        else:
            x = x.view(b, h // tall, tall, w // wide, wide, c).transpose(2, 3)
        return x.reshape(-1, tall * wide, c)

    def _reverse(self, x: Tensor, h: int, w: int) -> Tensor:
        tall, wide = self.window
        x = x.view(-1, h // tall, w // wide, tall, wide, x.shape[-1])
        x = x.permute(0, 3, 1, 4, 2, 5) if self.kind == "grid" else x.transpose(2, 3)
        return x.reshape(-1, h, w, x.shape[-1])

    def _mask(self, h: int, w: int, like: Tensor) -> Tensor:
        """Tokens attend to those of their own side of the roll's seam, and not to padding."""
        rows = (torch.arange(h) >= h - self.shift[0]).long()
        columns = (torch.arange(w) >= w - self.shift[1]).long()
        part = (rows[:, None] * 2 + columns).view(1, h, w, 1)
        part = self._partition(part).squeeze(-1)
        apart = part.unsqueeze(1) != part.unsqueeze(2)
        return torch.zeros_like(apart, dtype=like.dtype).masked_fill(apart, -100.0)

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        table = None if self.bias is None else self.bias.unsqueeze(0)
        if mask is not None:
            whole = mask.unsqueeze(1).expand(-1, self.heads, -1, -1)
            whole = whole.repeat(b // mask.shape[0], 1, 1, 1)
            table = whole if table is None else table + whole
        if self.core == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=table)
        else:
            if self.core == "cosine":
                scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * 5.0
            else:
                scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            y = (scores if table is None else scores + table).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, c))

    def _windows(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        down, right = -h % self.window[0], -w % self.window[1]
        back = tuple(-s for s in self.shift)
        if self.kind == "pad_first":
            x = torch.roll(F.pad(x, (0, 0, 0, right, 0, down)), back, (1, 2))
        else:
            x = F.pad(torch.roll(x, back, (1, 2)), (0, 0, 0, right, 0, down))
        tall, wide = x.shape[1], x.shape[2]
        mask = self._mask(tall, wide, x) if self.masked and any(self.shift) else None
        x = self._reverse(self._attend(self._partition(x), mask), tall, wide)
        if self.kind == "pad_first":
            return torch.roll(x, self.shift, (1, 2))[:, :h, :w]
        return torch.roll(x[:, :h, :w], self.shift, (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._windows(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinySwin(nn.Module):
    """Patch embedding, windowed blocks, mean head. Takes any image size that its blocks take."""

    def __init__(self, *blocks: nn.Module, dim: int = 16, patch: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, dim, patch, stride=patch)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))
