"""Blocks whose `grid_sample` is no attention by itself, for tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def corners(height: int, width: int, like: Tensor) -> Tensor:
    """(H, W, 2) centres of cells, x before y, in -1 to 1."""
    y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) * 2 / height - 1
    x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) * 2 / width - 1
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((x, y), -1)


class DAT(nn.Module):
    """As in "Vision Transformer with Deformable Attention": keys and values are read at points that
    a strided convolution of the queries moves; queries are dense. (B, C, H, W).

    Args:
        fused: scaled_dot_product_attention instead of einsum - softmax - einsum.
    """

    def __init__(self, dim: int, heads: int = 2, groups: int = 2, fused: bool = False) -> None:
        super().__init__()
        self.heads, self.groups, self.fused = heads, groups, fused
        own = dim // groups
        self.offset = nn.Sequential(
            nn.Conv2d(own, own, 3, 2, 1, groups=own), nn.GELU(), nn.Conv2d(own, 2, 1, bias=False)
        )
        self.q, self.k = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.v, self.proj = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q = self.q(x)
        offset = self.offset(q.reshape(b * self.groups, c // self.groups, h, w))
        rows, columns = offset.shape[2:]
        place = corners(rows, columns, x) + offset.permute(0, 2, 3, 1).tanh() / 4
        sampled = F.grid_sample(
            x.reshape(b * self.groups, c // self.groups, h, w), place, align_corners=True
        ).reshape(b, c, 1, rows * columns)
        shape = (b * self.heads, c // self.heads)
        q = q.reshape(*shape, h * w)
        k = self.k(sampled).reshape(*shape, rows * columns)
        v = self.v(sampled).reshape(*shape, rows * columns)
        if self.fused:
            q, k, v = (t.reshape(b, self.heads, shape[1], -1).transpose(2, 3) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        else:
            scores = torch.einsum("bcm,bcn->bmn", q, k) * shape[1] ** -0.5
            y = torch.einsum("bmn,bcn->bcm", scores.softmax(2), v)
        return self.proj(y.reshape(b, c, h, w))


class Warp(nn.Module):
    """A spatial transformer ("affine"), optical flow ("flow"), or a resampled table ("table")."""

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "table":
            self.table = nn.Parameter(torch.randn(1, dim, 5, 5))
        else:
            self.place = nn.Linear(dim, 6) if kind == "affine" else nn.Conv2d(dim, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        if self.kind == "affine":
            where = F.affine_grid(self.place(x.mean((2, 3))).view(b, 2, 3), list(x.shape), False)
        elif self.kind == "flow":
            where = corners(h, w, x) + self.place(x).permute(0, 2, 3, 1).tanh() / 4
        else:
            where = corners(h, w, x)[None]
            return x + F.grid_sample(self.table, where, align_corners=False)
        return F.grid_sample(x, where, align_corners=False)


class Attention(nn.Module):
    """Fused, on (B, C, H, W)."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(x.flatten(2).transpose(1, 2)).reshape(b, h * w, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return self.proj(y).transpose(1, 2).reshape(b, c, h, w)


class Norm(nn.LayerNorm):
    """Of channels, on (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GridBlock(nn.Module):
    """Pre-norm on (B, C, H, W). `warp`, if given, comes between attention and MLP."""

    def __init__(self, dim: int, attention: nn.Module, warp: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = Norm(dim), Norm(dim), Norm(dim)
        self.attn, self.warp = attention, warp
        self.mlp = nn.Sequential(nn.Conv2d(dim, 2 * dim, 1), nn.GELU(), nn.Conv2d(2 * dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        if self.warp is not None:
            x = x + self.warp(self.norm3(x))
        return x + self.mlp(self.norm2(x))


class GridModel(nn.Module):
    """Patch embedding, blocks, mean head."""

    def __init__(self, *blocks: nn.Module, dim: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean((2, 3)))
