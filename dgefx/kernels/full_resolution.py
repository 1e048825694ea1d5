"""An operation that needs the real grid, at full resolution: between un-pooling and pooling.

The exact fallback for whatever mixes tokens in the query path but keeps the grid. Slow for wide
hidden layers: `kernels.stencil` does the common case (depthwise convolutions) without it. Where
all granularities are computed (`kernels.alternatives`), the operation sees 1 + L grids per image:
the chosen mixture and every level alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgefx.kernels.alternatives import choose, unpool_levels
from dgefx.kernels.layout import query_count
from dgefx.kernels.pool import patch_means, patch_sums
from dgefx.kernels.ragged import body_queries, body_slots
from dgefx.kernels.routing import Routing
from dgefx.kernels.rows import gather_rows, spread_rows


def _to_rows(value: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, torch.Size]:
    """(B, tokens, F) of a value with tokens on `axes` and images on axis 0; and F's axes."""
    if len(axes) == 2:
        value = value.flatten(axes[0], axes[1])
    value = value.movedim(axes[0], 1)
    rest = value.shape[2:]
    return (value.flatten(2) if rest else value.unsqueeze(-1)), rest


def _from_rows(
    rows: Tensor, rest: torch.Size, axes: tuple[int, ...], grid: tuple[int, int]
) -> Tensor:
    value = rows.reshape(*rows.shape[:2], *rest).movedim(1, axes[0])
    return value.unflatten(axes[0], grid) if len(axes) == 2 else value


def unpool_value(
    value: Tensor, routing: Routing, axes: tuple[int, ...], prefix: bool, inner: int = 1
) -> Tensor:
    """A value of the query path on all tokens.

    Args:
        value: images on axis 0, queries on `axes` (a grid stands as (queries, 1)).
        prefix: whether the prefix tokens are among the queries.
        inner: how many of something else (heads) every image has on axis 0.

    Returns:
        Images on axis 0 and tokens on `axes`; with alternatives 1 + L times as many images.
    """
    if inner > 1:
        apart = value.unflatten(0, (-1, inner))
        return unpool_value(apart, routing, _shifted(axes), prefix).flatten(0, 1)
    rows, rest = _to_rows(value, axes)
    count = routing.prefix if prefix else 0
    if routing.ragged is not None:
        dense = spread_rows(rows, routing.ragged.row if prefix else body_slots(routing))
    else:
        dense = gather_rows(rows[:, count:], routing.token_slot)
        if count:
            dense = torch.cat([rows[:, :count], dense], 1)
    if routing.alternatives is not None:
        alone = unpool_levels(rows, routing.alternatives, routing.prefix - count)
        front = dense[:, :count]
        dense = torch.cat([dense, *(torch.cat([front, level], 1) for level in alone)], 0)
    return _from_rows(dense, rest, axes, routing.grid)


def _shifted(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis + 1 for axis in axes)


def pool_value(
    value: Tensor, routing: Routing, axes: tuple[int, ...], prefix: bool, inner: int = 1
) -> Tensor:
    """The inverse direction: patch means of a dense value for every query."""
    if inner > 1:
        apart = value.unflatten(0, (-1, inner))
        return pool_value(apart, routing, _shifted(axes), prefix).flatten(0, 1)
    rows, rest = _to_rows(value, axes)
    count = routing.prefix if prefix else 0
    means = _means(rows[:, count:], routing)
    if routing.alternatives is not None:
        rows = rows[: routing.alternatives.weights.shape[0]]
    parts = [rows[:, :count]] if count else []
    if routing.ragged is not None:
        parts += means
        left_out = routing.prefix - count
        table = torch.cat(parts, 1).flatten(0, 1)
        pooled = table.index_select(0, routing.ragged.flat(left_out)).unsqueeze(0)
        pooled = pooled if prefix else body_queries(pooled, routing, 1)
        return _from_rows(pooled, rest, axes, (pooled.shape[1], 1))
    for level, patches in enumerate(routing.patches):
        if patches is not None:
            parts.append(gather_rows(means[level], patches))
    pooled = torch.cat(parts, 1)
    return _from_rows(pooled, rest, axes, (pooled.shape[1], 1))


def unpool_flat(value: Tensor, routing: Routing, prefix: bool) -> Tensor:
    """`unpool_value` where images and queries are one axis, the first: (B * queries, ...)."""
    apart = value.unflatten(0, (-1, query_count(routing, prefix)))
    return unpool_value(apart, routing, (1,), prefix).flatten(0, 1)


def pool_flat(value: Tensor, routing: Routing, prefix: bool) -> Tensor:
    """`pool_value` where images and tokens are one axis, the first: (B * tokens, ...)."""
    count = routing.grid[0] * routing.grid[1] + (routing.prefix if prefix else 0)
    return pool_value(value.unflatten(0, (-1, count)), routing, (1,), prefix).flatten(0, 1)


def _means(body: Tensor, routing: Routing) -> list[Tensor]:
    """Per level (B, P, F), patch means of (B, N, F) tokens; see `unpool_value` for alternatives."""
    sums = patch_sums(body, routing.grid, routing.granularities, routing.places)
    means = [body]
    for total, tokens in zip(sums[1:], routing.patch_tokens[1:], strict=True):
        means.append(patch_means(total, tokens, body.dtype))
    alternatives = routing.alternatives
    if alternatives is None:
        return means
    grids = 1 + len(means)
    apart = [mean.unflatten(0, (grids, -1)) for mean in means]
    return [choose(m[0], m[1 + level], alternatives, level) for level, m in enumerate(apart)]
