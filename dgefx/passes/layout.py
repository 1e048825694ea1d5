"""How the residual stream of a block lays out its tokens: found by `passes.locate`, read by all
stages after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dgefx.kernels.layout import axis_of, parts_of


@dataclass(frozen=True)
class Layout:
    """How a block's stream lays out (batch, tokens, channels).

    order: of its axes, see `dgefx.kernels.layout`.
    grid: (H, W). prefix: tokens in front of the grid. source: module that laid the grid out, whose
        output tells H and W; None where patch merging did. update: whether the block hands out what
        is to be added to the stream, not the stream updated. first_only: whether the model reads
        but the first of the tensors that the block hands out.
    token_order: raster number of the token at every position behind the prefix, at this size; None:
        raster order. Only of orders with one axis of tokens.
    """

    order: str
    grid: tuple[int, int]
    prefix: int
    source: str | None = None
    update: bool = False
    token_order: tuple[int, ...] | None = None
    first_only: bool = False

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]

    def shape_at(self, shape: tuple[int, ...], grid: tuple[int, int]) -> tuple[int, ...]:
        """The shape of a stream that has `shape` here, on another grid."""
        size = list(shape)
        if "N" in self.order:
            size[self.axis("N")] = self.prefix + grid[0] * grid[1]
        else:
            size[self.axis("H")], size[self.axis("W")] = grid
        return tuple(size)

    def axis(self, letter: str) -> int:
        """The axis of the stream that a letter of the order names."""
        return axis_of(self.order, letter)

    def position(self, token: int) -> int:
        """Position, behind the prefix, of the token with this raster number."""
        return token if self.token_order is None else self.token_order.index(token)

    def numbers(self) -> Tensor:
        """(N,) raster number of the token at every position behind the prefix."""
        if self.token_order is None:
            return torch.arange(self.grid[0] * self.grid[1])
        return torch.tensor(self.token_order)

    def images(self, shape: tuple[int, ...]) -> int:
        """Images, or parts that count as images, in a stream of this shape."""
        return shape[self.axis("B")] * parts_of(self.order)
