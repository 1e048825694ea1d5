"""`allocate`: levels to slots, without a host sync: one kernel for patches, one for tokens.

Integers only, so that every device numbers alike. The patch kernel runs one program per image and
level, which counts chosen patches block by block and carries the count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgefx.kernels.gpu.blocks import cover, device_of, identity

#: patches counted at once: a grid of 64 x 64 and its levels take six rounds
PATCHES = 1024
#: tokens of one program; they do not depend on each other
TOKENS = 256


@triton.jit
def allocate_patches_kernel(
    levels: tl.tensor,
    patch_region: tl.tensor,
    patch_level: tl.tensor,
    exists: tl.tensor,
    segment: tl.tensor,
    patch: tl.tensor,
    patch_slot: tl.tensor,
    regions: tl.tensor,
    patches: tl.tensor,
    level_count: tl.tensor,
    total: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    image = tl.program_id(0).to(tl.int64)
    level = tl.program_id(1)
    next_slot = tl.load(segment + image * level_count + level)
    for begin in range(0, patches, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside = index < patches
        # every program writes the patches of its own level alone
        own = inside & (tl.load(patch_level + index, mask=inside, other=-1) == level)
        region = tl.load(patch_region + index, mask=own, other=0)
        chosen = tl.load(levels + image * regions + region, mask=own, other=-1) == level
        chosen &= tl.load(exists + index, mask=own, other=0) != 0
        chosen &= own
        rank = tl.cumsum(chosen.to(tl.int32), 0)
        slot = next_slot + rank.to(tl.int64) - 1
        taken = chosen & (slot < total)
        place = image * patches + index
        tl.store(patch_slot + place, tl.where(taken, slot, -1), mask=own)
        tl.store(patch + slot, place, mask=taken)
        next_slot += tl.sum(chosen.to(tl.int32), 0)


@triton.jit
def allocate_tokens_kernel(
    levels: tl.tensor,
    patch_region: tl.tensor,
    token_patch: tl.tensor,
    patch_slot: tl.tensor,
    token_slot: tl.tensor,
    regions: tl.tensor,
    patches: tl.tensor,
    tokens: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    # images along the first axis: the second ends at 65535
    image = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    finest = tl.load(token_patch + token, mask=inside, other=0)
    region = tl.load(patch_region + finest, mask=inside, other=0)
    level = tl.load(levels + image * regions + region, mask=inside, other=0)
    mine = tl.load(token_patch + level * tokens + token, mask=inside, other=0)
    slot = tl.load(patch_slot + image * patches + mine, mask=inside, other=-1)
    tl.store(token_slot + image * tokens + token, slot, mask=inside)


def launch_allocate(
    levels: Tensor,
    patch_region: Tensor,
    patch_level: Tensor,
    exists: Tensor,
    token_patch: Tensor,
    segment: Tensor,
    total: int,
    *,
    launch: Callable[[Any], Any] = identity,
    empty: Callable[..., Tensor] = torch.empty,
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots of the chosen patches; arguments and results as of `dgefx::allocate`.

    Args:
        launch: what a kernel is passed through, `torch.library.wrap_triton` for a compiler.
        empty: makes the results before the kernels fill them.
    """
    images, regions = levels.shape
    patches, tokens = patch_region.shape[0], token_patch.shape[1]
    level_count = segment.shape[1]
    like = {"dtype": torch.int64, "device": levels.device}
    levels, token_patch = levels.contiguous(), token_patch.contiguous()
    patch = empty((total,), **like).fill_(-1)
    patch_slot = empty((images, patches), **like)
    token_slot = empty((images, tokens), **like)
    with device_of(levels):
        launch(allocate_patches_kernel)[(images, level_count)](
            levels,
            patch_region,
            patch_level,
            exists,
            segment.contiguous(),
            patch,
            patch_slot,
            regions,
            patches,
            level_count,
            total,
            BLOCK=PATCHES,
        )
        launch(allocate_tokens_kernel)[(images, cover(tokens, TOKENS))](
            levels,
            patch_region,
            token_patch,
            patch_slot,
            token_slot,
            regions,
            patches,
            tokens,
            BLOCK=TOKENS,
        )
    return patch, patch_slot, token_slot
