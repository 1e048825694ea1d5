"""A PVT-like pyramid with deformable attention (DPVT), in the ways it is written, for tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def centres(height: int, width: int, like: Tensor) -> Tensor:
    """(N, 2) centres of the grid's tokens, x before y, in 0 to 1."""
    y = torch.linspace(0.5, height - 0.5, height, device=like.device) / height
    x = torch.linspace(0.5, width - 0.5, width, device=like.device) / width
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((x.reshape(-1), y.reshape(-1)), -1)


class DeformableAttention(nn.Module):
    """As in Deformable DETR, with a single level: (B, N, C) told H and W.

    Args:
        reference: where reference points come from: "linspace", "arange", "buffer" (of `grid`) or
            "none" (offsets from the image's centre: nothing is positional).
        weighting: "mul" (multiply and sum), "einsum" or "matmul".
        grid: the only grid that a buffer of reference points allows.
        softmax: without it weights are sigmoids, which is no attention.
        maps: 2 also samples a pooled map, `points` of each, with one softmax over both.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 2,
        points: int = 4,
        reference: str = "linspace",
        weighting: str = "mul",
        grid: tuple[int, int] | None = None,
        softmax: bool = True,
        maps: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.points, self.maps = heads, points, maps
        self.reference, self.weighting, self.softmax = reference, weighting, softmax
        self.offsets = nn.Linear(dim, heads * maps * points * 2)
        self.weights = nn.Linear(dim, heads * maps * points)
        self.dropout = nn.Dropout(dropout)
        self.value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        if grid is not None:
            self.register_buffer("table", centres(*grid, torch.empty(0)).view(1, -1, 1, 1, 2))

    def _reference(self, height: int, width: int, x: Tensor) -> Tensor:
        if self.reference == "buffer":
            return self.table
        if self.reference == "arange":
            place = torch.arange(height * width, device=x.device)
            rows, columns = place // width, place % width
            points = torch.stack(((columns + 0.5) / width, (rows + 0.5) / height), -1)
        else:
            points = centres(height, width, x)
        return points[None, :, None, None, :]

    def _grid(self, x: Tensor, height: int, width: int) -> Tensor:
        b, n, _ = x.shape
        offsets = self.offsets(x).view(b, n, self.heads, self.maps * self.points, 2)
        if self.reference == "none":
            return offsets.tanh()
        if self.reference == "arange":
            offsets = offsets / torch.tensor([width, height], device=x.device)
        else:
            offsets = offsets / x.new_tensor([width, height])
        return 2 * (self._reference(height, width, x) + offsets) - 1

    def _samples(self, value: Tensor, grid: Tensor) -> Tensor:
        """(B * heads, C, N, maps * points)."""
        if self.maps == 1:
            return F.grid_sample(value, grid, "bilinear", "zeros", False)
        values = (value, F.avg_pool2d(value, 2, ceil_mode=True))
        grids = grid.split(self.points, 2)
        samples = [
            F.grid_sample(v, g, align_corners=False) for v, g in zip(values, grids, strict=True)
        ]
        return torch.stack(samples, -2).flatten(-2)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        b, n, c = x.shape
        points = self.maps * self.points
        value = self.value(x).transpose(1, 2).reshape(b * self.heads, -1, height, width)
        weights = self.weights(x).view(b, n, self.heads, points)
        weights = weights.softmax(-1) if self.softmax else weights.sigmoid()
        samples = self._samples(value, self._grid(x, height, width).transpose(1, 2).flatten(0, 1))
        if self.weighting == "mul":
            weights = weights.transpose(1, 2).reshape(b * self.heads, 1, n, points)
            y = (samples * weights).sum(-1).view(b, c, n)
        elif self.weighting == "einsum":
            samples = samples.view(b, self.heads, -1, n, points)
            y = torch.einsum("bhcnp,bnhp->bhcn", samples, weights).reshape(b, c, n)
        else:
            samples = samples.view(b, self.heads, -1, n, points).permute(0, 3, 1, 2, 4)
            y = torch.matmul(samples, weights.unsqueeze(-1)).reshape(b, n, c).transpose(1, 2)
        return self.dropout(self.proj(y.transpose(1, 2)))


class Mlp(nn.Module):
    """With a depthwise convolution in the middle, as PVT v2, or without, as PVT."""

    def __init__(self, dim: int, depthwise: bool) -> None:
        super().__init__()
        wide = 4 * dim
        self.fc1, self.fc2 = nn.Linear(dim, wide), nn.Linear(wide, dim)
        self.conv = nn.Conv2d(wide, wide, 3, padding=1, groups=wide) if depthwise else None

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = self.fc1(x)
        if self.conv is not None:
            b, _, c = x.shape
            x = self.conv(x.transpose(1, 2).view(b, c, height, width)).flatten(2).transpose(1, 2)
        return self.fc2(F.gelu(x))


class Block(nn.Module):
    """Pre-norm."""

    def __init__(self, dim: int, attention: nn.Module, depthwise: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = attention, Mlp(dim, depthwise)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.attn(self.norm1(x), height, width)
        return x + self.mlp(self.norm2(x), height, width)


class DPVT(nn.Module):
    """Stages of patch embedding and blocks, mean head. Images of any size, but for buffers."""

    def __init__(
        self,
        dims: tuple[int, ...] = (16, 16, 32, 32),
        depth: int = 1,
        strides: tuple[int, ...] = (4, 2, 2, 2),
        depthwise: bool = False,
        side: int = 128,
        **options: object,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeds, self.norms, self.stages = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels = 3
        for dim, stride in zip(dims, strides, strict=True):
            side = -(-side // stride)
            grid = (side, side) if options.get("reference") == "buffer" else None
            self.embeds.append(nn.Conv2d(channels, dim, 2 * stride - 1, stride, stride - 1))
            self.norms.append(nn.LayerNorm(dim))
            self.stages.append(
                nn.ModuleList(
                    Block(dim, DeformableAttention(dim, grid=grid, **options), depthwise)  # type: ignore[arg-type]
                    for _ in range(depth)
                )
            )
            channels = dim
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        for embed, norm, blocks in zip(self.embeds, self.norms, self.stages, strict=True):
            x = embed(x)
            b, c, height, width = x.shape
            x = norm(x.flatten(2).transpose(1, 2))
            for block in blocks:
                x = block(x, height, width)
            x = x.transpose(1, 2).reshape(b, c, height, width)
        return self.head(x.mean((2, 3)))
