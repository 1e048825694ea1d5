"""Sides, window axes: values that hold windows, and the movement between image and windows.

Data movement is run on token numbers, so that a value on its way is told from one that has
arrived, and the partition that it arrives at is read off (`passes.sides.window_partition`). Used by
`passes.sides.find_axes`, which searches block by block; `find_rule` asks how the windows lie on
other grids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import networkx as nx
import torch
from torch import Tensor, fx

from dgefx.nn.windows import WindowRule
from dgefx.passes.errors import Refused
from dgefx.passes.labels import moved, numbered
from dgefx.passes.ops import op_name
from dgefx.passes.sides.sides import block_flow
from dgefx.passes.sides.token_axes import MOVES, TokenAxes, size_inputs, stream_axes
from dgefx.passes.sides.window_partition import (
    Partition,
    candidate_rules,
    fits,
    fixed_rule,
    read_partition,
)

if TYPE_CHECKING:
    from dgefx.passes.sides.find_axes import AxesSearch


def is_movement(search: AxesSearch, node: fx.Node) -> bool:
    """Whether `node` is data movement of a value that holds tokens."""
    if node.op == "call_module" or op_name(node, search.trace.root) not in MOVES:
        return False
    source = moved_by(node)
    return source in search.token_axes and search.token_axes[source].kind != "no_tokens"


def moved_by(node: fx.Node) -> fx.Node:
    """The value that a movement moves."""
    source = node.args[0] if node.args else next(iter(node.kwargs.values()))
    return source if isinstance(source, fx.Node) else node


def lands(search: AxesSearch, node: fx.Node) -> bool:
    """Whether anything but movement and sizes reads `node`, or it is taken into parts."""
    for user in node.users:
        value = search.values.get(user)
        parts = isinstance(value, (tuple, list)) and not isinstance(value, torch.Size)
        if parts or (
            isinstance(value, Tensor)
            and (user.op == "call_module" or op_name(user, search.trace.root) not in MOVES)
        ):
            return True
    return False


def arrives(search: AxesSearch, node: fx.Node) -> bool:
    """Whether tokens end a movement here: it came from somewhere in between, and `lands`."""
    if not is_movement(search, node) or search.layout.prefix or not lands(search, node):
        return False
    source = moved_by(node)
    while is_movement(search, source):
        if search.token_axes[source].kind == "in_transit":
            return True
        source = moved_by(source)
    return False


def token_labels(
    search: AxesSearch, node: fx.Node, values: dict[fx.Node, Any], grid: tuple[int, int]
) -> Tensor:
    """1 + image * H * W + token for every element of a moving value; 0 in padding.

    Args:
        values: of every node that `node` needs, on `grid`.
    """
    source = moved_by(node)
    # also through what moves nothing at this size: a padding of zero rows
    if is_movement(search, source):
        labels = token_labels(search, source, values, grid)
    else:
        held = search.token_axes[source]
        if held.batch is None or held.prefix or held.kind in ("no_tokens", "in_transit"):
            raise Refused("tokens are moved that are not in the image's order", "windows")
        labels = labels_of(search, held, values[source].shape, grid)
        if held.inner > 1:
            # laid out as the value is: a view may join heads and channels
            labels = torch.empty_like(values[source], dtype=labels.dtype).copy_(labels)
    found = moved(node, {source: labels}, values.__getitem__, search.trace.root)
    assert isinstance(found, Tensor)
    return found


def labels_of(
    search: AxesSearch, held: TokenAxes, shape: torch.Size, grid: tuple[int, int]
) -> Tensor:
    """Labels, as in `token_labels`, of a value of this shape that holds tokens like this: 0 for
    prefix tokens, -1 where the shape does not fit. Without an image axis, as of the first image."""
    if max(held.counting_axes, default=0) >= len(shape):
        return torch.full(shape, -1)
    if held.kind == "window":
        return _window_labels(search, held, shape)
    layout, merged, count = search.layout, held.kind == "batch_merged", grid[0] * grid[1]
    prefix = layout.prefix if held.prefix else 0
    size, length = torch.Size([shape[axis] for axis in held.axes]).numel(), count + prefix
    if size % length or not (merged or size == length):
        return torch.full(shape, -1)
    small = [size if axis in held.counting_axes else 1 for axis, size in enumerate(shape)]
    places = numbered(small, held.axes)
    tokens = places % length - prefix
    if layout.token_order is not None and held.kind != "grid":
        tokens = torch.where(tokens < 0, tokens, layout.numbers()[tokens])
    images = places // length
    if not merged and held.batch is not None:
        images = numbered(small, [held.batch])
    return torch.where(tokens < 0, 0, images * count + tokens + 1).expand(shape)


def _window_labels(search: AxesSearch, held: TokenAxes, shape: torch.Size) -> Tensor:
    numbers = search.windows.numbers(search.images)
    if len(held.windows) < 2:
        numbers = numbers.flatten(1, 2)
    if len(held.axes) == 1:
        numbers = numbers.flatten(-2, -1)
    if held.merged:
        numbers = numbers.flatten(0, 1)
    elif not held.windows:  # one window that has no axis of its own
        numbers = numbers.squeeze(1)
    numbers = numbers.repeat_interleave(held.inner, 0)
    place = [1] * len(shape)
    for axis, size in zip((held.batch, *held.windows, *held.axes), numbers.shape, strict=True):
        if axis is None or axis >= len(shape) or shape[axis] != size:
            return torch.full(shape, -1)
        place[axis] = size
    return numbers.view(place).expand(shape)


def partition_at(
    search: AxesSearch, node: fx.Node, values: dict[fx.Node, Any], grid: tuple[int, int]
) -> Partition | None:
    """The partition into windows that a movement ends in, on a grid."""
    slots = {
        shape[axis]
        for core in search.sides.cores
        for shape in [search.trace.values[core.query].shape]
        for axis in core.query_axes
        if len(shape) >= -axis
    }
    labels = token_labels(search, node, values, grid)
    images = int(values[search.sides.stream].shape[stream_axes(search.layout).batch or 0])
    permuted = search.layout.token_order is not None and grid == search.layout.grid
    return read_partition(labels, images, grid, slots, permuted)


def window_candidates(search: AxesSearch, value: Tensor) -> list[TokenAxes]:
    """Every way in which a value of this shape could hold windows."""
    if search.layout.prefix:
        return []
    partition, images, known = search.windows, search.images, search.partition is not None
    rows, columns = partition.windows
    shape, dim = value.shape, value.dim()
    found = []
    for batch, lead in enumerate(shape):
        options: list[tuple[int, tuple[int, ...], bool]] = []
        if lead % (images * rows * columns) == 0:
            options.append((lead // (images * rows * columns), (), known))
        if lead == images and known:
            for axis in range(batch + 1, dim):
                if shape[axis] == rows * columns:
                    options.append((1, (axis,), False))
                if tuple(shape[axis : axis + 2]) == (rows, columns):
                    options.append((1, (axis, axis + 1), False))
        for inner, windows, merged in options:
            for axis in range(max((batch, *windows)) + 1, dim):
                slots: list[tuple[int, ...]] = []
                if shape[axis] == partition.size[0] * partition.size[1]:
                    slots.append((axis,))
                if tuple(shape[axis : axis + 2]) == partition.size:
                    slots.append((axis, axis + 1))
                for axes in slots:
                    found.append(
                        TokenAxes("window", axes, False, batch, False, windows, merged, inner)
                    )
    # of a single window, axes that count windows are 1: next to slot rows and columns they do
    return sorted(found, key=lambda f: (f.inner, -len(f.windows) * (len(f.axes) == 2)))


def find_rule(search: AxesSearch) -> WindowRule:
    """The rule of the block's windows, as far as the movement itself tells on two other grids;
    whether it holds on other sizes, `passes.plan.sizes` asks the dense block itself."""
    if search.partition is None or search.landing is None:
        return WindowRule()
    if search.layout.token_order is not None:
        return fixed_rule(search.partition)
    rules = candidate_rules(search.partition)
    tall, wide = search.partition.size
    for grid in ((2 * tall, 3 * wide), (2 * tall + 1, 3 * wide - 1)):
        other = _landed_at(search, search.landing, grid)
        if other is not None:
            rules = [rule for rule in rules if fits(rule, other)]
    return rules[0] if rules else fixed_rule(search.partition)


def _landed_at(search: AxesSearch, landing: fx.Node, grid: tuple[int, int]) -> Partition | None:
    """The partition of another grid, or None where the block does not take it."""
    needed = {landing, *nx.ancestors(block_flow(search.trace.graph), landing)}
    values = _inputs_at(search, grid)
    try:
        with torch.no_grad():
            for index, node in enumerate(search.trace.graph.nodes):
                if node in needed and node not in values:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                    values[node] = search.execute(node, args, kwargs, index)
        return partition_at(search, landing, values, grid)
    except Exception:  # whatever the block raises, it does not take this size
        return None


def _inputs_at(search: AxesSearch, grid: tuple[int, int]) -> dict[fx.Node, Any]:
    """The block's inputs with a stream, and its sizes, for another grid."""
    traced = search.trace.values
    stream = traced[search.sides.stream]
    shape = search.layout.shape_at(tuple(stream.shape), grid)
    values = {n: traced[n] for n in search.trace.graph.nodes if n.op == "placeholder"}
    values[search.sides.stream] = torch.zeros(shape, dtype=stream.dtype, device=stream.device)
    pair = size_inputs(search.trace, search.layout)
    if pair is not None:
        values[pair[0]], values[pair[1]] = grid
    return values
