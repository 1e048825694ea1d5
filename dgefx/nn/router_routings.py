"""`RouterRoutings`: levels of every region to the `Routing` that kernels read.

The base of `dgefx.nn.router.Router`, which decides the levels; on top of the tables of
`dgefx.nn.router_tables`. Three forms: as many slots for every image, packed queries, and the
queries of all levels at once for training gates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dgefx.config import DGEConfig
from dgefx.kernels.allocate import assign_slots, assign_slots_on_gpu
from dgefx.kernels.alternatives import Alternatives, alternative_rows
from dgefx.kernels.dispatch import takes_triton
from dgefx.kernels.packing import ragged_packing, static_packing
from dgefx.kernels.pool import patch_means
from dgefx.kernels.ragged import assign_all, assign_ragged
from dgefx.kernels.routing import Routing
from dgefx.kernels.window_slots import ragged_window_slots, window_slots
from dgefx.nn.gate import certainty
from dgefx.nn.hierarchy import LevelTables, divides
from dgefx.nn.router_tables import RouterTables
from dgefx.nn.windows import Tiling, WindowRule


class Scores(NamedTuple):
    """What the router knows of a batch before it decides."""

    tables: list[LevelTables]
    sums: list[Tensor]  # per level (B, rows, columns, C)
    energies: list[Tensor] | None  # per level (B, rows, columns, 1), see `patch_energies`
    logits: Tensor | None  # (B, R, levels) of the learned gate; R = 1 under layer routing
    chances: Tensor | None = None  # the same, see `dgefx.nn.gate.Decision`


class RouterRoutings(RouterTables):
    """Numbers the queries of decided levels.

    Args:
        config, grid, prefix, windows, stencils: see `RouterTables`.
        fixed_slots: whether its windows need a slot for every patch, see `dgefx.kernels.window`.
    """

    def __init__(
        self,
        config: DGEConfig,
        grid: tuple[int, int],
        prefix: int,
        windows: WindowRule | None,
        stencils: frozenset[int],
        fixed_slots: bool,
    ) -> None:
        super().__init__(config, grid, prefix, windows, stencils)
        self.has_fixed_slots = fixed_slots

    def _ragged_routing(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        scores: Scores,
        levels: Tensor,
        used: list[bool],
        total: int,
    ) -> Routing:
        """Packed queries.

        Args:
            used: per level, whether any image may have it. total: queries of the batch.
        """
        tables, space = scores.tables, self.space(grid)
        ragged = assign_ragged(
            levels,
            [t.patch_region for t in tables],
            [t.token_patch for t in tables],
            [t.region_cost for t in tables],
            self._existing(grid, tokens.device),
            self.prefix,
            total,
        )
        windows = None
        if isinstance(space, Tiling):
            windows = ragged_window_slots(
                self._slot_tables(space, tokens.device),
                ragged,
                used,
                space.windows,
                _window_size(space),
                self.config.granularities,
                self.has_fixed_slots,
            )
        gate = None
        if scores.chances is not None:
            regions = torch.cat([t.patch_region for t in tables])
            patch = (ragged.patch - self.prefix).clamp(min=0)
            chosen = certainty(scores.chances.expand(-1, levels.shape[1], -1), levels)
            own = chosen.flatten()[ragged.image * levels.shape[1] + regions[patch]]
            gate = torch.where(ragged.patch < self.prefix, 1.0, own).unsqueeze(0)
        packing = None
        if takes_triton(tokens):
            packing = ragged_packing(ragged, self.members(grid, tables))
        return self._gathered_routing(tokens, grid, scores, levels)._replace(
            token_slot=ragged.row[:, self.prefix :],
            gate=gate,
            windows=windows,
            ragged=ragged,
            packing=packing,
            stencils=() if packing is None else self.stencils(grid, tokens.device),
        )

    def _static_routing(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        scores: Scores,
        levels: Tensor,
        capacities: tuple[int, ...],
    ) -> Routing:
        """As many slots per level for every image."""
        tables = scores.tables
        space, sides = self.space(grid), self.config.granularities
        on_gpu = takes_triton(tokens)
        assign = assign_slots_on_gpu if on_gpu else assign_slots
        patches, token_slot, patch_slot, ids = assign(
            levels,
            [t.patch_region for t in tables],
            [t.token_patch for t in tables],
            capacities,
            self._existing(grid, tokens.device),
        )
        windows = None
        if isinstance(space, Tiling):
            found = self._slot_tables(space, tokens.device)
            size = _window_size(space)
            windows = window_slots(
                found, patches, patch_slot, space.windows, size, sides, self.has_fixed_slots
            )
        gate = None
        if scores.chances is not None:
            gate = _straight_through(scores.chances, levels, patches, tables)
        packing = None
        if on_gpu and ids is not None:
            members = self.members(grid, tables)
            packing = static_packing(ids, token_slot, self.prefix, members)
        return self._gathered_routing(tokens, grid, scores, levels)._replace(
            patches=patches,
            token_slot=token_slot,
            gate=gate,
            windows=windows,
            packing=packing,
            stencils=() if packing is None else self.stencils(grid, tokens.device),
        )

    def _full_routing(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        scores: Scores,
        levels: Tensor,
        chances: Tensor,
    ) -> Routing:
        """With the queries of every level, to train gates on all of them; never by Triton kernels,
        where every token is in one patch."""
        tables, space, device = scores.tables, self.space(grid), tokens.device
        images, regions = levels.shape
        counts = [table.patch_region.shape[0] for table in tables]
        rows = alternative_rows(tuple(t.token_patch for t in tables), counts, self.prefix)
        token_level = levels[:, tables[0].patch_region]
        own = rows.t().expand(images, -1, -1).gather(2, token_level.unsqueeze(-1)).squeeze(-1)
        exists = [
            torch.ones(count, dtype=torch.bool, device=device) if found is None else found
            for found, count in zip(self._existing(grid, device), counts, strict=True)
        ]
        alternatives = Alternatives(
            (chances - chances.detach()).expand(-1, regions, -1),
            rows,
            tuple((levels == n)[:, table.patch_region] for n, table in enumerate(tables)),
        )
        routing = self._gathered_routing(tokens, grid, scores, levels)
        routing = routing._replace(alternatives=alternatives)
        windows, sides = None, self.config.granularities
        if self.config.packs:
            ragged = assign_all(own, torch.cat(exists), self.prefix)
            if isinstance(space, Tiling):
                found, size = self._slot_tables(space, device), _window_size(space)
                used = [True] * len(counts)
                windows = ragged_window_slots(
                    found, ragged, used, space.windows, size, sides, fixed=True
                )
            slots = ragged.row[:, self.prefix :]
            return routing._replace(token_slot=slots, ragged=ragged, windows=windows)
        patches = tuple(
            torch.where(there, torch.arange(count, device=device), 0).expand(images, -1)
            for there, count in zip(exists, counts, strict=True)
        )
        if isinstance(space, Tiling):
            found, size = self._slot_tables(space, device), _window_size(space)
            place = torch.arange(sum(counts), device=device)
            slot = torch.where(torch.cat(exists), place, -1).expand(images, -1)
            windows = window_slots(found, patches, slot, space.windows, size, sides, fixed=True)
        return routing._replace(patches=patches, token_slot=own - self.prefix, windows=windows)

    def _gathered_routing(
        self, tokens: Tensor, grid: tuple[int, int], scores: Scores, levels: Tensor
    ) -> Routing:
        """What both budget modes have; the caller fills in where the queries are."""
        tables, space = scores.tables, self.space(grid)
        means = [tokens[:, :0]]
        for level, side in enumerate(self.config.granularities[1:], 1):
            count = side**2 if divides(space, side) else tables[level].patch_tokens
            means.append(patch_means(scores.sums[level], count, tokens.dtype))
        return Routing(
            levels=levels,
            patches=(),
            token_slot=levels,
            means=tuple(means),
            patch_tokens=tuple(t.patch_tokens for t in tables),
            token_patch=tuple(t.token_patch for t in tables),
            token_region=tables[0].patch_region,
            gate=None,
            grid=grid,
            prefix=self.prefix,
            granularities=self.config.granularities,
            region=self.config.region_side,
            places=self.places(grid, tokens.device),
        )


def _straight_through(
    chances: Tensor,
    levels: Tensor,
    patches: tuple[Tensor | None, ...],
    tables: list[LevelTables],
) -> Tensor:
    """(B, slots) `certainty` of every slot's region."""
    one = certainty(chances, levels)
    parts = []
    for table, ids in zip(tables, patches, strict=True):
        if ids is not None:
            parts.append(one.gather(1, table.patch_region[ids]))
    return torch.cat(parts, 1)


def _window_size(space: Tiling) -> tuple[int, int]:
    """Rows and columns of tokens in a window."""
    return (len(space.rows.places), len(space.columns.places))
