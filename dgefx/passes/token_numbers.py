"""Token numbers: which token of which grid lies in every element of a value.

What `passes.grid` carries through a flat capture. Operations change numbers: a convolution lays a
new grid out, patch merging or a patch embedding by a linear layer makes one token of several,
attention gives tokens where its queries are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node


@dataclass
class Numbers:
    """The token in every element of a node's value, -1 for none; mostly the same along batch and
    channels, and then with stride 0."""

    ids: Tensor
    grid: tuple[int, int]
    source: str | None


def seed(node: Node) -> Numbers | None:
    """Every element of a (B, C, H, W) value a token by its place; None for other shapes."""
    shape = node.meta["shape"]
    if len(shape) != 4:
        return None
    height, width = shape[2:]
    ids = torch.arange(height * width).view(1, 1, height, width).expand(shape)
    stack = node.meta["stack"]
    return Numbers(ids, (height, width), stack[-1] if stack else None)


def kept_plane(numbers: Numbers, shape: tuple[int, ...]) -> Numbers | None:
    """The same numbers after a spatial operation that keeps the plane's size: tokens stay where
    they are, also within windows."""
    ids = numbers.ids
    if ids.dim() != 4 or tuple(ids.shape[2:]) != shape[2:] or ids.shape[0] != shape[0]:
        return None
    if varies(ids, 1) or not varies(ids[:, :1], 2) or not varies(ids[:, :1], 3):
        return None
    return Numbers(ids[:, :1].expand(shape), numbers.grid, numbers.source)


def fit(numbers: Numbers, shape: tuple[int, ...]) -> Numbers | None:
    """The same numbers on a value with other channels."""
    ids = numbers.ids
    if tuple(ids.shape) == shape:
        return numbers
    if len(shape) == ids.dim() and tuple(ids.shape[:-1]) == shape[:-1] and not varies(ids, -1):
        return Numbers(ids[..., :1].expand(shape), numbers.grid, numbers.source)
    return None


def merged(numbers: Numbers) -> Numbers | None:
    """The coarser grid of a value whose channels hold several tokens each.

    Every position has to hold the same rows x columns of tokens, relative to its first one, with
    as many channels of each.
    """
    ids = numbers.ids.flatten(0, -2)
    away = ids < 0
    rows, first_rows = _relative(ids // numbers.grid[1], away)
    columns, first_columns = _relative(ids % numbers.grid[1], away)
    if rows is None or columns is None or not _is_block(rows, columns):
        return None
    lines, new_rows = torch.unique(first_rows, return_inverse=True)
    across, new_columns = torch.unique(first_columns, return_inverse=True)
    empty = away.all(1)
    # a position of padding alone sorts last and is no token
    grid = tuple(int((t < _NOWHERE).sum()) for t in (lines, across))
    new = torch.where(empty, -1, new_rows * grid[1] + new_columns)
    if len(torch.unique(new[~empty])) != grid[0] * grid[1]:
        return None
    shape = numbers.ids.shape
    return Numbers(new.view(*shape[:-1], 1).expand(shape), (grid[0], grid[1]), None)


def rows_of(numbers: Numbers, shape: tuple[int, ...]) -> Numbers | None:
    """Numbers of a product, row by row those of its first operand."""
    ids = numbers.ids
    if ids.dim() != len(shape) or ids.shape[:-1] != shape[:-1] or varies(ids, -1):
        return None
    return Numbers(ids[..., :1].expand(shape), numbers.grid, numbers.source)


def without_axis(numbers: Numbers, axis: int) -> Numbers | None:
    """Numbers of a value after pooling over an axis: that of prefix tokens or channels leaves them
    as they are, one of several tokens makes one token of them."""
    if not varies(numbers.ids, axis):
        return Numbers(numbers.ids.select(axis, 0), numbers.grid, numbers.source)
    if varies(numbers.ids, -1):
        return None
    # as channels, two of each
    apart = numbers.ids[..., 0].movedim(axis, -1).repeat_interleave(2, -1)
    coarse = merged(Numbers(apart, numbers.grid, numbers.source))
    if coarse is None:
        return None
    ids = coarse.ids[..., :1].expand(*coarse.ids.shape[:-1], numbers.ids.shape[-1])
    return Numbers(ids, coarse.grid, None)


def sub_lattice(numbers: Numbers) -> Numbers | None:
    """Some rows and columns of a grid as a grid of their own (what strided slicing leaves); None
    where all tokens, or no full rows and columns, are there."""
    held = torch.unique(numbers.ids)
    held = held[held >= 0]
    rows, columns = torch.unique(held // numbers.grid[1]), torch.unique(held % numbers.grid[1])
    grid = (len(rows), len(columns))
    if len(held) != grid[0] * grid[1] or grid == numbers.grid or not len(held):
        return None
    place = torch.full((numbers.grid[0] * numbers.grid[1],), -1)
    place[held] = torch.arange(len(held))
    ids = torch.where(numbers.ids < 0, -1, place[numbers.ids.clamp(min=0)])
    return Numbers(ids, grid, None)


_NOWHERE = 1 << 40


def _relative(places: Tensor, away: Tensor) -> tuple[Tensor | None, Tensor]:
    """(offset of every channel's token from the first, the first): rows or columns of a
    (positions, channels) value. No offsets where positions differ in them."""
    first = places.masked_fill(away, _NOWHERE).amin(1)
    offsets = places - first.unsqueeze(1)
    smallest = offsets.masked_fill(away, _NOWHERE).amin(0)
    largest = offsets.masked_fill(away, -_NOWHERE).amax(0)
    return (smallest if torch.equal(smallest, largest) else None), first


def _is_block(rows: Tensor, columns: Tensor) -> bool:
    """Whether channels hold all combinations of some rows and columns, each equally often."""
    pairs, counts = torch.unique(torch.stack([rows, columns]), dim=1, return_counts=True)
    combinations = len(torch.unique(rows)) * len(torch.unique(columns))
    return pairs.shape[1] == combinations > 1 and int(counts.min()) == int(counts.max()) > 1


def varies(ids: Tensor, axis: int) -> bool:
    """Whether numbers differ along an axis."""
    if ids.stride(axis) == 0:
        return False
    return ids.shape[axis] > 1 and not torch.equal(ids, ids.narrow(axis, 0, 1).expand_as(ids))
