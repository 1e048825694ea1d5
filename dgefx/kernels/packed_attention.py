"""Attention of packed queries: what the generated code of the average budget calls.

Lays the block's own query, key, value and mask out for `dgefx.kernels.attend`, the ragged
attention itself. Used by `passes.emit.packed`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dgefx.kernels.attend import attend
from dgefx.kernels.pool import patch_means, patch_sums
from dgefx.kernels.ragged import from_padded, to_padded
from dgefx.kernels.routing import Routing


def query_bias(mask: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """An attention mask as bias rows.

    Args:
        mask: broadcastable to (B, heads, prefix + N, keys): additive, or bool (True: attend).

    Returns:
        (rows, 1 or heads, keys) and the row of every query, (T,): one row per patch if the mask
        has an entry per token, per image if it has one per image.
    """
    ragged = routing.ragged
    assert ragged is not None
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    boolean = mask.dtype == torch.bool
    images, heads, tokens, keys = mask.shape
    if tokens == 1:
        table = mask.squeeze(2)
        row = ragged.image % images
    else:
        value = mask.float() if boolean else mask
        entries = value.movedim(2, 1).flatten(2)  # (images, tokens, heads * keys)
        body = entries[:, routing.prefix :]
        sums = patch_sums(body, routing.grid, routing.granularities, routing.places)
        parts = [entries]
        for total, count in zip(sums[1:], routing.patch_tokens[1:], strict=True):
            parts.append(patch_means(total, count, entries.dtype))
        pooled = torch.cat(parts, 1).view(-1, heads, keys)
        table = pooled > 1 - 1e-5 if boolean else pooled  # keys that all its tokens see
        row = ragged.flat(tables=images)
    if boolean:
        table = torch.zeros(table.shape, device=table.device).masked_fill(~table, -torch.inf)
    return table, row


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routing: Routing,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of packed queries.

    Args:
        query: (1, [heads,] T, C), the packed queries of a batch.
        key, value: (B, [heads,] keys, C), of every image.
        attn_mask: broadcastable to ([B, heads,] prefix + N, keys).
        dropout_p, scale, enable_gqa: as there.

    Returns:
        (1, [heads,] T, C).
    """
    ragged = routing.ragged
    assert ragged is not None
    if query.dim() == 3:
        mask = attn_mask if attn_mask is None or attn_mask.dim() < 3 else attn_mask.unsqueeze(1)
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        return packed_attention(query, key, value, routing, mask, dropout_p, scale).squeeze(1)
    images = ragged.row.shape[0]
    key, value = (t.expand(images, -1, -1, -1) for t in (key, value))
    if enable_gqa and key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    bias = row = None
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], key.shape[2])
        bias, row = query_bias(attn_mask, routing)
        bias = bias.to(query.dtype)
    packed = query.squeeze(0).transpose(0, 1)  # (T, heads, C)
    if dropout_p > 0.0:
        found = _with_dropout(packed, key, value, routing, bias, row, dropout_p, scale)
    else:
        found = attend(packed, key, value, ragged.offsets, bias, row, scale)
    return found.transpose(0, 1).unsqueeze(0)


def _with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routing: Routing,
    bias: Tensor | None,
    row: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> Tensor:
    """Padded to as many queries as an image can have: dropout of attention weights is for training
    only."""
    ragged = routing.ragged
    assert ragged is not None
    # all patches of all levels are queries where all granularities are computed
    longest = ragged.row.shape[1] if routing.alternatives is None else ragged.patches
    padded = to_padded(query.flatten(1), ragged, longest).unflatten(2, query.shape[1:])
    mask = None
    if bias is not None and row is not None:
        rows = to_padded(row.unsqueeze(1), ragged, longest).squeeze(2)
        mask = bias[rows].transpose(1, 2)
    found = F.scaled_dot_product_attention(
        padded.transpose(1, 2), key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale
    )
    packed = from_padded(found.transpose(1, 2).flatten(2), ragged)
    return packed.unflatten(1, (query.shape[1], -1))


def packed_multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routing: Routing,
    weight: Tensor,
    bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    batch_first: bool,
    dropout_p: float,
) -> tuple[Tensor, None]:
    """`nn.MultiheadAttention` of packed queries, from its parameters.

    Args:
        query: (1, T, C) if `batch_first`, else (T, 1, C). key, value: of every image.
        weight: (3 C, C) and bias (3 C,) of the projections; out_weight (C, C), out_bias (C,).

    Returns:
        The output, laid out as `query`, and None for the weights.
    """
    if not batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (
        F.linear(t, w, b).unflatten(2, (heads, -1)).transpose(1, 2)
        for t, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True)
    )
    found = packed_attention(q, k, v, routing, None, dropout_p)
    found = F.linear(found.transpose(1, 2).flatten(2), out_weight, out_bias)
    return (found if batch_first else found.transpose(0, 1)), None
