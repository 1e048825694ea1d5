"""`StencilTables`: what a stencil on one grid reads, as constants.

Made once per (grid, granularities, kernel size), moved to the device by the caller, read by
`dgefx::stencil` and its gradients.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from dgefx.kernels.taps import ring_of, tap_shares


class StencilTables(NamedTuple):
    """P patches of all levels (raster order within a level), of K kinds: side and clipped shape.
    Queries of one kind make the same reads, E over all kinds."""

    place: Tensor  # (P, 4) int32: kind, top row, left column, tokens of every patch
    start: Tensor  # (K + 1,) int32; kind k makes the reads start[k] to start[k + 1] - 1
    reads: Tensor  # (E, 3) int32: kind, rows down and columns right of the patch's top left
    shares: Tensor  # (E, k * k) float32, of each tap in the coefficient of the read


@functools.lru_cache(maxsize=64)
def stencil_tables(
    grid: tuple[int, int], granularities: tuple[int, ...], kernel: int
) -> StencilTables:
    """Tables of a stencil of k = `kernel`, odd, on the CPU; kept, so not to be changed."""
    if kernel % 2 == 0:
        raise ValueError(f"stencil: kernel size {kernel} is not odd")
    kinds: dict[tuple[int, int, int], int] = {}
    place = []
    for side in granularities:
        for top in range(0, grid[0], side):
            for left in range(0, grid[1], side):
                height, width = min(side, grid[0] - top), min(side, grid[1] - left)
                kind = kinds.setdefault((side, height, width), len(kinds))
                place.append((kind, top, left, height * width))
    start, reads, shares = [0], [], []
    for (side, height, width), kind in kinds.items():
        for (down, right), share in _reads(side, height, width, kernel):
            reads.append((kind, down, right))
            shares.append(share)
        start.append(len(reads))
    # a first call in inference mode must not leave tensors that training cannot save
    with torch.inference_mode(False):
        return StencilTables(
            torch.tensor(place, dtype=torch.int32),
            torch.tensor(start, dtype=torch.int32),
            torch.tensor(reads, dtype=torch.int32),
            torch.tensor(shares, dtype=torch.float32),
        )


def _reads(
    side: int, height: int, width: int, kernel: int
) -> list[tuple[tuple[int, int], list[float]]]:
    """(down, right) and tap shares of the reads of one kind, the patch itself first."""
    reach = kernel // 2
    ring = [(y - reach, x - reach) for y, x in ring_of(side, kernel)]
    shares = [share[0] for share in tap_shares(side, kernel, ((height, width),))]
    return [
        (offset, share)
        for offset, share in zip([(0, 0), *ring], shares, strict=True)
        # a clipped patch lies at the border: what is beyond it there is never on the grid
        if not (height < side and offset[0] >= height) and not (width < side and offset[1] >= width)
    ]
