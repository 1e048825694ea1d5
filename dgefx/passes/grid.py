"""Where the tokens of a stream lie in the image: grid size, order and prefix, by analysis.

Walks back from a stream along the residual path of the flat capture to the convolution (or other
spatial operation) that laid the grid out, and runs the data movement on the way forward on token
numbers. Tokens that carry no number are prefix tokens (class, distillation, registers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dgefx.passes.ops import MOVEMENT, TOKENWISE, op_name

_SPATIAL = frozenset(
    "conv2d conv_transpose2d max_pool2d avg_pool2d adaptive_avg_pool2d interpolate upsample "
    "max_pool2d_with_indices".split()
)
_REARRANGE = MOVEMENT | {"cat", "roll", "flip"}


@dataclass(frozen=True)
class Layout:
    """How a block's stream lays out (batch, tokens, channels).

    order: axis letters, one of BNC, NBC, BCN, BHWC, BCHW.
    grid: (H, W). prefix: tokens in front of the grid. source: module that laid the grid out.
    """

    order: str
    grid: tuple[int, int]
    prefix: int
    source: str | None = None

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]


@dataclass
class _Numbers:
    """Token numbers, stride 0 along batch and channels: same shape as the node's value."""

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


def _fit(numbers: _Numbers, shape: tuple[int, ...]) -> _Numbers | None:
    """The same numbers on a value with other channels."""
    ids = numbers.ids
    if tuple(ids.shape) == shape:
        return numbers
    if len(shape) == ids.dim() and tuple(ids.shape[:-1]) == shape[:-1]:
        return _Numbers(ids[..., :1].expand(shape), numbers.grid, numbers.source)
    return None


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
        if name in _SPATIAL or name not in _REARRANGE | TOKENWISE:
            return []
        if name in TOKENWISE and name not in ELEMENTWISE_PAIRS:
            return node.all_input_nodes[:1]
        return list(node.all_input_nodes)

    def _combine(self, node: Node) -> _Numbers | None:
        if not node.op.startswith("call_"):
            return None
        name = op_name(node)
        shape = node.meta.get("shape")
        if name in _SPATIAL:
            return _seed(node) if shape else None
        if name in _REARRANGE:
            return self._rearranged(node)
        if name in TOKENWISE and shape:
            for source in self._sources(node):
                found = self._found.get(source)
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
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None
        if isinstance(value, (tuple, list)):
            self._found_parts[node] = (origin[0], list(value))
            return None
        return _Numbers(value, origin[0].grid, origin[0].source)

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
        line = plane.reshape(-1)
        if bool((line[1:] > line[:-1]).all()):
            return Layout(order, (plane.shape[0], plane.shape[1]), 0, numbers.source)
    return "the stream's grid is not in raster order"
