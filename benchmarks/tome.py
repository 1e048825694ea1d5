"""Token merging (Bolya et al., ICLR 2023, arXiv 2210.09461) from the paper, to compare with.

Section 3: in every block, between attention and MLP, the tokens are dealt alternately to two sets;
each token of the first is joined by an edge to the token of the second with the most similar key
(cosine, keys averaged over the heads); the r strongest edges are merged, averaging tokens weighted
by how many patches they stand for. Attention is proportional: log(size) is added to the scores.
Prefix tokens are never merged away. For timm's plain vision transformers, in eval mode.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def merge(x: Tensor, size: Tensor, key: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching.

    Args:
        x: (B, N, C) tokens. size: (B, N, 1) patches in each. key: (B, N, D) what is compared.
        r: tokens to merge away. protected: tokens in front that are never merged away.

    Returns:
        (B, N - r, C) and (B, N - r, 1).
    """
    r = min(r, (x.shape[1] - protected) // 2)
    if r <= 0:
        return x, size
    key = F.normalize(key, dim=-1)
    scores = key[:, ::2] @ key[:, 1::2].transpose(1, 2)
    scores[:, : (protected + 1) // 2] = -torch.inf
    scores[:, :, : protected // 2] = -torch.inf
    best, partner = scores.max(-1)
    order = best.argsort(-1, descending=True)
    merged = order[:, :r]
    kept = order[:, r:].sort(-1).values  # keeps the prefix in front
    target = partner.gather(1, merged).unsqueeze(-1)

    def combine(values: Tensor) -> Tensor:
        first, second = values[:, ::2], values[:, 1::2]
        channels = values.shape[-1]
        sources = first.gather(1, merged.unsqueeze(-1).expand(-1, -1, channels))
        joined = second.scatter_add(1, target.expand(-1, -1, channels), sources)
        return torch.cat([first.gather(1, kept.unsqueeze(-1).expand(-1, -1, channels)), joined], 1)

    total = combine(size)
    return combine(x * size) / total, total


class ToMe(nn.Module):
    """A timm vision transformer with r tokens merged away per block.

    Args:
        model: a plain timm `VisionTransformer` with a class token. merged: per block.
    """

    def __init__(self, model: nn.Module, merged: list[int]) -> None:
        super().__init__()
        self.model = model.eval()
        self.merged = merged

    def forward(self, x: Tensor) -> Tensor:
        model: Any = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        size = torch.ones_like(x[..., :1])
        for block, r in zip(model.blocks, self.merged, strict=True):
            update, key = self._attention(block.attn, block.norm1(x), size)
            x = x + block.ls1(update)
            x, size = merge(x, size, key, r, model.num_prefix_tokens)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return model.forward_head(model.norm(x))

    @staticmethod
    def _attention(attn: Any, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, channels = x.shape
        qkv = attn.qkv(x).view(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        bias = size.log().transpose(1, 2).unsqueeze(1)  # (B, 1, 1, N)
        out = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v, attn_mask=bias)
        out = attn.proj(attn.norm(out.transpose(1, 2).reshape(batch, tokens, channels)))
        return out, k.mean(1)


def even_schedule(total: int, depth: int) -> list[int]:
    """`total` merges spread over the blocks, the earlier ones first."""
    return [total // depth + (block < total % depth) for block in range(depth)]
