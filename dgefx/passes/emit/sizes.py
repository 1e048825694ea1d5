"""Emit, sizes: what stands for them in the new graph.

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
from dgefx.passes.ops import Op, argument, named, op_name
from dgefx.passes.sides.sides import is_size
from dgefx.passes.sides.token_axes import TokenAxes, size_read

if TYPE_CHECKING:
    from dgefx.passes.emit.builder import GraphBuilder

#: give their result its shape
_RESHAPES = named(Op.SIZED)
_SPLITS = frozenset({"split", "split_with_sizes", "narrow"})
#: what queries are asked in place of all tokens, as the answer is the same
_ON_BOTH_SIDES = (bool, torch.dtype, torch.device, torch.layout)
_RANKS = frozenset({"dim", "element_size"})


def dense_size(build: GraphBuilder, node: fx.Node) -> Any:
    """A size, a type, or a number made of them, on all tokens."""
    if node not in build.sizes:
        build.sizes[node] = _dense_size(build, node)
    return build.sizes[node]


def _dense_size(build: GraphBuilder, node: fx.Node) -> Any:
    trace = build.facts.trace
    value, name = trace.values[node], build.facts.name(node)
    if value is None:
        return None  # one of several results
    read = size_read(node, trace)
    if read is not None:
        return _dense_axis(build, *read)
    measured = [source for source in node.all_input_nodes if not is_size(trace, source)]
    if any(not _in_context(build, source) for source in measured):
        if isinstance(value, torch.Size) or name == "numel":
            axes = range(len(build.facts.shape(measured[0])))
            sizes = tuple(_dense_axis(build, measured[0], axis) for axis in axes)
            if isinstance(value, torch.Size):
                return build.call(torch.Size, sizes)
            return functools.reduce(partial(build.call, operator.mul), sizes)
        if not isinstance(value, _ON_BOTH_SIDES) and name not in _RANKS:
            raise Refused(f"{node.name} reads a number off what is not computed", "mixes tokens")

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
    images_merged = held is not None and held.kind == "tokens" and held.batch is None
    if key or images_merged or held is None or held.kind in ("full_resolution", "no_tokens"):
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
        if any(isinstance(leaf, torch.dtype) for leaf in (*args, *kwargs.values())):
            return args, kwargs  # another type for the same bits
        sizes = _query_sizes(build, node, held)
        source = args[0] if args else kwargs["input"]
        if name == "unflatten":
            axis: Any = argument(node, 1, "dim")
            rank = len(build.facts.shape(node.all_input_nodes[0]))
            parts = tuple(sizes[axis % rank :][: len(sizes) - rank + 1])
            return (source, axis, parts), {}
        flat = node.op == "call_method"
        return ((source, *sizes) if flat else (source, tuple(sizes))), {}
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
    given = _given_sizes(build, node, shape)
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
            unknown = isinstance(own, int) and own == -1 and images is not None
            found.append(_key_count(build, node, size) if unknown else own)
        else:
            found.append(size)
    return found


def _given_sizes(build: GraphBuilder, node: fx.Node, shape: tuple[int, ...]) -> list[Any]:
    """The sizes of a view as they are written, if they are written one an axis."""
    sizes: Any = node.args[1:] or tuple(node.kwargs.get(name) for name in ("size", "shape"))
    whole = next((size for size in sizes if size is not None), None)
    if isinstance(whole, fx.Node) and isinstance(build.facts.trace.values[whole], torch.Size):
        known = build.operand(whole, crosses=True)
        return [build.call(operator.getitem, known, axis) for axis in range(len(shape))]
    if isinstance(whole, (tuple, list)):
        sizes = whole
    if len(sizes) != len(shape):
        return list(shape)
    return [build.operand(n, crosses=True) if isinstance(n, fx.Node) else n for n in sizes]


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
    given = args[0] if args else kwargs["input"]
    if narrows:
        return (given, axis, facts.known(argument(node, 2, "start")), wanted[0]), {}
    return (given, wanted), {"dim": axis}
