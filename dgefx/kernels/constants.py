"""`gather_constant`: tables that carry the query axis, pooled into the patch hierarchy.

Relative position bias rows, RoPE tables and the like do not come from the tokens but have one
entry per token. A mixed-granularity query reads the mean of its patch's entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgefx.kernels.pool import patch_means, patch_sums
from dgefx.kernels.ragged import body_queries
from dgefx.kernels.routing import Routing
from dgefx.kernels.rows import spread_rows


def _hierarchy_rows(table: Tensor, routing: Routing) -> Tensor:
    """(b, N, F) entries per token to (b, all patches, F), level by level."""
    sums = patch_sums(table, routing.grid, routing.granularities, routing.places)
    parts = [table]
    for total, count in zip(sums[1:], routing.patch_tokens[1:], strict=True):
        parts.append(patch_means(total, count, table.dtype))
    return torch.cat(parts, 1)


def _patch_rows(routing: Routing) -> Tensor:
    """(B, slots) row of every slot's patch among the patches of all levels."""
    offset, parts = 0, []
    for tokens, ids in zip(routing.patch_tokens, routing.patches, strict=True):
        if ids is not None:
            parts.append(ids + offset)
        offset += tokens.shape[0]
    return torch.cat(parts, 1)


def gather_constant(
    constant: Tensor,
    routing: Routing,
    rank: int,
    batch: int,
    axes: tuple[int, ...],
    prefix: bool,
    share: float = 0.5,
) -> Tensor:
    """Entries of a constant for every query.

    Args:
        constant: broadcastable to a value of `rank` axes, with one entry per token on `axes`.
        rank: axes of the value it is combined with.
        batch: the image axis of that value.
        axes: its token axis, or its two grid axes.
        prefix: whether the prefix tokens have entries, in front.
        share: a boolean is true where more than this share of the patch's entries are.

    Returns:
        `rank` axes: images on `batch`, queries on `axes` (a grid becomes (queries, 1)).
    """
    boolean = constant.dtype == torch.bool
    value = constant.to(torch.float32) if boolean else constant
    value = value.reshape((1,) * (rank - value.dim()) + tuple(value.shape))
    if len(axes) == 2:
        value = value.flatten(axes[0], axes[1])
        batch = batch - 1 if batch > axes[0] else batch
    token = axes[0]
    value = value.movedim((batch, token), (0, 1))
    rest = value.shape[2:]
    table = value.flatten(2) if rest else value.unsqueeze(-1)
    head, body = (
        (table[:, : routing.prefix], table[:, routing.prefix :]) if prefix else (None, table)
    )
    hierarchy = _hierarchy_rows(body, routing)
    if routing.ragged is not None:
        entries = hierarchy if head is None else torch.cat([head, hierarchy], 1)
        left_out = routing.prefix if head is None else 0
        flat = routing.ragged.flat(left_out, table.shape[0])
        rows = entries.flatten(0, 1).index_select(0, flat).unsqueeze(0)
        rows = rows if prefix else body_queries(rows, routing, 1)
        return _arranged(rows, rest, batch, token, len(axes) == 2, share if boolean else None)
    index = _patch_rows(routing)
    rows = spread_rows(hierarchy, index)
    if head is not None:
        rows = torch.cat([head.expand(rows.shape[0], -1, -1), rows], 1)
    return _arranged(rows, rest, batch, token, len(axes) == 2, share if boolean else None)


def _arranged(
    rows: Tensor, rest: torch.Size, batch: int, token: int, on_grid: bool, share: float | None
) -> Tensor:
    """(images, queries, F) rows with the axes of the value they meet."""
    rows = rows.reshape(*rows.shape[:2], *rest).movedim((0, 1), (batch, token))
    if on_grid:
        rows = rows.unsqueeze(token + 1)
    return rows if share is None else rows > share
