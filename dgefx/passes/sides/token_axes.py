"""How values of the query side hold tokens: what `passes.sides.find_axes` finds and later passes
read."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dgefx.kernels.layout import parts_of
from dgefx.kernels.window import WindowAxes
from dgefx.nn.windows import WindowRule
from dgefx.passes.attention.registry import form_named
from dgefx.passes.layout import Layout
from dgefx.passes.ops import Op, argument, named, op_name
from dgefx.passes.sides.sides import Sides
from dgefx.passes.sides.window_partition import Partition
from dgefx.passes.trace.block_trace import Trace


@dataclass(frozen=True)
class TokenAxes:
    """How a value of the query side holds tokens.

    kind: "tokens" (one axis, in the stream's order), "grid" (two axes, H and W), "batch_merged"
        (images and tokens on one axis, in the stream's order), "window" (slots of windows),
        "in_transit" (on the way between two of these), "full_resolution" (un-pooled, on another
        grid than the tokens', until an operation comes back to theirs) or "no_tokens" (no token
        axis).
    axes: the token axis or axes. prefix: whether prefix tokens are on the axis too.
    batch: the image axis, None where images are merged with something else. Of a "batch_merged"
        value, the token axis.
    mixes: whether the node lets tokens see each other.
    windows, merged, inner: of a "window", see `dgefx.kernels.window.WindowAxes`.
    """

    kind: str
    axes: tuple[int, ...] = ()
    prefix: bool = False
    batch: int | None = None
    mixes: bool = False
    windows: tuple[int, ...] = ()
    merged: bool = False
    inner: int = 1

    def __str__(self) -> str:
        """For `passes.stage_log`."""
        fields = (f for f in dataclasses.fields(self)[1:] if getattr(self, f.name) != f.default)
        return ", ".join([self.kind, *(f"{f.name} {getattr(self, f.name)}" for f in fields)])

    @property
    def holds_tokens(self) -> bool:
        """Whether queries lie on the token axes in the query side, packed or in slots."""
        return self.kind in ("tokens", "grid", "window", "batch_merged")

    @property
    def counting_axes(self) -> set[int]:
        """Axes of images, windows and tokens."""
        batch = () if self.batch is None else (self.batch,)
        return {*batch, *self.windows, *self.axes}

    @property
    def window_axes(self) -> WindowAxes:
        """For the kernels; without windows, as of one window."""
        assert self.batch is not None
        return WindowAxes(self.batch, self.merged, self.inner, self.windows, self.axes)


@dataclass(frozen=True)
class TokenFacts:
    """How a block's values hold tokens, see `passes.sides.find_axes`.

    token_axes: of the tensors of the query side. values: of all nodes, on random input.
    partition: of the grid into windows; None: attention sees the whole image. rule: the same on
        any grid, but for masks.
    """

    trace: Trace
    layout: Layout
    sides: Sides
    token_axes: Mapping[fx.Node, TokenAxes]
    values: Mapping[fx.Node, Any]
    partition: Partition | None
    rule: WindowRule

    def name(self, node: fx.Node) -> str:
        """The operation of a node."""
        return op_name(node, self.trace.root)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Of a tensor in the dense block, at the example's size."""
        value = self.trace.values[node]
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    def known(self, argument: Any) -> Any:
        """The value of an argument in the example."""
        return self.trace.values[argument] if isinstance(argument, fx.Node) else argument

    @property
    def windowed(self) -> bool:
        """Whether attention sees parts of the image only."""
        return self.partition is not None

    def axis_sizes(self, held: TokenAxes) -> tuple[int, ...]:
        """Sizes of the token axes of a value in the dense block."""
        grid = self.layout.grid
        if held.kind == "window" and self.partition is not None:
            grid = self.partition.size
        if len(held.axes) == 2:
            return grid
        count = grid[0] * grid[1] + (self.layout.prefix if held.prefix else 0)
        if held.kind == "batch_merged":
            batch = stream_axes(self.layout).batch
            assert batch is not None
            count *= self.shape(self.sides.stream)[batch]
        return (count,)


#: moves tokens and changes none; padding is zero
MOVES = named(Op.MOVES | Op.SHIFTS)


@dataclass(frozen=True)
class Probe:
    """One perturbation: `image` and grid token `token` at (row, column)."""

    image: int
    row: int
    column: int


def stream_axes(layout: Layout) -> TokenAxes:
    """Of a block's stream."""
    order = layout.order
    if order in ("BHWC", "BCHW"):
        return TokenAxes("grid", (layout.axis("H"), layout.axis("W")), False, 0)
    batch = 1 if parts_of(order) > 1 else layout.axis("B")
    return TokenAxes("tokens", (layout.axis("N"),), layout.prefix > 0, batch)


#: more than half of a patch's tokens; all of them; any of them
_MOST, _ALL, _ANY = 0.5, 1 - 1e-5, 1e-5


def needed_share(node: fx.Node, name: str, place: int | str, asking: Collection[fx.Node]) -> float:
    """Which share of a patch's tokens a condition, a boolean table, has to hold for (more than
    that) to hold for their query: so that a query sees the keys that all its tokens see.

    Args:
        node, name: the operation that reads it. place: among the arguments. asking: nodes of the
            query side.
    """
    if form_named(name) is not None:
        return _ALL
    if name == "masked_fill":
        return _ANY
    condition, first = (1, 0) if node.op == "call_method" else (0, 1)
    if name == "where" and place in (condition, "condition"):
        branches = argument(node, first, "input"), argument(node, 2, "other")
        kept, replaced = (branch in asking for branch in branches)
        if kept != replaced:
            return _ALL if kept else _ANY
    return _MOST


def size_inputs(trace: Trace, layout: Layout) -> tuple[fx.Node, fx.Node] | None:
    """The block's arguments, or attributes, that hold the grid's rows and columns, if any do."""
    sizes = [
        n
        for n in trace.graph.nodes
        if n.op in ("placeholder", "get_attr") and isinstance(trace.values[n], int)
    ]
    for rows, columns in itertools.pairwise(sizes):
        if (trace.values[rows], trace.values[columns]) == layout.grid:
            return rows, columns
    return None


def size_read(node: fx.Node, trace: Trace) -> tuple[fx.Node, int] | None:
    """(tensor, axis) of a node that reads one size of a tensor: `x.shape[1]`, `x.size(1)`."""
    source, axis = argument(node, 0, "self"), argument(node, 1, "dim")
    if not isinstance(source, fx.Node) or not isinstance(axis, int):
        return None
    if node.target is operator.getitem and isinstance(trace.values.get(source), torch.Size):
        source = source.args[0]
    elif node.op != "call_method" or node.target != "size":
        return None
    value = trace.values.get(source) if isinstance(source, fx.Node) else None
    if not isinstance(source, fx.Node) or not isinstance(value, Tensor):
        return None
    return source, axis % value.dim()
