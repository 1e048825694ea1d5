"""`dgefx::collect` and `dgefx::spread`: the two linear maps between token rows and query rows.

Each is the gradient of the other, and together they are the gradients of `dgefx::pool` and
`dgefx::unpool_add`. Neither adds atomically, so gradients do not change between runs. They do no
multiply-accumulates: torch's FLOP counter has no formula for them and counts 0, as it should.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dgefx.kernels.dispatch import takes_triton
from dgefx.kernels.operator import operator


def widened(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that sums are in: float32, or its own where that is wider."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def member_counts(patch: Tensor, start: Tensor) -> Tensor:
    """(Q,) int64 tokens of every query's patch, 0 where it is idle."""
    counts = (start[1:] - start[:-1]).index_select(0, patch.clamp(min=0))
    return torch.where(patch >= 0, counts, 0)


def collect_reference(
    source: Tensor,
    patch: Tensor,
    base: Tensor,
    start: Tensor,
    token: Tensor,
    longest: int,
    mean: bool,
    zero_idle: bool,
) -> Tensor:
    """What `launch_collect` computes, in PyTorch; `longest` as in `dgefx.kernels.packing`."""
    counts = member_counts(patch, start)
    wide = widened(source)
    # tokens in the order of their queries; there are as many as rows, each being in one query
    begin = counts.cumsum(0) - counts
    first = start.index_select(0, patch.clamp(min=0)) - begin
    places = torch.arange(source.shape[0], device=source.device)
    query = torch.arange(patch.shape[0], device=source.device).repeat_interleave(
        counts, output_size=source.shape[0]
    )
    rows = token.index_select(0, first.index_select(0, query) + places)
    rows = rows + base.index_select(0, query)
    result = F.embedding_bag(rows, wide, begin, mode="mean" if mean else "sum")
    if not zero_idle:
        own = torch.arange(longest, device=source.device) < start[1]
        filler = torch.where(own[:, None], wide.index_select(0, token[:longest]), 0).sum(0)
        filler = filler / start[1].clamp(min=1) if mean else filler
        result = torch.where((patch >= 0)[:, None], result, filler)
    return result.to(source.dtype)


def spread_reference(
    queries: Tensor, row: Tensor, patch: Tensor, start: Tensor, mean: bool
) -> Tensor:
    """(R, C): every token's query row, divided by the tokens of its patch if `mean`."""
    if not mean:
        return queries.index_select(0, row)
    counts = member_counts(patch, start).clamp(min=1)
    return (widened(queries) / counts[:, None]).index_select(0, row).to(queries.dtype)


@operator("dgefx::collect")
def collect(
    source: Tensor,
    patch: Tensor,
    base: Tensor,
    row: Tensor,
    start: Tensor,
    token: Tensor,
    longest: int,
    mean: bool,
    zero_idle: bool,
) -> Tensor:
    """(Q, C) sum or mean of the member rows of every query; see `launch_collect`."""
    if not takes_triton(source):
        return collect_reference(source, patch, base, start, token, longest, mean, zero_idle)
    from dgefx.kernels.gpu.collect import launch_collect

    return launch_collect(
        source,
        patch,
        base,
        start,
        token,
        mean=mean,
        zero_idle=zero_idle,
        launch=torch.library.wrap_triton,
    )


@operator("dgefx::spread")
def spread(
    queries: Tensor,
    patch: Tensor,
    base: Tensor,
    row: Tensor,
    start: Tensor,
    token: Tensor,
    longest: int,
    mean: bool,
) -> Tensor:
    """(R, C) every token's query row, divided by the tokens of its patch if `mean`."""
    if not takes_triton(queries):
        return spread_reference(queries, row, patch, start, mean)
    from dgefx.kernels.gpu.spread import launch_spread

    return launch_spread(queries, row, patch, start, mean=mean, launch=torch.library.wrap_triton)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:6])
    ctx.longest, ctx.mean = inputs[6], inputs[7]


def _collect_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # no token's row is that of an idle query, so what arrives at those is never read
    gradient = spread(grad, *ctx.saved_tensors, ctx.longest, ctx.mean)
    return gradient, *[None] * 8


def _spread_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gradient = collect(grad, *ctx.saved_tensors, ctx.longest, ctx.mean, True)
    return gradient, *[None] * 7


collect.register_autograd(_collect_backward, setup_context=_keep)
spread.register_autograd(_spread_backward, setup_context=_keep)
