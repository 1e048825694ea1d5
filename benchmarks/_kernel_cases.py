"""What `kernels.py` times: realistic shapes, random packings, and one `Contest` per operator.

A contest has the operator, its compiled PyTorch reference, other contestants where there are any,
and the same function in float64 that all of them must agree with. See `_attend_cases.py` for
attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dgefx.kernels.allocate_op import allocate, allocate_reference
from dgefx.kernels.packing import Packing, image_members, ragged_packing
from dgefx.kernels.pool_op import pool_reference, pool_rows_op
from dgefx.kernels.ragged import Ragged, assign_ragged, level_counts
from dgefx.kernels.stencil_op import stencil
from dgefx.kernels.stencil_tables import StencilTables, stencil_tables
from dgefx.kernels.unpool_op import unpool_add_op, unpool_add_reference
from dgefx.nn.hierarchy import LevelTables, level_tables

SIDES = (1, 2, 4)
OWN, EAGER, BASELINE = "dgefx", "dgefx, eager", "compiled reference"
FORWARD, BOTH = "forward", "forward + backward"


class Shape(NamedTuple):
    """Tokens of one layer."""

    name: str
    grid: tuple[int, int]
    prefix: int
    channels: int
    heads: int
    share: float = 1.0  # of the batch: large images come in smaller batches
    hidden: int = 0  # channels of the convolution in the MLP

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]


VIT_B = Shape("ViT-B/16 224", (14, 14), 1, 768, 12)
VIT_L = Shape("ViT-L/16 384", (24, 24), 1, 1024, 16)
PVT = Shape("PVT v2-B2 stage 1", (56, 56), 0, 64, 1, hidden=512)
SAM = Shape("SAM-B 1024", (64, 64), 0, 768, 12, share=1 / 32)


@dataclass
class Contest:
    """One operator on one shape.

    inputs: what is differentiated, in the timed dtype; calls: by name, functions of the inputs, the
    operator's own is `OWN`. exact: the same function, given the inputs in float64. work: per pass,
    the bytes or FLOPs that it needs at least. roundings: per pass, how often a result or what it is
    made from is rounded to the timed dtype. steps: per pass, float32 operations on the way, each
    off by 2**-24 at most. unlike: calls with another result.
    """

    op: str
    shape: str
    inputs: tuple[Tensor, ...]
    calls: dict[str, Callable[..., Any]]
    exact: Callable[..., Any]
    work: dict[str, float]
    roundings: dict[str, int]
    steps: dict[str, float]
    limit: str = "bytes"
    unlike: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)  # contestants that cannot run here


class Drawn(NamedTuple):
    """A batch whose images have different numbers of queries."""

    images: int
    levels: Tensor  # (B, R)
    tables: list[LevelTables]
    ragged: Ragged
    packing: Packing


def draw(shape: Shape, batch: int, device: torch.device, seed: int = 0) -> Drawn:
    """Regions of 4 x 4 tokens with random levels, images between mostly coarse and mostly fine, so
    that as nearly as can be half of the batch's tokens are left as queries."""
    generator = torch.Generator().manual_seed(seed)
    images = max(1, int(batch * shape.share))
    tables = [level_tables(shape.grid, side, SIDES[-1], torch.device("cpu")) for side in SIDES]
    costs = [table.region_cost for table in tables]
    detail = torch.rand(images, len(costs[0]), generator=generator)
    detail = detail + 0.3 * torch.rand(images, 1, generator=generator)

    def levels_above(bar: float) -> Tensor:
        return (detail < bar).long() + (detail < 0.6 * bar).long()

    def missed(bar: float) -> float:
        return abs(float(level_counts(levels_above(bar), costs).sum()) - half)

    half = images * (shape.grid[0] * shape.grid[1]) / 2
    levels = levels_above(min((step / 100 for step in range(131)), key=missed))
    total = int(level_counts(levels, costs).sum()) + images * shape.prefix
    regions_of = [table.patch_region for table in tables]
    patches = [table.token_patch for table in tables]
    ragged = assign_ragged(
        levels, regions_of, patches, costs, [None] * len(SIDES), shape.prefix, total
    )
    counts = [len(region) for region in regions_of]
    members = image_members(patches, counts, shape.prefix, longest=SIDES[-1] ** 2)
    packing = ragged_packing(ragged, members)
    return Drawn(
        images,
        levels.to(device),
        [LevelTables(*(t.to(device) for t in table)) for table in tables],
        Ragged(*(t.to(device) if isinstance(t, Tensor) else t for t in ragged)),
        Packing(
            *(t.to(device) for t in (packing.patch, packing.base, packing.row)),
            members=members._replace(
                start=members.start.to(device), token=members.token.to(device)
            ),
        ),
    )


def label(shape: Shape, drawn: Drawn, channels: str) -> str:
    """ "ViT-B/16 224: 256 x 197 x 768, 51 % queries"."""
    share = drawn.packing.patch.shape[0] / (drawn.images * shape.tokens)
    return f"{shape.name}: {drawn.images} x {shape.tokens} x {channels}, {share:.0%} queries"


def rows_like(count: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, channels, device=device).to(dtype).requires_grad_()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def pool_contest(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> Contest:
    """Bytes: every token row is read, every query row written; the gradient goes the other way."""
    drawn = draw(shape, batch, device)
    packing = drawn.packing
    tokens = rows_like(drawn.images * shape.tokens, shape.channels, device, dtype)

    def reference(tokens: Tensor) -> Tensor:
        return pool_reference(tokens, packing.patch, packing.base, *packing.members)

    def own(tokens: Tensor) -> Tensor:
        return pool_rows_op(tokens, packing)

    moved = tokens.nbytes + packing.patch.shape[0] * shape.channels * tokens.itemsize
    return Contest(
        "pool",
        label(shape, drawn, f"{shape.channels}"),
        (tokens,),
        {OWN: compiled(own), BASELINE: compiled(reference), EAGER: own},
        reference,
        {FORWARD: moved, BOTH: 2 * moved},
        # sums of 16 in float32 at most; a token's gradient is one query's
        {FORWARD: 1, BOTH: 1},
        {FORWARD: 64, BOTH: 64},
    )


def unpool_contest(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> Contest:
    """Bytes: tokens and two query tables are read, tokens written; the gradient of the tokens is
    that of the result and costs nothing, those of the queries are two tables."""
    drawn = draw(shape, batch, device)
    packing, queries = drawn.packing, drawn.packing.patch.shape[0]
    inputs = tuple(
        rows_like(count, shape.channels, device, dtype)
        for count in (drawn.images * shape.tokens, queries, queries)
    )

    def reference(tokens: Tensor, old: Tensor, new: Tensor) -> Tensor:
        return unpool_add_reference(tokens, old, new, None, packing.row)

    def own(tokens: Tensor, old: Tensor, new: Tensor) -> Tensor:
        return unpool_add_op(tokens, old, new, None, packing)

    tokens, table = inputs[0].nbytes, inputs[1].nbytes
    moved = 2 * tokens + 2 * table
    return Contest(
        "unpool_add",
        label(shape, drawn, f"{shape.channels}"),
        inputs,
        {OWN: compiled(own), BASELINE: compiled(reference), EAGER: own},
        reference,
        {FORWARD: moved, BOTH: moved + tokens + 2 * table},
        # the gradient's sum is rounded when it is collected
        {FORWARD: 1, BOTH: 2},
        {FORWARD: 16, BOTH: 64},
    )


def stencil_contest(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> Contest:
    """Bytes: query rows only, as the operator moves no more; the reference is the definition."""
    drawn = draw(shape, batch, device)
    packing, kernel, grid = drawn.packing, 3, shape.grid
    tables = StencilTables(*(t.to(device) for t in stencil_tables(grid, SIDES, kernel)))
    hidden = rows_like(packing.patch.shape[0], shape.hidden, device, dtype)
    weight = torch.randn(shape.hidden, 1, kernel, kernel, device=device).to(dtype) / kernel
    weight = weight.requires_grad_()
    row = packing.row

    def reference(hidden: Tensor, weight: Tensor) -> Tensor:
        """Un-pool, convolve, pool."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        maps = hidden[row].view(-1, *grid, hidden.shape[1]).permute(0, 3, 1, 2)
        out = F.conv2d(maps, weight, padding=kernel // 2, groups=hidden.shape[1])
        tokens = out.permute(0, 2, 3, 1).reshape(-1, hidden.shape[1]).to(wide)
        sums = torch.zeros_like(hidden, dtype=wide).index_add(0, row, tokens)
        return (sums / tables.place[packing.patch, 3].unsqueeze(1)).to(hidden.dtype)

    def own(hidden: Tensor, weight: Tensor) -> Tensor:
        return stencil(hidden, weight, None, packing, tables, grid)

    return Contest(
        "stencil",
        label(shape, drawn, f"{shape.hidden}"),
        (hidden, weight),
        {OWN: compiled(own), BASELINE: compiled(reference), EAGER: own},
        reference,
        {FORWARD: 2 * hidden.nbytes, BOTH: 5 * hidden.nbytes},
        # a gradient of the weight is a sum over all tokens, whose error in float32 grows with the
        # root of their number
        {FORWARD: 1, BOTH: 1},
        {FORWARD: 256, BOTH: 256 + 4 * math.sqrt(row.shape[0])},
    )


def allocate_contest(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> Contest:
    """Bytes: levels are read, three tables of int64 written. Integers, so it must agree exactly."""
    drawn = draw(shape, batch, device)
    counts = [table.patch_region.shape[0] for table in drawn.tables]
    starts = [sum(counts[:level]) for level in range(len(counts))]
    region = torch.cat([table.patch_region for table in drawn.tables])
    level = torch.repeat_interleave(
        torch.arange(len(counts), device=device), torch.tensor(counts, device=device)
    )
    exists = torch.ones_like(region, dtype=torch.bool)
    token_patch = torch.stack(
        [table.token_patch + start for table, start in zip(drawn.tables, starts, strict=True)]
    )
    taken = level_counts(drawn.levels, [table.region_cost for table in drawn.tables])
    segment = (taken.flatten().cumsum(0) - taken.flatten()).view_as(taken)
    total = int(taken.sum())
    arguments = (region, level, exists, token_patch, segment, total)

    def reference(levels: Tensor) -> tuple[Tensor, ...]:
        return allocate_reference(levels, *arguments)

    def own(levels: Tensor) -> tuple[Tensor, ...]:
        return allocate(levels, *arguments)

    entries = drawn.levels.numel() + total + drawn.images * (sum(counts) + token_patch.shape[1])
    return Contest(
        "allocate",
        label(shape, drawn, f"{len(SIDES)} levels"),
        (drawn.levels,),
        {OWN: compiled(own), BASELINE: compiled(reference), EAGER: own},
        reference,
        {FORWARD: 8.0 * entries},
        {FORWARD: 0},
        {FORWARD: 0},
    )
