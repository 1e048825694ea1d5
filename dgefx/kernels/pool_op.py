"""`dgefx::pool`: the mean of every chosen patch, straight from the token rows.

`dgefx.kernels.pool` gathers from a hierarchy that the router has built; this operator needs no
such table. Its gradient is `dgefx::spread`. FLOP count: see `dgefx.kernels.transfer_op`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgefx.kernels.dispatch import takes_triton
from dgefx.kernels.operator import operator
from dgefx.kernels.packing import Packing
from dgefx.kernels.transfer_op import collect_reference, spread


def pool_reference(
    tokens: Tensor, patch: Tensor, base: Tensor, start: Tensor, token: Tensor, longest: int
) -> Tensor:
    """`dgefx::pool` in PyTorch."""
    return collect_reference(tokens, patch, base, start, token, longest, True, False)


@operator("dgefx::pool")
def pool(
    tokens: Tensor,
    patch: Tensor,
    base: Tensor,
    row: Tensor,
    start: Tensor,
    token: Tensor,
    longest: int,
) -> Tensor:
    """Patch means; idle queries hold the mean of the first image's patch 0.

    Args:
        tokens: (R, C); half precision is summed in float32.
        patch, base, row, start, token, longest: the fields of `dgefx.kernels.packing`.

    Returns:
        (Q, C) in the dtype of `tokens`.
    """
    if not takes_triton(tokens):
        return pool_reference(tokens, patch, base, start, token, longest)
    from dgefx.kernels.gpu.collect import launch_collect

    return launch_collect(
        tokens,
        patch,
        base,
        start,
        token,
        mean=True,
        zero_idle=False,
        launch=torch.library.wrap_triton,
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:6])
    ctx.longest = inputs[6]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # no token's row is that of an idle query, so what arrives at those is dropped
    return spread(grad, *ctx.saved_tensors, ctx.longest, True), *[None] * 6


pool.register_autograd(_backward, setup_context=_keep)


def pool_rows_op(tokens: Tensor, packing: Packing) -> Tensor:
    """(R, C) token rows to (Q, C) patch means; gradients arriving at idle queries are dropped."""
    patch, base, row, members = packing
    return pool(tokens, patch, base, row, *members)
