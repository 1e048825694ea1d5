"""`Routing`: the decision of one router call, in the form the kernels read.

Made by `dgefx.nn.router.Router`, read by every kernel of the same block. Under the per-image
budget the number of slots per level is a Python int, equal for every image of the batch; under the
average budget `ragged` says where the queries of every image are, and `patches` is empty.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dgefx.kernels.alternatives import Alternatives
from dgefx.kernels.correction import Correction
from dgefx.kernels.packing import Packing
from dgefx.kernels.pool import Places
from dgefx.kernels.ragged import Ragged
from dgefx.kernels.stencil_tables import StencilTables
from dgefx.kernels.window_slots import WindowSlots


class Routing(NamedTuple):
    """Granularity of every region and where its queries are.

    B images, N = H*W grid tokens, R regions, slots = sum of the capacities.
    """

    levels: Tensor  # (B, R) int64, level of every region, 0 = finest; raster order
    patches: tuple[Tensor | None, ...]  # per level (B, capacity) patch ids; None: no slots
    token_slot: Tensor  # (B, N) int64, slot of every grid token's patch, prefix not counted
    # (ragged: among the packed queries of the batch, prefix tokens counted)
    means: tuple[Tensor, ...]  # per level (B, P, C) patch means; level 0 is empty (it is the input)
    patch_tokens: tuple[Tensor, ...]  # per level (P,) tokens in every patch
    token_patch: tuple[Tensor, ...]  # per level (N,) patch of every token
    token_region: Tensor  # (N,) region of every token
    gate: Tensor | None  # (B, slots) multiplier of the update that carries the gate's gradient
    grid: tuple[int, int]  # (H, W)
    prefix: int  # tokens in front of the grid, queries of their own
    granularities: tuple[int, ...]
    region: int  # side of the cells that `levels` counts in
    correction: Correction | None = None  # of the un-pooled update, where one was fitted
    lost: Tensor | None = None  # (B, slots) input of the correction
    places: Places | None = None  # of the patch hierarchy, where the block has windows
    windows: WindowSlots | None = None  # where every query sits in its window
    ragged: Ragged | None = None  # where the queries are, if images differ in their number
    packing: Packing | None = None  # for the operators, where the tensors are on a GPU
    stencils: tuple[tuple[int, StencilTables], ...] = ()  # with `packing`: per kernel size
    alternatives: Alternatives | None = None  # all granularities at once, to train gates

    @property
    def capacities(self) -> tuple[int, ...]:
        """Slots per level, under the per-image budget."""
        return tuple(0 if p is None else p.shape[1] for p in self.patches)
