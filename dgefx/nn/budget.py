"""The budget solver: one plan per block such that the whole model meets `gamma` at least loss.

Costs are multiply-accumulates (MACs) as `torch.utils.flop_counter.FlopCounterMode` counts them,
measured by `dgefx.passes.plan.cost`. Losses come from a
calibration, or from `guess` where there was none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgefx.nn.capacity import Plan

#: share of the dense model's MACs that may stay unspent for a lower loss
SLACK = 0.01
#: resolution of the knapsack; what is above the floor is divided into so many units
_UNITS = 16000
#: how much less the last block's detail is worth than the first's, as exp(-_DEPTH); DeiT-Tiny's
#: measured sensitivities fall by about as much
_DEPTH = 5.0


@dataclass(frozen=True)
class BlockCost:
    """MACs of one block for the whole example batch, and the plans it can choose from.

    Linear in the queries and, inside windows, in the slots that hold them.
    """

    dense: int
    finest: int
    coarsest: int
    plans: tuple[Plan, ...]
    #: of attention inside windows, whose slots depend on the levels in use only:
    slot_macs: float = 0.0  # MACs of each slot
    slots: tuple[tuple[tuple[bool, ...], int], ...] = ()  # per set of levels in use, the slots

    def macs(self, plan: Plan) -> float:
        """MACs of the converted block with `plan`, without a correction."""
        low, high = self.plans[0], self.plans[-1]
        if low.slots == high.slots:
            return float(self.finest)
        share = (plan.slots - low.slots) / (high.slots - low.slots)
        bottom = self.coarsest - self._in_windows(low)
        top = self.finest - self._in_windows(high)
        return bottom + (top - bottom) * share + self._in_windows(plan)

    def macs_asked(self, queries: Tensor) -> Tensor:
        """MACs of the converted block when gates ask for so many queries, of any level.

        Args:
            queries: per image, prefix tokens not counted; gradients flow.
        """
        low, high = self.plans[0], self.plans[-1]
        if low.slots == high.slots:
            return queries * 0.0 + float(self.finest)
        bottom = self.coarsest - self._in_windows(low)
        top = self.finest - self._in_windows(high)
        share = (queries - low.slots) / (high.slots - low.slots)
        # windows have the slots of all levels where any level may be asked for
        held = max((slots for _, slots in self.slots), default=0)
        return bottom + (top - bottom) * share + self.slot_macs * held

    def _in_windows(self, plan: Plan) -> float:
        if not self.slots:
            return 0.0
        return self.slot_macs * dict(self.slots)[tuple(c > 0 for c in plan.capacities)]


@dataclass(frozen=True)
class Choices:
    """What one block can be set to, by rising slots: plans, their MACs and their losses."""

    plans: tuple[Plan, ...]
    macs: tuple[float, ...]
    losses: tuple[float, ...]


def guess_losses(plans: Sequence[Plan], index: int, blocks: int) -> tuple[float, ...]:
    """Loss of every plan of a block, from nothing but its place: a guess, not a measurement.

    Early blocks lose most by coarse queries (everything later builds on their detail), and loss
    grows faster than the slots that are saved.

    Args:
        index: of the block among the converted `blocks`, in the order they run.
    """
    depth = index / max(blocks - 1, 1)
    finest = plans[-1].slots
    return tuple(math.exp(-_DEPTH * depth) * (1.0 - plan.slots / finest) ** 2 for plan in plans)


def floor_ratio(choices: Mapping[str, Choices], rest: float, dense: float) -> float:
    """Whole-model MAC ratio with every converted block at its cheapest.

    Args:
        rest: MACs outside the converted blocks. dense: MACs of the dense model.
    """
    return (rest + sum(min(c.macs) for c in choices.values())) / dense


def solve(
    choices: Mapping[str, Choices], rest: float, dense: float, gamma: float
) -> dict[str, Plan]:
    """The plans with the least total loss whose whole-model MAC ratio is at most `gamma`.

    A knapsack over the blocks, solved exactly with costs rounded up to 1/16000 of what the budget
    leaves above the floor. Where it can, it spends the budget to within `SLACK`.

    Args:
        choices: per converted block.
        rest: MACs outside the converted blocks. dense: MACs of the dense model.
        gamma: target ratio, in (0, 1]; 1 gives the finest plan everywhere.

    Raises:
        ValueError: gamma is under the floor.
    """
    if gamma >= 1.0:
        return {name: choice.plans[-1] for name, choice in choices.items()}
    floor = floor_ratio(choices, rest, dense)
    if floor > gamma:
        raise ValueError(
            f"gamma={gamma:g} is under this model's floor of {floor:.3f}: with every region of all "
            f"{len(choices)} converted blocks at its coarsest granularity, what remains is the "
            f"keys and values of all tokens, one query per coarsest patch and the layers that are "
            f"not converted ({rest / dense:.3f}). Use gamma >= {math.ceil(floor * 1000) / 1000:g}, "
            f"or coarser granularities; dgefx.explain lists the blocks that stay dense and why."
        )
    spare = (gamma - floor) * dense
    unit = max(spare / _UNITS, 1e-12 * dense)
    best = torch.full((_UNITS + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0.0
    picks = []
    for choice in choices.values():
        cheapest = min(choice.macs)
        following = torch.full_like(best, torch.inf)
        pick = torch.zeros(_UNITS + 1, dtype=torch.int64)
        for index, (macs, loss) in enumerate(zip(choice.macs, choice.losses, strict=True)):
            units = math.ceil((macs - cheapest) / unit - 1e-9)
            if units > _UNITS:
                continue
            total = best[: _UNITS + 1 - units] + loss
            pick[units:].masked_fill_(total < following[units:], index)
            torch.fmin(total, following[units:], out=following[units:])
        best = following
        picks.append(pick)
    start = max(0, _UNITS - int(SLACK * dense / unit))
    if not bool(torch.isfinite(best[start:]).any()):
        start = 0
    spent = start + int(best[start:].argmin())
    chosen: dict[str, Plan] = {}
    for name, pick in zip(reversed(list(choices)), reversed(picks), strict=True):
        choice = choices[name]
        index = int(pick[spent])
        chosen[name] = choice.plans[index]
        spent -= math.ceil((choice.macs[index] - min(choice.macs)) / unit - 1e-9)
    return {name: chosen[name] for name in choices}
