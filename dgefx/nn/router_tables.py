"""`RouterTables`: what a router knows of its token grid, as buffers that move with the model.

The base of `dgefx.nn.router_routings.RouterRoutings`. At the converted size every table is a
non-persistent buffer; at any other it is computed when it is asked for.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from dgefx.config import DGEConfig
from dgefx.kernels.packing import Members, image_members
from dgefx.kernels.pool import Places
from dgefx.kernels.stencil_tables import StencilTables, stencil_tables
from dgefx.kernels.window_slots import WindowTables
from dgefx.nn.hierarchy import (
    Grid,
    LevelTables,
    children_table,
    divides,
    level_tables,
    max_region_cost,
    parent_table,
    side_counts,
)
from dgefx.nn.tables import Tables
from dgefx.nn.window_tables import from_tensors, tiling_tensors
from dgefx.nn.windows import Tiling, WindowRule


class NestedTables(NamedTuple):
    """Between level l and the next coarser one, see `dgefx.kernels.allocate.allocate_nested`."""

    parents: Tensor
    holders: Tensor
    children: Tensor


def space_of(grid: tuple[int, int], windows: WindowRule | None, config: DGEConfig) -> Grid:
    """What the patch hierarchy of a block on `grid` is built on."""
    if windows is None:
        return grid
    return windows.tiling(grid, max(config.granularities[-1], config.region_side))


class RouterTables(Tables):
    """Tables of one block's patch hierarchy.

    Args:
        config: granularities and region side.
        grid: (H, W) tokens at the converted size.
        prefix: tokens in front of the grid.
        windows: how the block's attention partitions the grid, if it does.
        stencils: kernel sizes of the block's depthwise convolutions.
    """

    def __init__(
        self,
        config: DGEConfig,
        grid: tuple[int, int],
        prefix: int,
        windows: WindowRule | None,
        stencils: frozenset[int],
    ) -> None:
        super().__init__()
        self.windows = windows
        self.config = config
        self.grid = grid
        self.prefix = prefix
        self._space = space = space_of(grid, windows, config)
        for level, side in enumerate(config.granularities):
            tables = level_tables(space, side, config.region_side, torch.device("cpu"))
            for name, table in zip(LevelTables._fields, tables, strict=True):
                self.register_buffer(f"{name}_{level}", table, persistent=False)
        held = self.tables(grid, torch.device("cpu"))
        counts = [table.patch_region.shape[0] for table in held]
        start, token, self._longest = image_members(
            [table.token_patch for table in held], counts, prefix, self._most_tokens(grid)
        )
        self.register_buffer("member_start", start, persistent=False)
        self.register_buffer("member_token", token, persistent=False)
        self._stencils = tuple(sorted(stencils)) if windows is None and not prefix else ()
        for kernel in self._stencils:
            found = stencil_tables(grid, config.granularities, kernel)
            # as integers, since model.half() would round the shares
            found = found._replace(shares=found.shares.view(torch.int32))
            for name, table in zip(StencilTables._fields, found, strict=True):
                self.register_buffer(f"stencil_{kernel}_{name}", table.clone(), persistent=False)
        self._window_names: tuple[str, ...] = ()
        if isinstance(space, Tiling):
            self._register_windows(space)
        if config.routing_mode == "nested":
            for level in range(config.levels - 1):
                nested = self._build_nested(level, grid, torch.device("cpu"))
                for name, table in zip(NestedTables._fields, nested, strict=True):
                    self.register_buffer(f"{name}_{level}", table, persistent=False)

    def space(self, grid: tuple[int, int]) -> Grid:
        """What the patch hierarchy of `grid` is built on."""
        return self._space if grid == self.grid else space_of(grid, self.windows, self.config)

    def _register_windows(self, tiling: Tiling) -> None:
        found = tiling_tensors(tiling, self.config.granularities)
        for name, tensor in found.items():
            self.register_buffer(name, tensor.clone(), persistent=False)
        self._window_names = tuple(found)

    def _window_tensors(self, space: Tiling, device: torch.device) -> dict[str, Tensor]:
        """Buffers at the converted size, computed at any other."""
        if space.grid == self.grid:
            return {name: cast(Tensor, getattr(self, name)) for name in self._window_names}
        found = tiling_tensors(space, self.config.granularities)
        return {name: tensor.to(device) for name, tensor in found.items()}

    def places(self, grid: tuple[int, int], device: torch.device) -> Places | None:
        """Where tokens are in the patch hierarchy, if not where they are in the image."""
        space = self.space(grid)
        if not isinstance(space, Tiling):
            return None
        found = self._window_tensors(space, device)
        return Places(found["place_token"], found.get("place_filled"), space.shape)

    def _slot_tables(self, space: Tiling, device: torch.device) -> WindowTables:
        shape = (space.rows.side, space.columns.side)
        return from_tensors(self._window_tensors(space, device), shape, self.config.levels)

    def _existing(self, grid: tuple[int, int], device: torch.device) -> list[Tensor | None]:
        """Per level, which patches hold tokens; None where all do."""
        space = self.space(grid)
        if not isinstance(space, Tiling):
            return [None] * self.config.levels
        found = self._window_tensors(space, device)
        return [found.get(f"existing_{level}") for level in range(self.config.levels)]

    def tables(self, grid: tuple[int, int], device: torch.device) -> list[LevelTables]:
        """The hierarchy's tables: buffers at the converted size, computed at any other."""
        sides = self.config.granularities
        if grid == self.grid:
            names = LevelTables._fields
            return [
                LevelTables(*(cast(Tensor, getattr(self, f"{name}_{level}")) for name in names))
                for level in range(len(sides))
            ]
        space = self.space(grid)
        return [level_tables(space, side, self.config.region_side, device) for side in sides]

    def members(self, grid: tuple[int, int], tables: list[LevelTables]) -> Members:
        """Tokens of every patch, prefix tokens counted: buffers at the converted size."""
        if grid == self.grid:
            start, token = (cast(Tensor, getattr(self, f"member_{n}")) for n in ("start", "token"))
            return Members(start, token, self._longest)
        counts = [table.patch_region.shape[0] for table in tables]
        patches = [table.token_patch for table in tables]
        return image_members(patches, counts, self.prefix, self._most_tokens(grid))

    def _most_tokens(self, grid: tuple[int, int]) -> int:
        """Tokens in the largest patch."""
        return max_region_cost(self.space(grid), 1, self.config.granularities[-1])

    def stencils(
        self, grid: tuple[int, int], device: torch.device
    ) -> tuple[tuple[int, StencilTables], ...]:
        """Per kernel size, the tables of the block's depthwise convolutions."""
        found = []
        for kernel in self._stencils:
            if grid == self.grid:
                names = (f"stencil_{kernel}_{name}" for name in StencilTables._fields)
                tables = StencilTables(*(cast(Tensor, getattr(self, name)) for name in names))
                tables = tables._replace(shares=tables.shares.view(torch.float32))
            else:
                built = stencil_tables(grid, self.config.granularities, kernel)
                tables = StencilTables(*(table.to(device) for table in built))
            found.append((kernel, tables))
        return tuple(found)

    def _build_nested(
        self, level: int, grid: tuple[int, int], device: torch.device
    ) -> NestedTables:
        sides, space = self.config.granularities, self.space(grid)
        fine, coarse = sides[level], sides[level + 1]
        return NestedTables(
            parent_table(space, fine, coarse, device),
            parent_table(space, sides[1], coarse, device),
            children_table(space, fine, coarse, device),
        )

    def nested_tables(self, grid: tuple[int, int], device: torch.device) -> list[NestedTables]:
        """Per level but the coarsest; like `tables`, for nested routing."""
        levels = range(self.config.levels - 1)
        if grid != self.grid:
            return [self._build_nested(level, grid, device) for level in levels]
        return [
            NestedTables(
                *(cast(Tensor, getattr(self, f"{n}_{level}")) for n in NestedTables._fields)
            )
            for level in levels
        ]

    def _uniform_costs(self, grid: tuple[int, int]) -> list[int | None]:
        region, space = self.config.region_side, self.space(grid)
        if not divides(space, region):
            return [None] * self.config.levels
        return [max_region_cost(space, side, region) for side in self.config.granularities]

    def _patch_counts(self, tables: list[LevelTables], grid: tuple[int, int]) -> list[Tensor | int]:
        """Tokens in the patches of every level: one number where all are whole."""
        counts: list[Tensor | int] = []
        space = self.space(grid)
        for side, table in zip(self.config.granularities, tables, strict=True):
            shape = (*side_counts(space, side), 1)
            counts.append(side**2 if divides(space, side) else table.patch_tokens.view(shape))
        return counts
