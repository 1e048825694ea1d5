"""`dgefx::allocate`: levels to slots, with a segment of the slots for every image and level.

One numbering for both budget modes: with a budget per image all images have segments of the same
sizes, with an average budget an image's segments begin where the one before ends. Integers only,
so there is nothing to differentiate and every device numbers alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgefx.kernels.dispatch import has_triton
from dgefx.kernels.operator import operator


def allocate_reference(
    levels: Tensor,
    patch_region: Tensor,
    patch_level: Tensor,
    exists: Tensor,
    token_patch: Tensor,
    segment: Tensor,
    total: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dgefx::allocate` in PyTorch."""
    images, patches = levels.shape[0], patch_region.shape[0]
    chosen = exists & (levels.index_select(1, patch_region) == patch_level)
    counts = torch.zeros_like(segment).index_add(1, patch_level, chosen.long())
    shift = segment - (counts.cumsum(1) - counts)
    slot = chosen.long().cumsum(1) - 1 + shift.index_select(1, patch_level)
    taken = chosen & (slot < total)
    # what has no slot is written behind the last one
    ids = torch.arange(images * patches, device=levels.device)
    table = torch.full((total + 1,), -1, dtype=torch.int64, device=levels.device)
    table = table.scatter(0, torch.where(taken, slot, total).flatten(), ids)
    patch_slot = torch.where(taken, slot, -1)
    token_level = levels.index_select(1, patch_region.index_select(0, token_patch[0]))
    mine = token_patch.gather(0, token_level)
    return table[:total].clone(), patch_slot, patch_slot.gather(1, mine)


@operator("dgefx::allocate")
def allocate(
    levels: Tensor,
    patch_region: Tensor,
    patch_level: Tensor,
    exists: Tensor,
    token_patch: Tensor,
    segment: Tensor,
    total: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Number the chosen patches: those that exist and whose region has their level.

    The k-th chosen patch of level l of image b, in raster order, takes slot segment[b, l] + k. A
    slot from `total` on is taken by nobody.

    Args:
        levels: (B, R) int64, level of every region, 0 = finest.
        patch_region: (P,) int64, region of every patch; P counts all L levels, level by level.
        patch_level: (P,) int64, level of every patch, never falling.
        exists: (P,) bool, whether a patch holds tokens.
        token_patch: (L, N) int64, patch of every token at every level, out of the P.
        segment: (B, L) int64, first slot of every image and level; segments are apart.
        total: number of slots of the batch.

    Returns:
        patch: (total,) int64, p + b * P for patch p of image b; -1 where nobody took the slot.
        patch_slot: (B, P) int64, slot of every patch, -1 where it has none.
        token_slot: (B, N) int64, slot of the patch that holds the token at its region's level.
    """
    if not (levels.is_cuda and has_triton()):
        return allocate_reference(
            levels, patch_region, patch_level, exists, token_patch, segment, total
        )
    from dgefx.kernels.gpu.allocate import launch_allocate

    return launch_allocate(
        levels,
        patch_region,
        patch_level,
        exists,
        token_patch,
        segment,
        total,
        launch=torch.library.wrap_triton,
    )
