"""The budget solver: one capacity plan per block such that the whole model meets `gamma`.

Costs are multiply-accumulates (MACs) as `torch.utils.flop_counter.FlopCounterMode` counts them,
measured by `dgefx.passes.cost`; a converted block's cost is linear in its slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dgefx.nn.capacity import Plan

#: share of the dense model's MACs that may stay unspent for the sake of equal blocks
SLACK = 0.01
#: share that may stay unspent at all, before evenness between blocks is given up
BAND = 0.02


@dataclass(frozen=True)
class BlockCost:
    """MACs of one block for the whole example batch, and the plans it can choose from."""

    dense: int
    finest: int
    coarsest: int
    plans: tuple[Plan, ...]

    def macs(self, plan: Plan) -> float:
        """MACs of the converted block with `plan`."""
        low, high = self.plans[0].slots, self.plans[-1].slots
        if low == high:
            return float(self.finest)
        share = (plan.slots - low) / (high - low)
        return self.coarsest + (self.finest - self.coarsest) * share


def _total(costs: Mapping[str, BlockCost], rest: float, chosen: Mapping[str, int]) -> float:
    return rest + sum(cost.macs(cost.plans[chosen[name]]) for name, cost in costs.items())


def _choose(cost: BlockCost, share: float) -> int:
    """Index of the plan whose slots come closest to `share` of the finest plan's."""
    wanted = share * cost.plans[-1].slots
    return min(range(len(cost.plans)), key=lambda i: abs(cost.plans[i].slots - wanted))


def floor_ratio(costs: Mapping[str, BlockCost], dense: float) -> float:
    """Whole-model MAC ratio with every region of every converted block at its coarsest."""
    rest = dense - sum(cost.dense for cost in costs.values())
    return _total(costs, rest, dict.fromkeys(costs, 0)) / dense


def solve(costs: Mapping[str, BlockCost], dense: float, gamma: float) -> dict[str, Plan]:
    """Plans with the largest whole-model MAC ratio not above `gamma`, equal shares first.

    Args:
        costs: per converted block.
        dense: MACs of the dense model.
        gamma: target ratio, in (0, 1]; 1 gives the finest plan everywhere.

    Raises:
        ValueError: gamma is under the floor.
    """
    if gamma >= 1.0:
        return {name: cost.plans[-1] for name, cost in costs.items()}
    rest = dense - sum(cost.dense for cost in costs.values())
    limit = gamma * dense
    floor = floor_ratio(costs, dense)
    if floor > gamma:
        raise ValueError(
            f"gamma={gamma:g} is under this model's floor of {floor:.3f}: with every region of all "
            f"{len(costs)} converted blocks at its coarsest granularity, what remains is the keys "
            f"and values of all tokens, one query per coarsest patch and the layers that are not "
            f"converted ({rest / dense:.3f}). Use gamma >= {floor:.3f}, or coarser granularities."
        )
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        chosen = {name: _choose(cost, middle) for name, cost in costs.items()}
        if _total(costs, rest, chosen) <= limit:
            low = middle
        else:
            high = middle
    chosen = {name: _choose(cost, low) for name, cost in costs.items()}
    groups: dict[BlockCost, list[str]] = {}
    for name, cost in costs.items():
        groups.setdefault(cost, []).append(name)
    # equal blocks stay equal as long as the budget is nearly met: they then share compiled kernels
    _top_up(costs, rest, limit, chosen, list(groups.values()))
    if limit - _total(costs, rest, chosen) > SLACK * dense:
        _top_up(costs, rest, limit, chosen, [[name] for name in costs])
    few_plans = all(len(cost.plans) <= 4 for cost in costs.values())
    if limit - _total(costs, rest, chosen) > (SLACK if few_plans else BAND) * dense:
        _fill(costs, rest, limit, dense, chosen)
    return {name: cost.plans[chosen[name]] for name, cost in costs.items()}


def _top_up(
    costs: Mapping[str, BlockCost],
    rest: float,
    limit: float,
    chosen: dict[str, int],
    groups: list[list[str]],
) -> None:
    """Spend what rounding left: raise the group with the smallest share while it still fits."""
    spent = _total(costs, rest, chosen)
    open_ = list(groups)
    while open_:
        group = min(
            open_,
            key=lambda g: costs[g[0]].plans[chosen[g[0]]].slots / costs[g[0]].plans[-1].slots,
        )
        cost, index = costs[group[0]], chosen[group[0]]
        step = 0.0
        if index + 1 < len(cost.plans):
            step = len(group) * (cost.macs(cost.plans[index + 1]) - cost.macs(cost.plans[index]))
        if not step or spent + step > limit:
            open_.remove(group)
            continue
        for name in group:
            chosen[name] = index + 1
        spent += step


def _fill(
    costs: Mapping[str, BlockCost], rest: float, limit: float, dense: float, chosen: dict[str, int]
) -> None:
    """The combination of plans that spends most of the budget (a knapsack), finest first.

    For blocks with few plans (one granularity per layer), where raising one at a time gets stuck.
    """
    unit = dense / 4000
    reachable: dict[int, tuple[int, ...]] = {0: ()}
    names = list(costs)
    for name in names:
        following: dict[int, tuple[int, ...]] = {}
        for spent, picks in reachable.items():
            for index in reversed(range(len(costs[name].plans))):
                total = spent + math.ceil(costs[name].macs(costs[name].plans[index]) / unit)
                if total * unit <= limit - rest:
                    following.setdefault(total, (*picks, index))
        reachable = following
    if not reachable:
        return
    best = list(reachable[max(reachable)])
    if _total(costs, rest, dict(zip(names, best, strict=True))) <= _total(costs, rest, chosen):
        return
    for cost in set(costs.values()):
        # among equal blocks the early ones matter most
        places = [i for i, name in enumerate(names) if costs[name] == cost]
        for place, index in zip(
            places, sorted((best[p] for p in places), reverse=True), strict=True
        ):
            best[place] = index
    chosen.update(zip(names, best, strict=True))
