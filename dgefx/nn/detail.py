"""Scores of the training-free router: how much detail coarser patches would lose, per query saved.

The detail of a patch is sum ||x - mean||^2 over its tokens. Since that equals sum ||x||^2 minus
||sum x||^2 / n, the variance between two levels is a difference of per-patch energies. Where a
calibration has fitted an importance (`dgefx.calibration`), detail is weighted by it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dgefx.kernels.pool import sum_children

#: largest ratio that importance gives two regions of an image, as exp(+-_LIMIT)
_LIMIT = 6.0


def patch_energies(sums: list[Tensor], counts: list[Tensor | int]) -> list[Tensor]:
    """||sum x||^2 / n of every patch.

    Args:
        sums: per level (B, rows, columns, C).
        counts: per level, tokens in every patch (rows, columns, 1), or in all of them.

    Returns:
        Per level (B, rows, columns, 1) float32 (float64 of float64).
    """
    energies = []
    for total, count in zip(sums, counts, strict=True):
        wide = total.detach()
        wide = wide if wide.dtype == torch.float64 else wide.float()
        squared = wide.square().sum(-1, keepdim=True)
        energies.append(squared * (1.0 / count) if isinstance(count, int) else squared / count)
    return energies


def importance_logits(cells: Tensor, weight: Tensor) -> Tensor:
    """Log importance of every cell, up to a constant per image.

    Args:
        cells: (B, rows, columns, C) mean token of every region.
        weight: (C,) as fitted on layer-normalised cells.

    Returns:
        (B, rows, columns, 1), zero on average.
    """
    cells = cells.detach().float()
    logits = F.layer_norm(cells, cells.shape[-1:]) @ weight.float()
    logits = logits - logits.mean((1, 2), keepdim=True)
    return logits.clamp(-_LIMIT, _LIMIT).unsqueeze(-1)


def region_gains(
    energies: list[Tensor], factors: list[int], costs: list[Tensor], logits: Tensor | None
) -> Tensor:
    """What a region gains from level l over level l + 1, per query that it costs more.

    Args:
        energies: per level, see `patch_energies`.
        factors: per level, patches along a side of a region.
        costs: per level, (R,) patches in every region.
        logits: of the regions' importance, (B, rows, columns, 1).

    Returns:
        (B, R, levels - 1).
    """
    per_region = [
        sum_children(energy, factor).flatten(1)
        for energy, factor in zip(energies, factors, strict=True)
    ]
    gains = [
        (fine - coarse) / (fine_cost - coarse_cost).clamp(min=1)
        for (fine, fine_cost), (coarse, coarse_cost) in pairwise(
            zip(per_region, costs, strict=True)
        )
    ]
    if not gains:
        return per_region[0].unsqueeze(-1)[:, :, :0]
    stacked = torch.stack(gains, -1)
    return stacked if logits is None else stacked * logits.exp().flatten(1).unsqueeze(-1)


def nested_gains(
    energies: list[Tensor], ratios: list[int], children: list[Tensor], logits: Tensor | None
) -> list[Tensor]:
    """What splitting a patch of level l + 1 gains per query: alone, or with the splits that it
    makes possible inside it, whichever is more.

    Args:
        energies: per level, see `patch_energies`.
        ratios: per level but the coarsest, the next coarser side over this side.
        children: per level but the coarsest, (rows, columns, 1) patches in each next coarser one.
        logits: of the importance of the patches of level 1, (B, rows, columns, 1).

    Returns:
        Per level but the coarsest, (B, patches of level l + 1).
    """
    gains = []
    weight = None if logits is None else logits.exp()
    within: tuple[Tensor, Tensor] | None = None  # best split inside each child: value, price
    for level, ((fine, coarse), ratio, count) in enumerate(
        zip(pairwise(energies), ratios, children, strict=True)
    ):
        value = sum_children(fine, ratio) - coarse
        if weight is not None:
            if level:
                weight = sum_children(weight, ratio) / count
            value = value * weight
        price = (count - 1).to(value.dtype).expand_as(value)
        if within is not None:
            value, price = _with_children((value, price), within, ratio)
        gains.append((value / price.clamp(min=1)).flatten(1))
        within = (value, price)
    return gains


def _with_children(
    own: tuple[Tensor, Tensor], within: tuple[Tensor, Tensor], ratio: int
) -> tuple[Tensor, Tensor]:
    """The best value per price of: the split alone, with its best child's, with all children's."""
    value, price = own
    best, best_price = own
    rows, columns = value.shape[1] * ratio, value.shape[2] * ratio
    grown = [F.pad(t, (0, 0, 0, columns - t.shape[2], 0, rows - t.shape[1])) for t in within]
    options = [
        (grown[0][:, row::ratio, column::ratio], grown[1][:, row::ratio, column::ratio])
        for row in range(ratio)
        for column in range(ratio)
    ]
    options.append((sum_children(within[0], ratio), sum_children(within[1], ratio)))
    for more, cost in options:
        total, total_price = value + more, price + cost
        better = total * best_price.clamp(min=1) > best * total_price.clamp(min=1)
        best = torch.where(better, total, best)
        best_price = torch.where(better, total_price, best_price)
    return best, best_price
