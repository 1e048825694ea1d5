"""Where the tokens of a stream lie in the image: grid size, order and prefix, by analysis.

Walks back from a stream along the residual path of the flat capture to the convolution (or other
spatial operation) that laid the grid out, and runs the data movement on the way forward on token
ids. Tokens that carry no id are prefix tokens (class, distillation, registers) or padding. Movement
may also gather a neighbourhood of tokens in the channels of one (patch merging); what mixes these
channels lays out a new, coarser grid.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from dgefx.nn.grid_shape import Size
from dgefx.passes.attention.registry import form_named
from dgefx.passes.labels import moved, varies
from dgefx.passes.layout import Layout
from dgefx.passes.locate.refusal import Cause
from dgefx.passes.locate.token_ids import (
    TokenIds,
    kept_plane,
    merged,
    plane_of_parts,
    sampled,
    seed,
    sub_lattice,
    unfolded,
    without_axis,
)
from dgefx.passes.ops import Op, argument, named, op_name

_SPATIAL = named(Op.SPATIAL)
_REDUCES = named(Op.REDUCES)
_COMPLEX = named(Op.PAIRS)
_REARRANGE = named(Op.MOVES | Op.PAIRS | Op.SHIFTS) | {"cat", "flip", "index_select"}
_MIX_CHANNELS = named(Op.CHANNELS)
_UNFOLDS = {"unfold", "im2col"}
_TOKENWISE = named(Op.TOKENWISE) | {"set_item"}
_OF_FIRST = _TOKENWISE | _SPATIAL | _REDUCES | _UNFOLDS | {"matmul"}
#: either operand may carry the stream
_OF_ANY = _REARRANGE | named(Op.BINARY)


def _whole(node: Node) -> tuple[Node, int | None]:
    """(what made a value, which of its results the value is, where they are several)."""
    if op_name(node) == "getitem":
        whole, index = node.args[:2]
        if isinstance(whole, Node) and "shape" not in whole.meta and isinstance(index, int):
            return whole, index
    return node, None


class GridFinder:
    """Token ids of any node of a flat capture; remembers what it found."""

    def __init__(self) -> None:
        self._found: dict[Node, TokenIds | None] = {}

    def token_ids(self, node: Node) -> TokenIds | None:
        """Depth-first without recursion: residual paths are hundreds of nodes long."""
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [n for n in self.sources(current) if n not in self._found]
            if current not in self._found and not missing:
                self._found[current] = self._combine(current)
            if current in self._found:
                pending.pop()
            pending.extend(missing)
        return self._found[node]

    @staticmethod
    def sources(node: Node) -> list[Node]:
        """Where the tokens of a value come from, by what is followed."""
        if not node.op.startswith("call_"):
            return []
        made, _ = _whole(node)
        name = op_name(made)
        if name in _OF_ANY:
            return made.all_input_nodes
        form = form_named(name)
        core = None if form is None else form.match(made, None)
        if core is not None:
            return [core.query]
        return made.all_input_nodes[:1] if name in _OF_FIRST else []

    def _combine(self, node: Node) -> TokenIds | None:
        if node.op == "placeholder":
            return seed(node)  # an image; patches may be cut out of it by movement alone
        if not node.op.startswith("call_") or "shape" not in node.meta:
            return None
        made, part = _whole(node)
        name, shape = op_name(made), node.meta["shape"]
        if name in _REARRANGE:
            return self._rearranged(made, part)
        sources = self.sources(node)
        found = next((ids for source in sources if (ids := self._found[source])), None)
        if name in _SPATIAL:
            if found is None or sources[0].op == "placeholder" or len(shape) != 4:
                return seed(node)
            return kept_plane(found, shape) or plane_of_parts(found, shape) or seed(node)
        if found is None:
            return None
        if name == "grid_sample":
            return sampled(found, shape)
        if name == "matmul" or form_named(name) is not None:
            return found.in_rows(shape)  # each about the same token as that of the first operand
        if name in _REDUCES:
            return _pooled(found, made, shape)
        if name in _UNFOLDS:
            return unfolded(found, made, shape) if len(shape) == 3 else None
        for found in filter(None, map(self._found.get, sources)):
            if name in _MIX_CHANNELS and found.in_features:
                found = merged(found) or found
            if tuple(found.ids.shape) == shape:
                return found
            if (fitted := found.in_rows(shape)) is not None:
                return fitted
        return None

    def _rearranged(self, node: Node, part: int | None) -> TokenIds | None:
        """Run the movement itself on the ids; tensors without ids count as prefix (-1)."""
        found = {n: ids for n in node.all_input_nodes if (ids := self._found[n]) is not None}
        # tokens of no place are of a grid only if nothing else is
        placed = [t for t in found.values() if bool((t.ids >= 0).any())] or list(found.values())
        if not placed or any(t.grid != placed[0].grid for t in placed):
            return None
        labels = {n: t.ids for n, t in found.items()}
        try:
            if op_name(node) == "pad":
                value: Any = _padded(node, labels[node.all_input_nodes[0]])
            elif op_name(node) in _COMPLEX:
                value = _complex(labels[node.all_input_nodes[0]], op_name(node) == "view_as_real")
            else:
                value = moved(node, labels, _no_tokens, None)
        except (RuntimeError, TypeError, IndexError, KeyError, ValueError):
            return None
        return placed[0].on(value if part is None else value[part])

    def layout(self, stream: Node) -> Layout | Cause:
        """The layout of `stream`, or what keeps it from having one."""
        found = self.token_ids(stream)
        return Cause("no grid") if found is None else _layout(sub_lattice(found))


def _no_tokens(node: Node) -> Tensor:
    """In place of a value whose tokens are not known: an index, or tokens of no place."""
    if "index" in node.meta:
        index: Tensor = node.meta["index"]
        return index.cpu()
    return torch.full(node.meta["shape"], -1)


def _pooled(found: TokenIds, node: Node, shape: tuple[int, ...]) -> TokenIds | None:
    axis = argument(node, 1, "dim")
    if isinstance(axis, (tuple, list)) and len(axis) == 1:
        (axis,) = axis
    pooled = without_axis(found, axis) if isinstance(axis, int) else None
    if pooled is None or tuple(pooled.ids.shape) == shape:
        return pooled
    return pooled.in_rows(shape)


def _padded(node: Node, ids: Tensor) -> Tensor:
    """Padding carries no token, whatever it is filled with; copies of tokens are not supported."""
    pads, mode = argument(node, 1, "pad"), argument(node, 2, "mode", "constant")
    if mode != "constant":
        raise ValueError("padding that repeats tokens")
    return F.pad(ids, list(pads), value=-1)  # type: ignore[call-overload]


def _complex(ids: Tensor, to_real: bool) -> Tensor:
    """Pairs of numbers of one token, as one complex number or taken out of it."""
    if to_real:
        return ids.unsqueeze(-1).expand(*ids.shape, 2)
    if varies(ids, -1):
        raise ValueError("no pairs of one token")
    return ids[..., 0]


def _is_raster(ids: Tensor, width: int) -> bool:
    """Whether (..., rows, columns) tokens are rows and columns of a grid this wide, in order."""
    rows, columns = ids // width, ids % width
    return (
        bool((ids >= 0).all())
        and bool((rows.diff(dim=-2) > 0).all() and (columns.diff(dim=-1) > 0).all())
        and torch.equal(rows, rows[..., :1].expand_as(rows))
        and torch.equal(columns, columns[..., :1, :].expand_as(columns))
    )


def _part_grid(lines: Tensor, width: int) -> Size | None:
    """The grid of every part of an image, where each of (parts, tokens) lines is some rows and
    columns of the image's grid in raster order, as many of each in all lines."""
    rows = lines // width
    across = int((rows == rows[:, :1]).sum(1).min()) if lines.numel() else 0
    if not across or lines.shape[1] % across:
        return None
    parts = lines.view(len(lines), -1, across)
    return (parts.shape[1], across) if _is_raster(parts, width) else None


def _layout(found: TokenIds) -> Layout | Cause:
    ids, (height, width) = found.ids, found.grid
    moving = {axis for axis in range(ids.dim()) if varies(ids, axis)}
    if ids.dim() == 4:
        for order, axes, plane in (("BHWC", {1, 2}, ids[0, ..., 0]), ("BCHW", {2, 3}, ids[0, 0])):
            if moving <= axes and _is_raster(plane, width):
                return Layout(order, (plane.shape[0], plane.shape[1]), 0, found.source)
        grid = _part_grid(ids[0, ..., 0], width) if moving in ({2}, {1, 2}) else None
        return Cause("no raster") if grid is None else Layout(f"B{ids.shape[1]}NC", grid, 0)
    if ids.dim() != 3:
        return Cause("rank", (ids.dim(),))
    if moving == {0, 1}:  # parts of an image next to the images
        grid = _part_grid(ids[..., 0], width)
        if grid is not None:
            return Layout("BNC", grid, 0)
    if len(moving) != 1:
        return Cause("tokens on several axes")
    (axis,) = moving
    line = ids.movedim(axis, 0)[:, 0, 0]
    prefix = int((line < 0).sum())
    body, raster = line[prefix:], torch.arange(height * width)
    if bool((body < 0).any()) or not torch.equal(body.sort().values, raster):
        return Cause("tokens not in order")
    token_order = None if torch.equal(body, raster) else tuple(body.tolist())
    order = {0: "NBC", 1: "BNC", 2: "BCN"}[axis]
    return Layout(order, found.grid, prefix, found.source, token_order=token_order)
