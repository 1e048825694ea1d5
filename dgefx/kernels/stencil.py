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

from dgefx.kernels.island import pool_value, unpool_value
from dgefx.kernels.routing import Routing
from dgefx.kernels.rows import gather_rows


def stencil_conv(hidden: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
    """Depthwise convolution, stride 1, zero padding, on queries.

    Args:
        hidden: (B, C, slots, 1).
        weight: (C, 1, k, k), k odd. bias: (C,) or None.
        routing: of the block.

    Returns:
        (B, C, slots, 1): for every query the mean over its patch of the convolution of the
        un-pooled `hidden`.
    """
    # uncompiled, every read would be a pass over memory of its own; in training, its backward too
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if needs_gradient or not torch.compiler.is_compiling():
        return island_conv(hidden, weight, bias, routing)
    rows = hidden.squeeze(-1).transpose(1, 2)
    return stencil_rows(rows, weight, bias, routing).transpose(1, 2).unsqueeze(-1)


def island_conv(hidden: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
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
    side, reach = routing.granularities[level], kernel // 2
    height, width = routing.grid
    columns = -(-width // side)
    row, column = (ids // columns) * side, (ids % columns) * side
    shapes = _patch_shapes(routing.grid, side)
    kinds = None
    if len(shapes) > 1:
        # clipped patches have taps of their own: which of the (at most four) shapes is this one?
        rows_clipped = (height - row < side).long()
        columns_clipped = (width - column < side).long()
        kinds = rows_clipped * len({w for _, w in shapes}) + columns_clipped
    ring, coefficients = _patch_taps(taps, kernel, side, shapes)
    out = own * _pick(coefficients[0], kinds)
    for (down, right), coefficient in zip(ring, coefficients[1:], strict=True):
        y, x = row + (down - reach), column + (right - reach)
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        token = torch.where(inside, y * width + x, 0)
        slot = routing.token_slot.gather(1, token)
        value = torch.where(inside.unsqueeze(-1), gather_rows(hidden, slot), 0)
        out = out + value * _pick(coefficient, kinds)
    return out


def _pick(coefficient: Tensor, kinds: Tensor | None) -> Tensor:
    """(shapes, C) taps to what broadcasts with (B, slots, C)."""
    return coefficient[0] if kinds is None else coefficient[kinds]


def _patch_shapes(grid: tuple[int, int], side: int) -> list[tuple[int, int]]:
    """Shapes of the patches on `grid`: whole first, then clipped in x, in y, in both."""
    heights = [side] + ([grid[0] % side] if grid[0] % side else [])
    widths = [side] + ([grid[1] % side] if grid[1] % side else [])
    return [(h, w) for h in heights for w in widths]


def _patch_taps(
    taps: Tensor, kernel: int, side: int, shapes: list[tuple[int, int]]
) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """Positions of the ring around a patch, and per position the summed taps of every shape.

    Returns:
        ring positions in the (side + kernel - 1)^2 frame; coefficients (shapes, C), first those
        of the patch's own value.
    """
    frame, reach = side + kernel - 1, kernel // 2
    grid = taps.unflatten(0, (kernel, kernel))
    per_shape = []
    for height, width in shapes:
        total = None
        for down in range(height):
            for right in range(width):
                padding = (
                    0, 0, right, frame - kernel - right, down, frame - kernel - down
                )
                moved = F.pad(grid, padding)
                total = moved if total is None else total + moved
        assert total is not None
        per_shape.append(total * (1.0 / (height * width)))
    summed = torch.stack(per_shape, 2)  # (frame, frame, shapes, C)
    ring: list[tuple[int, int]] = []
    coefficients = [_own_taps(grid, reach, shapes)]
    for down in range(frame):
        for right in range(frame):
            inside = reach <= down < reach + side and reach <= right < reach + side
            if not inside:
                ring.append((down, right))
                coefficients.append(summed[down, right])
    return ring, coefficients


def _own_taps(grid: Tensor, reach: int, shapes: list[tuple[int, int]]) -> Tensor:
    """(shapes, C): taps with which the patch's own value enters its mean."""
    kernel = grid.shape[0]
    own = []
    for height, width in shapes:
        total = None
        for down in range(kernel):
            for right in range(kernel):
                # tokens whose neighbour at this tap lies inside the same patch
                rows = max(0, height - abs(down - reach))
                columns = max(0, width - abs(right - reach))
                if rows and columns:
                    part = grid[down, right] * (rows * columns / (height * width))
                    total = part if total is None else total + part
        assert total is not None
        own.append(total)
    return torch.stack(own)
