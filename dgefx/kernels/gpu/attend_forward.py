"""The forward kernel of `dgefx::attend`: one program per tile of queries and head.

Keys of the tile's group are read block by block with a running maximum and sum. Idle rows are
tiles of their own that only write zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgefx.kernels.gpu.attend_tiles import (
    LOG2_E,
    Tiles,
    constants,
    dense_last,
    forward_tiles,
    load_rows,
    locate_rows,
    row_tiles,
    sizes_of,
    store_rows,
    widens,
)

# shapes change from call to call (T above all): none of them may make Triton compile again
UNSPECIALIZED = (
    "rows groups keys q_row q_head k_group k_head k_row v_group v_head v_row bias_pattern bias_head"
).split()


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attend_forward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    offsets: tl.tensor,
    bias: tl.tensor,
    bias_row: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    scale: tl.tensor,
    rows: tl.tensor,
    groups: tl.tensor,
    keys: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_group: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_group: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    bias_pattern: tl.tensor,
    bias_head: tl.tensor,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    PAD_HEAD: tl.constexpr,
    PAD_VALUE: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> None:
    """Outputs and log-sum-exp of one tile of rows and one head; strides of q, k, v in UNITs."""
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    group, start, left = locate_rows(offsets, rows, groups, tl.program_id(0), BLOCK_ROWS)
    if left <= 0:
        return
    row = tl.arange(0, BLOCK_ROWS)
    out += (start * heads + head) * VALUE
    lse += (start + row) * heads + head
    total = tl.zeros([BLOCK_ROWS, PAD_VALUE], tl.float32)
    if (group < 0) | (group == groups):
        store_rows(out, heads * VALUE, left, total, VALUE, PAD_VALUE, BLOCK_ROWS)
        tl.store(lse, tl.zeros([BLOCK_ROWS], tl.float32), mask=row < left)
        return
    q += (start * q_row + head * q_head) * UNIT
    k += (group.to(tl.int64) * k_group + head * k_head) * UNIT
    v += (group.to(tl.int64) * v_group + head * v_head) * UNIT
    queries = load_rows(q, q_row, left, HEAD, PAD_HEAD, BLOCK_ROWS, UNIT, False, WIDE)
    if HAS_BIAS:
        pattern = tl.load(bias_row + start + row, mask=row < left, other=0)
        bias += pattern[:, None] * bias_pattern + head * bias_head
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, keys, BLOCK_KEYS):
        skip = tl.cast(first, tl.int64) * UNIT
        block = load_rows(
            k + skip * k_row, k_row, keys - first, HEAD, PAD_HEAD, BLOCK_KEYS, UNIT, WHOLE, WIDE
        )
        key = first + tl.arange(0, BLOCK_KEYS)[None, :]
        score = tl.dot(queries, tl.trans(block), input_precision="ieee") * (scale * LOG2_E)
        if HAS_BIAS:
            inside = (row[:, None] < left) & (key < keys)
            score += tl.load(bias + key, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        if not WHOLE:
            score = tl.where(key < keys, score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        # a bias may rule out every key so far: -inf - -inf must not be
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(score - base[:, None])
        decay = tl.exp2(highest - base)
        weight = weight * decay + tl.sum(share, 1)
        values = load_rows(
            v + skip * v_row, v_row, keys - first, VALUE, PAD_VALUE, BLOCK_KEYS, UNIT, WHOLE, WIDE
        )
        total = total * decay[:, None]
        total = tl.dot(share.to(values.dtype), values, total, input_precision="ieee")
        highest = higher
    some = weight > 0.0
    weight = tl.where(some, weight, 1.0)
    store_rows(out, heads * VALUE, left, total / weight[:, None], VALUE, PAD_VALUE, BLOCK_ROWS)
    summed = tl.where(some, (highest + tl.log2(weight)) / LOG2_E, 0.0)
    tl.store(lse, summed, mask=row < left)


def launch_attend_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    bias_row: Tensor | None,
    scale: float,
    tiles: Tiles | None = None,
    empty: Callable[..., Tensor] = torch.empty,
) -> tuple[Tensor, Tensor]:
    """`dgefx::attend` by Triton.

    Args:
        q, k, v, offsets, bias, bias_row, scale: as `dgefx.kernels.attend.attend` takes them;
            float16, bfloat16 or float32.
        tiles: block sizes; by default from the shapes.
        empty: makes outputs; tests have it poison them.

    Returns:
        (T, H, E) in q's dtype and (T, H) float32 log-sum-exp, zeros in rows without a key.
    """
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    bias = None if bias is None else dense_last(bias)
    sizes = sizes_of(q, k, v, (q, k, v))
    tiles = tiles or forward_tiles(sizes, q.dtype, bias is not None)
    out = empty((sizes.rows, sizes.heads, sizes.value), dtype=q.dtype, device=q.device)
    lse = empty((sizes.rows, sizes.heads), dtype=torch.float32, device=q.device)
    unit = sizes.unit
    attend_forward_kernel[(row_tiles(sizes.rows, sizes.groups, tiles.rows), sizes.heads)](
        q,
        k,
        v,
        offsets,
        bias,
        bias_row,
        out,
        lse,
        scale,
        sizes.rows,
        sizes.groups,
        sizes.keys,
        q.stride(0) // unit,
        q.stride(1) // unit,
        k.stride(0) // unit,
        k.stride(1) // unit,
        k.stride(2) // unit,
        v.stride(0) // unit,
        v.stride(1) // unit,
        v.stride(2) // unit,
        *bias_strides(bias),
        **constants(sizes, tiles, bias is not None, widens(attend_forward_kernel, q.dtype)),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out, lse


def bias_strides(bias: Tensor | None) -> tuple[int, int]:
    """Strides from pattern to pattern and head to head; 0 where all heads share a pattern."""
    if bias is None:
        return 0, 0
    return bias.stride(0), 0 if bias.shape[1] == 1 else bias.stride(1)
