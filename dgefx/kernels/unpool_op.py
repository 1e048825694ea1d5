"""`dgefx::unpool_add`: residual stream plus the gated update of every token's query, in one pass.

`dgefx.kernels.unpool` as one operator. Its gradients are sums over patches, `dgefx::collect`. FLOP
count: see `dgefx.kernels.transfer_op`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgefx.kernels.dispatch import takes_triton
from dgefx.kernels.operator import operator
from dgefx.kernels.packing import Packing
from dgefx.kernels.transfer_op import collect, widened


def unpool_add_reference(
    tokens: Tensor, queries: Tensor, updated: Tensor, gate: Tensor | None, row: Tensor
) -> Tensor:
    """`dgefx::unpool_add` in PyTorch."""
    update = widened(updated) - widened(queries)
    if gate is not None:
        update = update * widened(gate)[:, None]
    result = widened(tokens) + update.index_select(0, row)
    return result.to(torch.promote_types(tokens.dtype, updated.dtype))


@operator("dgefx::unpool_add")
def unpool_add(
    tokens: Tensor,
    queries: Tensor,
    updated: Tensor,
    gate: Tensor | None,
    patch: Tensor,
    base: Tensor,
    row: Tensor,
    start: Tensor,
    token: Tensor,
    longest: int,
) -> Tensor:
    """tokens[r] + gate[q] * (updated[q] - queries[q]) with q = row[r].

    Args:
        tokens: (R, C); half precision is computed in float32.
        queries, updated: (Q, C). gate: (Q,) or None for 1.
        patch, base, row, start, token, longest: the fields of `dgefx.kernels.packing`.

    Returns:
        (R, C) in the dtype of `tokens` plus `updated`, as the addition in the dense block.
    """
    if not takes_triton(tokens):
        return unpool_add_reference(tokens, queries, updated, gate, row)
    from dgefx.kernels.gpu.spread import launch_spread

    return launch_spread(
        updated,
        row,
        patch,
        start,
        minus=queries,
        scale=gate,
        residual=tokens,
        launch=torch.library.wrap_triton,
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, queries, updated, gate, *fields = inputs
    values = () if gate is None else (gate, queries, updated)
    ctx.save_for_backward(*fields[:5], *values)
    ctx.longest = fields[5]
    ctx.dtypes = queries.dtype, updated.dtype, inputs[0].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    _, needs_queries, needs_updated, needs_gate, *_ = ctx.needs_input_grad
    patch, base, row, start, token, *values = ctx.saved_tensors
    for_queries = for_updated = for_gate = None
    if needs_queries or needs_updated or needs_gate:
        # idle queries collect zeros
        total = collect(grad, patch, base, row, start, token, ctx.longest, False, True)
        update = widened(total)
        if values:
            gate, queries, updated = values
            change = widened(updated) - widened(queries)
            # an idle query holds any values: times 0 is not enough
            along = torch.where(patch >= 0, (update * change).sum(1), 0)
            for_gate = along.to(gate.dtype) if needs_gate else None
            update = update * widened(gate)[:, None]
        for_queries = -update.to(ctx.dtypes[0]) if needs_queries else None
        for_updated = update.to(ctx.dtypes[1]) if needs_updated else None
    return grad.to(ctx.dtypes[2]), for_queries, for_updated, for_gate, *[None] * 6


unpool_add.register_autograd(_backward, setup_context=_keep)


def unpool_add_op(
    tokens: Tensor, queries: Tensor, updated: Tensor, gate: Tensor | None, packing: Packing
) -> Tensor:
    """(R, C) token rows plus the update of their queries; idle queries get zero gradient.

    Args:
        tokens: (R, C). queries, updated: (Q, C). gate: (Q,) or None.
    """
    patch, base, row, members = packing
    return unpool_add(tokens, queries, updated, gate, patch, base, row, *members)
