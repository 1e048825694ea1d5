"""Small models and independent checks that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

#: aot_eager traces, functionalises and takes the operators' fakes as Inductor does; what Inductor
#: then makes of it costs a minute of C++ compiler per model, so that CI has it on few models
COMPILERS = ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow))


def slow(*values: Any) -> Any:
    """A case of a parametrised test that CI leaves to `-m slow`: it has others of its kind."""
    return pytest.param(*values, marks=pytest.mark.slow)


def randomise(model: nn.Module) -> nn.Module:
    """Give constant-initialised parameters (layer scale, biases, tables) random values."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.max() - parameter.min() < 1e-6:
            noise = torch.rand(parameter.shape, generator=generator) - 0.5
            parameter.data.add_(noise)
    return model


def images(count: int, side: int | tuple[int, int], seed: int = 0, channels: int = 3) -> Tensor:
    height, width = (side, side) if isinstance(side, int) else side
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, height, width, generator=generator)


def error(found: Any, wanted: Any) -> float:
    """Relative error (2-norm) of one tensor."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def macs(model: nn.Module, *args: Any) -> int:
    """torch's own count, independent of the library's."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args)
    return counter.get_total_flops() // 2


class Attention(nn.Module):
    """Fused qkv, SDPA, tokens (B, N, C)."""

    def __init__(self, dim: int, heads: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    """A pre-norm block in any of three layouts."""

    def __init__(
        self, dim: int, order: str, make: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.order = order
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, 2) if make is None else make(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "BCHW":
            b, c, h, w = x.shape
            y = x.flatten(2).transpose(1, 2)
            x = x + self.attn(self.norm1(y)).transpose(1, 2).reshape(b, c, h, w)
            y = self.mlp(self.norm2(x.permute(0, 2, 3, 1)))
            return x + y.permute(0, 3, 1, 2)
        if self.order == "BHWC":
            b, h, w, c = x.shape
            x = x + self.attn(self.norm1(x).reshape(b, h * w, c)).reshape(b, h, w, c)
            return x + self.mlp(self.norm2(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """Patch embedding, prefix tokens, blocks in one layout, mean head. Takes any image size."""

    def __init__(
        self,
        dim: int = 16,
        depth: int = 2,
        prefix: int = 0,
        order: str = "BNC",
        patch: int = 4,
        make: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, dim, patch, stride=patch)
        self.prefix = nn.Parameter(torch.randn(1, prefix, dim)) if prefix else None
        self.order = order
        self.blocks = nn.ModuleList(Block(dim, order, make) for _ in range(depth))
        self.head = nn.Linear(dim, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.order == "BHWC":
            x = x.permute(0, 2, 3, 1)
        elif self.order == "BNC":
            x = x.flatten(2).transpose(1, 2)
            if self.prefix is not None:
                x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        if self.order == "BCHW":
            return self.head(x.mean((2, 3)))
        return self.head(x.flatten(1, -2).mean(1))
