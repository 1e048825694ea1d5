"""`allocate`: gains to levels and slots under fixed capacities, without a host sync.

Every image of the batch gets the same number of slots per level (the per-image budget), so all
shapes are static and images never influence each other. Sort, cumulative sum, compare and
scatter only: nothing here depends on the data except values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: up to so many regions, comparing all pairs is cheaper than sorting (and fuses with its readers)
_PAIRS_LIMIT = 1024


def _running_total(values: Tensor, gain: Tensor) -> Tensor:
    """Sum of `values` over a region and all that come before it by falling gain (ties: in order).

    Args:
        values: (B, R) int64. gain: (B, R).
    """
    regions = gain.shape[1]
    if regions <= _PAIRS_LIMIT:
        index = torch.arange(regions, device=gain.device)
        mine, other = gain.unsqueeze(2), gain.unsqueeze(1)
        earlier = (other > mine) | ((other == mine) & (index <= index.unsqueeze(1)))
        return torch.where(earlier, values.unsqueeze(1), 0).sum(2)
    order = gain.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(values).scatter(1, order, values.gather(1, order).cumsum(1))


def _take_best(gain: Tensor, free: Tensor, count: int) -> Tensor:
    """(B, R) bool: the `count` free regions with the highest gain."""
    return free & (_running_total(free.long(), gain) <= count)


def _take_within(gain: Tensor, free: Tensor, cost: Tensor, capacity: int) -> Tensor:
    """(B, R) bool: free regions by falling gain while their costs fit into `capacity`.

    Three passes: after the best prefix, smaller (clipped) regions may still fill what is left.
    """
    taken = torch.zeros_like(free)
    left = torch.full((gain.shape[0], 1), capacity, device=gain.device)
    for _ in range(3):
        price = torch.where(free & ~taken & (cost <= left), cost, 0)
        chosen = (price > 0) & (_running_total(price, gain) <= left)
        taken = taken | chosen
        left = left - torch.where(chosen, price, 0).sum(1, keepdim=True)
    return taken


def allocate_levels(
    gains: Tensor, costs: Sequence[Tensor], capacities: Sequence[int], uniform: Sequence[int | None]
) -> Tensor:
    """One level per region such that every level's patches fit its capacity.

    Args:
        gains: (B, R, L - 1): what a region gains from level l over level l + 1.
        costs: per level (R,) patches of every region.
        capacities: per level, slots. The last must hold whatever is not taken before.
        uniform: per level, the cost where all regions cost the same, else None.

    Returns:
        (B, R) int64, 0 = finest.
    """
    batch, regions = gains.shape[:2]
    last = len(capacities) - 1
    levels = torch.full((batch, regions), last, dtype=torch.int64, device=gains.device)
    free = torch.ones((batch, regions), dtype=torch.bool, device=gains.device)
    for level in range(last):
        capacity, price = capacities[level], uniform[level]
        if not capacity:
            continue
        gain = gains[:, :, level]
        if price is not None:
            taken = _take_best(gain, free, capacity // price)
        else:
            taken = _take_within(gain, free, costs[level], capacity)
        levels = torch.where(taken, level, levels)
        free = free & ~taken
    return levels


def assign_slots(
    levels: Tensor,
    patch_region: Sequence[Tensor],
    token_patch: Sequence[Tensor],
    capacities: Sequence[int],
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """Number the chosen patches, level by level, in raster order (so that at the finest level the
    queries are the tokens, in their order).

    Args:
        levels: (B, R).
        patch_region: per level (P,).
        token_patch: per level (N,).
        capacities: per level, slots.

    Returns:
        Per level the patch ids in its slots, (B, capacity) or None (slots past the chosen patches
        hold patch 0, their result is never read); and (B, N) the slot of every token's patch,
        counted over all levels.
    """
    patches: list[Tensor | None] = []
    token_slot = None
    offset = 0
    for level, capacity in enumerate(capacities):
        if not capacity:
            patches.append(None)
            continue
        chosen = (levels == level)[:, patch_region[level]]  # (B, P)
        slot = chosen.long().cumsum(1) - 1
        target = torch.where(chosen, slot, capacity)
        ids = torch.arange(target.shape[1], device=levels.device).expand_as(target)
        table = torch.zeros(
            (levels.shape[0], capacity + 1), dtype=torch.int64, device=levels.device
        )
        patches.append(table.scatter(1, target, ids)[:, :capacity])
        of_token = (slot + offset)[:, token_patch[level]]
        if token_slot is None:
            token_slot = of_token
        else:
            token_slot = torch.where(chosen[:, token_patch[level]], of_token, token_slot)
        offset += capacity
    assert token_slot is not None
    return tuple(patches), token_slot
