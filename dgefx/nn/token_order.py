"""`TokenOrder`: tokens of a stream that does not hold its grid in raster order.

Some models permute their tokens once (so that pooling and windows become views) and keep them so.
Patches, regions and granularities are those of the image, so a converted block gathers its stream
into raster order and its result back; its keys and values stay in the stream's own order. Which
token lies where is known at the converted size only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenOrder(nn.Module):
    """Where the tokens of one block's stream are.

    Args:
        places: raster number of the token at every position behind the prefix.
        grid: (H, W). prefix: tokens in front of the grid.
    """

    def __init__(self, places: tuple[int, ...], grid: tuple[int, int], prefix: int) -> None:
        super().__init__()
        self.grid, self.prefix = grid, prefix
        front = torch.arange(prefix)
        stream = torch.cat([front, torch.tensor(places) + prefix])
        self.to_stream: Tensor
        self.to_raster: Tensor
        # token of every position of the stream; position of every token in raster order
        self.register_buffer("to_stream", stream, persistent=False)
        self.register_buffer("to_raster", stream.argsort(), persistent=False)

    def index(self, raster: bool, prefix: bool) -> Tensor:
        """(N,) or, with the prefix tokens, (prefix + N,): what to gather for either order."""
        index = self.to_raster if raster else self.to_stream
        return index if prefix or not self.prefix else index[self.prefix :] - self.prefix

    def require(self, grid: tuple[int, int]) -> None:
        """Accept the converted size alone.

        Raises:
            ValueError: another grid than the one that the order was read at.
        """
        if (grid[0], grid[1]) != self.grid:
            raise ValueError(
                f"a converted block whose tokens are not in raster order got a grid of {grid[0]} x "
                f"{grid[1]} tokens; it was converted for {self.grid[0]} x {self.grid[1]}, and the "
                f"order on other sizes is not known. convert() the model at this image size"
            )

    def extra_repr(self) -> str:
        return f"grid={self.grid}, prefix={self.prefix}"


def raster_tokens(tokens: Tensor, order: TokenOrder, grid: tuple[int, int]) -> Tensor:
    """(B, prefix + N, C) in the stream's order to raster order.

    Raises:
        ValueError: see `TokenOrder.require`.
    """
    order.require(grid)
    return tokens.index_select(1, order.to_raster)


def stream_tokens(tokens: Tensor, order: TokenOrder) -> Tensor:
    """The inverse of `raster_tokens`."""
    return tokens.index_select(1, order.to_stream)


def raster_axis(value: Tensor, order: TokenOrder, axis: int, prefix: bool) -> Tensor:
    """A value or table with an entry per token on `axis`, in the stream's order, in raster order.

    Args:
        prefix: whether the prefix tokens have entries, in front.
    """
    return value.index_select(axis, order.index(True, prefix))


def stream_axis(value: Tensor, order: TokenOrder, axis: int, prefix: bool) -> Tensor:
    """The inverse of `raster_axis`."""
    return value.index_select(axis, order.index(False, prefix))
