"""Between a block's own layout and the (B, tokens, C) that the kernels work on.

Queries have no grid: in a 4-D layout they stand as a grid of (queries, 1).

An order names the axes of a stream: BNC, NBC, BCN, BHWC or BCHW, where B are images, N tokens. A
number stands for an axis of parts of an image that do not see each other in the block and count as
images (nested windows): B16NC.
"""

from __future__ import annotations

import re

from torch import Tensor

from dgefx.kernels.routing import Routing


def axis_of(order: str, letter: str) -> int:
    """The axis that a letter of an order names."""
    return re.findall(r"[A-Z]|\d+", order).index(letter)


def has_parts(order: str) -> bool:
    """Whether an order has an axis of parts that count as images."""
    return order[1:-2].isdigit()


def parts_of(order: str) -> int:
    """Parts of an image that count as images."""
    return int(order[1:-2]) if has_parts(order) else 1


def to_tokens(stream: Tensor, order: str) -> Tensor:
    """(B, tokens, C) of a stream laid out as `order`; parts count as images."""
    if order == "BHWC":
        return stream.flatten(1, 2)
    if order == "BCHW":
        return stream.flatten(2).transpose(1, 2)
    if order == "NBC":
        return stream.transpose(0, 1)
    if order == "BCN":
        return stream.transpose(1, 2)
    if has_parts(order):
        return stream.flatten(0, 1)
    return stream


def from_tokens(tokens: Tensor, order: str, grid: tuple[int, int]) -> Tensor:
    """The inverse of `to_tokens`, for `grid` (rows, columns)."""
    if order == "BHWC":
        return tokens.unflatten(1, grid)
    if order == "BCHW":
        # not transposed before it is cut into rows: of one image that gives a stride of C between
        # images, which PyTorch's batch norm takes for another layout in its backward pass
        return tokens.unflatten(1, grid).permute(0, 3, 1, 2)
    if order == "NBC":
        return tokens.transpose(0, 1)
    if order == "BCN":
        return tokens.transpose(1, 2)
    if has_parts(order):
        return tokens.unflatten(0, (-1, parts_of(order)))
    return tokens


def queries_as_stream(queries: Tensor, order: str) -> Tensor:
    """(B, queries, C) in the block's own layout, a 4-D grid becoming (queries, 1)."""
    return from_tokens(queries, order, (queries.shape[1], 1))


def query_count(routing: Routing, prefix: bool) -> int:
    """Number of slots, with or without the prefix tokens; T of a ragged routing."""
    if routing.ragged is not None:
        left_out = 0 if prefix else routing.ragged.row.shape[0] * routing.prefix
        return routing.ragged.patch.shape[0] - left_out
    return sum(routing.capacities) + (routing.prefix if prefix else 0)
