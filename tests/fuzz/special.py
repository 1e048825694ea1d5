"""Attention that is not plain: nn.MultiheadAttention, axial, and kinds that must not convert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.spec import AttentionSpec


class Special(nn.Module):
    """Takes (B, N, C), the grid's size and, where queries or keys are another's, other tokens."""

    def __init__(
        self, spec: AttentionSpec, dim: int, grid: tuple[int, int], prefix: int, tokens: int
    ) -> None:
        super().__init__()
        self.spec, self.heads = spec, spec.heads
        self.prefix, self.tokens = prefix, tokens
        if spec.kind.startswith("mha"):
            first = spec.kind == "mha"
            self.attention = nn.MultiheadAttention(
                dim, spec.heads, dropout=spec.dropout, batch_first=first
            )
            return
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if spec.kind == "foreign":
            self.asking = nn.Parameter(torch.randn(1, tokens, dim))

    def forward(
        self,
        x: Tensor,
        height: int,
        width: int,
        outside: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return getattr(self, f"_{self.spec.kind}")(x, height, width, outside)

    def _mha(self, x: Tensor, height: int, width: int, other: Tensor | None) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]

    def _mha_sequence(self, x: Tensor, height: int, width: int, other: Tensor | None) -> Tensor:
        x = x.transpose(0, 1)
        y, _ = self.attention(x, x, x)
        return y.transpose(0, 1)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _merged(self, y: Tensor) -> Tensor:
        return self.proj(y.transpose(1, 2).flatten(2))

    def _axial(self, x: Tensor, height: int, width: int, other: Tensor | None) -> Tensor:
        """Along rows, then along columns; tokens beside the grid are left alone."""
        head, grid = x[:, : x.shape[1] - height * width], x[:, x.shape[1] - height * width :]
        b, _, c = grid.shape
        rows = grid.reshape(b * height, width, c)
        rows = self._merged(F.scaled_dot_product_attention(*self._parts(rows)))
        columns = rows.view(b, height, width, c).transpose(1, 2).reshape(b * width, height, c)
        columns = self._merged(F.scaled_dot_product_attention(*self._parts(columns)))
        grid = columns.view(b, width, height, c).transpose(1, 2).reshape(b, -1, c)
        return torch.cat([head, grid], 1)

    def _channel(self, x: Tensor, height: int, width: int, other: Tensor | None) -> Tensor:
        q, k, v = (part.transpose(-2, -1) for part in self._parts(x))
        y = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1) @ v
        return self._merged(y.transpose(-2, -1))

    def _class(self, x: Tensor, height: int, width: int, other: Tensor | None) -> Tensor:
        """Only the first token asks."""
        q, k, v = self._parts(x)
        y = self._merged(F.scaled_dot_product_attention(q[:, :, :1], k, v))
        return torch.cat([y, torch.zeros_like(x[:, 1:])], 1)

    def _cross(self, x: Tensor, height: int, width: int, other: Tensor | None) -> Tensor:
        """Keys and values of another stream."""
        assert other is not None
        _, k, v = self._parts(other)
        return self._merged(F.scaled_dot_product_attention(self._parts(x)[0], k, v))

    def _foreign(self, x: Tensor, height: int, width: int, other: Tensor | None) -> Tensor:
        """Learned queries."""
        q = self._parts(self.asking.expand(x.shape[0], -1, -1))[0]
        _, k, v = self._parts(x)
        return self._merged(F.scaled_dot_product_attention(q, k, v))

    def _pooled(self, x: Tensor, height: int, width: int, other: Tensor | None) -> Tensor:
        """One query of every pair of tokens, its result for both."""
        q, k, v = self._parts(x)
        b, h, n, d = q.shape
        few = F.adaptive_avg_pool1d(q.transpose(2, 3).flatten(1, 2), n // 2)
        few = few.view(b, h, d, n // 2).transpose(2, 3)
        y = self._merged(F.scaled_dot_product_attention(few, k, v))
        return F.interpolate(y.transpose(1, 2), size=n).transpose(1, 2)

    def _linear(self, x: Tensor, height: int, width: int, other: Tensor | None) -> Tensor:
        q, k, v = self._parts(x)
        if self.heads == 2:
            q, k = q.softmax(-1), k.softmax(-2)
            return self._merged(q @ (k.transpose(-2, -1) @ v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        total = q @ k.sum(2, keepdim=True).transpose(-2, -1)
        return self._merged((q @ (k.transpose(-2, -1) @ v)) / total)
