"""`dgefx::stencil`: a depthwise convolution on queries in any order, as an operator.

What `kernels.stencil` does slot by slot, for training too and for both budget modes: equal to
un-pool, convolve, pool. CUDA takes the kernels of `gpu.stencil`, which read each query's patch and
the ring around it; everything else takes the dense reference, the definition itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import wrap_triton
from torch.nn.grad import conv2d_weight
from torch.utils.flop_counter import register_flop_formula

from dgefx.kernels.autocast import autocast_dtype
from dgefx.kernels.dispatch import takes_triton
from dgefx.kernels.operator import operator
from dgefx.kernels.packing import Packing
from dgefx.kernels.stencil_tables import StencilTables


def stencil(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packing: Packing,
    tables: StencilTables,
    grid: tuple[int, int],
) -> Tensor:
    """Depthwise convolution, stride 1, zero padding, on queries.

    Args:
        hidden: (Q, C), float. weight: (C, 1, k, k), k odd. bias: (C,) or None.
        packing: of the block, which has no prefix tokens.
        tables: of `grid`, the block's granularities and k, on the device of `hidden`.
        grid: (H, W) of one image.

    Returns:
        (Q, C) of `hidden`'s dtype: for every query the mean over its patch of the convolution of
        the un-pooled `hidden`; idle slots hold the bias.
    """
    patches = packing.members.start.shape[0] - 1
    if tables.place.shape[0] != patches:
        raise ValueError(
            f"stencil: the tables have {tables.place.shape[0]} patches, the packing {patches}; "
            "blocks with convolutions have no prefix tokens"
        )
    if tables.shares.shape[1] != weight.shape[-1] * weight.shape[-2]:
        raise ValueError(
            f"stencil: tables for {tables.shares.shape[1]} taps, weight {tuple(weight.shape)}"
        )
    taps = weight.flatten(1).t()
    operands = (packing.patch, packing.base, packing.row, *tables, *grid)
    kind = hidden.device.type
    dtype = autocast_dtype(kind)
    if dtype is not None:  # as a convolution takes it
        with torch.autocast(kind, enabled=False):
            out = stencil_op(hidden.to(dtype), taps.to(dtype), *operands)
    else:
        out = stencil_op(hidden, taps, *operands)
    return out if bias is None else out + bias.to(out.dtype)


@operator("dgefx::stencil")
def stencil_op(
    hidden: Tensor,
    taps: Tensor,
    patch: Tensor,
    base: Tensor,
    row: Tensor,
    place: Tensor,
    start: Tensor,
    reads: Tensor,
    shares: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """`stencil` without bias: hidden (Q, C), taps (k * k, C), then `Packing` and `StencilTables`.
    Zeros in idle slots."""
    if not takes_triton(hidden):
        return _dense(hidden, taps, patch, row, place, height, width)
    from dgefx.kernels.gpu.stencil import run_stencil

    coefficients = shares @ taps.float()
    return run_stencil(
        hidden,
        coefficients,
        patch,
        base,
        row,
        place,
        start,
        reads,
        height,
        width,
        adjoint=False,
        launch=wrap_triton,
    )


@operator("dgefx::stencil_hidden_grad")
def stencil_hidden_grad(
    grad: Tensor,
    taps: Tensor,
    patch: Tensor,
    base: Tensor,
    row: Tensor,
    place: Tensor,
    start: Tensor,
    reads: Tensor,
    shares: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """Gradient of `hidden` (Q, C) from that of the result.

    With U un-pooling, n the tokens per query and V the convolution, the stencil is U^T V U / n;
    its adjoint U^T V^T U applied to grad / n is n times the stencil of V^T, of flipped taps.
    """
    if not takes_triton(grad):
        tokens = _tokens(patch, place, _wide(grad))
        scaled = grad.to(tokens.dtype) / tokens
        out = _dense(scaled, taps.flip(0), patch, row, place, height, width)
        return (out * tokens).to(grad.dtype)
    from dgefx.kernels.gpu.stencil import run_stencil

    coefficients = shares @ taps.float().flip(0)
    return run_stencil(
        grad,
        coefficients,
        patch,
        base,
        row,
        place,
        start,
        reads,
        height,
        width,
        adjoint=True,
        launch=wrap_triton,
    )


@operator("dgefx::stencil_taps_grad")
def stencil_taps_grad(
    grad: Tensor,
    hidden: Tensor,
    taps: Tensor,
    patch: Tensor,
    base: Tensor,
    row: Tensor,
    place: Tensor,
    reads: Tensor,
    shares: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """Gradient of `taps` (k * k, C), in their dtype, from that of the result."""
    if not takes_triton(hidden):
        wide, channels, kernel = _wide(hidden), hidden.shape[1], _side(taps)
        scaled = grad.to(wide) / _tokens(patch, place, wide)
        found = conv2d_weight(
            _maps(hidden.to(wide), row, height, width),
            [channels, 1, kernel, kernel],
            _maps(scaled, row, height, width),
            padding=kernel // 2,
            groups=channels,
        )
        return found.flatten(1).t().to(taps.dtype).contiguous()
    from dgefx.kernels.gpu.stencil import run_coefficients

    sums = run_coefficients(
        grad, hidden, patch, base, row, place, reads, height, width, launch=wrap_triton
    )
    return (shares.t() @ sums).to(taps.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    """What sums are made in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _side(taps: Tensor) -> int:
    return math.isqrt(taps.shape[0])


def _tokens(patch: Tensor, place: Tensor, dtype: torch.dtype) -> Tensor:
    """(Q, 1): tokens in every query's patch, of any patch where the slot is idle."""
    return place[patch.clamp(min=0), 3].to(dtype).unsqueeze(-1)


def _maps(values: Tensor, row: Tensor, height: int, width: int) -> Tensor:
    """(Q, C) un-pooled to (images, C, H, W)."""
    return values[row].view(-1, height, width, values.shape[1]).permute(0, 3, 1, 2)


def _dense(
    hidden: Tensor, taps: Tensor, patch: Tensor, row: Tensor, place: Tensor, height: int, width: int
) -> Tensor:
    """The definition: un-pool, convolve, pool. It needs no tables but the tokens per patch."""
    wide, channels, kernel = _wide(hidden), hidden.shape[1], _side(taps)
    weight = taps.to(wide).t().reshape(channels, 1, kernel, kernel)
    maps = _maps(hidden.to(wide), row, height, width)
    out = F.conv2d(maps, weight, padding=kernel // 2, groups=channels)
    rows = out.permute(0, 2, 3, 1).reshape(-1, channels)
    sums = torch.zeros_like(hidden, dtype=wide).index_add(0, row, rows)
    return (sums / _tokens(patch, place, wide)).to(hidden.dtype)


@stencil_op.register_fake
@stencil_hidden_grad.register_fake
def _like_first(first: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(first, memory_format=torch.contiguous_format)


@stencil_taps_grad.register_fake
def _like_taps(grad: Tensor, hidden: Tensor, taps: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(taps, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.height, ctx.width = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden, taps, patch, base, row, place, start, reads, shares = ctx.saved_tensors
    grad_hidden = grad_taps = None
    if ctx.needs_input_grad[0]:
        grad_hidden = stencil_hidden_grad(
            grad, taps, patch, base, row, place, start, reads, shares, ctx.height, ctx.width
        )
    if ctx.needs_input_grad[1]:
        grad_taps = stencil_taps_grad(
            grad, hidden, taps, patch, base, row, place, reads, shares, ctx.height, ctx.width
        )
    return grad_hidden, grad_taps, *[None] * 9


stencil_op.register_autograd(_backward, setup_context=_save)


# Counted as the depthwise convolution over Q positions that the stencil replaces, whatever reads
# it makes; each of the two gradients costs the same again.
@register_flop_formula([torch.ops.dgefx.stencil, torch.ops.dgefx.stencil_hidden_grad])
def _flops(hidden: Any, taps: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(hidden) * taps[0]


@register_flop_formula(torch.ops.dgefx.stencil_taps_grad)
def _taps_flops(grad: Any, hidden: Any, taps: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(hidden) * taps[0]
