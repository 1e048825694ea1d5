"""The average budget: levels of all images of a batch under one budget, without a host sync.

The detail router shares the batch's queries out as if its images were one large image
(`share_levels`, `share_nested`); the linear router takes every region's arg max, and `demote` makes
regions coarser where that asks for more queries than there may be. Next:
`dgefx.kernels.ragged.assign_ragged`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgefx.kernels.allocate import allocate_levels, allocate_nested


def _in_batch(patches: Tensor, images: int, count: int) -> Tensor:
    """(K,) patch numbers of one image to (images * K,) numbers among `count` patches of each."""
    start = torch.arange(images, device=patches.device)[:, None] * count
    return (patches + start).flatten()


def share_levels(
    gains: Tensor, costs: Sequence[Tensor], capacities: Sequence[int], uniform: Sequence[int | None]
) -> Tensor:
    """`allocate_levels` with the capacities of all images in one.

    Args:
        gains: (B, R, L - 1). costs: per level (R,). capacities: per level, slots per image.

    Returns:
        (B, R) int64, 0 = finest.
    """
    images = gains.shape[0]
    levels = allocate_levels(
        gains.flatten(0, 1).unsqueeze(0),
        [cost.repeat(images) for cost in costs],
        [capacity * images for capacity in capacities],
        uniform,
        pairs=False,
    )
    return levels.view(images, -1)


def share_nested(
    gains: Sequence[Tensor],
    children: Sequence[Tensor],
    parents: Sequence[Tensor],
    holders: Sequence[Tensor],
    budgets: Sequence[int],
    uniform: Sequence[int | None],
) -> Tensor:
    """`allocate_nested` with the budgets of all images in one.

    Args:
        as `allocate_nested`, of one image; gains: per level but the coarsest (B, P of l + 1).

    Returns:
        (B, P of 1) int64, 0 = finest.
    """
    images = gains[0].shape[0]
    above = [gain.shape[1] for gain in gains]
    levels = allocate_nested(
        [gain.reshape(1, -1) for gain in gains],
        [table.repeat(images) for table in children],
        [_in_batch(table, images, count) for table, count in zip(parents, above, strict=True)],
        [_in_batch(table, images, count) for table, count in zip(holders, above, strict=True)],
        [budget * images for budget in budgets],
        uniform,
        pairs=False,
    )
    return levels.view(images, -1)


def demote(levels: Tensor, scores: Tensor, costs: Sequence[Tensor], capacity: int) -> Tensor:
    """Make the regions with the lowest scores coarser until their patches fit; none is dropped.

    From the finest level on: of the regions of a level, those that would lose least by the next
    coarser one go there, as many as it takes.

    Args:
        levels: (B, R) int64, what every region asks for.
        scores: (B, R, L - 1), what a region holds to level l rather than l + 1.
        costs: per level (R,) patches of every region.
        capacity: patches that all images may have together; at least what they have when all
            regions are at the coarsest level.

    Returns:
        (B, R) int64, at least as coarse as `levels`.
    """
    images = levels.shape[0]
    shape = levels.shape
    flat = levels.flatten()
    price = torch.stack([cost.repeat(images) for cost in costs])  # (L, B * R)
    for level in range(len(costs) - 1):
        excess = price.gather(0, flat.unsqueeze(0)).sum() - capacity
        saved = torch.where(flat == level, price[level] - price[level + 1], 0)
        score = scores[..., level].flatten()
        # NaN first: a region without a score has no claim
        score = torch.where(score.isnan(), -torch.inf, score)
        score = torch.where(flat == level, score, torch.inf)
        order = score.argsort(stable=True)
        before = saved[order].cumsum(0) - saved[order]
        gone = torch.zeros_like(flat, dtype=torch.bool).scatter(0, order, before < excess)
        flat = torch.where((flat == level) & gone, level + 1, flat)
    return flat.view(shape)
