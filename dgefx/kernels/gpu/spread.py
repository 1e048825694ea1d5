"""`spread`: every token row receives its query's row, scaled, in one pass over memory.

Forward of `dgefx::unpool_add` (the gated update is never stored per query) and backward of
`dgefx::pool` (the gradient of a mean, divided by the members of the patch).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgefx.kernels.gpu.blocks import blocks_of, cover, device_of, identity


@triton.jit
def spread_kernel(
    residual: tl.tensor,
    plus: tl.tensor,
    minus: tl.tensor,
    scale: tl.tensor,
    row: tl.tensor,
    patch: tl.tensor,
    start: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = place < rows
    mask = inside[:, None] & (channel < channels)[None, :]
    query = tl.load(row + place, mask=inside, other=0)
    there = query[:, None] * channels + channel[None, :]
    here = place[:, None] * channels + channel[None, :]
    value = tl.load(plus + there, mask=mask, other=0.0).to(tl.float32)
    if HAS_MINUS:
        value -= tl.load(minus + there, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        value *= tl.load(scale + query, mask=inside, other=0.0).to(tl.float32)[:, None]
    if MEAN:
        mine = tl.maximum(tl.load(patch + query, mask=inside, other=0), 0)
        last = tl.load(start + mine + 1, mask=inside, other=1)
        count = tl.maximum(last - tl.load(start + mine, mask=inside, other=0), 1)
        value = value / count.to(tl.float32)[:, None]
    if HAS_RESIDUAL:
        value += tl.load(residual + here, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + here, value.to(out.dtype.element_ty), mask=mask)


def launch_spread(
    plus: Tensor,
    row: Tensor,
    patch: Tensor,
    start: Tensor,
    *,
    mean: bool = False,
    minus: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    launch: Callable[[Any], Any] = identity,
    empty: Callable[..., Tensor] = torch.empty,
) -> Tensor:
    """out[r] = residual[r] + scale[q] * (plus[q] - minus[q]) / members, q = row[r], in float32.

    Args:
        plus: (Q, C), half or single precision.
        row: (R,) int64. patch: (Q,) int64. start: (P + 1,) int64; see `dgefx.kernels.packing`.
        mean: divide by the number of members of the query's patch.
        minus: (Q, C), scale: (Q,), residual: (R, C); each left out where None.
        launch: what the kernel is passed through, `torch.library.wrap_triton` for a compiler.
        empty: makes the result before the kernel fills it.

    Returns:
        (R, C) in the dtype of `residual` plus `plus`, or else of `plus`.
    """
    rows, channels = row.shape[0], plus.shape[1]
    plus = plus.contiguous()
    dtype = plus.dtype
    if residual is not None:
        dtype = torch.promote_types(residual.dtype, plus.dtype)
    out = empty((rows, channels), dtype=dtype, device=plus.device)
    blocks = blocks_of(channels)
    grid = (cover(rows, blocks.rows), cover(channels, blocks.channels))
    with device_of(plus):
        # a pointer that the flags leave unread is any tensor
        launch(spread_kernel)[grid](
            plus if residual is None else residual.contiguous(),
            plus,
            plus if minus is None else minus.contiguous(),
            plus if scale is None else scale.contiguous(),
            row.contiguous(),
            patch.contiguous(),
            start,
            out,
            rows,
            channels,
            HAS_RESIDUAL=residual is not None,
            HAS_MINUS=minus is not None,
            HAS_SCALE=scale is not None,
            MEAN=mean,
            BLOCK_ROWS=blocks.rows,
            BLOCK_CHANNELS=blocks.channels,
        )
    return out
