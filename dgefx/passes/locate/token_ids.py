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


def sampled(found: TokenIds, shape: tuple[int, ...]) -> TokenIds | None:
    """Ids of what `F.grid_sample` reads of a map at places (B, H, W, 2): (B, C, H, W), each where
    its place is."""
    if found.in_features:
        return None
    return found.on(found.ids[..., 0].unsqueeze(1).expand(shape))


def merged(found: TokenIds) -> TokenIds | None:
    """The coarser grid of a value whose channels hold several tokens each: of patches, which may
    overlap.

    Every position has to hold the same rows x columns of tokens, with as many channels of each; at
    the border some of them may be padding. Patches have to be rows x columns themselves.
    """
    found = sub_lattice(found)
    ids, width = found.ids.flatten(0, -2), found.grid[1]
    there = ids >= 0
    full = ids[there.all(1)][:1]
    held, channels = torch.unique(full, return_counts=True)
    even = len(held) > 1 and int(channels.min()) == int(channels.max()) > 1
    if not even or rectangle(held, width) is None:
        return None
    patch, corners = there.any(1), []
    for places, own in ((ids // width, full // width), (ids % width, full % width)):
        corner = places - (own - own.amin())
        nearest = corner.masked_fill(~there, corner.min()).amax(1, keepdim=True)
        if not bool((~there | (corner == nearest)).all()):
            return None
        corners.append(nearest[patch, 0] - nearest[patch, 0].min())
    across = int(corners[1].max()) + 1
    laid = rectangle(corners[0] * across + corners[1], across)
    if laid is None:
        return None
    grid, row, column = laid
    new = torch.full((len(ids), 1), -1)
    new[patch, 0] = row * grid[1] + column
    shape = found.ids.shape
    return TokenIds(new.view(*shape[:-1], 1).expand(shape), grid, None)


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
