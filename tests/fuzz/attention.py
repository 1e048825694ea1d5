"""Plain softmax attention, in the many ways that people write it.

`Attention.forward` is `run` with queries, keys and values of one and the same tokens;
`tests.fuzz.reference` calls `run` with pooled queries.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.spec import AttentionSpec


def rotate(x: Tensor, pairs: bool) -> Tensor:
    if pairs:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def pooled(table: Tensor, pool: Tensor | None) -> Tensor:
    """Rows of a (..., N, D) table averaged over patches; `pool` (Q, N), None for every token."""
    return table if pool is None else pool @ table


class Attention(nn.Module):
    """Takes (B, N, C) and the grid's size.

    Args:
        grid: of tokens, of one window where there are windows. prefix: tokens in front of it.
        tokens: prefix, grid and whatever else there is.
    """

    def __init__(
        self, spec: AttentionSpec, dim: int, grid: tuple[int, int], prefix: int, tokens: int
    ) -> None:
        super().__init__()
        self.spec, self.grid, self.prefix, self.tokens = spec, grid, prefix, tokens
        self.heads, self.head_dim = spec.heads, dim // spec.heads
        groups = {"multi_query": 1, "grouped_query": max(1, spec.heads // 2)}
        self.key_heads = groups.get(spec.projection, spec.heads)
        self._make_projections(dim)
        self.proj = nn.Conv2d(dim, dim, 1) if spec.projection == "convolution" else None
        self.out = nn.Linear(dim, dim) if self.proj is None else None
        self.drop = nn.Dropout(spec.dropout)
        self.scale = self.head_dim**-0.5
        if spec.scale in ("temperature", "cosine"):
            self.temperature = nn.Parameter(torch.rand(self.heads, 1, 1) * 2 + 0.5)
        norms = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
        if spec.qk_norm != "none":
            self.q_norm = norms[spec.qk_norm](self.head_dim)
            self.k_norm = norms[spec.qk_norm](self.head_dim)
        if spec.talking != "none":
            convolution = spec.talking == "conv"
            make = (lambda h: nn.Conv2d(h, h, 1)) if convolution else (lambda h: nn.Linear(h, h))
            self.mix = make(self.heads)
        if spec.gate:
            self.gate = nn.Linear(dim, dim)
        if spec.lepe:
            self.local = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)
        if spec.extra_key:
            self.sink = nn.Parameter(torch.randn(2, 1, 1, dim))
        self._make_tables(dim)
        if spec.reduction == "conv":
            self.reduce = nn.Conv2d(dim, dim, 2, 2)
            self.reduce_norm = nn.LayerNorm(dim)

    def _make_projections(self, dim: int) -> None:
        kind, small = self.spec.projection, self.key_heads * self.head_dim
        if kind == "convolution":
            self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        elif kind.startswith("fused"):
            self.qkv = nn.Linear(dim, 3 * dim)
        elif kind == "key_value":
            self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim, bias=False)
        else:
            self.q, self.k = nn.Linear(dim, dim), nn.Linear(dim, small, bias=False)
            self.v = nn.Linear(dim, small)

    def _make_tables(self, dim: int) -> None:
        spec, n = self.spec, self.tokens
        height, width = self.grid
        if spec.bias == "param":
            self.bias = nn.Parameter(torch.randn(self.heads, n, n))
        if spec.bias in ("gathered", "coordinates"):
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            places = torch.stack([rows.flatten(), columns.flatten()], -1)
            apart = places[:, None] - places[None]
            index = (apart[..., 0] + height - 1) * (2 * width - 1) + apart[..., 1] + width - 1
            count = (2 * height - 1) * (2 * width - 1)
            full = torch.full((n, n), count)  # pairs with a prefix token share one entry
            stop = self.prefix + height * width
            full[self.prefix : stop, self.prefix : stop] = index
            self.register_buffer("index", full, persistent=False)
            if spec.bias == "gathered":
                self.table = nn.Parameter(torch.randn(count + 1, self.heads))
            else:
                self.position_mlp = nn.Sequential(
                    nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, self.heads)
                )
                line = torch.linspace(-2, 2, count + 1).unsqueeze(-1)
                self.register_buffer("coordinates", line, persistent=False)
        if spec.position == "absolute":
            self.place = nn.Parameter(torch.randn(1, n, dim))
        if spec.position.startswith("rope"):
            angles = torch.randn(n, self.head_dim // 2)
            pairs = spec.position == "rope_pairs"
            angles = angles.repeat_interleave(2, -1) if pairs else torch.cat([angles, angles], -1)
            angles[: self.prefix] = 0
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)

    def position_bias(self, outside: Tensor | None) -> Tensor | None:
        """(heads, N, N)."""
        if self.spec.bias == "param":
            return self.bias
        if self.spec.bias == "gathered":
            rows = self.table[self.index.view(-1)].view(self.tokens, self.tokens, -1)
            return rows.permute(2, 0, 1).contiguous()
        if self.spec.bias == "coordinates":
            return (16 * torch.sigmoid(self.position_mlp(self.coordinates)))[self.index].permute(
                2, 0, 1
            )
        return outside if self.spec.bias == "outside" else None

    def _heads_of(self, x: Tensor, heads: int) -> Tensor:
        b, n, _ = x.shape
        return x.view(b, n, heads, self.head_dim).transpose(1, 2)

    def _plane(self, count: int, height: int, width: int) -> tuple[int, int]:
        """What `count` tokens are laid out in for a 1 x 1 convolution."""
        return (height, width) if count == height * width else (count, 1)

    def _fused(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        b, n, c = x.shape
        kind, heads = self.spec.projection, self.heads
        if kind == "convolution":
            y = self.qkv(x.transpose(1, 2).reshape(b, c, *self._plane(n, height, width)))
            q, k, v = y.reshape(b, 3, heads, -1, n).transpose(-2, -1).unbind(1)
        elif kind == "fused_chunk":
            q, k, v = (self._heads_of(part, heads) for part in self.qkv(x).chunk(3, dim=-1))
        elif kind == "fused_split":
            q, k, v = (self._heads_of(part, heads) for part in torch.split(self.qkv(x), c, -1))
        elif kind == "fused_heads":
            y = self.qkv(x).view(b, n, heads, -1).transpose(1, 2)
            q, k, v = y.split([self.head_dim] * 3, dim=3)
        else:
            q, k, v = self.qkv(x).reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _context(self, x: Tensor, height: int, width: int) -> Tensor:
        """What keys and values are made of: the tokens, or fewer."""
        kind = self.spec.reduction
        if kind == "none":
            return x
        b, _, c = x.shape
        grid = x[:, self.prefix :].transpose(1, 2).reshape(b, c, height, width)
        if kind == "conv":
            grid = self.reduce(grid)
        elif kind == "average":
            grid = F.avg_pool2d(grid, 3, 2, 1)
        else:
            grid = F.adaptive_avg_pool2d(grid, 2)
        y = grid.reshape(b, c, -1).permute(0, 2, 1)
        y = self.reduce_norm(y) if kind == "conv" else y
        return torch.cat([x[:, : self.prefix], y], 1) if self.prefix else y

    def _project(
        self, asking: Tensor, x: Tensor, height: int, width: int, pool: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec
        values, context = x, self._context(x, height, width)
        if spec.position == "absolute":
            values = x
            same = asking is x
            context = x + self.place
            asking = context if same else asking + pooled(self.place, pool)
        elif spec.reduction != "none":
            values = context
        fused = spec.projection.startswith("fused") or spec.projection == "convolution"
        if fused and asking is context and values is context:
            return self._fused(asking, height, width)
        if fused:  # reads three parts of one projection, each of other tokens
            q = self._fused(asking, height, width)[0]
            return q, self._fused(context, height, width)[1], self._fused(values, height, width)[2]
        q = self._heads_of(self.q(asking), self.heads)
        if spec.projection == "key_value":
            b, n, _ = context.shape
            k, v = self.kv(context).view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
            if spec.position == "absolute":
                v = self.kv(values).view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4)[1]
            return q, k, v
        k = self._heads_of(self.k(context), self.key_heads)
        return q, k, self._heads_of(self.v(values), self.key_heads)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        core = self.spec.core
        if core == "matmul":
            return torch.matmul(q, k.transpose(-2, -1))
        if core in ("bmm", "bmm_sizes"):
            b, h, n, d = q.shape
            y = torch.bmm(q.reshape(b * h, n, d), k.reshape(b * h, -1, d).transpose(1, 2))
            return y.view(b, h, n, -1)
        if core == "einsum_ij":
            return torch.einsum("bhid,bhjd->bhij", q, k)
        if core == "einsum_nm":
            return torch.einsum("b h n d, b h m d -> b h n m", q, k)
        if core == "einsum_dots":
            return torch.einsum("...nd,...md->...nm", q, k)
        if core == "einsum_bnhd":
            return torch.einsum("bnhd,bmhd->bhnm", q.transpose(1, 2), k.transpose(1, 2))
        return q @ k.transpose(-2, -1)

    def _weigh(self, weights: Tensor, v: Tensor) -> Tensor:
        core = self.spec.core
        if core == "matmul":
            return torch.matmul(weights, v)
        if core == "bmm":
            b, h, n, m = weights.shape
            y = torch.bmm(weights.reshape(b * h, n, m), v.reshape(b * h, -1, v.shape[-1]))
            return y.view(b, h, n, -1)
        if core == "bmm_sizes":  # lays the values out by the number of keys of the weights
            b, h, n, m = weights.shape
            y = torch.bmm(weights.reshape(b * h, n, m), v.reshape(b * h, m, -1))
            return y.view(b, h, n, -1)
        if core == "einsum_ij":
            return torch.einsum("bhij,bhjd->bhid", weights, v)
        if core == "einsum_nm":
            return torch.einsum("b h n m, b h m d -> b h n d", weights, v)
        if core == "einsum_dots":
            return torch.einsum("...nm,...md->...nd", weights, v)
        if core == "einsum_bnhd":
            return torch.einsum("bhnm,bmhd->bnhd", weights, v.transpose(1, 2)).transpose(1, 2)
        if core == "values_left":
            return (v.transpose(-2, -1) @ weights.transpose(-2, -1)).transpose(-2, -1)
        return weights @ v

    def _talk(self, scores: Tensor) -> Tensor:
        if self.spec.talking == "conv":
            return self.mix(scores)
        return self.mix(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        spec = self.spec
        if spec.scale == "cosine":
            q, k = F.normalize(q, dim=-1) * self.temperature, F.normalize(k, dim=-1)
        elif spec.scale == "q" or spec.core in ("transposed_softmax",):
            q = q * self.scale
        elif spec.scale == "k":
            k = k * self.scale
        elif spec.scale == "temperature":
            q = q * self.temperature
        if spec.core == "sdpa":
            free = {} if spec.scale == "scores" else {"scale": 1.0}
            rate = spec.dropout if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate, **free)
        if spec.core == "transposed_softmax":
            turned = k @ q.transpose(-2, -1)
            if bias is not None:
                turned = turned + bias.transpose(-2, -1)
            if spec.talking != "none":
                turned = self._talk(turned)
            weights = self.drop(turned.softmax(dim=-2))
            return (v.transpose(-2, -1) @ weights).transpose(-2, -1)
        scores = self._scores(q, k)
        if spec.scale == "scores":
            scores = scores / math.sqrt(self.head_dim)
        if bias is not None:
            scores = scores + bias
        if spec.talking == "before":
            scores = self._talk(scores)
        if spec.float32:
            weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        else:
            weights = scores.softmax(-1)
        weights = self.drop(weights)
        if spec.talking in ("linear", "conv"):
            weights = self._talk(weights)
        return self._weigh(weights, v)

    def run(
        self,
        asking: Tensor,
        x: Tensor,
        height: int,
        width: int,
        outside: Tensor | None = None,
        mask: Tensor | None = None,
        pool: Tensor | None = None,
    ) -> Tensor:
        """Args: asking: (B, Q, C), what queries are of. x: (B, N, C), what keys and values are of.
        outside: bias of the caller. mask: (B, 1, N, N). pool: (Q, N), how queries were pooled."""
        spec = self.spec
        q, k, v = self._project(asking, x, height, width, pool)
        if spec.qk_norm != "none":
            q, k = self.q_norm(q), self.k_norm(k)
        if spec.position.startswith("rope"):
            pairs = spec.position == "rope_pairs"
            q = q * pooled(self.cos, pool) + rotate(q, pairs) * pooled(self.sin, pool)
            k = k * self.cos + rotate(k, pairs) * self.sin
        if self.key_heads != self.heads:
            times = self.heads // self.key_heads
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        bias = self.position_bias(outside)
        if bias is not None:
            bias = pooled(bias, pool).unsqueeze(0)
        if mask is not None:
            bias = mask if bias is None else bias + mask
        if spec.extra_key:
            b, h, _, d = k.shape
            more = self.sink.view(2, 1, self.heads, 1, d).expand(-1, b, -1, -1, -1)
            k, v = torch.cat([more[0], k], 2), torch.cat([more[1], v], 2)
            bias = None if bias is None else F.pad(bias, (1, 0))
        y = self._attend(q, k, v, bias)
        b, h, n, d = y.shape
        y = y.transpose(1, 2).reshape(b, n, h * d)
        if spec.lepe:
            y = y + self._local(v, height, width)
        if spec.gate:
            y = y * torch.sigmoid(self.gate(asking))
        if self.proj is not None:
            plane = y.transpose(1, 2).reshape(b, h * d, *self._plane(n, height, width))
            y = self.proj(plane).flatten(2).transpose(1, 2)
        else:
            y = self.out(y)
        return self.drop(y)

    def _local(self, v: Tensor, height: int, width: int) -> Tensor:
        """A depthwise convolution of the values, added to the attention's output."""
        b, h, n, d = v.shape
        grid = v.transpose(2, 3).reshape(b, h * d, n)
        if self.spec.extra_key:
            grid = grid[:, :, 1:]
        if grid.shape[2] != height * width:  # keys are fewer than tokens
            return grid.mean(2).unsqueeze(1)
        return self.local(grid.reshape(b, h * d, height, width)).flatten(2).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        height: int,
        width: int,
        outside: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return self.run(x, x, height, width, outside, mask)
