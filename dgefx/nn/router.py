"""The router of one converted block: tokens to `Routing`.

Sits as child `dge_router` of a `DGEBlock` and is the first call of its graph. Builds the patch
hierarchy's sums once, scores every region, allocates levels under the block's capacities and
numbers the slots; the block's kernels read the result.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from dgefx.config import DGEConfig
from dgefx.kernels.allocate import allocate_levels, assign_slots
from dgefx.kernels.pool import patch_means, patch_sums, sum_children
from dgefx.kernels.routing import Routing
from dgefx.nn.capacity import Plan, rescale
from dgefx.nn.hierarchy import LevelTables, divides, level_tables, max_region_cost, side_counts

FINEST_PROBABILITY = 0.95


class Router(nn.Module):
    """Picks one granularity per region under a fixed number of slots per level.

    Args:
        config: granularities, region side, routing and router kind.
        grid: (H, W) tokens at the converted size.
        prefix: tokens in front of the grid (class, distillation, registers).
        channels: C of the residual stream.
        plan: slots per level at the converted size.

    Shape:
        tokens (B, prefix + H*W, C) -> `Routing`.
    """

    def __init__(
        self, config: DGEConfig, grid: tuple[int, int], prefix: int, channels: int, plan: Plan
    ) -> None:
        super().__init__()
        self.config = config
        self.grid = grid
        self.prefix = prefix
        self.plan = plan
        for level, side in enumerate(config.granularities):
            tables = level_tables(grid, side, config.region_side, torch.device("cpu"))
            for name, table in zip(LevelTables._fields, tables, strict=True):
                self.register_buffer(f"{name}_{level}", table, persistent=False)
        self.gate: nn.Linear | None = None
        if config.router == "linear":
            self.gate = nn.Linear(channels, config.levels)
            self.reset_gate()

    def reset_gate(self) -> None:
        """Small weights; bias such that the finest level starts at p = 0.95 (section 4.1)."""
        assert self.gate is not None
        nn.init.trunc_normal_(self.gate.weight, std=0.02)
        nn.init.zeros_(self.gate.bias)
        others = max(self.config.levels - 1, 1)
        odds = FINEST_PROBABILITY * others / (1.0 - FINEST_PROBABILITY)
        with torch.no_grad():
            self.gate.bias[0] = torch.tensor(odds).log()

    def extra_repr(self) -> str:
        return (
            f"grid={self.grid}, prefix={self.prefix}, granularities={self.config.granularities}, "
            f"region={self.config.region_side}, slots={self.plan.capacities}, "
            f"router={self.config.router}"
        )

    def tables(self, grid: tuple[int, int], device: torch.device) -> list[LevelTables]:
        """The hierarchy's tables: buffers at the converted size, computed at any other."""
        sides = self.config.granularities
        if grid == self.grid:
            names = LevelTables._fields
            return [
                LevelTables(*(cast(Tensor, getattr(self, f"{name}_{level}")) for name in names))
                for level in range(len(sides))
            ]
        return [level_tables(grid, side, self.config.region_side, device) for side in sides]

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Routing:
        plan = rescale(self.plan, self.grid, grid, self.config)
        tables = self.tables(grid, tokens.device)
        sums = patch_sums(tokens[:, self.prefix :], grid, self.config.granularities)
        logits = None if self.gate is None else self._gate_logits(sums, tables, grid)
        with torch.no_grad():
            if logits is None:
                gains = self._detail_gains(sums, tables, grid)
            else:
                gains = (logits[..., :-1] - logits[..., 1:]).float()
            levels = allocate_levels(
                gains, [t.region_cost for t in tables], plan.capacities, self._uniform_costs(grid)
            )
        return self._routing(tokens, grid, sums, tables, levels, plan, logits)

    def routing_for(
        self, tokens: Tensor, levels: Tensor, grid: tuple[int, int] | None = None
    ) -> Routing:
        """The routing with given levels, with as many slots as they need.

        Args:
            tokens: (B, prefix + H*W, C).
            levels: (B, R) int64 in [0, number of granularities).
            grid: (H, W); the converted size if None.
        """
        grid = self.grid if grid is None else grid
        tables = self.tables(grid, tokens.device)
        needed = [
            int(torch.where(levels == level, table.region_cost, 0).sum(1).max())
            for level, table in enumerate(tables)
        ]
        sums = patch_sums(tokens[:, self.prefix :], grid, self.config.granularities)
        return self._routing(tokens, grid, sums, tables, levels, Plan(tuple(needed)), None)

    def _uniform_costs(self, grid: tuple[int, int]) -> list[int | None]:
        region = self.config.region_side
        if not divides(grid, region):
            return [None] * self.config.levels
        return [max_region_cost(grid, side, region) for side in self.config.granularities]

    def _region_sums(self, cells: Tensor, level: int) -> Tensor:
        """(B, rows, columns, 1) per patch to (B, R) per region."""
        factor = self.config.region_side // self.config.granularities[level]
        return sum_children(cells, factor).flatten(1)

    def _detail_gains(
        self, sums: list[Tensor], tables: list[LevelTables], grid: tuple[int, int]
    ) -> Tensor:
        """(B, R, L - 1) variance that level l keeps over level l + 1, per query it costs more.

        Sum over a patch of ||x - mean||^2 = sum ||x||^2 - ||sum x||^2 / n, so the variance
        between two levels is a difference of per-patch energies.
        """
        energies = []
        for level, total in enumerate(sums):
            squared = total.detach().float().square().sum(-1, keepdim=True)
            side = self.config.granularities[level]
            if side > 1:
                if divides(grid, side):
                    squared = squared * (1.0 / side**2)
                else:
                    squared = squared / tables[level].patch_tokens.view(*squared.shape[1:])
            energies.append(self._region_sums(squared, level))
        gains = []
        for (fine, fine_table), (coarse, coarse_table) in pairwise(
            zip(energies, tables, strict=True)
        ):
            price = (fine_table.region_cost - coarse_table.region_cost).clamp(min=1)
            gains.append((fine - coarse) / price)
        return (
            torch.stack(gains, -1)
            if gains
            else sums[0].new_zeros(sums[0].shape[0], tables[0].region_cost.shape[0], 0)
        )

    def _gate_logits(
        self, sums: list[Tensor], tables: list[LevelTables], grid: tuple[int, int]
    ) -> Tensor:
        """(B, R, L): one linear layer on every region's mean token (paper, eq. 1)."""
        assert self.gate is not None
        region = self.config.region_side
        total = sum_children(sums[-1], region // self.config.granularities[-1])
        rows, columns = side_counts(grid, region)
        tokens = tables[0].region_cost.view(rows, columns, 1)
        mean = (total / tokens).flatten(1, 2).to(self.gate.weight.dtype)
        return self.gate(mean)

    def _routing(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        sums: list[Tensor],
        tables: list[LevelTables],
        levels: Tensor,
        plan: Plan,
        logits: Tensor | None,
    ) -> Routing:
        patches, token_slot = assign_slots(
            levels,
            [t.patch_region for t in tables],
            [t.token_patch for t in tables],
            plan.capacities,
        )
        means = [tokens[:, :0]]
        for level, side in enumerate(self.config.granularities[1:], 1):
            count = side**2 if divides(grid, side) else tables[level].patch_tokens
            means.append(patch_means(sums[level], count, tokens.dtype))
        gate = None
        if logits is not None and self.training and torch.is_grad_enabled():
            gate = _straight_through(logits, levels, patches, tables)
        return Routing(
            levels=levels,
            patches=patches,
            token_slot=token_slot,
            means=tuple(means),
            patch_tokens=tuple(t.patch_tokens for t in tables),
            token_patch=tuple(t.token_patch for t in tables),
            gate=gate,
            grid=grid,
            prefix=self.prefix,
            granularities=self.config.granularities,
            region=self.config.region_side,
        )


def _straight_through(
    logits: Tensor,
    levels: Tensor,
    patches: tuple[Tensor | None, ...],
    tables: list[LevelTables],
) -> Tensor:
    """(B, slots) ones whose gradient is that of the chosen level's probability (paper, eq. 6)."""
    chosen = logits.softmax(-1).gather(2, levels.unsqueeze(-1)).squeeze(-1)  # (B, R)
    one = 1.0 + chosen - chosen.detach()
    parts = []
    for table, ids in zip(tables, patches, strict=True):
        if ids is not None:
            parts.append(one.gather(1, table.patch_region[ids]))
    return torch.cat(parts, 1)
