"""Deformable attention's sampling for packed queries: what the generated code of the average budget
calls in place of `grid_sample`.

`grid_sample` wants as many positions of every image. So queries are padded to as many as an image
can have, and packed again; idle rows sample anywhere and are never read. Sampling is then no
cheaper than the dense block's, what leads to it and from it is. Used by `passes.emit.packed`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dgefx.kernels.ragged import from_padded, to_padded
from dgefx.kernels.routing import Routing


def packed_grid_sample(
    value: Tensor,
    grid: Tensor,
    routing: Routing,
    axis: int,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    """`grid_sample` of packed queries.

    Args:
        value: (B * inner, C, H, W), maps of every image; `inner` are heads, say.
        grid: (inner, T, points, 2), or (inner, points, T, 2): positions of T packed queries.
        axis: of the queries in `grid`.
        mode, padding_mode, align_corners: as there.

    Returns:
        (inner, C, T, points), or (inner, C, points, T).
    """
    ragged = routing.ragged
    assert ragged is not None
    images, inner = ragged.row.shape[0], grid.shape[0]
    points = grid.shape[3 - axis]
    # all patches of all levels are queries where all granularities are computed
    longest = ragged.row.shape[1] if routing.alternatives is None else ragged.patches
    rows = grid.movedim(axis, 0).flatten(1)
    padded = to_padded(rows, ragged, longest).unflatten(2, (inner, points, 2))
    places = padded.transpose(1, 2).flatten(0, 1)  # (B * inner, longest, points, 2)
    samples = F.grid_sample(value, places, mode, padding_mode, align_corners)
    samples = samples.unflatten(0, (images, inner)).permute(0, 3, 1, 2, 4)
    packed = from_padded(samples.flatten(2), ragged)
    packed = packed.unflatten(1, (inner, -1, points))  # (T, inner, C, points)
    return packed.permute(1, 2, 0, 3) if axis == 1 else packed.permute(1, 2, 3, 0)
