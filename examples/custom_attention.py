"""A vision transformer whose attention is a kernel of one's own, converted by dgefx.

The kernel here is an operator of `torch.library` in a few lines of PyTorch; where it stands, call
Triton or CUDA. What dgefx needs to know of it is its form: which call it is, and where its queries
are. Runs on the CPU in seconds:

    python examples/custom_attention.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

import dgefx


@torch.library.custom_op("dgefx_example::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(B, heads, Q, C), twice (B, heads, N, C) -> (B, heads, Q, C). Q need not be N."""
    weights = torch.exp2(q @ k.transpose(-2, -1) * (scale * 1.4426950408889634))
    return (weights / weights.sum(-1, keepdim=True)) @ v


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, y = ctx.saved_tensors
    weights = torch.softmax(q @ k.transpose(-2, -1) * ctx.scale, -1)
    inner = weights * (gradient @ v.transpose(-2, -1) - (gradient * y).sum(-1, keepdim=True))
    by_key = weights.transpose(-2, -1) @ gradient
    return inner @ k * ctx.scale, inner.transpose(-2, -1) @ q * ctx.scale, by_key, None


attend.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.dgefx_example.attend)
def _flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Of an operator without a formula, dgefx counts nothing in either model."""
    images, heads, queries, width = q
    return 2 * images * heads * queries * k[2] * (width + v[3])


class Block(nn.Module):
    """A transformer block of (B, N, C) tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, width = x.shape
        parts = self.qkv(self.norm1(x)).reshape(images, tokens, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        y = attend(q, k, v, q.shape[-1] ** -0.5)
        x = x + self.proj(y.transpose(1, 2).reshape(images, tokens, width))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """16 x 16 tokens of an image of 64 x 64 pixels."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, 256, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.blocks(tokens).mean(1))


def main() -> None:
    """Convert, compare, and take a training step."""
    torch.manual_seed(0)
    model, images = ViT().eval(), torch.randn(2, 3, 64, 64)
    dgefx.register_attention(
        dgefx.AttentionForm("my attention", functions=[attend], operands=("q", "k", "v"))
    )
    converted = dgefx.convert(model, gamma=1.0, example_inputs=images)
    with torch.no_grad():
        difference = (converted(images) - model(images)).abs().max().item()
    print(f"finest granularity: largest difference to the dense model {difference:.1e}")
    dgefx.set_budget(converted, 0.5)
    print(dgefx.report(converted))
    converted.train()(images).square().mean().backward()


if __name__ == "__main__":
    main()
