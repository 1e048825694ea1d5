"""`project_rows`: a part of a fused projection, laid out as the block would have it.

A fused qkv layer is wanted for queries on one side and for keys and values on the other; each side
computes its own rows of the weight, so nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def weight_rows(weight: Tensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a weight (F, C) or bias (F,)."""
    return weight[start:stop]


def linear_rows(layer: nn.Module, x: Tensor, start: int, stop: int) -> Tensor:
    """Features [start, stop) of `layer(x)`.

    Args:
        layer: an `nn.Linear`, of which only these rows are computed; one with hooks (some compute
            its weight, as pruning does) or a forward of its own, or what was put into its place
            after the conversion (an adapter, a quantised layer), is called.
        x: (..., C).
    """
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    if type(layer) is not nn.Linear or hooked:
        projected: Tensor = layer(x)
        return projected[..., start:stop]
    bias = None if layer.bias is None else weight_rows(layer.bias, start, stop)
    return nn.functional.linear(x, weight_rows(layer.weight, start, stop), bias)


def arrange_projection(
    projected: Tensor,
    start: int,
    stop: int,
    feature_sizes: Sequence[int],
    order: Sequence[int],
    singles: Sequence[int],
    positions: Sequence[int] = (),
    merged: int | None = None,
) -> Tensor:
    """Features [start, stop) of a projection in the axis order the attention expects.

    Args:
        projected: (B, tokens..., F).
        feature_sizes: what the features split into.
        order: permutation of (batch, *positions, *features).
        singles: axes of size 1 of the result, in rising order.
        positions: sizes that the tokens split into, if they do (windows and their slots).
        merged: axis of the result that becomes one with the next.
    """
    part = projected if stop - start == projected.shape[-1] else projected[..., start:stop]
    part = part.flatten(1, -2).unflatten(-1, tuple(feature_sizes))
    if positions:
        part = part.unflatten(1, tuple(positions))
    part = part.permute(tuple(order))
    for axis in singles:
        part = part.unsqueeze(axis)
    return part if merged is None else part.flatten(merged, merged + 1)
