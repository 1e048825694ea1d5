"""`allocate`: gains to levels and slots under fixed capacities, without a host sync.

Every image of the batch gets the same number of slots per level (the per-image budget), so all
shapes are static and images never influence each other. Sort, cumulative sum, compare and
scatter only: nothing here depends on the data except values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _inverse_permutation(order: Tensor) -> Tensor:
    position = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, position)


def _take_best(gain: Tensor, free: Tensor, count: int) -> Tensor:
    """(B, R) bool: the `count` free regions with the highest gain."""
    order = gain.masked_fill(~free, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return (_inverse_permutation(order) < count) & free


def _take_within(gain: Tensor, free: Tensor, cost: Tensor, capacity: int) -> Tensor:
    """(B, R) bool: free regions by falling gain while their costs fit into `capacity`.

    Three passes: after the best prefix, smaller (clipped) regions may still fill what is left.
    """
    order = gain.masked_fill(~free, -torch.inf).argsort(dim=1, descending=True, stable=True)
    price = cost[order]
    open_ = free.gather(1, order)
    taken = torch.zeros_like(open_)
    left = torch.full((gain.shape[0], 1), capacity, device=gain.device)
    for _ in range(3):
        candidate = open_ & ~taken & (price <= left)
        spent = torch.where(candidate, price, 0)
        chosen = candidate & (spent.cumsum(1) <= left)
        taken = taken | chosen
        left = left - torch.where(chosen, price, 0).sum(1, keepdim=True)
    return taken.gather(1, _inverse_permutation(order))


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
    patch_local: Sequence[Tensor],
    token_patch: Sequence[Tensor],
    costs: Sequence[Tensor],
    capacities: Sequence[int],
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """Number the chosen patches.

    Args:
        levels: (B, R).
        patch_region, patch_local: per level (P,).
        token_patch: per level (N,).
        costs: per level (R,).
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
        chosen = levels == level
        spent = torch.where(chosen, costs[level], 0)
        start = spent.cumsum(1) - spent  # (B, R) first slot of every chosen region
        region, local = patch_region[level], patch_local[level]
        slot = start[:, region] + local
        target = torch.where(chosen[:, region], slot, capacity)
        ids = torch.arange(region.shape[0], device=levels.device).expand_as(target)
        table = torch.zeros(
            (levels.shape[0], capacity + 1), dtype=torch.int64, device=levels.device
        )
        patches.append(table.scatter(1, target, ids)[:, :capacity])
        of_token = (slot + offset)[:, token_patch[level]]
        if token_slot is None:
            token_slot = of_token
        else:
            token_chosen = chosen[:, region[token_patch[level]]]
            token_slot = torch.where(token_chosen, of_token, token_slot)
        offset += capacity
    assert token_slot is not None
    return tuple(patches), token_slot
