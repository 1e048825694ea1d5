"""The plain source of `tests.fuzz.user_draft`: a vision transformer with places for more code."""

from __future__ import annotations

TEMPLATE = """\
import random
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
{top}


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        {attn.init}

    def forward(self, x, *ARGS attn.args):
        B, N, C = x.shape
        {attn.start}
        {attn.project}
        {attn.qkv}
        {attn.core}
        {attn.merge}
        {attn.merged}
        x = self.proj(x)
        {attn.end}
        return x


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        {mlp.init}

    def forward(self, h, *ARGS mlp.args):
        {mlp.start}
        h = self.fc1(h)
        {mlp.conv}
        h = self.act(h)
        {mlp.hidden}
        h = self.fc2(h)
        {mlp.end}
        return h


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim)
        {block.init}

    def forward(self, x, *ARGS block.args):
        {block.start}
        h = self.norm1(x)
        {block.normed}
        {block.attend}
        {block.attended}
        x = x + h
        {block.middle}
        h = self.norm2(x)
        {block.normed2}
        {block.feed}
        {block.fed}
        x = x + h
        {block.end}
        {block.return}


class Model(nn.Module):
    def __init__(self, dim, heads, grid):
        super().__init__()
        {model.embed}
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)
        {model.init}

    def forward(self, images, *ARGS model.args):
        B, H, W = images.shape[0], images.shape[2] // 2, images.shape[3] // 2
        {model.patches}
        {model.start}
        for i, blk in enumerate(self.blocks):
            {model.loop}
            {model.call}
            {model.after}
        x = self.norm(x)
        {model.end}
        {model.return}


def ready(model):
    {ready}
    return model


def mode(model):
    {mode}
    return model


def later(model):
    {later}
    return model
"""

#: where code about one value may stand, with the value's name there
SPOTS = {
    "block.start": "x",
    "block.normed": "h",
    "block.attended": "h",
    "block.middle": "x",
    "block.normed2": "h",
    "block.fed": "h",
    "block.end": "x",
    "attn.start": "x",
    "attn.qkv": "v",
    "attn.merged": "x",
    "attn.end": "x",
    "mlp.start": "h",
    "mlp.hidden": "h",
    "mlp.end": "h",
}
QKV = """\
q, k, v = (
    self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
)"""
SDPA = "x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)"
WRITTEN = """\
scores = (q @ k.transpose(-2, -1)) * self.scale
{attn.scores}
scores = scores.softmax(-1)
{attn.weights}
x = scores @ v"""
