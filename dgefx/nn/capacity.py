"""How a block's query budget is split over granularities: slots per level, as Python ints.

`plans` lists the splits a block can choose from, from all coarse to all fine; the budget solver
(`dgefx.nn.budget`) picks one per block; `rescale` carries a split to another grid size.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from dgefx.config import DGEConfig
from dgefx.nn.hierarchy import Grid, divides, max_region_cost, patch_count, side_counts
from dgefx.nn.nested_capacity import nested_budgets, nested_capacities
from dgefx.nn.windows import Tiling

_STEPS = 400
_FEW_REGIONS = 4


class Plan(NamedTuple):
    """Slots per level on one grid; `budgets` only under nested routing."""

    capacities: tuple[int, ...]
    budgets: tuple[int, ...] = ()  # see `dgefx.nn.nested_capacity`

    @property
    def slots(self) -> int:
        return sum(self.capacities)


def region_count(grid: Grid, region: int) -> int:
    """Number of regions of `grid`."""
    rows, columns = side_counts(grid, region)
    return rows * columns


def _last_capacity(grid: Grid, config: DGEConfig, upper: list[int]) -> int:
    """Slots of the coarsest level that hold every region the finer levels may leave over."""
    regions = region_count(grid, config.region_side)
    left = regions
    for capacity, side in zip(upper, config.granularities, strict=False):
        # the greedy fill takes at least this many regions, whatever their (clipped) sizes
        left -= min(left, capacity // max_region_cost(grid, side, config.region_side))
    coarsest = config.granularities[-1]
    worst = left * max_region_cost(grid, coarsest, config.region_side)
    return min(worst, patch_count(grid, coarsest))


def _region_costs(grid: Grid, side: int, region: int) -> list[int]:
    """The different numbers of patches of `side` that regions of `grid` hold."""
    per_axis = []
    if isinstance(grid, Tiling):
        rows, columns = (sorted(set(line) - {0}) for line in grid.children(side, region))
        return sorted({h * w for h in rows for w in columns})
    for length in grid:
        whole, rest = divmod(length, region)
        sizes = ([region // side] if whole else []) + ([-(-rest // side)] if rest else [])
        per_axis.append(sizes)
    return sorted({h * w for h in per_axis[0] for w in per_axis[1]})


def plan_of(grid: Grid, config: DGEConfig, capacities: tuple[int, ...]) -> Plan:
    """The plan with given slots per level, as `Plan.capacities` lists them."""
    if config.routing_mode != "nested":
        return Plan(capacities)
    return Plan(capacities, nested_budgets(grid, config, capacities))


def plan_from_fractions(grid: Grid, config: DGEConfig, fractions: tuple[float, ...]) -> Plan:
    """Slots per level when `fractions` (one per level, sum 1) of the grid have each granularity."""
    if config.routing_mode == "nested":
        return plan_of(grid, config, nested_capacities(grid, config, fractions))
    totals = [patch_count(grid, side) for side in config.granularities]
    for level, fraction in enumerate(fractions):
        if fraction >= 1.0 - 1e-9:
            return Plan(tuple(t if i == level else 0 for i, t in enumerate(totals)))
    regions = region_count(grid, config.region_side)
    clipped = not divides(grid, config.region_side)
    upper: list[int] = []
    left = regions
    for total, side, fraction in zip(totals[:-1], config.granularities, fractions, strict=False):
        price = max_region_cost(grid, side, config.region_side)
        if clipped:
            costs = _region_costs(grid, side, config.region_side)
            unit = math.gcd(*costs)  # slots beyond a multiple of it would stay empty
            capacity = round(fraction * total / unit) * unit
            capacity = 0 if capacity < costs[0] else capacity
            left -= min(left, capacity // price)
        else:
            count = min(left, round(fraction * regions))
            left -= count
            capacity = count * price
        upper.append(capacity)
    return Plan((*upper, _last_capacity(grid, config, upper)))


def _mixtures(costs: list[float], means: list[float]) -> list[tuple[float, ...]]:
    """The maximum-entropy mixtures of levels with the given mean costs per region.

    Without data nothing is known of how detail is spread over an image; this is the mixture that
    assumes least, and it is monotone in the budget.
    """
    cost = torch.tensor(costs, dtype=torch.float64)
    mean = torch.tensor(means, dtype=torch.float64)
    low, high = torch.full_like(mean, -400.0), torch.full_like(mean, 400.0)

    def weights(slope: Tensor) -> Tensor:
        return torch.softmax(slope.unsqueeze(1) * (cost / cost[0]), 1)

    for _ in range(60):
        middle = (low + high) / 2
        under = weights(middle) @ cost < mean
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    return [tuple(mixture) for mixture in weights(low).tolist()]


@functools.lru_cache(maxsize=256)
def plans(grid: Grid, config: DGEConfig) -> tuple[Plan, ...]:
    """All splits of a block on `grid` by rising number of slots, all coarse to all fine."""
    levels = config.levels
    pure = [
        plan_from_fractions(grid, config, tuple(float(i == level) for i in range(levels)))
        for level in range(levels)
    ]
    if config.routing_mode == "layer":
        return tuple(sorted(set(pure), key=lambda plan: plan.slots))
    regions = region_count(grid, config.region_side)
    costs = [patch_count(grid, side) / regions for side in config.granularities]
    # the finest last: where patches hold one token each, it is the only plan
    found = {pure[-1].slots: pure[-1], pure[0].slots: pure[0]}
    if regions <= _FEW_REGIONS:  # mixtures of so few regions leave wide gaps
        for plan in pure:
            found.setdefault(plan.slots, plan)
    steps = range(1, _STEPS)
    means = [costs[-1] + (costs[0] - costs[-1]) * step / _STEPS for step in steps]
    for mixture in _mixtures(costs, means):
        plan = plan_from_fractions(grid, config, mixture)
        if pure[-1].slots < plan.slots < pure[0].slots:
            found.setdefault(plan.slots, plan)
    return tuple(found[slots] for slots in sorted(found))


def rescale(plan: Plan, old: Grid, new: Grid, config: DGEConfig) -> Plan:
    """The same shares of every granularity on a grid of another size.

    Args:
        plan: on grid `old`.
        new: the grid of the call.
    """
    if old == new:
        return plan
    totals = [patch_count(old, side) for side in config.granularities]
    fractions = [c / t for c, t in zip(plan.capacities, totals, strict=True)]
    # only a plan without finer slots is the coarsest one: clipped grids may fill the last level
    coarsest = not any(plan.capacities[:-1])
    fractions[-1] = 1.0 if coarsest else min(max(0.0, 1.0 - sum(fractions[:-1])), 1.0 - 1e-6)
    return plan_from_fractions(new, config, tuple(fractions))
