"""The router of one converted block: tokens to `Routing`.

Sits as child `dge_router` of a `DGEBlock` and is the first call of its graph. Builds the patch
hierarchy's sums once, scores every region and allocates levels under the block's capacities; its
base `dgefx.nn.router_routings` numbers the slots. The block's kernels read the result.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgefx.config import DGEConfig
from dgefx.kernels.allocate import (
    allocate_levels,
    allocate_nested,
)
from dgefx.kernels.batch_budget import demote, share_levels, share_nested
from dgefx.kernels.correction import Correction, mean_features
from dgefx.kernels.layout import to_tokens
from dgefx.kernels.pool import patch_sums, pool, sum_children
from dgefx.kernels.ragged import Ragged, level_counts
from dgefx.kernels.routing import Routing
from dgefx.kernels.rows import spread_rows
from dgefx.nn.capacity import Plan, rescale
from dgefx.nn.detail import importance_logits, nested_gains, patch_energies, region_gains
from dgefx.nn.gate import Gate
from dgefx.nn.hierarchy import LevelTables, divides, side_counts
from dgefx.nn.router_routings import RouterRoutings, Scores
from dgefx.nn.token_order import TokenOrder, raster_tokens
from dgefx.nn.windows import Tiling, WindowRule

Number = TypeVar("Number", int, Tensor)


class Router(RouterRoutings):
    """Picks one granularity per region under a fixed number of slots per level.

    Args:
        config: granularities, region side, routing and router kind.
        grid: (H, W) tokens at the converted size.
        prefix: tokens in front of the grid (class, distillation, registers).
        channels: C of the residual stream.
        plan: slots per level at the converted size.
        order: the block's own layout of the stream, for those who look at its output.
        windows: how the block's attention partitions the grid, if it does.
        fixed_slots: whether its windows need a slot for every patch, see `dgefx.kernels.window`.
        stencils: kernel sizes of the block's depthwise convolutions.
        places: order of the stream's tokens, see `TokenOrder`; None: raster order.
        only_here: whether the block takes no other grid.

    Attributes:
        token_order: None for streams in raster order.
        gate: with the linear router, else None.
        open: whether a gate without capacity asks in this block although its plan is the finest;
            set where a budget below 1 is.
        importance: (C,) or None; fitted by `dgefx.calibrate`, weighs the detail of a region.
        correction_down, correction_up: (2 C + 1, k) and (k, C) or None; fitted by
            `dgefx.calibrate`, see `dgefx.kernels.correction`.

    Shape:
        tokens (B, prefix + H*W, C) -> `Routing`.
    """

    def __init__(
        self,
        config: DGEConfig,
        grid: tuple[int, int],
        prefix: int,
        channels: int,
        plan: Plan,
        order: str = "BNC",
        windows: WindowRule | None = None,
        fixed_slots: bool = False,
        stencils: frozenset[int] = frozenset(),
        places: tuple[int, ...] | None = None,
        only_here: bool = False,
    ) -> None:
        super().__init__(config, grid, prefix, windows, stencils, fixed_slots)
        self.channels = channels
        self.order = order
        self.only_here = only_here
        self.token_order = None if places is None else TokenOrder(places, grid, prefix)
        self.plan = plan
        self.importance: Tensor | None
        self.register_buffer("importance", None)
        self.correction_down: nn.Parameter | None = None
        self.correction_up: nn.Parameter | None = None
        self.gate = Gate(channels, config.levels) if config.router == "linear" else None
        self.open = False

    def attention_slots(self, plan: Plan) -> int:
        """Slots of all windows of an image under `plan`, at the converted size; 0 without them."""
        space = self._space
        if not isinstance(space, Tiling):
            return 0
        rows = [
            table.numel()
            for table, used in zip(
                self._slot_tables(space, self.device).local, plan.capacities, strict=True
            )
            if used
        ]
        if self.asks and plan.capacities[0] < sum(plan.capacities):
            rows = [table.numel() for table in self._slot_tables(space, self.device).local]
        per_window = sum(rows)
        if not self.has_fixed_slots:
            per_window = min(per_window, len(space.rows.places) * len(space.columns.places))
        return per_window * space.windows[0] * space.windows[1]

    @property
    def asks(self) -> bool:
        """Whether regions take the level that the gate gives them, whatever the plan."""
        return self.config.packs and self.gate is not None

    def decides(self, plan: Plan) -> bool:
        """Whether there is anything to decide under `plan`, or all is at its finest."""
        return any(plan.capacities[1:]) or (self.open and self.config.capacity is None)

    @property
    def _asks_by_layer(self) -> bool:
        return self.asks and self.config.routing_mode == "layer"

    def extra_repr(self) -> str:
        return (
            f"grid={self.grid}, prefix={self.prefix}, granularities={self.config.granularities}, "
            f"region={self.config.region_side}, slots={self.plan.capacities}, "
            f"router={self.config.router}"
        )

    @property
    def correction(self) -> Correction | None:
        """The fitted correction of the un-pooled update, if there is one."""
        if self.correction_down is None or self.correction_up is None:
            return None
        return Correction(self.correction_down, self.correction_up)

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return cast(Tensor, self.patch_region_0).device

    def set_importance(self, weight: Tensor | None) -> None:
        """Give the detail score an importance, (C,), or take it away."""
        self.importance = None if weight is None else weight.to(self.device)

    def set_correction(self, weights: Correction | None) -> None:
        """Give the block a correction, or take it away."""
        if weights is None:
            self.correction_down = self.correction_up = None
            return
        self.correction_down, self.correction_up = (
            w if isinstance(w, nn.Parameter) else nn.Parameter(w.detach().to(self.device))
            for w in weights
        )

    def tokens_of(self, stream: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, prefix + H*W, C) in raster order of a stream as the block hands it out."""
        tokens = to_tokens(stream, self.order)
        return tokens if self.token_order is None else raster_tokens(tokens, self.token_order, grid)

    def scores(self, tokens: Tensor, grid: tuple[int, int]) -> Scores:
        """Sums, energies and gate logits of `tokens`."""
        tables = self.tables(grid, tokens.device)
        sums = self._sums(tokens, grid)
        logits = None if self.gate is None else self._gate_logits(sums, tables, grid)
        energies = None
        if logits is None or self.correction is not None:
            with torch.no_grad():
                energies = patch_energies(sums, self._patch_counts(tables, grid))
        return Scores(tables, sums, energies, logits)

    def _sums(self, tokens: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        places = self.places(grid, tokens.device)
        return patch_sums(tokens[:, self.prefix :], grid, self.config.granularities, places)

    def gains(self, scores: Scores, grid: tuple[int, int]) -> list[Tensor]:
        """What a finer level gains per query: per level but the coarsest.

        (B, R) each; under nested routing (B, patches of the next coarser level).
        """
        if scores.logits is not None:
            steps = (scores.logits[..., :-1] - scores.logits[..., 1:]).detach().float()
            return list(steps.unbind(-1))
        assert scores.energies is not None
        logits = None
        if self.importance is not None:
            cells = self._region_means(scores.sums, scores.tables, grid)
            logits = importance_logits(cells, self.importance)
        return self._detail_gains(scores, scores.energies, grid, logits)

    def _detail_gains(
        self, scores: Scores, energies: list[Tensor], grid: tuple[int, int], logits: Tensor | None
    ) -> list[Tensor]:
        sides = self.config.granularities
        if self.config.routing_mode == "nested":
            nested = self.nested_tables(grid, scores.sums[0].device)
            space = self.space(grid)
            shapes = [(*side_counts(space, side), 1) for side in sides[1:]]
            children = [t.children.view(s) for t, s in zip(nested, shapes, strict=True)]
            ratios = [coarse // fine for fine, coarse in pairwise(sides)]
            return nested_gains(energies, ratios, children, logits)
        factors = [self.config.region_side // side for side in sides]
        costs = [t.region_cost for t in scores.tables]
        return list(region_gains(energies, factors, costs, logits).unbind(-1))

    def gate_examples(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What a gate is fitted to: (B, R, C) mean tokens of the regions, and (B, R) the levels
        that the detail score gives them under the present plan; R = 1 under layer routing."""
        plan, scores = self.plan, self.scores(tokens, grid)
        if grid != self.grid:
            plan = rescale(plan, self.space(self.grid), self.space(grid), self.config)
        energies = patch_energies(scores.sums, self._patch_counts(scores.tables, grid))
        gains = self._detail_gains(scores, energies, grid, None)
        levels = self._allocate(gains, scores.tables, plan, grid).expand(tokens.shape[0], -1)
        means = self._gate_inputs(scores.sums, scores.tables, grid)
        return means, levels[:, : means.shape[1]]

    def level_costs(self) -> Tensor:
        """(R, L): queries of every region at every level, at the converted size."""
        costs = torch.stack([t.region_cost for t in self.tables(self.grid, self.device)], 1)
        return costs.sum(0, keepdim=True) if self._asks_by_layer else costs

    def level_fractions(self, gains: list[Tensor], threshold: float) -> tuple[float, ...]:
        """Share of the grid at every level when all that gains more than `threshold` is split.

        Args:
            gains: as `gains` returns them, any number of images at the converted size.
        """
        last = self.config.levels - 1
        tokens = self.tables(self.grid, torch.device("cpu"))[0].region_cost.cpu()
        levels = torch.full((gains[0].shape[0], len(tokens)), last)
        if self.config.routing_mode != "nested":
            for level in reversed(range(last)):
                levels = torch.where(gains[level] > threshold, level, levels)
        else:
            split = torch.ones_like(gains[-1], dtype=torch.bool)
            for level in reversed(range(last)):
                nested = self._build_nested(level, self.grid, torch.device("cpu"))
                split = split & (gains[level] > threshold)
                levels = torch.where(split[:, nested.holders] if level else split, level, levels)
                if level:
                    split = split[:, nested.parents]
        return tuple(
            float(torch.where(levels == level, tokens, 0).sum() / (tokens.sum() * len(levels)))
            for level in range(last + 1)
        )

    def region_means(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, rows, columns, C): the mean token of every region of (B, prefix + H*W, C)."""
        scores = self.scores(tokens, grid)
        return self._region_means(scores.sums, scores.tables, grid)

    def correction_features(self, tokens: Tensor, routing: Routing) -> Tensor:
        """(B, H*W, 2 C + 1): what the correction of every token is a linear map of."""
        tables = self.tables(routing.grid, tokens.device)
        sums = self._sums(tokens, routing.grid)
        energies = patch_energies(sums, self._patch_counts(tables, routing.grid))
        if routing.ragged is not None:
            lost, queries = self._lost_ragged(energies, routing.ragged), pool(tokens, routing)
        else:
            lost = self._lost_shares(energies, routing.patches)
            queries = pool(tokens, routing)[:, self.prefix :]
        spread = spread_rows(
            torch.cat([mean_features(queries, lost), queries], -1), routing.token_slot
        )
        features, mean = spread[..., : self.channels + 1], spread[..., self.channels + 1 :]
        return torch.cat([features, tokens[:, self.prefix :] - mean], -1)

    def correction_macs(self, plan: Plan) -> int:
        """MACs per image of the correction under `plan`."""
        return self.correction_macs_asked(plan.slots) if any(plan.capacities[1:]) else 0

    def correction_macs_asked(self, queries: Number) -> Number:
        """The same of so many queries per image, prefix tokens not counted; gradients flow."""
        weights = self.correction
        if weights is None:
            return queries * 0
        rank, channels = weights.up.shape
        packed = self.prefix if self.config.packs else 0  # prefix tokens are not apart there
        grid_tokens = self.grid[0] * self.grid[1]
        return rank * (2 * channels * grid_tokens + (2 * channels + 1) * (queries + packed))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Routing:
        plan = self.plan
        if grid != self.grid:
            self._require_any_grid(grid)
            plan = rescale(plan, self.space(self.grid), self.space(grid), self.config)
        scores = self.scores(tokens, grid)
        if self.gate is not None and scores.logits is not None:
            logits, chances = self.gate.decide(scores.logits)
            scores = scores._replace(logits=logits, chances=chances)
        if self.asks:
            return self._ask(tokens, grid, scores, plan)
        with torch.no_grad():
            levels = self._allocate(self.gains(scores, grid), scores.tables, plan, grid)
        total = tokens.shape[0] * (self.prefix + plan.slots)
        return self._routing(tokens, grid, scores, levels, plan, total)

    def _require_any_grid(self, grid: tuple[int, int]) -> None:
        if self.only_here:
            raise ValueError(
                f"a converted block got a grid of {grid[0]} x {grid[1]} tokens; it was converted "
                f"for {self.grid[0]} x {self.grid[1]}, and the dense block does something else on "
                f"other sizes (a branch or a number in its forward follows the size). convert() "
                f"the model at this image size"
            )

    def _ask(self, tokens: Tensor, grid: tuple[int, int], scores: Scores, plan: Plan) -> Routing:
        """Every region at its gate's arg max (paper, section 3.2), within the capacity.

        Under layer routing the image is one region.
        """
        images, logits, gate = tokens.shape[0], scores.logits, self.gate
        assert logits is not None and gate is not None
        costs = [table.region_cost for table in scores.tables]
        regions = costs[0].shape[0]
        if not self.decides(plan):  # the finest plan is the dense model, whatever the gate
            levels = torch.zeros_like(logits[..., 0], dtype=torch.int64).expand(-1, regions)
            total = images * (self.prefix + plan.slots)
            return self._routing(tokens, grid, scores, levels, plan, total)
        if self._asks_by_layer:
            costs = [cost.sum(0, keepdim=True) for cost in costs]
        with torch.no_grad():
            levels = logits.argmax(-1)
            if self.config.capacity is None:
                count = int(level_counts(levels, costs).sum())
                torch._check(count > 0)
                total = images * self.prefix + count
            else:
                steps = (logits[..., :-1] - logits[..., 1:]).float()
                levels = demote(levels, steps, costs, images * plan.slots)
                total = images * (self.prefix + plan.slots)
        if self.config.capacity is None:
            gate.ask(scores.chances, levels, costs)
            if grid != self.grid and gate.demand is not None:
                gate.demand = self._at_own_size(gate.demand, costs)
        levels = levels.expand(-1, regions)
        return self._routing(tokens, grid, scores, levels, plan, total)

    def _at_own_size(self, queries: Tensor, costs: list[Tensor]) -> Tensor:
        """Queries per image on another grid to those of the same share at the converted size.

        Args:
            costs: per level, queries of every region of that grid.
        """
        most, least = costs[0].sum(), costs[-1].sum()
        own = self.level_costs().sum(0)
        share = (queries - least) / (most - least).clamp(min=1)
        return own[-1] + share * (own[0] - own[-1])

    def _allocate(
        self, gains: list[Tensor], tables: list[LevelTables], plan: Plan, grid: tuple[int, int]
    ) -> Tensor:
        sides = self.config.granularities
        if not gains:
            regions = tables[0].region_cost.shape[0]
            return torch.zeros((1, regions), dtype=torch.int64, device=tables[0].region_cost.device)
        packs = self.config.packs
        if self.config.routing_mode != "nested":
            costs = [t.region_cost for t in tables]
            stacked = torch.stack(gains, -1)
            by_region = share_levels if packs else allocate_levels
            return by_region(stacked, costs, plan.capacities, self._uniform_costs(grid))
        nested = self.nested_tables(grid, gains[0].device)
        space = self.space(grid)
        uniform = [
            (coarse // fine) ** 2 if divides(space, coarse) else None
            for fine, coarse in pairwise(sides)
        ]
        by_patch = share_nested if packs else allocate_nested
        return by_patch(
            gains,
            [t.children for t in nested],
            [t.parents for t in nested],
            [t.holders for t in nested],
            plan.budgets,
            uniform,
        )

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
        scores = self.scores(tokens, grid)
        levels = levels.expand(tokens.shape[0], -1)
        counts = level_counts(levels, [table.region_cost for table in scores.tables])
        needed = Plan(tuple(int(most) for most in counts.amax(0)))
        total = tokens.shape[0] * self.prefix + int(counts.sum())
        return self._routing(tokens, grid, scores._replace(chances=None), levels, needed, total)

    def _region_means(
        self, sums: list[Tensor], tables: list[LevelTables], grid: tuple[int, int]
    ) -> Tensor:
        """(B, rows, columns, C): the mean token of every region."""
        sides, region = self.config.granularities, self.config.region_side
        if region in sides:
            level = sides.index(region)
            return sums[level] / self._patch_counts(tables, grid)[level]
        total = sum_children(sums[-1], region // sides[-1])
        cells = side_counts(self.space(grid), region)
        return total / tables[0].region_cost.view(*cells, 1).clamp(min=1)

    def _gate_logits(
        self, sums: list[Tensor], tables: list[LevelTables], grid: tuple[int, int]
    ) -> Tensor:
        """(B, R, L): one linear layer on every region's mean token (paper, eq. 1); under layer
        routing (B, 1, L), on the image's."""
        assert self.gate is not None
        return self.gate(self._gate_inputs(sums, tables, grid).to(self.gate.weight.dtype))

    def _gate_inputs(
        self, sums: list[Tensor], tables: list[LevelTables], grid: tuple[int, int]
    ) -> Tensor:
        """(B, R, C) mean tokens of the regions, or (B, 1, C) of the image."""
        mean = self._region_means(sums, tables, grid).flatten(1, 2)
        if self._asks_by_layer:
            count = tables[0].region_cost
            mean = (mean * count.unsqueeze(-1)).sum(1, keepdim=True) / count.sum()
        return mean

    def _lost_shares(self, energies: list[Tensor], patches: tuple[Tensor | None, ...]) -> Tensor:
        """(B, slots): share of a patch's energy that its mean does not hold, 0 for tokens."""
        whole = energies[0]
        parts = []
        for level, ids in enumerate(patches):
            if level:
                sides = self.config.granularities
                whole = sum_children(whole, sides[level] // sides[level - 1])
            if ids is None:
                continue
            if not level:
                parts.append(torch.zeros_like(ids, dtype=whole.dtype))
                continue
            lost = 1.0 - energies[level] / whole.clamp(min=1e-12)
            parts.append(lost.clamp(0.0, 1.0).flatten(1).gather(1, ids))
        return torch.cat(parts, 1)

    def _lost_ragged(self, energies: list[Tensor], ragged: Ragged) -> Tensor:
        """(1, T): `_lost_shares` of packed queries."""
        whole = energies[0]
        count = ragged.row.shape[1] - self.prefix
        parts = [whole.new_zeros((whole.shape[0], count))]
        sides = self.config.granularities
        for level in range(1, len(sides)):
            whole = sum_children(whole, sides[level] // sides[level - 1])
            lost = 1.0 - energies[level] / whole.clamp(min=1e-12)
            parts.append(lost.clamp(0.0, 1.0).flatten(1))
        shares = F.pad(torch.cat(parts, 1), (self.prefix, 0))
        return shares.flatten().index_select(0, ragged.flat()).unsqueeze(0)

    def _routing(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        scores: Scores,
        levels: Tensor,
        plan: Plan,
        total: int,
    ) -> Routing:
        levels = levels.expand(tokens.shape[0], -1)
        gate = self.gate
        if scores.chances is not None and gate is not None and gate.path == "dense":
            routing = self._full_routing(tokens, grid, scores, levels, scores.chances)
        elif self.config.packs:
            mixed = self.asks and self.decides(plan)
            used = [mixed or capacity > 0 for capacity in plan.capacities]
            routing = self._ragged_routing(tokens, grid, scores, levels, used, total)
        else:
            routing = self._static_routing(tokens, grid, scores, levels, plan.capacities)
        if self.decides(plan) and self.correction is not None and scores.energies is not None:
            with torch.no_grad():
                if routing.ragged is not None:
                    lost = self._lost_ragged(scores.energies, routing.ragged)
                else:
                    lost = self._lost_shares(scores.energies, routing.patches)
            return routing._replace(correction=self.correction, lost=lost)
        return routing
