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

from dgefx.passes.attention.registry import form_named
from dgefx.passes.labels import varies
from dgefx.passes.layout import Layout
from dgefx.passes.locate.token_ids import (
    Numbers,
    fit,
    kept_plane,
    merged,
    part_grid,
    plane_of_parts,
    rows_of,
    seed,
    sub_lattice,
    unfolded,
    unfolded_numbers,
    without_axis,
)
from dgefx.passes.ops import TOKENWISE, Op, argument, named, op_name

_SPATIAL = named(Op.SPATIAL)
#: every row of the result is about the same token as that row of the first operand
_ROWS = {"matmul"}
_REDUCES = named(Op.REDUCES)
_COMPLEX = named(Op.PAIRS)
_REARRANGE = named(Op.MOVES | Op.PAIRS | Op.SHIFTS) | {"cat", "flip", "index_select"}
_MIX_CHANNELS = named(Op.CHANNELS)
#: either operand may carry the stream
_PAIRS = named(Op.BINARY)


@dataclass(frozen=True)
class Held:
    """count: different tokens in a value, of `grid`. in_features: its last axis holds them."""

    count: int
    grid: tuple[int, int]
    in_features: bool


class GridFinder:
    """Token numbers of any node of a flat capture; remembers what it found."""

    def __init__(self) -> None:
        self._found: dict[Node, Numbers | None] = {}
        self._found_parts: dict[Node, tuple[Numbers, list[Tensor]]] = {}

    def _numbers(self, node: Node) -> Numbers | None:
        """Depth-first without recursion: residual paths are hundreds of nodes long."""
        pending = [node]
        while pending:
            current = pending[-1]
            if current in self._found:
                pending.pop()
                continue
            missing = [n for n in self.sources(current) if n not in self._found]
            if missing:
                pending.extend(missing)
                continue
            self._found[current] = self._combine(current)
            pending.pop()
        return self._found[node]

    @staticmethod
    def sources(node: Node) -> list[Node]:
        """Where the tokens of a value come from, by what is followed."""
        if not node.op.startswith("call_"):
            return []
        name = op_name(node)
        if name in _REARRANGE or name in _PAIRS:
            return list(node.all_input_nodes)
        form = form_named(name)
        core = None if form is None else form.match(node, None)
        if core is not None:
            return [core.query]
        known = TOKENWISE | _SPATIAL | _ROWS | _REDUCES | {"set_item", "unfold", "im2col"}
        return node.all_input_nodes[:1] if name in known else []

    def _combine(self, node: Node) -> Numbers | None:
        if node.op == "placeholder":
            return seed(node)  # an image; patches may be cut out of it by movement alone
        if not node.op.startswith("call_"):
            return None
        name = op_name(node)
        shape = node.meta.get("shape")
        if name in _ROWS | _REDUCES or form_named(name) is not None:
            return self._fewer(node, name, shape)
        if name in ("unfold", "im2col") and shape and len(shape) == 3:
            plane = self._found.get(node.all_input_nodes[0])
            return (unfolded_numbers(plane, node) if plane else None) or unfolded(node)
        if name in _SPATIAL and shape:
            if node.all_input_nodes[0].op == "placeholder":
                return seed(node)
            before = next((self._found.get(n) for n in self.sources(node)), None)
            if before is not None and len(shape) == 4:
                kept = kept_plane(before, shape) or plane_of_parts(before, shape)
                return kept or seed(node)
            return seed(node)
        if name in _REARRANGE:
            return self._rearranged(node)
        if (name in TOKENWISE or name == "set_item") and shape:
            for source in self.sources(node):
                found = self._found.get(source)
                if found and name in _MIX_CHANNELS and varies(found.ids, -1):
                    found = merged(found) or found
                fitted = fit(found, shape) if found else None
                if fitted:
                    return fitted
        return None

    def _fewer(self, node: Node, name: str, shape: tuple[int, ...] | None) -> Numbers | None:
        """Attention, whose results lie where its queries do, and pooling over an axis of tokens."""
        found = next((self._found.get(n) for n in self.sources(node)), None)
        if found is None:
            return None
        if name in _REDUCES:
            axis = argument(node, 1, "dim")
            if isinstance(axis, (tuple, list)) and len(axis) == 1:
                axis = axis[0]
            if not isinstance(axis, int):
                return None
            pooled = without_axis(found, axis)
            if shape is None:  # (values, indices)
                if pooled:
                    self._found_parts[node] = (pooled, [pooled.ids, pooled.ids])
                return None
            return fit(pooled, shape) if pooled else None
        return rows_of(found, shape) if shape else None

    def _rearranged(self, node: Node) -> Numbers | None:
        """Run the movement itself on the numbers; tensors without numbers count as prefix (-1)."""
        origin: list[Numbers] = []
        prefixes: list[Numbers] = []  # tokens of no place: of a grid only if nothing else is

        def numbers_of(source: Node) -> Any:
            found = self._found.get(source)
            if found is not None:
                (origin if bool((found.ids >= 0).any()) else prefixes).append(found)
                return found.ids
            if "shape" not in source.meta:
                return _Parts(source)
            if "index" in source.meta:
                return source.meta["index"].cpu()
            return torch.full(source.meta["shape"], -1)

        if op_name(node) == "getitem" and "shape" not in node.args[0].meta:  # type: ignore[union-attr]
            parts = node.args[0]
            assert isinstance(parts, Node)
            result = self._found_parts.get(parts)
            if result is None:
                return None
            numbers, values = result
            index = node.args[1]
            assert isinstance(index, int)
            return Numbers(values[index], numbers.grid, numbers.source)
        args = torch.fx.map_arg(node.args, numbers_of)
        kwargs = torch.fx.map_arg(node.kwargs, numbers_of)
        origin = origin or prefixes
        if not origin or any(o.grid != origin[0].grid for o in origin):
            return None
        try:
            if op_name(node) == "pad":
                value = _padded(node, args[0])
            elif op_name(node) in _COMPLEX:
                value = _complex(args[0], op_name(node) == "view_as_real")
            else:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None
        if isinstance(value, (tuple, list)):
            self._found_parts[node] = (origin[0], list(value))
            return None
        return Numbers(value, origin[0].grid, origin[0].source)

    def held(self, node: Node) -> Held | None:
        """What tokens a value holds, or None where that is not known."""
        numbers = self._numbers(node)
        if numbers is None:
            return None
        return Held(len(numbers.tokens()), numbers.grid, varies(numbers.ids, -1))

    def layout(self, stream: Node) -> Layout | str:
        """The layout of `stream`, or the reason why it has none."""
        numbers = self._numbers(stream)
        if numbers is None:
            return "no spatial operation lays out its tokens (grid not found)"
        numbers = sub_lattice(numbers) or numbers
        return self._whole_layout(numbers, stream)

    @staticmethod
    def _whole_layout(numbers: Numbers, stream: Node) -> Layout | str:
        ids, grid = numbers.ids, numbers.grid
        if ids.dim() == 4:
            return _grid_layout(ids, numbers)
        if ids.dim() != 3:
            return (
                f"the stream has {ids.dim()} axes; (B, N, C), (B, H, W, C) or (B, C, H, W) needed"
            )
        moving = [axis for axis in range(3) if varies(ids, axis)]
        if moving == [0, 1]:  # parts of an image next to the images
            grid_of_parts = part_grid(ids[..., 0], numbers.grid)
            if grid_of_parts is not None:
                return Layout("BNC", grid_of_parts, 0)
        if len(moving) != 1:
            return "tokens do not lie along one axis of the stream"
        axis = moving[0]
        line = ids.movedim(axis, 0)[:, 0, 0]
        prefix = int((line < 0).sum())
        body, raster = line[prefix:], torch.arange(grid[0] * grid[1])
        if bool((body < 0).any()) or not torch.equal(body.sort().values, raster):
            return "the stream's tokens are not prefix tokens followed by every token of the grid"
        places = None if torch.equal(body, raster) else tuple(body.tolist())
        order = {0: "NBC", 1: "BNC", 2: "BCN"}[axis]
        return Layout(order, grid, prefix, numbers.source, places=places)


def _padded(node: Node, ids: Any) -> Tensor:
    """Padding carries no token, whatever it is filled with; copies of tokens are not supported."""
    pads, mode = argument(node, 1, "pad"), argument(node, 2, "mode", "constant")
    if mode != "constant" or not isinstance(ids, Tensor):
        raise ValueError("padding that repeats tokens")
    return F.pad(ids, list(pads), value=-1)  # type: ignore[call-overload]


def _complex(ids: Any, to_real: bool) -> Tensor:
    """Pairs of numbers of one token, as one complex number or taken out of it."""
    if not isinstance(ids, Tensor) or (not to_real and varies(ids, -1)):
        raise ValueError("no pairs of one token")
    if to_real:
        return ids.unsqueeze(-1).expand(*ids.shape, 2)
    return ids[..., 0]


class _Parts:
    """Stands for a tuple-valued node where a tensor is needed: makes the movement fail."""

    def __init__(self, node: Node) -> None:
        self.node = node


def _grid_layout(ids: Tensor, numbers: Numbers) -> Layout | str:
    """A 4-D stream is its own grid, as long as its tokens keep the image's order."""
    moving = [axis for axis in range(4) if varies(ids, axis)]
    for axes, order in (((1, 2), "BHWC"), ((2, 3), "BCHW")):
        if not set(moving) <= set(axes):
            continue
        plane = ids[0, :, :, 0] if order == "BHWC" else ids[0, 0]
        rows, columns = plane // numbers.grid[1], plane % numbers.grid[1]
        if _ascending(rows[:, 0], rows.T) and _ascending(columns[0], columns):
            return Layout(order, (plane.shape[0], plane.shape[1]), 0, numbers.source)
    if moving in ([2], [1, 2]):
        grid_of_parts = part_grid(ids[0, :, :, 0], numbers.grid)
        if grid_of_parts is not None:
            return Layout(f"B{ids.shape[1]}NC", grid_of_parts, 0)
    return "the stream's grid is not in raster order"


def _ascending(line: Tensor, lines: Tensor) -> bool:
    """Whether `line`, of rows or columns, ascends from 0 or more and `lines` all equal it."""
    ascends = bool((line[1:] > line[:-1]).all()) and bool((line >= 0).all())
    return ascends and torch.equal(lines, line.expand_as(lines))
