"""Pass 5b, sizes: what stands for them in the new graph.

A size is that of the dense grid, whatever reads it: a number of images or tokens of the running
call, read off a tensor of the context where one has it, else the number of the example. Only where
the query side gives a value its shape (views, expands, splits) its axes are those of the queries:
there the sizes are written anew from the axes on which the value holds tokens.
"""

from __future__ import annotations

import functools
import operator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from dgefx.kernels.layout import has_parts, parts_of, query_count
from dgefx.kernels.window import lead_count, slot_count
from dgefx.passes.errors import Refused
from dgefx.passes.ops import argument, op_name
from dgefx.passes.sides.sides import is_size
from dgefx.passes.sides.token_axes import TokenAxes, size_read

if TYPE_CHECKING:
    from dgefx.passes.emit.builder import GraphBuilder

#: give their result its shape
_RESHAPES = frozenset({"view", "reshape", "unflatten", "expand"})
_SPLITS = frozenset({"split", "split_with_sizes", "narrow"})


def dense_size(build: GraphBuilder, node: fx.Node) -> Any:
    """A size, a type, or a number made of them, on all tokens."""
    if node not in build.sizes:
        build.sizes[node] = _dense_size(build, node)
    return build.sizes[node]


def _dense_size(build: GraphBuilder, node: fx.Node) -> Any:
    trace = build.facts.trace
    read = size_read(node, trace)
    if read is not None:
        return _dense_axis(build, *read)
    value = trace.values[node]
    if isinstance(value, (torch.Size, int)) and len(node.all_input_nodes) == 1:
        measured = node.all_input_nodes[0]
        if not is_size(trace, measured) and not _in_context(build, measured):
            rank = len(build.facts.shape(measured))
            sizes = tuple(_dense_axis(build, measured, axis) for axis in range(rank))
            if isinstance(value, torch.Size):
                return sizes
            counts = build.facts.name(node) == "numel"
            return functools.reduce(partial(build.call, operator.mul), sizes) if counts else value

    def pick(source: fx.Node) -> Any:
        if is_size(trace, source):
            return dense_size(build, source)
        while (known := _emitted(build, source)) is None:
            source = source.all_input_nodes[0]  # on its way to windows, or one of several parts
        return known

    args, kwargs = fx.map_arg((node.args, node.kwargs), pick)
    return build.create(node, args, kwargs)


def _emitted(build: GraphBuilder, source: fx.Node) -> Any:
    """What the new graph has of a value, or of one of its type; None where it has no such."""
    value = build.facts.trace.values[source]
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return None  # several parts
    if source in build.context and (not isinstance(value, Tensor) or _in_context(build, source)):
        return build.context[source]
    return build.query.get(source, build.slotted.get(source))


def _in_context(build: GraphBuilder, tensor: fx.Node) -> bool:
    """Whether the context has a tensor; one that is cut into rows by itself is not computed."""
    if tensor not in build.context:
        return False
    held = build.facts.token_axes.get(tensor)
    return held is None or not held.holds_tokens or not build.facts.is_replaced(tensor, True)


def _dense_axis(build: GraphBuilder, tensor: fx.Node, axis: int) -> Any:
    facts = build.facts
    if _in_context(build, tensor):
        return build.size(build.context[tensor], axis)
    held, shape = facts.token_axes.get(tensor), facts.shape(tensor)
    if held is not None and held.holds_tokens and axis in (held.batch, *held.windows, *held.axes):
        return _counted(build, held, axis, shape[axis])
    if held is not None and has_parts(facts.layout.order) and axis == 0:
        return build.size(build.context[facts.sides.stream], 0)
    key = (tensor, axis - len(shape)) in _key_axes(build)
    if key or held is None or held.kind in ("full_resolution", "no_tokens"):
        known = build.query.get(tensor, build.slotted.get(tensor))
        if isinstance(known, fx.Node):
            return build.size(known, axis)
    return shape[axis]


def _counted(build: GraphBuilder, held: TokenAxes, axis: int, size: int) -> Any:
    """The size of an axis of images, windows or tokens on the dense grid."""
    facts, call = build.facts, build.call
    if held.kind == "window" and axis == held.batch:
        return call(lead_count, build.tokens, build.windows, held.merged, held.inner)
    if axis in held.windows:
        return _windows(build, held, axis)
    if held.kind == "window" and facts.partition is not None:
        return size
    if len(held.axes) == 2 and axis in held.axes:
        return call(operator.getitem, build.grid, held.axes.index(axis))
    count: Any = 1
    if axis in held.axes:
        count = build.size(build.tokens, 1)
        left_out = 0 if held.prefix else facts.layout.prefix
        count = call(operator.sub, count, left_out) if left_out else count
        if held.kind != "batch_merged":
            return count
    if size == parts_of(facts.layout.order) and has_parts(facts.layout.order):
        return size
    images = build.size(build.tokens, 0)
    if held.kind == "batch_merged":
        return call(operator.mul, images, count)
    return call(operator.mul, images, held.inner) if held.inner > 1 else images


def _windows(build: GraphBuilder, held: TokenAxes, axis: int) -> Any:
    counts = build.call(getattr, build.windows, "windows")
    sides = [build.call(operator.getitem, counts, side) for side in (0, 1)]
    if len(held.windows) == 1:
        return build.call(operator.mul, *sides)
    return sides[held.windows.index(axis)]


# -- of values in the query side -------------------------------------------------------------


def shaped(build: GraphBuilder, node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments of a node of the query side with the sizes that its result has there."""
    name = "" if node.op == "call_module" else op_name(node, build.facts.trace.root)
    held = build.facts.token_axes.get(node)
    if name in _RESHAPES and held is not None and held.kind != "no_tokens":
        if any(isinstance(leaf, torch.dtype) for leaf in args):
            return args, kwargs  # another type for the same bits
        sizes = _query_sizes(build, node, held)
        if name == "unflatten":
            first = args[1] % len(build.facts.shape(node.all_input_nodes[0]))
            count = len(sizes) - len(build.facts.shape(node.all_input_nodes[0])) + 1
            return (args[0], args[1], tuple(sizes[first : first + count])), {}
        flat = node.op == "call_method"
        return ((args[0], *sizes) if flat else (args[0], tuple(sizes))), {}
    if name in _SPLITS:
        return _split(build, node, name, args, kwargs)
    return args, kwargs


def _query_sizes(build: GraphBuilder, node: fx.Node, held: TokenAxes) -> list[Any]:
    """The shape of a value in the query side. Its images are as many as there are."""
    facts, shape = build.facts, build.facts.shape(node)
    slots = node in facts.in_slots
    images = held.batch
    if has_parts(facts.layout.order) and images is not None:
        images = 0 if shape[images] == parts_of(facts.layout.order) else images
    given = _given_sizes(node, shape)
    keys = _key_axes(build)
    found: list[Any] = []
    for axis, size in enumerate(shape):
        if axis == images:
            found.append(-1)
        elif axis in held.axes:
            count: Any = 1
            if axis == held.axes[0] and slots:
                count = build.call(slot_count, build.windows)
            elif axis == held.axes[0]:
                count = build.call(query_count, build.routing, held.prefix)
            found.append(count)
        elif axis in held.windows:
            found.append(_windows(build, held, axis) if slots else 1)
        elif images is None or (node, axis - len(shape)) in keys:
            own = given[axis]
            if isinstance(own, fx.Node):
                own = build.operand(own, crosses=True)
            elif own == -1 and images is not None:
                own = _key_count(build, node, size)
            found.append(own)
        else:
            found.append(size)
    return found


def _given_sizes(node: fx.Node, shape: tuple[int, ...]) -> list[Any]:
    """The sizes of a view as they are written, if they are written one an axis."""
    sizes: Any = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = sizes[0]
    return list(sizes) if len(sizes) == len(shape) else list(shape)


def _key_count(build: GraphBuilder, node: fx.Node, size: int) -> Any:
    """The number of keys, of a view of scores: as many as the scores have themselves."""
    source, facts = node.all_input_nodes[0], build.facts
    for scores, axis in _key_axes(build):
        if scores is source and facts.shape(source)[axis] == size:
            return build.size(build.operand(source, slots=node in facts.in_slots), axis)
    return size


def _key_axes(build: GraphBuilder) -> set[tuple[fx.Node, int]]:
    return {place for core in build.facts.sides.cores for place in core.key_axes}


def _split(
    build: GraphBuilder, node: fx.Node, name: str, args: Any, kwargs: Any
) -> tuple[Any, Any]:
    """A split of the token axis, with the part that holds the grid as long as the queries."""
    facts = build.facts
    source = argument(node, 0, "input")
    held = facts.token_axes.get(source) if isinstance(source, fx.Node) else None
    if held is None or held.kind != "tokens" or not isinstance(source, fx.Node):
        return args, kwargs
    narrows = name == "narrow"
    axis = argument(node, 1 if narrows else 2, "dim", 0)
    written = argument(node, 3, "length") if narrows else argument(node, 1, "split_size")
    sizes: Any = [written] if narrows else written
    if not isinstance(sizes, (tuple, list)) or not isinstance(axis, int):
        return args, kwargs
    if axis % len(facts.shape(source)) != held.axes[0]:
        return args, kwargs
    stop = facts.known(argument(node, 2, "start")) if narrows else 0
    prefix = facts.layout.prefix if held.prefix else 0
    grid = facts.layout.grid[0] * facts.layout.grid[1]
    wanted: list[Any] = []
    for size in map(facts.known, sizes):
        start, stop = stop, stop + size
        body = max(0, stop - max(start, prefix))
        if body not in (0, grid):
            raise Refused(f"{node.name} splits the grid's tokens into parts", "mixes tokens")
        if body:
            count: Any = build.call(query_count, build.routing, False)
            size = build.call(operator.add, count, size - grid) if size > grid else count
        wanted.append(size)
    if narrows:
        return (args[0], axis, facts.known(argument(node, 2, "start")), wanted[0]), {}
    return (args[0], wanted), {"dim": axis}
