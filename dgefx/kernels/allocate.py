"""`allocate`: gains to levels and slots under fixed capacities, without a host sync.

Every image of the batch gets the same number of slots per level (the per-image budget), so all
shapes are static and images never influence each other. Sort, cumulative sum, compare and
scatter only: nothing here depends on the data except values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgefx.kernels.allocate_op import allocate

#: up to so many regions, comparing all pairs is cheaper than sorting (and fuses with its readers)
_PAIRS_LIMIT = 144


def _ranked(gain: Tensor) -> Tensor:
    """NaN as the least gain: compared as it is, it would take slots that it does not have."""
    return torch.where(gain.isnan(), -torch.inf, gain)


def _running_total(values: Tensor, gain: Tensor, pairs: bool) -> Tensor:
    """Sum of `values` over a region and all that come before it by falling gain (ties: in order).

    Args:
        values: (B, R) int64. gain: (B, R).
        pairs: whether all pairs may be compared, where they are few.
    """
    regions = gain.shape[1]
    if pairs and regions <= _PAIRS_LIMIT:
        index = torch.arange(regions, device=gain.device)
        mine, other = gain.unsqueeze(2), gain.unsqueeze(1)
        earlier = (other > mine) | ((other == mine) & (index <= index.unsqueeze(1)))
        return torch.where(earlier, values.unsqueeze(1), 0).sum(2)
    order = gain.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(values).scatter(1, order, values.gather(1, order).cumsum(1))


def _take_best(gain: Tensor, free: Tensor, count: int, pairs: bool) -> Tensor:
    """(B, R) bool: the `count` free regions with the highest gain."""
    return free & (_running_total(free.long(), gain, pairs) <= count)


def _take_within(gain: Tensor, free: Tensor, cost: Tensor, capacity: int, pairs: bool) -> Tensor:
    """(B, R) bool: free regions by falling gain while their costs fit into `capacity`.

    Three passes: after the best prefix, smaller (clipped) regions may still fill what is left.
    """
    price = torch.where(free, cost, 0)
    if pairs and gain.shape[1] <= _PAIRS_LIMIT:
        return _fill(price, capacity, lambda values: _running_total(values, gain, pairs))
    # sorted once for all passes
    order = gain.argsort(dim=1, descending=True, stable=True)
    taken = _fill(price.gather(1, order), capacity, lambda values: values.cumsum(1))
    return torch.zeros_like(taken).scatter(1, order, taken)


def _fill(price: Tensor, capacity: int, running: Callable[[Tensor], Tensor]) -> Tensor:
    """See `_take_within`; `running` sums over a region and all that come before it."""
    taken = torch.zeros_like(price, dtype=torch.bool)
    left = torch.full((price.shape[0], 1), capacity, device=price.device)
    for _ in range(3):
        open_price = torch.where(taken | (price > left), 0, price)
        chosen = (open_price > 0) & (running(open_price) <= left)
        taken = taken | chosen
        left = left - torch.where(chosen, open_price, 0).sum(1, keepdim=True)
    return taken


def allocate_levels(
    gains: Tensor,
    costs: Sequence[Tensor],
    capacities: Sequence[int],
    uniform: Sequence[int | None],
    pairs: bool = True,
) -> Tensor:
    """One level per region such that every level's patches fit its capacity.

    Args:
        gains: (B, R, L - 1): what a region gains from level l over level l + 1.
        costs: per level (R,) patches of every region.
        capacities: per level, slots. The last must hold whatever is not taken before.
        uniform: per level, the cost where all regions cost the same, else None.
        pairs: whether pairs of regions may be compared where R is small; not where R counts a whole
            batch, as a compiler would ask how small with every new batch size.

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
        gain = _ranked(gains[:, :, level])
        if price is not None:
            taken = _take_best(gain, free, capacity // price, pairs)
        else:
            taken = _take_within(gain, free, costs[level], capacity, pairs)
        levels = torch.where(taken, level, levels)
        free = free & ~taken
    return levels


def allocate_nested(
    gains: Sequence[Tensor],
    children: Sequence[Tensor],
    parents: Sequence[Tensor],
    holders: Sequence[Tensor],
    budgets: Sequence[int],
    uniform: Sequence[int | None],
    pairs: bool = True,
) -> Tensor:
    """Levels where every patch decides for itself whether it is split, from coarse to fine.

    Args:
        gains: per level l but the coarsest, (B, P of l + 1): what splitting a patch of level
            l + 1 into patches of level l gains per query.
        children: per level l, (P of l + 1,) patches of level l in each.
        parents: per level l, (P of l,) patch of level l + 1 that holds it.
        holders: per level l, (P of 1,) patch of level l + 1 that holds each patch of level 1; the
            first is not read.
        budgets: per level l, how many patches of it may be present.
        uniform: per level l, the number of children where all have the same, else None.

    Returns:
        (B, P of 1) int64, 0 = finest.
    """
    coarsest = len(budgets)
    batch = gains[0].shape[0]
    device = gains[0].device
    units = gains[0].shape[1]
    levels = torch.full((batch, units), coarsest, dtype=torch.int64, device=device)
    present = torch.ones_like(gains[-1], dtype=torch.bool)
    for level in range(coarsest - 1, -1, -1):
        budget, price = budgets[level], uniform[level]
        if not budget:
            break
        gain = _ranked(gains[level])
        if price is not None:
            split = _take_best(gain, present, budget // price, pairs)
        else:
            split = _take_within(gain, present, children[level], budget, pairs)
        levels = torch.where(split[:, holders[level]] if level else split, level, levels)
        if level:
            present = split[:, parents[level]]
    return levels


class Slots(NamedTuple):
    """Where the chosen patches are.

    patches: per level the patch ids in its slots, (B, capacity) or None; slots past the chosen
        patches hold patch 0, their result is never read.
    token_slot: (B, N) the slot of every token's patch, counted over all levels.
    patch_slot: (B, patches of the levels with slots) the slot of every patch, -1 where it has none.
    ids: (B, slots) the patch in every slot, counted over all levels, -1 where it is idle; made
        only where `dgefx.kernels.packing` wants it.
    """

    patches: tuple[Tensor | None, ...]
    token_slot: Tensor
    patch_slot: Tensor
    ids: Tensor | None = None


def assign_slots(
    levels: Tensor,
    patch_region: Sequence[Tensor],
    token_patch: Sequence[Tensor],
    capacities: Sequence[int],
    existing: Sequence[Tensor | None],
) -> Slots:
    """Number the chosen patches, level by level, in raster order (so that at the finest level the
    queries are the tokens, in their order).

    Args:
        levels: (B, R).
        patch_region: per level (P,).
        token_patch: per level (N,).
        capacities: per level, slots.
        existing: per level (P,) bool, or None where every patch holds tokens.
    """
    used = [level for level, capacity in enumerate(capacities) if capacity]
    counts = [patch_region[level].shape[0] for level in used]
    # all levels in one row, so that one cumulative sum and one scatter serve them
    parts = []
    for level in used:
        part, exists = (levels == level)[:, patch_region[level]], existing[level]
        parts.append(part if exists is None else part & exists)
    chosen = torch.cat(parts, 1)
    running = chosen.long().cumsum(1)
    shifts, rows = [], None
    start = offset = 0
    token_level = levels[:, patch_region[0]]
    for level, count in zip(used, counts, strict=True):
        before = running[:, start - 1 : start] if start else torch.zeros_like(running[:, :1])
        shifts.append((offset - 1 - before).expand(-1, count))
        row = token_patch[level] + start
        rows = row.expand_as(token_level) if rows is None else rows
        rows = torch.where(token_level == level, row, rows)
        start += count
        offset += capacities[level]
    assert rows is not None
    slot = running + torch.cat(shifts, 1)
    target = torch.where(chosen, slot, offset)
    ids = torch.arange(start, device=levels.device).expand_as(target)
    table = torch.zeros((levels.shape[0], offset + 1), dtype=torch.int64, device=levels.device)
    table = table.scatter(1, target, ids)
    patches: list[Tensor | None] = [None] * len(capacities)
    start = offset = 0
    for level, count in zip(used, counts, strict=True):
        # a slot that nothing was scattered into holds 0, which may lie before this level
        stop = offset + capacities[level]
        patches[level] = (table[:, offset:stop] - start).clamp(min=0)
        start, offset = start + count, stop
    return Slots(tuple(patches), slot.gather(1, rows), torch.where(chosen, slot, -1))


def assign_slots_on_gpu(
    levels: Tensor,
    patch_region: Sequence[Tensor],
    token_patch: Sequence[Tensor],
    capacities: Sequence[int],
    existing: Sequence[Tensor | None],
) -> Slots:
    """`assign_slots` by the operator `dgefx::allocate`, with `ids`."""
    images, device = levels.shape[0], levels.device
    counts = [region.shape[0] for region in patch_region]
    starts = [sum(counts[:level]) for level in range(len(counts))]
    offsets = [sum(capacities[:level]) for level in range(len(counts))]
    slots, image = sum(capacities), torch.arange(images, device=device)[:, None]
    # from a list on the host it would be a copy, which CUDA graphs do not take
    segment = torch.cat([image * slots + offset for offset in offsets], 1)
    patch, patch_slot, token_slot = allocate(
        levels,
        torch.cat(list(patch_region)),
        torch.cat([torch.full_like(r, level) for level, r in enumerate(patch_region)]),
        torch.cat(
            [
                torch.ones_like(region, dtype=torch.bool) if exists is None else exists
                for region, exists in zip(patch_region, existing, strict=True)
            ]
        ),
        torch.stack([t + start for t, start in zip(token_patch, starts, strict=True)]),
        segment,
        images * slots,
    )
    patch = patch.view(images, slots)
    ids = torch.where(patch < 0, -1, patch - image * sum(counts))
    own = torch.where(patch_slot < 0, -1, patch_slot - image * slots)
    patches: list[Tensor | None] = []
    kept = []
    for level, capacity in enumerate(capacities):
        if not capacity:
            patches.append(None)
            continue
        held = ids[:, offsets[level] : offsets[level] + capacity]
        patches.append((held - starts[level]).clamp(min=0))
        kept.append(own[:, starts[level] : starts[level] + counts[level]])
    return Slots(tuple(patches), token_slot - image * slots, torch.cat(kept, 1), ids)
