"""Capacities under nested routing: how many patches of a level may be split, and what is left.

Nested routing works from coarse to fine: of the patches present at a level some are split, and
their children are present at the next finer one. `budgets[l]` bounds the patches of level l that
are present; a level's slots hold those that are present and not split. Used by `dgefx.nn.capacity`.
"""

from __future__ import annotations

import math

from dgefx.config import DGEConfig
from dgefx.nn.hierarchy import Grid, children_counts, patch_count


def least_split(counts: list[tuple[int, int]], budget: int) -> int:
    """Patches that are surely split when `budget` children may appear, whatever their sizes.

    Any k patches fit if the k with most children do.

    Args:
        counts: (children, patches with so many), most children first.
    """
    split = 0
    for children, patches in counts:
        fit = min(patches, budget // children)
        split += fit
        budget -= fit * children
        if fit < patches:
            break
    return split


def nested_budgets(grid: Grid, config: DGEConfig, capacities: tuple[int, ...]) -> tuple[int, ...]:
    """Per level but the coarsest, how many of its patches may be present."""
    sides = config.granularities
    budgets: list[int] = []
    for level in range(config.levels - 1):
        split = 0
        if level:
            counts = children_counts(grid, sides[level - 1], sides[level])
            split = least_split(counts, budgets[-1])
        budgets.append(capacities[level] + split)
    return tuple(budgets)


def nested_capacities(
    grid: Grid, config: DGEConfig, fractions: tuple[float, ...]
) -> tuple[int, ...]:
    """Slots per level when `fractions` (one per level, sum 1) of the grid have each granularity."""
    sides = config.granularities
    capacities: list[int] = []
    split, reached = 0, 0.0
    for level, side in enumerate(sides):
        total = patch_count(grid, side)
        if level == len(sides) - 1:
            capacities.append(total - split)
            break
        reached = min(reached + fractions[level], 1.0)
        counts = children_counts(grid, side, sides[level + 1])
        unit = math.gcd(*(children for children, _ in counts))  # more would stay empty
        budget = min(total, round(reached * total / unit) * unit)
        budget = 0 if budget < counts[-1][0] else budget
        budget = max(budget, split)
        capacities.append(budget - split)
        split = least_split(counts, budget)
    return tuple(capacities)
