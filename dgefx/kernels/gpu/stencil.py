"""Triton kernels of `dgefx::stencil`: a depthwise convolution on mixed-granularity queries.

Imported lazily by `kernels.stencil_op`, whose tables it reads. Two kernels: the stencil itself,
which with flipped taps and token weights is its own adjoint, and the gradient of the coefficients.
Neither uses atomics, so results are the same every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgefx.kernels.gpu.blocks import cover, device_of, identity

#: programs that share the queries of one coefficient's gradient: enough to fill a GPU together
#: with the reads and the channel blocks, few enough that their sums stay small beside `hidden`
SPLITS = 32


# Annotations below name `tl` and builtins alone: Inductor copies the functions into a module of
# its own, without the imports of this one, and evaluates them there.
@triton.jit
def _queries(
    patch: tl.tensor, base: tl.tensor, place: tl.tensor, query: tl.tensor, queries: tl.tensor
) -> tuple[tl.tensor, ...]:
    """Kind (-1 for an idle slot), top, left, tokens and first row of a block of queries."""
    own = tl.load(patch + query, mask=query < queries, other=-1)
    used = own >= 0
    entry = place + own * 4
    kind = tl.load(entry, mask=used, other=-1)
    top = tl.load(entry + 1, mask=used, other=0)
    left = tl.load(entry + 2, mask=used, other=0)
    tokens = tl.load(entry + 3, mask=used, other=1)
    first = tl.load(base + query, mask=used, other=0)
    return kind, top, left, tokens, first


@triton.jit
def _source(
    row: tl.tensor,
    reads: tl.tensor,
    entry: tl.tensor,
    ours: tl.tensor,
    top: tl.tensor,
    left: tl.tensor,
    first: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
) -> tl.tensor:
    """Query that holds the token of a read, -1 where that token is not on the grid.

    Callers compare with 0 instead of being given the mask: Triton 3.6 does not compile kernels
    that use one mask of this load for their tiles too, with tiles of 64 channels and less.
    """
    y = top + tl.load(reads + entry * 3 + 1)
    x = left + tl.load(reads + entry * 3 + 2)
    inside = ours & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return tl.load(row + first + y * width + x, mask=inside, other=-1)


@triton.jit
def stencil_kernel(
    hidden: tl.tensor,
    coefficients: tl.tensor,
    patch: tl.tensor,
    base: tl.tensor,
    row: tl.tensor,
    place: tl.tensor,
    start: tl.tensor,
    reads: tl.tensor,
    out: tl.tensor,
    queries: tl.tensor,
    channels: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    ADJOINT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """A block of queries and of channels: the sum of coefficient * value over the reads.

    The kinds present in the block are done one after the other (mostly there is one: slots are
    ordered by level), so that a coefficient is loaded once for all queries of the block.
    """
    query = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < channels
    kind, top, left, tokens, first = _queries(patch, base, place, query, queries)
    total = tl.zeros((BLOCK_Q, BLOCK_C), dtype=tl.float32)
    lowest = tl.min(tl.where(kind < 0, 2147483647, kind), 0)
    highest = tl.max(kind, 0)
    for current in range(lowest, highest + 1):
        ours = kind == current
        begin = tl.load(start + current)
        # a kind that only lies between two present ones has no reads to do
        stop = tl.where(tl.max(ours.to(tl.int32), 0) > 0, tl.load(start + current + 1), begin)
        for entry in range(begin, stop):
            source = _source(row, reads, entry, ours, top, left, first, height, width)
            coefficient = tl.load(
                coefficients + tl.cast(entry, tl.int64) * channels + channel, mask=real, other=0.0
            )
            value = tl.load(
                hidden + source[:, None] * channels + channel[None, :],
                mask=(source >= 0)[:, None] & real[None, :],
                other=0.0,
            ).to(tl.float32)
            if ADJOINT:
                holder = tl.load(patch + source, mask=source >= 0, other=0)
                count = tl.load(place + holder * 4 + 3, mask=source >= 0, other=1)
                value *= (1.0 / count.to(tl.float32))[:, None]
            total += value * coefficient[None, :]
    if ADJOINT:
        total *= tokens.to(tl.float32)[:, None]
    tl.store(
        out + query[:, None] * channels + channel[None, :],
        total.to(out.dtype.element_ty),
        mask=(query < queries)[:, None] & real[None, :],
    )


@triton.jit
def coefficients_kernel(
    grad: tl.tensor,
    hidden: tl.tensor,
    patch: tl.tensor,
    base: tl.tensor,
    row: tl.tensor,
    place: tl.tensor,
    reads: tl.tensor,
    partial: tl.tensor,
    queries: tl.tensor,
    channels: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Sum of grad * value over one split of the queries, for one read and a block of channels.

    One read per program keeps a single tile of sums in registers. The splits take blocks of
    queries in turn, so that each has its share of every kind; programs of all reads of one split
    run side by side and find `grad` in the cache.
    """
    entry = tl.program_id(0)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < channels
    current = tl.load(reads + entry * 3)
    total = tl.zeros((BLOCK_Q, BLOCK_C), dtype=tl.float32)
    for block in range(tl.program_id(1), tl.cdiv(queries, BLOCK_Q), tl.num_programs(1)):
        query = tl.cast(block, tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        kind, top, left, _, first = _queries(patch, base, place, query, queries)
        ours = kind == current
        if tl.max(ours.to(tl.int32), 0) > 0:
            source = _source(row, reads, entry, ours, top, left, first, height, width)
            mask = (source >= 0)[:, None] & real[None, :]
            value = tl.load(
                hidden + source[:, None] * channels + channel[None, :], mask=mask, other=0.0
            )
            own = tl.load(grad + query[:, None] * channels + channel[None, :], mask=mask, other=0.0)
            total += value.to(tl.float32) * own.to(tl.float32)
    place_of_sum = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + entry
    tl.store(partial + place_of_sum * channels + channel, tl.sum(total, 0), mask=real)


def tile_of(channels: int) -> tuple[int, int]:
    """(BLOCK_Q, BLOCK_C): all channels up to a 256-byte line of half precision, and as many
    queries as make 16 sums per thread (four warps); more would only mix kinds."""
    block_c = min(128, max(16, 1 << (int(channels) - 1).bit_length()))
    return min(64, 2048 // block_c), block_c


def run_stencil(
    hidden: Tensor,
    coefficients: Tensor,
    patch: Tensor,
    base: Tensor,
    row: Tensor,
    place: Tensor,
    start: Tensor,
    reads: Tensor,
    height: int,
    width: int,
    adjoint: bool,
    launch: Callable[[Any], Any] = identity,
    empty: Callable[..., Tensor] = torch.empty,
) -> Tensor:
    """(Q, C) of the dtype of `hidden` (Q, C) with `coefficients` (E, C) float32, see
    `kernels.stencil_op`; `adjoint`: weigh by tokens, for the gradient of `hidden`."""
    queries, channels = hidden.shape
    out = empty((queries, channels), dtype=hidden.dtype, device=hidden.device)
    block_q, block_c = tile_of(channels)
    with device_of(hidden):
        launch(stencil_kernel)[(cover(queries, block_q), cover(channels, block_c))](
            hidden.contiguous(),
            coefficients.contiguous(),
            patch.contiguous(),
            base.contiguous(),
            row.contiguous(),
            place,
            start,
            reads,
            out,
            queries,
            channels,
            height,
            width,
            ADJOINT=adjoint,
            BLOCK_Q=block_q,
            BLOCK_C=block_c,
        )
    return out


def run_coefficients(
    grad: Tensor,
    hidden: Tensor,
    patch: Tensor,
    base: Tensor,
    row: Tensor,
    place: Tensor,
    reads: Tensor,
    height: int,
    width: int,
    splits: int = SPLITS,
    launch: Callable[[Any], Any] = identity,
    empty: Callable[..., Tensor] = torch.empty,
) -> Tensor:
    """(E, C) float32: gradient of the coefficients, from `grad` and `hidden` (Q, C)."""
    queries, channels = hidden.shape
    entries = reads.shape[0]
    partial = empty((splits, entries, channels), dtype=torch.float32, device=hidden.device)
    block_q, block_c = tile_of(channels)
    with device_of(hidden):
        launch(coefficients_kernel)[(entries, splits, cover(channels, block_c))](
            grad.contiguous(),
            hidden.contiguous(),
            patch.contiguous(),
            base.contiguous(),
            row.contiguous(),
            place,
            reads,
            partial,
            queries,
            channels,
            height,
            width,
            BLOCK_Q=block_q,
            BLOCK_C=block_c,
        )
    return partial.sum(0)
