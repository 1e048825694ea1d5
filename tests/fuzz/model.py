"""The whole model: patch embedding, stages of blocks, head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.block import Block
from tests.fuzz.parts import DIM, from_tokens, to_tokens
from tests.fuzz.spec import Spec
from tests.helpers import randomise


class UnfoldEmbed(nn.Module):
    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch, self.linear = patch, nn.Linear(3 * patch * patch, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        y = self.linear(F.unfold(x, self.patch, stride=self.patch).transpose(1, 2))
        return y.transpose(1, 2).reshape(b, DIM, h // self.patch, w // self.patch)


class CutEmbed(nn.Module):
    """Patches cut out by views, then a linear layer."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch, self.linear = patch, nn.Linear(3 * patch * patch, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        p = self.patch
        x = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)
        return self.linear(x.flatten(3)).permute(0, 3, 1, 2)


def make_embed(spec: Spec) -> nn.Module:
    if spec.embed == "cut":
        return CutEmbed(spec.patch)
    if spec.embed == "unfold":
        return UnfoldEmbed(spec.patch)
    conv = nn.Conv2d(8 if spec.embed == "stem" else 3, DIM, spec.patch, stride=spec.patch)
    if spec.embed == "conv":
        return conv
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), conv)


class Merging(nn.Module):
    """Patch merging of (B, H, W, C), odd sides padded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * DIM), nn.Linear(4 * DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduce(self.norm(torch.cat(parts, -1)))


class Model(nn.Module):
    """A random transformer. Takes (B, 3, grid * patch)."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = make_embed(spec)
        height, width = spec.grid
        tokens = height * width + spec.prefix + spec.suffix
        self.place = nn.Parameter(torch.randn(1, DIM, *spec.grid)) if spec.position else None
        self.head_tokens = nn.Parameter(torch.randn(1, spec.prefix, DIM)) if spec.prefix else None
        self.tail_tokens = nn.Parameter(torch.randn(1, spec.suffix, DIM)) if spec.suffix else None
        attention = spec.block.attention
        self.outside = None
        if attention.bias == "outside":
            self.outside = nn.Parameter(torch.randn(attention.heads, tokens, tokens))
        if attention.kind == "cross":
            self.see = nn.Conv2d(3, DIM, 4, 4)
        self.blocks = nn.ModuleList(Block(spec, spec.grid, i) for i in range(spec.depth))
        self.second = None
        if spec.stage != "none":
            self.down: nn.Module = Merging()
            if spec.stage == "convolution":
                self.down = nn.Conv2d(DIM, DIM, 3, 2, 1)
            smaller = (height + height % 2) // 2, (width + width % 2) // 2
            self.second = nn.ModuleList(Block(spec, smaller, i) for i in range(2))
            self.outside_second = None
            if self.outside is not None:
                count = smaller[0] * smaller[1]
                self.outside_second = nn.Parameter(torch.randn(attention.heads, count, count))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 5)

    def _call(self, block: nn.Module, x: Tensor, h: int, w: int, outside: Tensor | None) -> Tensor:
        spec = self.spec.block
        named: dict[str, Any] = {}
        if spec.sizes == "dict":
            named["info"] = {"size": (h, w)}
        if spec.sizes == "keyword":
            named.update(height=h, width=w)
        if outside is not None:
            named["outside"] = outside
        places = {"ints": (h, w), "pair": ((h, w),)}.get(spec.sizes, ())
        y = block(x, *places, **named)
        return y[0] if spec.returns == "tuple" else y

    def _stage(
        self, blocks: nn.ModuleList, x: Tensor, h: int, w: int, outside: Tensor | None, seen: Any
    ) -> Tensor:
        if self.spec.block.attention.kind == "cross":
            outside = seen
        for block in blocks:
            x = self._call(block, x, h, w, outside)
        return x

    def forward_features(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Tokens (B, N, C) and the grid."""
        spec = self.spec
        seen = None
        if spec.block.attention.kind == "cross":
            seen = self.see(x).flatten(2).transpose(1, 2)
        x = self.embed(x)
        if self.place is not None:
            x = x + self.place
        b, _, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        parts = [x]
        if self.head_tokens is not None:
            parts = [self.head_tokens.expand(b, -1, -1), *parts]
        if self.tail_tokens is not None:
            parts = [*parts, self.tail_tokens.expand(b, -1, -1)]
        x = torch.cat(parts, 1) if len(parts) > 1 else x
        x = from_tokens(x, spec.layout, h, w).contiguous()
        x = self._stage(self.blocks, x, h, w, self.outside, seen)
        if self.second is not None:
            x = to_tokens(x, spec.layout)
            if spec.stage == "convolution":
                x = self.down(from_tokens(x, "BCHW", h, w))
                h, w = x.shape[-2:]
                x = to_tokens(x, "BCHW")
            else:
                x = self.down(from_tokens(x, "BHWC", h, w))
                h, w = x.shape[1:3]
                x = to_tokens(x, "BHWC")
            x = from_tokens(x, spec.layout, h, w).contiguous()
            x = self._stage(self.second, x, h, w, self.outside_second, seen)
        return self.norm(to_tokens(x, spec.layout)), h, w

    def forward(self, x: Tensor) -> Any:
        spec = self.spec
        tokens, h, w = self.forward_features(x)
        if spec.head == "class":
            return self.head(tokens[:, 0])
        if spec.head == "mean":
            return self.head(tokens.mean(1))
        grid = tokens[:, spec.prefix : spec.prefix + h * w]
        grid = from_tokens(self.head(grid), "BCHW", h, w)
        return grid if spec.head == "map" else {"map": grid, "tokens": tokens}


def build(spec: Spec) -> Model:
    """In eval mode, with random parameters and running statistics."""
    torch.manual_seed(spec.seed)
    model = Model(spec)
    randomise(model)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()
