"""The fixed patch hierarchy of a token grid: which patch and region every token belongs to.

A grid of H x W tokens has, at every level, ceil(H / side) x ceil(W / side) patches in raster
order, clipped at the right and bottom border. Regions are patches of the region side. Because
every side divides the next and the region, a patch never straddles a region. All tables are
integer arithmetic on the sides, built once at the converted size and again for any other size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LevelTables(NamedTuple):
    """One level of the hierarchy; N tokens, P patches, R regions; all int64."""

    token_patch: Tensor  # (N,) patch of every token
    patch_region: Tensor  # (P,) region of every patch
    patch_tokens: Tensor  # (P,) tokens in every (possibly clipped) patch
    region_cost: Tensor  # (R,) patches in every region


def side_counts(grid: tuple[int, int], side: int) -> tuple[int, int]:
    """Rows and columns of patches of `side` on `grid` (rows, columns of tokens)."""
    return -(-grid[0] // side), -(-grid[1] // side)


def patch_count(grid: tuple[int, int], side: int) -> int:
    """Number of patches of `side` on `grid`."""
    rows, columns = side_counts(grid, side)
    return rows * columns


def max_region_cost(grid: tuple[int, int], side: int, region: int) -> int:
    """Most patches of `side` that any region of `grid` holds."""
    rows, columns = side_counts((min(region, grid[0]), min(region, grid[1])), side)
    return rows * columns


def divides(grid: tuple[int, int], side: int) -> bool:
    """Whether no patch of `side` is clipped on `grid`."""
    return grid[0] % side == 0 and grid[1] % side == 0


def _axis_patch_sizes(length: int, side: int, device: torch.device) -> Tensor:
    starts = torch.arange(0, length, side, device=device)
    return (length - starts).clamp(max=side)


def level_tables(
    grid: tuple[int, int], side: int, region: int, device: torch.device
) -> LevelTables:
    """Tables of the level with patches of `side` tokens on `grid` (rows, columns)."""
    height, width = grid
    rows, columns = side_counts(grid, side)
    region_columns = side_counts(grid, region)[1]
    per_region = region // side
    token_row = torch.arange(height, device=device)[:, None]
    token_column = torch.arange(width, device=device)
    token_patch = (token_row // side) * columns + token_column // side
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)
    patch_region = (row // per_region) * region_columns + column // per_region
    # patches per region along each axis: fewer in a clipped region
    region_rows = _axis_patch_sizes(rows, per_region, device)
    region_cols = _axis_patch_sizes(columns, per_region, device)
    tokens = _axis_patch_sizes(height, side, device)[:, None] * _axis_patch_sizes(
        width, side, device
    )
    return LevelTables(
        token_patch.reshape(-1),
        patch_region.reshape(-1),
        tokens.reshape(-1),
        (region_rows[:, None] * region_cols).reshape(-1),
    )
