"""`collect`: sum or mean of the token rows of every query's patch, in one pass over them.

Forward of `dgefx::pool` and backward of `dgefx::unpool_add`. A query gathers its own members, so
there is nothing to add atomically and the result does not depend on the order of the programs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgefx.kernels.gpu.blocks import blocks_of, cover, device_of, identity

#: members read at once, so that their loads overlap: a patch of 2 x 2
UNROLL = 4


@triton.jit
def collect_kernel(
    source: tl.tensor,
    out: tl.tensor,
    patch: tl.tensor,
    base: tl.tensor,
    start: tl.tensor,
    token: tl.tensor,
    queries: tl.tensor,
    channels: tl.tensor,
    MEAN: tl.constexpr,
    ZERO_IDLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    query = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = query < queries
    in_row = (channel < channels)[None, :]
    mine = tl.load(patch + query, mask=inside, other=-1)
    filled = inside
    if ZERO_IDLE:
        filled = mine >= 0
    mine = tl.maximum(mine, 0)
    first = tl.load(start + mine, mask=filled, other=0)
    count = tl.load(start + mine + 1, mask=filled, other=0) - first
    origin = tl.load(base + query, mask=filled, other=0)
    total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    # queries are ordered by level, so that the rows of a block mostly have equally many members
    for done in range(0, tl.max(count, 0).to(tl.int32), UNROLL):
        for step in tl.static_range(UNROLL):
            there = done + step < count
            row = origin + tl.load(token + first + (done + step), mask=there, other=0)
            total += tl.load(
                source + row[:, None] * channels + channel[None, :],
                mask=there[:, None] & in_row,
                other=0.0,
            ).to(tl.float32)
    if MEAN:
        total = total / tl.maximum(count, 1).to(tl.float32)[:, None]
    tl.store(
        out + query[:, None] * channels + channel[None, :],
        total.to(out.dtype.element_ty),
        mask=inside[:, None] & in_row,
    )


def launch_collect(
    source: Tensor,
    patch: Tensor,
    base: Tensor,
    start: Tensor,
    token: Tensor,
    *,
    mean: bool,
    zero_idle: bool,
    launch: Callable[[Any], Any] = identity,
    empty: Callable[..., Tensor] = torch.empty,
) -> Tensor:
    """Sum or mean of every query's member rows.

    Args:
        source: (R, C), half or single precision; summed in float32.
        patch, base: (Q,) int64. start: (P + 1,) int64. token: (M,) int64; see
            `dgefx.kernels.packing`.
        mean: divide by the number of members.
        zero_idle: idle queries get zeros; otherwise what patch 0 of the first image gets.
        launch: what the kernel is passed through, `torch.library.wrap_triton` for a compiler.
        empty: makes the result before the kernel fills it.

    Returns:
        (Q, C) in the dtype of `source`.
    """
    queries, channels = patch.shape[0], source.shape[1]
    out = empty((queries, channels), dtype=source.dtype, device=source.device)
    blocks = blocks_of(channels)
    grid = (cover(queries, blocks.rows), cover(channels, blocks.channels))
    with device_of(source):
        launch(collect_kernel)[grid](
            source.contiguous(),
            out,
            patch.contiguous(),
            base.contiguous(),
            start,
            token,
            queries,
            channels,
            MEAN=mean,
            ZERO_IDLE=zero_idle,
            BLOCK_ROWS=blocks.rows,
            BLOCK_CHANNELS=blocks.channels,
            UNROLL=UNROLL,
        )
    return out
