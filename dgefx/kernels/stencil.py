"""`stencil_conv`: a depthwise convolution evaluated on the mixed-granularity grid itself.

Mix-FFN (PVT v2, SegFormer) convolves the hidden layer, eight times as wide as the stream. Instead
of un-pooling it, every query reads its neighbourhood through the slot table: all tokens inside a
coarse patch share one value, so a patch of side p costs one read for itself and one per token of
the ring around it, with taps summed beforehand. Equal to un-pool, convolve, pool.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dgefx.kernels.full_resolution import pool_value, unpool_value
from dgefx.kernels.routing import Routing
from dgefx.kernels.rows import gather_rows
from dgefx.kernels.stencil_op import stencil
from dgefx.kernels.taps import patch_shapes, ring_of, tap_shares


def stencil_conv(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing, inner: int = 1
) -> Tensor:
    """Depthwise convolution, stride 1, zero padding, on queries.

    Args:
        hidden: (B * inner, C, slots, 1), for example with heads next to the images.
        weight: (C, 1, k, k), k odd. bias: (C,) or None.
        routing: of the block.

    Returns:
        (B * inner, C, slots, 1): for every query the mean over its patch of the convolution of the
        un-pooled `hidden`.
    """
    if inner > 1:  # channels do not see each other: as well have those of all heads
        joined = hidden.unflatten(0, (-1, inner)).flatten(1, 2)
        bias = None if bias is None else bias.repeat(inner)
        out = stencil_conv(joined, weight.repeat(inner, 1, 1, 1), bias, routing)
        return out.unflatten(1, (inner, -1)).flatten(0, 1)
    tables = dict(routing.stencils).get(weight.shape[-1])
    if routing.packing is not None and tables is not None:
        rows = hidden.squeeze(-1).transpose(1, 2)
        out = stencil(rows.flatten(0, 1), weight, bias, routing.packing, tables, routing.grid)
        return out.view(rows.shape).transpose(1, 2).unsqueeze(-1)
    # uncompiled, every read would be a pass over memory of its own; in training, its backward too
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    # the ring around a patch is known for patches of the image itself only
    known = routing.places is None and routing.ragged is None
    if needs_gradient or not torch.compiler.is_compiling() or not known:
        return full_resolution_conv(hidden, weight, bias, routing)
    rows = hidden.squeeze(-1).transpose(1, 2)
    return stencil_rows(rows, weight, bias, routing).transpose(1, 2).unsqueeze(-1)


def full_resolution_conv(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing
) -> Tensor:
    """The same by un-pool, convolve, pool."""
    dense = unpool_value(hidden, routing, (2, 3), False)
    out = F.conv2d(dense, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return pool_value(out, routing, (2, 3), False)


def stencil_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
    """`stencil_conv` on (B, slots, C), level by level."""
    kernel = weight.shape[-1]
    taps = weight.flatten(1).t()  # (k*k, C)
    parts = []
    start = 0
    for level, ids in enumerate(routing.patches):
        if ids is None:
            continue
        own = hidden[:, start : start + ids.shape[1]]
        parts.append(_level(hidden, own, ids, taps, kernel, routing, level))
        start += ids.shape[1]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return out if bias is None else out + bias


def _level(
    hidden: Tensor,
    own: Tensor,
    ids: Tensor,
    taps: Tensor,
    kernel: int,
    routing: Routing,
    level: int,
) -> Tensor:
    """One level's slots: their own value and the ring around their patch."""
    side, reach = routing.granularities[level], kernel // 2
    height, width = routing.grid
    columns = -(-width // side)
    row, column = (ids // columns) * side, (ids % columns) * side
    shapes = patch_shapes(routing.grid, side)
    kinds = None
    if len(shapes) > 1:
        # clipped patches have taps of their own: which of the (at most four) shapes is this one?
        below = (height - row < side).long() * len({w for _, w in shapes})
        kinds = below + (width - column < side).long()
    ring = ring_of(side, kernel)
    known = tap_shares(side, kernel, tuple(shapes))
    shares = torch.tensor(known, dtype=taps.dtype, device=taps.device)
    coefficients = torch.einsum("rst,tc->rsc", shares, taps)
    out = own * _pick(coefficients[0], kinds)
    offsets = torch.tensor(ring, device=ids.device) - reach  # (ring, 2)
    y, x = row.unsqueeze(-1) + offsets[:, 0], column.unsqueeze(-1) + offsets[:, 1]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    token = torch.where(inside, y * width + x, 0)
    slot = routing.token_slot.gather(1, token.flatten(1)).view(token.shape)
    for index in range(len(ring)):
        value = gather_rows(hidden, slot[:, :, index])
        value = torch.where(inside[:, :, index].unsqueeze(-1), value, 0)
        out = out + value * _pick(coefficients[index + 1], kinds)
    return out


def _pick(coefficient: Tensor, kinds: Tensor | None) -> Tensor:
    """(shapes, C) taps to what broadcasts with (B, slots, C)."""
    return coefficient[0] if kinds is None else coefficient[kinds]
