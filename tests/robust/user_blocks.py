"""Transformer blocks with code in them as users write it, for `test_user_code.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import randomise

DIM = 16


class UserAttention(nn.Module):
    """Written-out attention; `change` is the user's code on its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.scale, self.drop = 2, (DIM // 2) ** -0.5, 0.0
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.drops = nn.Dropout(0.0)  # of which only `p` is read, as in timm

    #: of the class
    gain = 1.0

    def change(self, q: Tensor) -> Tensor:
        return q

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (self.change(q) * self.scale @ k.transpose(-2, -1)).softmax(-1)
        weights = F.dropout(weights, self.drop, self.training)
        weights = F.dropout(weights, self.drops.p, self.training) * self.gain
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class UserMLP(nn.Module):
    """`change` is the user's code between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def change(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.change(self.fc1(x))))


class UserNorm(nn.LayerNorm):
    """As in timm: a class of its own, which is no leaf to tracers."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__(DIM, eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class UserBlock(nn.Module):
    """`change` is the user's code in the block's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = UserNorm(), UserNorm()
        self.attn, self.mlp = UserAttention(), UserMLP()

    def change(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.change(self.attn(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class UserModel(nn.Module):
    """Two blocks, 8 x 8 tokens of 64 px images."""

    def __init__(self, make: Callable[[], nn.Module] = UserBlock) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, DIM, 8, 8)
        self.blocks = nn.ModuleList(make() for _ in range(2))
        self.head = nn.Linear(DIM, 5)
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def with_change(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """Blocks whose `part` ("attn", "mlp" or "" for the block) changes its values by `change`."""

    class Changed(UserBlock):
        def __init__(self) -> None:
            super().__init__()
            owner: Any = self.get_submodule(part)
            kind = type(owner)
            made = type(kind.__name__, (kind,), {"change": lambda _self, h: change(h)})
            if part:
                setattr(self, part, made())

    if not part:
        return type("Block", (UserBlock,), {"change": lambda _self, h: change(h)})
    return Changed
