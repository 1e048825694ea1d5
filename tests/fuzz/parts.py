"""Norms, MLPs and movement between layouts, each written as it is found in the wild."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM = 16


def to_tokens(x: Tensor, layout: str) -> Tensor:
    """(B, N, C)."""
    if layout == "NBC":
        return x.transpose(0, 1)
    if layout == "BCN":
        return x.transpose(1, 2)
    if layout == "BHWC":
        return x.flatten(1, 2)
    if layout == "BCHW":
        return x.flatten(2).transpose(1, 2)
    return x


def from_tokens(x: Tensor, layout: str, height: int, width: int) -> Tensor:
    if layout == "NBC":
        return x.transpose(0, 1)
    if layout == "BCN":
        return x.transpose(1, 2)
    if layout == "BHWC":
        return x.reshape(x.shape[0], height, width, x.shape[2])
    if layout == "BCHW":
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)
    return x


class ChannelsFirst(nn.Module):
    """A norm over the channels of (B, C, ...) by moving them to the end and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class ChannelNorm(nn.Module):
    """LayerNorm over axis 1, written out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)
        self.bias = nn.Parameter(torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(var + 1e-6)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return x * self.weight.view(shape) + self.bias.view(shape)


class WrittenRMS(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * (x * scale).to(x.dtype)


class BatchLast(nn.Module):
    """BatchNorm over the channels of (..., C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, -2)).view(x.shape)


def make_norm(kind: str, layout: str, dim: int = DIM) -> nn.Module:
    """For a stream of `layout`."""
    if kind == "none":
        return nn.Identity()
    if layout in ("BCN", "BCHW"):
        batch = nn.BatchNorm2d if layout == "BCHW" else nn.BatchNorm1d
        makers = {"channel": ChannelNorm, "group": lambda d: nn.GroupNorm(1, d), "batch": batch}
        return makers.get(kind, ChannelsFirst)(dim)
    last = {"rms": nn.RMSNorm, "rms_written": WrittenRMS, "batch": BatchLast}
    return last.get(kind, nn.LayerNorm)(dim)


class PlainMLP(nn.Module):
    def __init__(self, dim: int, drop: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(drop), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.layers(x)


class GatedMLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.both = nn.Linear(dim, 4 * dim)
        self.out = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        gate, value = self.both(x).chunk(2, -1)
        return self.out(F.silu(gate) * value)


class ConvolutionMLP(nn.Module):
    """1 x 1 convolutions, with or without a depthwise one between; prefix tokens skip that."""

    def __init__(self, dim: int, kernel: int, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.into = nn.Conv2d(dim, 2 * dim, 1)
        self.depthwise = nn.Conv2d(2 * dim, 2 * dim, kernel, 1, kernel // 2, groups=2 * dim)
        self.out = nn.Conv2d(2 * dim, dim, 1)
        self.kernel = kernel

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        b, _, c = x.shape
        head = x[:, : self.prefix]
        grid = x[:, self.prefix :].transpose(1, 2).reshape(b, c, height, width)
        y = self.into(grid)
        if self.kernel > 1:
            y = self.depthwise(y)
        y = self.out(F.gelu(y)).flatten(2).transpose(1, 2)
        return torch.cat([head, y], 1) if self.prefix else y


class DepthwiseMLP(nn.Module):
    """Linear - depthwise convolution - linear (Mix-FFN)."""

    def __init__(self, dim: int, kernel: int, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.depthwise = nn.Conv2d(2 * dim, 2 * dim, kernel, 1, kernel // 2, groups=2 * dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = self.fc1(x)
        b, _, c = x.shape
        grid = x[:, self.prefix :].transpose(1, 2).view(b, c, height, width)
        grid = self.depthwise(grid).flatten(2).transpose(1, 2)
        x = torch.cat((x[:, : self.prefix], grid), dim=1) if self.prefix else grid
        return self.fc2(F.gelu(x))


def make_mlp(kind: str, prefix: int, suffix: int, dim: int = DIM) -> nn.Module | None:
    if kind == "none":
        return None
    if kind == "gated":
        return GatedMLP(dim)
    if suffix == 0 and kind == "convolution":
        return ConvolutionMLP(dim, 1, prefix)
    if suffix == 0 and kind == "depthwise3":
        return DepthwiseMLP(dim, 3, prefix)
    if suffix == 0 and kind == "depthwise5":
        return ConvolutionMLP(dim, 5, prefix)
    return PlainMLP(dim, 0.1)


class SqueezeExcite(nn.Module):
    """Channels of (B, N, C) scaled by what the mean token says."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(dim, 4), nn.Linear(4, dim)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.expand(F.relu(self.reduce(x.mean(1, keepdim=True))))
        return x * torch.sigmoid(scale)


class DropPath(nn.Module):
    """Whole images of the update dropped, in train mode."""

    def __init__(self, rate: float, images_axis: int) -> None:
        super().__init__()
        self.rate, self.images_axis = rate, images_axis

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1 - self.rate
        shape = [1] * x.ndim
        shape[self.images_axis] = x.shape[self.images_axis]
        return x * x.new_empty(shape).bernoulli_(keep).div_(keep)
