"""Token ids: which token of which grid lies in every element of a value.

What `passes.locate.grid` carries through a flat capture. Operations change ids: a convolution lays
a new grid out, patch merging or a patch embedding by a linear layer makes one token of several,
attention gives tokens where its queries are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from dgefx.nn.grid_shape import Size
from dgefx.passes.labels import numbered, varies


@dataclass(frozen=True)
class TokenIds:
    """The token in every element of a node's value, -1 for none; mostly the same along batch and
    channels, and then with stride 0. source: module that laid the grid out, where one did."""

    ids: Tensor
    grid: Size
    source: str | None

    @property
    def in_features(self) -> bool:
        """Whether the last axis holds several."""
        return varies(self.ids, -1)

    @property
    def tokens(self) -> Tensor:
        """The tokens that some element holds, ascending."""
        repeated = tuple(slice(1 if stride == 0 else None) for stride in self.ids.stride())
        ids = self.ids[repeated].flatten()
        ids = ids[(ids >= 0) & (ids < self.grid[0] * self.grid[1])]
        return torch.bincount(ids.long()).nonzero().flatten()

    def on(self, ids: Tensor) -> TokenIds:
        """Other ids of the same grid."""
        return replace(self, ids=ids)

    def in_rows(self, shape: tuple[int, ...]) -> TokenIds | None:
        """The same ids on a value of as many rows with other channels; None where a row has more
        than one."""
        if tuple(self.ids.shape[:-1]) != shape[:-1] or self.in_features:
            return None
        return self.on(self.ids[..., :1].expand(shape))


def seed(node: Node) -> TokenIds | None:
    """Every element of a (B, C, H, W) value a token by its place; None for other shapes."""
    shape, stack = node.meta["shape"], node.meta["stack"]
    if len(shape) != 4:
        return None
    return TokenIds(numbered(shape, (2, 3)), shape[2:], stack[-1] if stack else None)


def unfolded(found: TokenIds, node: Node, shape: tuple[int, ...]) -> TokenIds | None:
    """Ids of what F.unfold makes of a plane: movement, with zero padding."""
    given = dict(zip(("kernel_size", "dilation", "padding", "stride"), node.args[1:], strict=False))
    sizes: Any = {**given, **node.kwargs}
    ids = F.unfold((found.ids + 1).double(), **sizes).long() - 1
    return found.on(ids) if tuple(ids.shape) == shape else None


def rectangle(tokens: Tensor, width: int) -> tuple[Size, Tensor, Tensor] | None:
    """(grid, row and column in it of every token) of tokens that are some rows and columns of a
    grid this wide; None where one that such rows and columns share is not there."""
    rows, row = torch.unique(tokens // width, return_inverse=True)
    columns, column = torch.unique(tokens % width, return_inverse=True)
    if len(torch.unique(tokens)) != len(rows) * len(columns):
        return None
    return (len(rows), len(columns)), row, column


def plane_of_parts(found: TokenIds, shape: tuple[int, ...]) -> TokenIds | None:
    """What a spatial operation lays out on parts of an image that lie next to the images: the
    parts' own grids, side by side as the parts are. None where the value has no such parts.

    Args:
        found: of a value of (B * parts, C, h, w). shape: of the result.
    """
    ids = found.ids
    if ids.dim() != 4 or ids.shape[0] != shape[0] or not varies(ids[:, :1, :1, :1], 0):
        return None
    first = ids[:, 0].flatten(1).amin(1)
    parts = rectangle(first, found.grid[1])
    if bool((first < 0).any()) or parts is None:
        return None
    (down, across), row, column = parts
    tall, wide = shape[2:]
    rows = (row * tall)[:, None] + torch.arange(tall)
    columns = (column * wide)[:, None] + torch.arange(wide)
    new = rows[:, :, None] * across * wide + columns[:, None, :]
    return TokenIds(new.unsqueeze(1).expand(shape), (down * tall, across * wide), None)


def kept_plane(found: TokenIds, shape: tuple[int, ...]) -> TokenIds | None:
    """The same ids after a spatial operation that keeps the plane's size: tokens stay where they
    are, also within windows."""
    ids = found.ids
    if ids.dim() != 4 or tuple(ids.shape[2:]) != shape[2:] or ids.shape[0] != shape[0]:
        return None
    if varies(ids, 1) or not varies(ids[:, :1], 2) or not varies(ids[:, :1], 3):
        return None
    return found.on(ids[:, :1].expand(shape))


def merged(found: TokenIds) -> TokenIds | None:
    """The coarser grid of a value whose channels hold several tokens each.

    Every position has to hold the same rows x columns of tokens, next to each other, with as many
    channels of each; at the border some of them may be padding.
    """
    found = sub_lattice(found)
    ids, (height, width) = found.ids.flatten(0, -2), found.grid
    there = ids >= 0
    full = there.all(1)
    if not bool(full.any()):
        return None
    rows, columns = ids // width, ids % width
    tall, wide = (int((x[full].amax(1) - x[full].amin(1)).max()) + 1 for x in (rows, columns))
    grid = (-(-height // tall), -(-width // wide))
    offsets = rows % tall * wide + columns % wide
    expected = offsets[full][0]
    channels = torch.bincount(expected, minlength=tall * wide)
    new = torch.where(there, rows // tall * grid[1] + columns // wide, -1)
    first = new.amax(1, keepdim=True)
    in_place = bool((~there | (offsets == expected) & (new == first)).all())
    even = len(channels) > 1 and int(channels.min()) == int(channels.max()) > 1
    if not in_place or not even or len(torch.unique(first[first >= 0])) != grid[0] * grid[1]:
        return None
    shape = found.ids.shape
    return TokenIds(first.view(*shape[:-1], 1).expand(shape), grid, None)


def without_axis(found: TokenIds, axis: int) -> TokenIds | None:
    """Ids of a value after pooling over an axis: that of prefix tokens or channels leaves them as
    they are, one of several tokens makes one token of them."""
    if not varies(found.ids, axis):
        return found.on(found.ids.select(axis, 0))
    if found.in_features:
        return None
    # as channels, two of each
    coarse = merged(found.on(found.ids[..., 0].movedim(axis, -1).repeat_interleave(2, -1)))
    if coarse is None:
        return None
    return coarse.on(coarse.ids[..., :1].expand(*coarse.ids.shape[:-1], found.ids.shape[-1]))


def sub_lattice(found: TokenIds) -> TokenIds:
    """Some rows and columns of a grid as a grid of their own (what strided slicing leaves); the
    same where all tokens, or no full rows and columns, are there."""
    held = found.tokens
    lattice = rectangle(held, found.grid[1])
    if not len(held) or lattice is None or lattice[0] == found.grid:
        return found
    new = torch.full((found.grid[0] * found.grid[1],), -1)
    new[held] = torch.arange(len(held))
    ids = torch.where(found.ids < 0, -1, new[found.ids.clamp(min=0)])
    return TokenIds(ids, lattice[0], None)
