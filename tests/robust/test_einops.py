"""Models written with einops convert, exactly, and at other image sizes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import einsum, pack, parse_shape, rearrange, reduce, repeat, unpack
from einops.layers.torch import EinMix, Rearrange, Reduce
from torch import Tensor, nn

import dgefx
from dgefx.nn.callspec import CallSpec
from dgefx.passes.trace.block_trace import trace
from dgefx.passes.trace.proxies import ConcolicProxy
from tests.helpers import error, images, randomise
from tests.test_trace import interpret


class Attention(nn.Module):
    """As vit-pytorch writes it."""

    def __init__(self, dim: int, heads: int = 2, contract: bool = False) -> None:
        super().__init__()
        self.heads, self.contract = heads, contract
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in parts)
        if self.contract:
            scores = einsum(q, k, "b h i d, b h j d -> b h i j") * q.shape[-1] ** -0.5
            y = einsum(scores.softmax(-1), v, "b h i j, b h j d -> b h i d")
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(y, "b h n d -> b n (h d)"))


class LayeredAttention(nn.Module):
    """The same by layers."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.part = Rearrange("b n (p h d) -> p b h n d", p=3, h=heads)
        self.join = Rearrange("b h n d -> b n (h d)")
        self.out = EinMix("b n c -> b n d", weight_shape="c d", bias_shape="d", c=dim, d=dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.part(self.qkv(x))
        return self.out(self.join(F.scaled_dot_product_attention(q, k, v)))


class Block(nn.Module):
    """(B, N, C); with `window`, (B, H, W, C) and attention within windows."""

    def __init__(self, dim: int, attention: nn.Module, window: int = 0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.window = attention, window
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if self.window:
            side = self.window
            _, h, w, _ = x.shape
            y = rearrange(y, "b (h p) (w q) c -> (b h w) (p q) c", p=side, q=side)
            sizes = {"h": h // side, "w": w // side, "p": side, "q": side}
            y = rearrange(self.attn(y), "(b h w) (p q) c -> b (h p) (w q) c", **sizes)
        else:
            y = self.attn(y)
        x = x + y
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """A patch embedding, class tokens packed in front and unpacked at the end, blocks, mean."""

    def __init__(self, make: Callable[[], nn.Module], classes: int = 0, window: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.window = window
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.tokens = nn.Parameter(torch.randn(classes, 16)) if classes else None
        self.blocks = nn.Sequential(*(Block(16, make(), window) for _ in range(2)))
        self.pool = Reduce("b ... c -> b c", "mean")
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.window:
            x = rearrange(x, "b c h w -> b h w c")
        else:
            x = rearrange(x, "b c h w -> b (h w) c")
        if self.tokens is None:
            return self.head(reduce(self.blocks(x), "b ... c -> b c", "mean"))
        classes = repeat(self.tokens, "n c -> b n c", b=x.shape[0])
        x, shapes = pack([classes, x], "b * c")
        classes, x = unpack(self.blocks(x), shapes, "b * c")
        return self.head(self.pool(classes) + self.pool(x))


MODELS = {
    "plain": lambda: Model(lambda: Attention(16)),
    "windows": lambda: Model(lambda: Attention(16), window=4),
    "einsum and packed tokens": lambda: Model(lambda: Attention(16, contract=True), classes=2),
    "layers": lambda: Model(lambda: LayeredAttention(16)),
}


@pytest.mark.parametrize("name", MODELS)
def test_converts_exactly_and_at_other_sizes(name: str) -> None:
    dense = randomise(MODELS[name]()).eval()
    model = dgefx.convert(dense, 1.0, example_inputs=images(2, 64))
    assert len(dgefx.report(model).converted) == 2
    for size in ((64, 64), (96, 64), (32, 128)):
        x = images(3, size)
        assert error(model(x).detach(), dense(x).detach()) <= 1e-5
    dgefx.set_budget(model, 0.7)
    assert torch.isfinite(model(images(2, 64))).all()
    assert torch.isfinite(model(images(2, (96, 64)))).all()
    gc.collect()
    assert not any(isinstance(found, ConcolicProxy) for found in gc.get_objects())


def _shifted(x: Tensor) -> Tensor:
    x = rearrange(x, "b (h w) c -> b h w c", h=4)
    return rearrange(x, "b h w c -> b (w h) c")


def _repeated(x: Tensor) -> Tensor:
    x = repeat(x, "b n c -> b (n two) c", two=2)
    return reduce(x, "b (n two) c -> b n c", "sum", two=2)


def _averaged(x: Tensor) -> Tensor:
    return x - reduce(x, "b n c -> b 1 c", "mean") + reduce(x, "b n c -> () n ()", "max")


def _packed(x: Tensor) -> Tensor:
    front = reduce(x, "b n c -> b c", "min")
    packed, shapes = pack([front, x], "b * c")
    one, rest = unpack(packed * 2, shapes, "b * c")
    some, _ = unpack(packed, [[3], [-1]], "b * c")
    return rest + rearrange(one, "b c -> b 1 c") + some.sum(1, keepdim=True)


def _stacked(x: Tensor) -> Tensor:
    both = rearrange([x, x * 2], "two b n c -> b n c two")
    return einsum(both, x, "b n c two, b n c -> b n c")


def _parsed(x: Tensor) -> Tensor:
    sizes = parse_shape(x, "b n _")
    return rearrange(x, "b n c -> (b n) c").reshape(sizes["b"], sizes["n"], 6) * sizes["n"]


class UnfusedAttention(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("function", [_shifted, _repeated, _averaged, _packed, _stacked, _parsed])
def test_sizes_stay_symbolic(function: Callable[[Any], Any]) -> None:
    block = UnfusedAttention(function)
    traced = trace(block, CallSpec.of(block, (torch.randn(2, 8, 6),), {}), False)
    for batch, tokens in ((2, 8), (3, 12), (1, 20)):
        x = torch.randn(batch, tokens, 6)
        assert torch.allclose(interpret(traced, x), function(x), atol=1e-6)
