"""The backward kernels of `dgefx::attend`: one over queries, one over keys and values.

Every gradient is summed by the one program that writes it: nothing is atomic, the same inputs give
the same bits. Scores are computed again from the forward's log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgefx.kernels.gpu.attend_forward import UNSPECIALIZED as FORWARD_UNSPECIALIZED
from dgefx.kernels.gpu.attend_forward import bias_strides
from dgefx.kernels.gpu.attend_tiles import (
    LOG2_E,
    Tiles,
    constants,
    context_backward_tiles,
    dense_last,
    load_rows,
    locate_rows,
    query_backward_tiles,
    row_tiles,
    sizes_of,
    store_rows,
    widens,
)

UNSPECIALIZED = [*FORWARD_UNSPECIALIZED, "g_row", "g_head"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attend_query_backward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    offsets: tl.tensor,
    bias: tl.tensor,
    bias_row: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    out: tl.tensor,
    grad_q: tl.tensor,
    grad_score: tl.tensor,
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
    g_row: tl.tensor,
    g_head: tl.tensor,
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
    WRITE_SCORE: tl.constexpr,
) -> None:
    """Gradient of one tile of queries and one head; if asked, of their scores.

    `delta`, the inner product of every output with its gradient, is left for the other kernel.
    """
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    group, start, left = locate_rows(offsets, rows, groups, tl.program_id(0), BLOCK_ROWS)
    if left <= 0:
        return
    row = tl.arange(0, BLOCK_ROWS)
    flat = (start + row) * heads + head
    grad_q += (start * heads + head) * HEAD
    total = tl.zeros([BLOCK_ROWS, PAD_HEAD], tl.float32)
    if (group < 0) | (group == groups):
        store_rows(grad_q, heads * HEAD, left, total, HEAD, PAD_HEAD, BLOCK_ROWS)
        if WRITE_SCORE:
            for first in range(0, keys, BLOCK_KEYS):
                key = first + tl.arange(0, BLOCK_KEYS)[None, :]
                inside = (row[:, None] < left) & (key < keys)
                nothing = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
                tl.store(grad_score + flat[:, None] * keys + key, nothing, mask=inside)
        return
    q += (start * q_row + head * q_head) * UNIT
    k += (group.to(tl.int64) * k_group + head * k_head) * UNIT
    v += (group.to(tl.int64) * v_group + head * v_head) * UNIT
    grad += (start * g_row + head * g_head) * UNIT
    out += (start * heads + head) * VALUE
    queries = load_rows(q, q_row, left, HEAD, PAD_HEAD, BLOCK_ROWS, UNIT, False, WIDE)
    slope = load_rows(grad, g_row, left, VALUE, PAD_VALUE, BLOCK_ROWS, UNIT, False, WIDE)
    made = load_rows(out, heads * VALUE, left, VALUE, PAD_VALUE, BLOCK_ROWS, 1, False, WIDE)
    inner = tl.sum(made.to(tl.float32) * slope.to(tl.float32), 1)
    tl.store(delta + flat, inner, mask=row < left)
    level = tl.load(lse + flat, mask=row < left, other=0.0) * LOG2_E
    if HAS_BIAS:
        pattern = tl.load(bias_row + start + row, mask=row < left, other=0)
        bias += pattern[:, None] * bias_pattern + head * bias_head
    for first in range(0, keys, BLOCK_KEYS):
        skip = tl.cast(first, tl.int64) * UNIT
        key = first + tl.arange(0, BLOCK_KEYS)[None, :]
        inside = (row[:, None] < left) & (key < keys)
        block = load_rows(
            k + skip * k_row, k_row, keys - first, HEAD, PAD_HEAD, BLOCK_KEYS, UNIT, WHOLE, WIDE
        )
        values = load_rows(
            v + skip * v_row, v_row, keys - first, VALUE, PAD_VALUE, BLOCK_KEYS, UNIT, WHOLE, WIDE
        )
        score = tl.dot(queries, tl.trans(block), input_precision="ieee") * (scale * LOG2_E)
        if HAS_BIAS:
            score += tl.load(bias + key, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        if not WHOLE:
            score = tl.where(key < keys, score, float("-inf"))
        share = tl.exp2(score - level[:, None])
        change = tl.dot(slope, tl.trans(values), input_precision="ieee")
        change = share * (change - inner[:, None])
        if WRITE_SCORE:
            tl.store(grad_score + flat[:, None] * keys + key, change, mask=inside)
        total = tl.dot(change.to(block.dtype), block, total, input_precision="ieee")
    store_rows(grad_q, heads * HEAD, left, total * scale, HEAD, PAD_HEAD, BLOCK_ROWS)


@triton.jit(do_not_specialize=UNSPECIALIZED[2:])
def attend_context_backward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    offsets: tl.tensor,
    bias: tl.tensor,
    bias_row: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    grad_k: tl.tensor,
    grad_v: tl.tensor,
    scale: tl.tensor,
    keys: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_group: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_group: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    g_row: tl.tensor,
    g_head: tl.tensor,
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
    """Gradients of one block of keys and values of one group and head: a sum over its queries.

    Works on transposed scores, (keys, rows), so that both sums are plain products.
    """
    blocks = tl.cdiv(keys, BLOCK_KEYS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK_KEYS
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    begin = tl.load(offsets + group)
    count = (tl.load(offsets + group + 1) - begin).to(tl.int32)
    skip = tl.cast(first, tl.int64)
    k += (group * k_group + head * k_head + skip * k_row) * UNIT
    v += (group * v_group + head * v_head + skip * v_row) * UNIT
    q += (begin * q_row + head * q_head) * UNIT
    grad += (begin * g_row + head * g_head) * UNIT
    if HAS_BIAS:
        bias_row += begin
        bias += head * bias_head
    left = keys - first
    block = load_rows(k, k_row, left, HEAD, PAD_HEAD, BLOCK_KEYS, UNIT, WHOLE, WIDE)
    values = load_rows(v, v_row, left, VALUE, PAD_VALUE, BLOCK_KEYS, UNIT, WHOLE, WIDE)
    total_k = tl.zeros([BLOCK_KEYS, PAD_HEAD], tl.float32)
    total_v = tl.zeros([BLOCK_KEYS, PAD_VALUE], tl.float32)
    key = first + tl.arange(0, BLOCK_KEYS)[:, None]
    for done in range(0, count, BLOCK_ROWS):
        row = done + tl.arange(0, BLOCK_ROWS)
        past = tl.cast(done, tl.int64) * UNIT
        queries = load_rows(
            q + past * q_row, q_row, count - done, HEAD, PAD_HEAD, BLOCK_ROWS, UNIT, False, WIDE
        )
        slope = load_rows(
            grad + past * g_row,
            g_row,
            count - done,
            VALUE,
            PAD_VALUE,
            BLOCK_ROWS,
            UNIT,
            False,
            WIDE,
        )
        flat = (begin + row) * heads + head
        # rows of the next group are none of this one's: exp2(score - inf) is 0
        level = tl.load(lse + flat, mask=row < count, other=float("inf")) * LOG2_E
        inner = tl.load(delta + flat, mask=row < count, other=0.0)
        score = tl.dot(block, tl.trans(queries), input_precision="ieee") * (scale * LOG2_E)
        if HAS_BIAS:
            pattern = tl.load(bias_row + row, mask=row < count, other=0)
            shift = bias + pattern[None, :] * bias_pattern + key
            inside = (row[None, :] < count) & (key < keys)
            score += tl.load(shift, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        share = tl.exp2(score - level[None, :])
        total_v = tl.dot(share.to(slope.dtype), slope, total_v, input_precision="ieee")
        change = tl.dot(values, tl.trans(slope), input_precision="ieee")
        change = share * (change - inner[None, :])
        total_k = tl.dot(change.to(queries.dtype), queries, total_k, input_precision="ieee")
    place = (group * heads + head) * keys + first
    store_rows(grad_k + place * HEAD, HEAD, left, total_k * scale, HEAD, PAD_HEAD, BLOCK_KEYS)
    store_rows(grad_v + place * VALUE, VALUE, left, total_v, VALUE, PAD_VALUE, BLOCK_KEYS)


def launch_attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    bias_row: Tensor | None,
    scale: float,
    bias_grad: bool,
    tiles: Tiles | None = None,
    empty: Callable[..., Tensor] = torch.empty,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`dgefx::attend_backward` by Triton.

    Args:
        grad: (T, H, E) gradient of `out`.
        q to scale: what the forward was given; out, lse: what it returned, contiguous.
        bias_grad: whether to return the gradient of the scores.
        tiles, empty: as in the forward; block sizes of both kernels.

    Returns:
        Contiguous gradients of q, k and v, in their dtype, and of the scores, (T, H, M) float32.
    """
    q, k, v, grad = (dense_last(tensor) for tensor in (q, k, v, grad))
    bias = None if bias is None else dense_last(bias)
    sizes = sizes_of(q, k, v, (q, k, v, grad))
    rows, groups, heads, keys, *_, unit = sizes
    wide = widens(attend_query_backward_kernel, q.dtype)
    single = {"dtype": torch.float32, "device": q.device}
    grad_q, grad_k, grad_v = (
        empty(tuple(tensor.shape), dtype=q.dtype, device=q.device) for tensor in (q, k, v)
    )
    delta = empty((rows, heads), **single)
    grad_score = empty((rows, heads, keys), **single) if bias_grad else None
    inputs = (q, k, v, offsets, bias, bias_row, grad, lse, delta)
    strides = [stride // unit for tensor in (q, k, v, grad) for stride in tensor.stride()[:-1]]
    strides += bias_strides(bias)

    chosen = tiles or query_backward_tiles(sizes, q.dtype, bias is not None)
    attend_query_backward_kernel[(row_tiles(rows, groups, chosen.rows), heads)](
        *inputs,
        out,
        grad_q,
        grad_score,
        scale,
        rows,
        groups,
        keys,
        *strides,
        **constants(sizes, chosen, bias is not None, wide),
        WRITE_SCORE=bias_grad,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )

    if groups:  # a grid must not be empty
        chosen = tiles or context_backward_tiles(sizes, q.dtype, bias is not None)
        fixed = constants(sizes, chosen, bias is not None, wide)
        attend_context_backward_kernel[(groups * triton.cdiv(keys, fixed["BLOCK_KEYS"]), heads)](
            *inputs,
            grad_k,
            grad_v,
            scale,
            keys,
            *strides,
            **fixed,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
        )
    return grad_q, grad_k, grad_v, grad_score
