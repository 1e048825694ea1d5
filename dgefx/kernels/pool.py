"""`pool`: tokens to mixed-granularity queries, by patch means and row gathers.

`patch_sums` builds the whole hierarchy once per block from strided slices (each level from the
one before); `pool` then gathers the chosen patches. Called from the block's router (sums, for
the detail score) and from the converted block's graph (queries).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dgefx.kernels.pool_op import pool_rows_op
from dgefx.kernels.rows import gather_rows

if TYPE_CHECKING:
    from dgefx.kernels.routing import Routing


class Places(NamedTuple):
    """Tokens rearranged window by window, for blocks whose attention has windows."""

    token: Tensor  # (V,) token at every place, 0 where there is none
    filled: Tensor | None  # (V, 1) bool whether there is one; None: everywhere
    shape: tuple[int, int]  # (rows, columns) of places, V = rows * columns

    def arrange(self, tokens: Tensor) -> Tensor:
        """(B, N, C) tokens to (B, V, C) with zeros where there is none."""
        placed = tokens.index_select(1, self.token)
        return placed if self.filled is None else torch.where(self.filled, placed, 0)


def sum_children(cells: Tensor, factor: int) -> Tensor:
    """Sum factor x factor neighbours; a clipped border sums what is there.

    Args:
        cells: (B, h, w, C).
        factor: side of the square of cells that becomes one.

    Returns:
        (B, ceil(h / factor), ceil(w / factor), C).
    """
    if factor == 1:
        return cells
    height, width = cells.shape[1], cells.shape[2]
    pad_rows, pad_columns = -height % factor, -width % factor
    if pad_rows or pad_columns:
        cells = F.pad(cells, (0, 0, 0, pad_columns, 0, pad_rows))
    total = None
    for row in range(factor):
        for column in range(factor):
            part = cells[:, row::factor, column::factor]
            total = part if total is None else total + part
    assert total is not None
    return total


def patch_sums(
    tokens: Tensor, grid: tuple[int, int], sides: Sequence[int], places: Places | None = None
) -> list[Tensor]:
    """Sums of the tokens of every patch, one tensor per level.

    Args:
        tokens: (B, H*W, C), raster order. Half precision is summed in float32.
        grid: (H, W).
        sides: patch sides, finest (1) first, each dividing the next.
        places: where the patches are not those of the image itself.

    Returns:
        Per level (B, rows, columns, C).
    """
    wide = tokens.float() if tokens.dtype in (torch.float16, torch.bfloat16) else tokens
    if places is not None:
        wide, grid = places.arrange(wide), places.shape
    sums = [wide.reshape(tokens.shape[0], grid[0], grid[1], tokens.shape[2])]
    for fine, coarse in pairwise(sides):
        sums.append(sum_children(sums[-1], coarse // fine))
    return sums


def patch_means(sums: Tensor, tokens_per_patch: Tensor | int, dtype: torch.dtype) -> Tensor:
    """(B, rows, columns, C) sums to (B, P, C) means in `dtype`."""
    flat = sums.flatten(1, 2)
    if isinstance(tokens_per_patch, int):
        return (flat * (1.0 / tokens_per_patch)).to(dtype)
    return (flat / tokens_per_patch[:, None]).to(dtype)


def pool(tokens: Tensor, routing: Routing) -> Tensor:
    """Mixed-granularity queries (arXiv 2301.03831, eq. 3 and figure 2).

    Args:
        tokens: (B, prefix + N, C), the block's input.
        routing: of the same tokens.

    Returns:
        (B, prefix + slots, C): prefix tokens as they are, then the mean of every chosen patch,
        level by level; of a ragged routing (1, T, C).
    """
    if routing.packing is not None:
        rows = pool_rows_op(tokens.flatten(0, 1), routing.packing)
        return rows.unflatten(0, (1 if routing.ragged is not None else tokens.shape[0], -1))
    if routing.ragged is not None:
        table = torch.cat([tokens, *routing.means[1:]], 1)
        return table.flatten(0, 1).index_select(0, routing.ragged.flat()).unsqueeze(0)
    prefix = routing.prefix
    parts = [tokens[:, :prefix]] if prefix else []
    for level, patches in enumerate(routing.patches):
        if patches is None:
            continue
        if level == 0:
            parts.append(gather_rows(tokens, patches + prefix))
        else:
            parts.append(gather_rows(routing.means[level], patches))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def pool_onto(tokens: Tensor, routing: Routing) -> Tensor:
    """`pool` of other tokens than those the routing was made of: a later value of the stream."""
    if routing.packing is not None:
        return pool(tokens, routing)
    prefix = routing.prefix
    sums = patch_sums(tokens[:, prefix:], routing.grid, routing.granularities, routing.places)
    means = [tokens[:, :0]]
    for total, count in zip(sums[1:], routing.patch_tokens[1:], strict=True):
        means.append(patch_means(total, count, tokens.dtype))
    return pool(tokens, routing._replace(means=tuple(means)))
