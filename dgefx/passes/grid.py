"""Where the tokens of a stream lie in the image: grid size, order and prefix, by analysis.

Walks back from a stream along the residual path of the flat capture to the convolution (or other
spatial operation) that laid the grid out, and runs the data movement on the way forward on token
numbers. Tokens that carry no number are prefix tokens (class, distillation, registers) or padding.
Movement may also gather a neighbourhood of tokens in the channels of one (patch merging); what
mixes these channels lays out a new, coarser grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from dgefx.passes.ops import MOVEMENT, TOKENWISE, argument, op_name

_SPATIAL = frozenset(
    "conv2d conv_transpose2d max_pool2d avg_pool2d adaptive_avg_pool2d interpolate upsample "
    "max_pool2d_with_indices group_norm groupnorm".split()
)
_REARRANGE = MOVEMENT | {"cat", "roll", "flip", "pad"}
#: reads all channels of a token at once: what lies in them is one token afterwards
_MIX_CHANNELS = frozenset({"linear", "layer_norm", "rms_norm"})


@dataclass(frozen=True)
class Layout:
    """How a block's stream lays out (batch, tokens, channels).

    order: axis letters, one of BNC, NBC, BCN, BHWC, BCHW.
    grid: (H, W). prefix: tokens in front of the grid. source: module that laid the grid out, whose
        output tells H and W; None where patch merging did.
    """

    order: str
    grid: tuple[int, int]
    prefix: int
    source: str | None = None

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]

    def shape_at(self, shape: tuple[int, ...], grid: tuple[int, int]) -> tuple[int, ...]:
        """The shape of a stream that has `shape` here, on another grid."""
        size = list(shape)
        if "N" in self.order:
            size[self.order.index("N")] = self.prefix + grid[0] * grid[1]
        else:
            size[self.order.index("H")], size[self.order.index("W")] = grid
        return tuple(size)


@dataclass(frozen=True)
class Held:
    """count: different tokens in a value, of `grid`. in_features: its last axis holds them."""

    count: int
    grid: tuple[int, int]
    in_features: bool


@dataclass
class _Numbers:
    """The token in every element of a node's value, -1 for none; mostly the same along batch and
    channels, and then with stride 0."""

    ids: Tensor
    grid: tuple[int, int]
    source: str | None


def _seed(node: Node) -> _Numbers | None:
    shape = node.meta["shape"]
    if len(shape) != 4:
        return None
    height, width = shape[2:]
    ids = torch.arange(height * width).view(1, 1, height, width).expand(shape)
    stack = node.meta["stack"]
    return _Numbers(ids, (height, width), stack[-1] if stack else None)


def _kept_plane(numbers: _Numbers, shape: tuple[int, ...]) -> _Numbers | None:
    """The same numbers after a spatial operation that keeps the plane's size: tokens stay where
    they are, also within windows."""
    ids = numbers.ids
    if ids.dim() != 4 or tuple(ids.shape[2:]) != shape[2:] or ids.shape[0] != shape[0]:
        return None
    if _varies(ids, 1) or not _varies(ids[:, :1], 2) or not _varies(ids[:, :1], 3):
        return None
    return _Numbers(ids[:, :1].expand(shape), numbers.grid, numbers.source)


def _fit(numbers: _Numbers, shape: tuple[int, ...]) -> _Numbers | None:
    """The same numbers on a value with other channels."""
    ids = numbers.ids
    if tuple(ids.shape) == shape:
        return numbers
    if len(shape) == ids.dim() and tuple(ids.shape[:-1]) == shape[:-1] and not _varies(ids, -1):
        return _Numbers(ids[..., :1].expand(shape), numbers.grid, numbers.source)
    return None


def _merged(numbers: _Numbers) -> _Numbers | None:
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
    return _Numbers(new.view(*shape[:-1], 1).expand(shape), (grid[0], grid[1]), None)


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


class GridFinder:
    """Token numbers of any node of a flat capture; remembers what it found."""

    def __init__(self) -> None:
        self._found: dict[Node, _Numbers | None] = {}
        self._found_parts: dict[Node, tuple[_Numbers, list[Tensor]]] = {}

    def _numbers(self, node: Node) -> _Numbers | None:
        """Depth-first without recursion: residual paths are hundreds of nodes long."""
        pending = [node]
        while pending:
            current = pending[-1]
            if current in self._found:
                pending.pop()
                continue
            missing = [n for n in self._sources(current) if n not in self._found]
            if missing:
                pending.extend(missing)
                continue
            self._found[current] = self._combine(current)
            pending.pop()
        return self._found[node]

    @staticmethod
    def _sources(node: Node) -> list[Node]:
        if not node.op.startswith("call_"):
            return []
        name = op_name(node)
        if name not in _REARRANGE | TOKENWISE | _SPATIAL:
            return []
        if name in _SPATIAL or (name in TOKENWISE and name not in ELEMENTWISE_PAIRS):
            return node.all_input_nodes[:1]
        return list(node.all_input_nodes)

    def _combine(self, node: Node) -> _Numbers | None:
        if not node.op.startswith("call_"):
            return None
        name = op_name(node)
        shape = node.meta.get("shape")
        if name in _SPATIAL and shape:
            before = next((self._found.get(n) for n in self._sources(node)), None)
            return (_kept_plane(before, shape) if before else None) or _seed(node)
        if name in _REARRANGE:
            return self._rearranged(node)
        if name in TOKENWISE and shape:
            for source in self._sources(node):
                found = self._found.get(source)
                if found and name in _MIX_CHANNELS and _varies(found.ids, -1):
                    found = _merged(found) or found
                fitted = _fit(found, shape) if found else None
                if fitted:
                    return fitted
        return None

    def _rearranged(self, node: Node) -> _Numbers | None:
        """Run the movement itself on the numbers; tensors without numbers count as prefix (-1)."""
        origin: list[_Numbers] = []

        def numbers_of(source: Node) -> Any:
            found = self._found.get(source)
            if found is not None:
                origin.append(found)
                return found.ids
            if "shape" not in source.meta:
                return _Parts(source)
            return torch.full((1,), -1).expand(source.meta["shape"])

        if op_name(node) == "getitem" and "shape" not in node.args[0].meta:  # type: ignore[union-attr]
            parts = node.args[0]
            assert isinstance(parts, Node)
            result = self._found_parts.get(parts)
            if result is None:
                return None
            numbers, values = result
            index = node.args[1]
            assert isinstance(index, int)
            return _Numbers(values[index], numbers.grid, numbers.source)
        args = torch.fx.map_arg(node.args, numbers_of)
        kwargs = torch.fx.map_arg(node.kwargs, numbers_of)
        if not origin:
            return None
        try:
            if op_name(node) == "pad":
                value = _padded(node, args[0])
            else:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None
        if isinstance(value, (tuple, list)):
            self._found_parts[node] = (origin[0], list(value))
            return None
        return _Numbers(value, origin[0].grid, origin[0].source)

    def held(self, node: Node) -> Held | None:
        """What tokens a value holds, or None where that is not known."""
        numbers = self._numbers(node)
        if numbers is None:
            return None
        tokens = torch.unique(numbers.ids)
        return Held(int((tokens >= 0).sum()), numbers.grid, _varies(numbers.ids, -1))

    def layout(self, stream: Node) -> Layout | str:
        """The layout of `stream`, or the reason why it has none."""
        numbers = self._numbers(stream)
        if numbers is None:
            return "no spatial operation lays out its tokens (grid not found)"
        ids, grid = numbers.ids, numbers.grid
        if ids.dim() == 4:
            return _grid_layout(ids, numbers)
        if ids.dim() != 3:
            return (
                f"the stream has {ids.dim()} axes; (B, N, C), (B, H, W, C) or (B, C, H, W) needed"
            )
        moving = [axis for axis in range(3) if _varies(ids, axis)]
        if len(moving) != 1:
            return "tokens do not lie along one axis of the stream"
        axis = moving[0]
        line = ids.movedim(axis, 0)[:, 0, 0]
        prefix = int((line < 0).sum())
        wanted = torch.cat([torch.full((prefix,), -1), torch.arange(grid[0] * grid[1])])
        if line.shape != wanted.shape or not torch.equal(line, wanted):
            return "the stream's tokens are not prefix tokens followed by the grid in raster order"
        return Layout({0: "NBC", 1: "BNC", 2: "BCN"}[axis], grid, prefix, numbers.source)


def _padded(node: Node, ids: Any) -> Tensor:
    """Padding carries no token, whatever it is filled with; copies of tokens are not supported."""
    pads, mode = argument(node, 1, "pad"), argument(node, 2, "mode", "constant")
    if mode != "constant" or not isinstance(ids, Tensor):
        raise ValueError("padding that repeats tokens")
    return F.pad(ids, list(pads), value=-1)  # type: ignore[call-overload]


class _Parts:
    """Stands for a tuple-valued node where a tensor is needed: makes the movement fail."""

    def __init__(self, node: Node) -> None:
        self.node = node


#: element-by-element operations that join two tensors: either may carry the stream
ELEMENTWISE_PAIRS = frozenset("add sub mul div where type_as lerp addcmul maximum minimum".split())


def _varies(ids: Tensor, axis: int) -> bool:
    return ids.shape[axis] > 1 and not torch.equal(ids, ids.narrow(axis, 0, 1).expand_as(ids))


def _grid_layout(ids: Tensor, numbers: _Numbers) -> Layout | str:
    """A 4-D stream is its own grid, as long as its tokens keep the image's order."""
    moving = [axis for axis in range(4) if _varies(ids, axis)]
    for axes, order in (((1, 2), "BHWC"), ((2, 3), "BCHW")):
        if not set(moving) <= set(axes):
            continue
        plane = ids[0, :, :, 0] if order == "BHWC" else ids[0, 0]
        rows, columns = plane // numbers.grid[1], plane % numbers.grid[1]
        if _ascending(rows[:, 0], rows.T) and _ascending(columns[0], columns):
            return Layout(order, (plane.shape[0], plane.shape[1]), 0, numbers.source)
    return "the stream's grid is not in raster order"


def _ascending(line: Tensor, lines: Tensor) -> bool:
    """Whether `line`, of rows or columns, ascends from 0 or more and `lines` all equal it."""
    ascends = bool((line[1:] > line[:-1]).all()) and bool((line >= 0).all())
    return ascends and torch.equal(lines, line.expand_as(lines))
