"""The fixed patch hierarchy of a token grid: which patch and region every token belongs to.

A grid of H x W tokens has, at every level, ceil(H / side) x ceil(W / side) patches in raster
order, clipped at the right and bottom border. Regions are patches of the region side. Because
every side divides the next and the region, a patch never straddles a region. All tables are
integer arithmetic on the sides, built once at the converted size and again for any other size.

With nested routing the region is the second patch side, and the patches of coarser levels hold
several regions, which then all carry their level.

A block with windows has the hierarchy of its `Tiling` (`dgefx.nn.windows`) instead: the same
arithmetic on places, some of which hold no token. Its patches of side 1 are the tokens themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dgefx.nn.windows import Tiling

#: what a hierarchy is built on: (H, W) tokens, or the tiling of a block with windows
Grid = tuple[int, int] | Tiling


class LevelTables(NamedTuple):
    """One level of the hierarchy; N tokens, P patches, R regions; all int64."""

    token_patch: Tensor  # (N,) patch of every token
    patch_region: Tensor  # (P,) region of every patch; the first, where it holds several
    patch_tokens: Tensor  # (P,) tokens in every (possibly clipped) patch; 1 where there are none
    region_cost: Tensor  # (R,) patches in (that begin in, where they are larger) every region


def side_counts(grid: Grid, side: int) -> tuple[int, int]:
    """Rows and columns of patches of `side` on `grid`, those without tokens counted."""
    if isinstance(grid, Tiling):
        grid = grid.shape
    return -(-grid[0] // side), -(-grid[1] // side)


def patch_count(grid: Grid, side: int) -> int:
    """Number of patches of `side` on `grid`."""
    if isinstance(grid, Tiling):
        filled, across = (sum(c > 0 for c in counts) for counts in grid.counts(side))
        return filled * across
    rows, columns = side_counts(grid, side)
    return rows * columns


def max_region_cost(grid: Grid, side: int, region: int) -> int:
    """Most patches of `side` that any region of `grid` holds."""
    if isinstance(grid, Tiling):
        most, across = (max(counts) for counts in grid.children(side, region))
        return most * across
    rows, columns = side_counts((min(region, grid[0]), min(region, grid[1])), side)
    return rows * columns


def divides(grid: Grid, side: int) -> bool:
    """Whether no patch of `side` is clipped on `grid`."""
    if isinstance(grid, Tiling):
        return side == 1 or grid.full
    return grid[0] % side == 0 and grid[1] % side == 0


def _axis_patch_sizes(length: int, side: int, device: torch.device) -> Tensor:
    starts = torch.arange(0, length, side, device=device)
    return (length - starts).clamp(max=side)


def level_tables(grid: Grid, side: int, region: int, device: torch.device) -> LevelTables:
    """Tables of the level with patches of `side` tokens on `grid`."""
    if isinstance(grid, Tiling):
        return LevelTables(*(t.to(device) for t in _tiled_tables(grid, side, region)))
    height, width = grid
    rows, columns = side_counts(grid, side)
    region_columns = side_counts(grid, region)[1]
    per_region = max(region // side, 1)
    token_row = torch.arange(height, device=device)[:, None]
    token_column = torch.arange(width, device=device)
    token_patch = (token_row // side) * columns + token_column // side
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)
    stride = max(side // region, 1)
    patch_region = (row * stride // per_region) * region_columns + column * stride // per_region
    # patches per region along each axis: fewer in a clipped region
    region_rows = _axis_patch_sizes(rows, per_region, device)
    region_cols = _axis_patch_sizes(columns, per_region, device)
    tokens = _axis_patch_sizes(height, side, device)[:, None] * _axis_patch_sizes(
        width, side, device
    )
    if side > region:
        region_rows = _starts(side_counts(grid, region)[0], stride, device)
        region_cols = _starts(region_columns, stride, device)
    return LevelTables(
        token_patch.reshape(-1),
        patch_region.reshape(-1),
        tokens.reshape(-1),
        (region_rows[:, None] * region_cols).reshape(-1),
    )


def token_places(tiling: Tiling) -> tuple[Tensor, Tensor]:
    """(row, column) place of every row and every column of tokens."""
    found = []
    for axis in (tiling.rows, tiling.columns):
        place = torch.empty(axis.length, dtype=torch.int64)
        for index, token in enumerate(axis.line):
            if token >= 0:
                place[token] = index
        found.append(place)
    return found[0], found[1]


def _tiled_tables(tiling: Tiling, side: int, region: int) -> LevelTables:
    rows, columns = token_places(tiling)
    region_columns = side_counts(tiling, region)[1]
    token_region = (rows[:, None] // region * region_columns + columns // region).reshape(-1)
    if side == 1:
        tokens = torch.arange(token_region.numel())
        row_cost, column_cost = (torch.tensor(c) for c in tiling.children(1, region))
        costs = (row_cost[:, None] * column_cost).reshape(-1)
        return LevelTables(tokens, token_region, torch.ones_like(tokens), costs)
    patch_rows, patch_columns = side_counts(tiling, side)
    token_patch = (rows[:, None] // side * patch_columns + columns // side).reshape(-1)
    row = torch.arange(patch_rows)[:, None] * side // region
    column = torch.arange(patch_columns) * side // region
    filled = [torch.tensor(counts) for counts in tiling.counts(side)]
    if side <= region:
        cost = [torch.tensor(counts) for counts in tiling.children(side, region)]
    else:
        stride = side // region
        cost = []
        for counts in filled:
            begins = torch.zeros(len(counts) * stride, dtype=torch.int64)
            begins[::stride] = (counts > 0).long()
            cost.append(begins)
    return LevelTables(
        token_patch,
        (row * region_columns + column).reshape(-1),
        (filled[0][:, None] * filled[1]).reshape(-1).clamp(min=1),
        (cost[0][:, None] * cost[1]).reshape(-1),
    )


def existing_patches(grid: Grid, side: int) -> Tensor | None:
    """(P,) whether a patch of `side` holds tokens; None where all do."""
    if not isinstance(grid, Tiling) or side == 1:
        return None
    rows, columns = (torch.tensor(counts) > 0 for counts in grid.counts(side))
    found = (rows[:, None] & columns).reshape(-1)
    return None if bool(found.all()) else found


def _starts(regions: int, stride: int, device: torch.device) -> Tensor:
    """(regions,) 1 where a patch of `stride` regions begins."""
    return (torch.arange(regions, device=device) % stride == 0).long()


def parent_table(grid: Grid, fine: int, coarse: int, device: torch.device) -> Tensor:
    """(P,) patch of side `coarse` that holds each patch of side `fine`."""
    if isinstance(grid, Tiling) and fine == 1:
        return level_tables(grid, coarse, coarse, device).token_patch
    rows, columns = side_counts(grid, fine)
    ratio = coarse // fine
    row = torch.arange(rows, device=device)[:, None] // ratio
    column = torch.arange(columns, device=device) // ratio
    return (row * side_counts(grid, coarse)[1] + column).reshape(-1)


def children_table(grid: Grid, fine: int, coarse: int, device: torch.device) -> Tensor:
    """(P,) patches of side `fine` in each patch of side `coarse`."""
    if isinstance(grid, Tiling):
        tall, wide = (torch.tensor(c, device=device) for c in grid.children(fine, coarse))
        return (tall[:, None] * wide).reshape(-1)
    rows, columns = side_counts(grid, fine)
    ratio = coarse // fine
    sizes = _axis_patch_sizes(rows, ratio, device)[:, None] * _axis_patch_sizes(
        columns, ratio, device
    )
    return sizes.reshape(-1)


def children_counts(grid: Grid, fine: int, coarse: int) -> list[tuple[int, int]]:
    """(children, how many patches have so many), most children first; see `children_table`."""
    ratio = coarse // fine
    axes = []
    if isinstance(grid, Tiling):
        for line in grid.children(fine, coarse):
            axes.append([(n, line.count(n)) for n in sorted(set(line) - {0}, reverse=True)])
    else:
        for cells in side_counts(grid, fine):
            whole, rest = divmod(cells, ratio)
            axes.append(([(ratio, whole)] if whole else []) + ([(rest, 1)] if rest else []))
    counts: dict[int, int] = {}
    for height, rows in axes[0]:
        for width, columns in axes[1]:
            counts[height * width] = counts.get(height * width, 0) + rows * columns
    return sorted(counts.items(), reverse=True)


def nested_levels(levels: Tensor, grid: Grid, sides: tuple[int, ...]) -> Tensor:
    """Make any levels valid for nested routing: a coarse patch has its first region's level.

    Args:
        levels: (B, R) over patches of the second side.

    Returns:
        (B, R), equal within every patch that is not split.
    """
    result = levels.clamp(max=1)
    held = torch.zeros_like(levels, dtype=torch.bool)
    for level in range(len(sides) - 1, 1, -1):
        first = level_tables(grid, sides[level], sides[1], levels.device).patch_region
        parent = parent_table(grid, sides[1], sides[level], levels.device)
        coarse = (levels[:, first] >= level)[:, parent] & ~held
        result = torch.where(coarse, level, result)
        held = held | coarse
    return result
