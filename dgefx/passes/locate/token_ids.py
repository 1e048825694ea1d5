"""Token numbers: which token of which grid lies in every element of a value.

What `passes.locate.grid` carries through a flat capture. Operations change numbers: a convolution
lays a new grid out, patch merging or a patch embedding by a linear layer makes one token of
several, attention gives tokens where its queries are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from dgefx.passes.labels import varies
from dgefx.passes.ops import argument


@dataclass
class Numbers:
    """The token in every element of a node's value, -1 for none; mostly the same along batch and
    channels, and then with stride 0."""

    ids: Tensor
    grid: tuple[int, int]
    source: str | None

    def tokens(self) -> Tensor:
        """The tokens that some element holds, ascending."""
        repeated = tuple(slice(1 if stride == 0 else None) for stride in self.ids.stride())
        ids = self.ids[repeated].flatten()
        ids = ids[(ids >= 0) & (ids < self.grid[0] * self.grid[1])]
        return torch.bincount(ids.long()).nonzero().flatten()


def seed(node: Node) -> Numbers | None:
    """Every element of a (B, C, H, W) value a token by its place; None for other shapes."""
    shape = node.meta["shape"]
    if len(shape) != 4:
        return None
    height, width = shape[2:]
    ids = torch.arange(height * width).view(1, 1, height, width).expand(shape)
    stack = node.meta["stack"]
    return Numbers(ids, (height, width), stack[-1] if stack else None)


def unfolded(node: Node) -> Numbers | None:
    """The grid that F.unfold lays out along the last axis of (B, C * kernel, N)."""
    height, width = node.all_input_nodes[0].meta["shape"][-2:]

    def pair(position: int, name: str, default: int) -> tuple[int, int]:
        value: Any = argument(node, position, name, default)
        return (value, value) if isinstance(value, int) else (value[0], value[1])

    kernel, dilation = pair(1, "kernel_size", 1), pair(2, "dilation", 1)
    padding, stride = pair(3, "padding", 0), pair(4, "stride", 1)
    rows, columns = (
        (size + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i, size in enumerate((height, width))
    )
    shape = node.meta["shape"]
    if rows * columns != shape[2]:
        return None
    return Numbers(torch.arange(shape[2]).view(1, 1, -1).expand(shape), (rows, columns), None)


def unfolded_numbers(numbers: Numbers, node: Node) -> Numbers | None:
    """Numbers of what F.unfold makes of a plane: movement, with zero padding."""
    given = dict(zip(("kernel_size", "dilation", "padding", "stride"), node.args[1:], strict=False))
    sizes: Any = {**given, **node.kwargs}
    moved = F.unfold((numbers.ids + 1).double(), **sizes).long() - 1
    fits = tuple(moved.shape) == node.meta["shape"]
    return Numbers(moved, numbers.grid, numbers.source) if fits else None


def plane_of_parts(numbers: Numbers, shape: tuple[int, ...]) -> Numbers | None:
    """What a spatial operation lays out on parts of an image that lie next to the images: the
    parts' own grids, side by side as the parts are. None where the value has no such parts.

    Args:
        numbers: (B * parts, C, h, w). shape: of the result.
    """
    ids = numbers.ids
    if ids.dim() != 4 or ids.shape[0] != shape[0] or not varies(ids[:, :1, :1, :1], 0):
        return None
    first = ids[:, 0].flatten(1).amin(1)
    rows, row = torch.unique(first // numbers.grid[1], return_inverse=True)
    columns, column = torch.unique(first % numbers.grid[1], return_inverse=True)
    if bool((first < 0).any()) or len(torch.unique(first)) != len(rows) * len(columns):
        return None
    tall, wide = shape[2:]
    grid = (len(rows) * tall, len(columns) * wide)
    down = (row * tall)[:, None] + torch.arange(tall)
    right = (column * wide)[:, None] + torch.arange(wide)
    new = down[:, :, None] * grid[1] + right[:, None, :]
    return Numbers(new.unsqueeze(1).expand(shape), grid, None)


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


def part_grid(lines: Tensor, grid: tuple[int, int]) -> tuple[int, int] | None:
    """The grid of every part, where each line of tokens is some rows and columns of `grid` in
    raster order, as many of each in all lines.

    Args:
        lines: (parts, tokens) token numbers.
    """
    if lines.numel() == 0 or bool((lines < 0).any()):
        return None
    rows, columns = lines // grid[1], lines % grid[1]
    across = int((rows == rows[:, :1]).sum(1).min())
    if lines.shape[1] % across:
        return None
    shape = (-1, lines.shape[1] // across, across)
    rows, columns = rows.view(shape), columns.view(shape)
    ascends = bool(
        (rows[:, 1:] > rows[:, :-1]).all() and (columns[..., 1:] > columns[..., :-1]).all()
    )
    regular = torch.equal(rows, rows[..., :1].expand_as(rows))
    regular = regular and torch.equal(columns, columns[:, :1].expand_as(columns))
    return (shape[1], across) if ascends and regular else None


def sub_lattice(numbers: Numbers) -> Numbers | None:
    """Some rows and columns of a grid as a grid of their own (what strided slicing leaves); None
    where all tokens, or no full rows and columns, are there."""
    held = numbers.tokens()
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
