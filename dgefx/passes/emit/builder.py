"""Emit, the new graph while it is written: its nodes for every value of the old one.

A value may be there on all tokens (the context side), on packed queries, and on queries in fixed
slots of their windows. Used by everything in `passes.emit`; `passes.emit.emitter` walks over the
old graph and fills it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from dgefx.kernels.layout import from_tokens, to_tokens
from dgefx.kernels.pool import pool
from dgefx.kernels.window import from_slots, to_slots
from dgefx.nn.code import CONSTANTS
from dgefx.nn.grid_shape import resolve_grid
from dgefx.nn.token_order import raster_axis, raster_tokens, stream_axis, stream_tokens
from dgefx.passes.emit.sizes import dense_size
from dgefx.passes.errors import Refused
from dgefx.passes.sides.facts import BlockFacts
from dgefx.passes.sides.sides import is_size
from dgefx.passes.sides.token_axes import TokenAxes, size_inputs


class GraphBuilder:
    """A graph that pools its stream, and the operands of what is written next.

    Attributes:
        context, query, slotted: nodes of the new graph by those of the old one.
        tokens: (B, N, C) the stream in raster order. queries: (B, Q, C). grid: rows and columns.
        positional: whether a table with a query axis has been read. mixing: whether an operation
            that mixes tokens has. stencils: kernel sizes of depthwise convolutions on queries.
    """

    def __init__(self, facts: BlockFacts) -> None:
        self.facts = facts
        self.graph = fx.Graph()
        self.context: dict[fx.Node, Any] = {}
        self.query: dict[fx.Node, Any] = {}
        self.slotted: dict[fx.Node, Any] = {}
        self.sizes: dict[fx.Node, Any] = {}
        self.positional = self.mixing = False
        self.stencils: set[int] = set()
        self.constant_names: dict[str, str] = {}
        for node in facts.trace.graph.nodes:
            if node.op == "placeholder":
                self.context[node] = self.graph.placeholder(str(node.target))
        stream, layout = self.context[facts.sides.stream], facts.layout
        self.tokens = self.call(to_tokens, stream, layout.order)
        self.grid_shape: fx.Node | None = None  # where only the model knows the grid
        self.grid = self._grid(stream)
        self.token_order: fx.Node | None = None  # of a stream in another order than raster
        if layout.token_order is not None:
            self.token_order = self.attribute("dge_router.token_order")
            self.tokens = self.call(raster_tokens, self.tokens, self.token_order, self.grid)
        self.routing = self.graph.call_module("dge_router", (self.tokens, self.grid))
        self.queries = self.call(pool, self.tokens, self.routing)
        self.windows = self.call(getattr, self.routing, "windows")

    def _grid(self, stream: fx.Node) -> Any:
        """(H, W) of the running call: from the stream, the block's arguments, or the model."""
        layout = self.facts.layout
        if "N" not in layout.order:
            return tuple(self.size(stream, layout.axis(letter)) for letter in "HW")
        pair = size_inputs(self.facts.trace, layout)
        if pair is not None:
            return tuple(
                self.attribute(str(size.target)) if size.op == "get_attr" else self.context[size]
                for size in pair
            )
        count = self.size(self.tokens, 1)
        if layout.prefix:
            count = self.call(operator.sub, count, layout.prefix)
        self.grid_shape = self.attribute("dge_grid_shape")
        asking = self.graph.create_node("get_attr", "dge_router", name="asking")
        return self.call(resolve_grid, self.grid_shape, asking, stream, count)

    # -- nodes -------------------------------------------------------------------------------

    def call(self, function: Callable[..., Any], *operands: Any) -> fx.Node:
        return self.graph.call_function(function, operands)

    def size(self, tensor: Any, axis: int) -> fx.Node:
        return self.graph.call_method("size", (tensor, axis))

    def attribute(self, name: str) -> fx.Node:
        """Of the block."""
        return self.graph.create_node("get_attr", name)

    def create(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """What `node` does, with these arguments."""
        target: Any = node.target
        if node.op == "get_attr" and target in self.facts.trace.constants:
            name = f"{CONSTANTS}.c{len(self.constant_names)}"
            target = self.constant_names.setdefault(target, name)
        return self.graph.create_node(node.op, target, args, kwargs, name=node.name)

    def constants(self) -> dict[str, Tensor]:
        """Tensors of the trace, no parameters or buffers of the block, that the graph reads."""
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        return {
            new.split(".", 1)[1]: self.facts.trace.constants[old].detach().clone()
            for old, new in self.constant_names.items()
            if new in used
        }

    # -- operands ----------------------------------------------------------------------------

    def operand(self, source: fx.Node, crosses: bool = False, slots: bool = False) -> Any:
        """A value as the query side reads it.

        Args:
            crosses: whether from the context side. slots: whether in slots of windows.

        Raises:
            Refused: it is on its way to or from windows.
        """
        if is_size(self.facts.trace, source):
            return dense_size(self, source)
        if crosses or source not in self.facts.sides.on_queries:
            return self.context[source]
        held = self.facts.token_axes.get(source)
        if held is None or not held.holds_tokens:
            if source in self.query:
                return self.query[source]
            if source in self.slotted:
                return self.slotted[source]
            raise Refused(f"{source.name} are tokens on their way to or from windows", "windows")
        return self.in_slots(source, held) if slots else self.packed(source, held)

    def packed(self, node: fx.Node, held: TokenAxes) -> Any:
        if node not in self.query:
            slotted = self.slotted[node]
            self.query[node] = self.call(from_slots, slotted, self.windows, tuple(held.window_axes))
        return self.query[node]

    def in_slots(self, node: fx.Node, held: TokenAxes) -> Any:
        if node not in self.slotted:
            if held.prefix or held.batch is None:
                raise Refused(
                    f"{node.name} joins images or prefix tokens where windows are needed", "windows"
                )
            packed = self.query[node]
            self.slotted[node] = self.call(to_slots, packed, self.windows, tuple(held.window_axes))
        return self.slotted[node]

    # -- orders of tokens --------------------------------------------------------------------

    def dense_tokens(self, value: Any, order: str) -> Any:
        """(B, N, C) in raster order of all tokens of a value laid out as a stream."""
        tokens = self.call(to_tokens, value, order)
        if self.token_order is None:
            return tokens
        return self.call(raster_tokens, tokens, self.token_order, self.grid)

    def dense_value(self, tokens: Any, order: str) -> Any:
        """The inverse of `dense_tokens`."""
        if self.token_order is not None:
            tokens = self.call(stream_tokens, tokens, self.token_order)
        return self.call(from_tokens, tokens, order, self.grid)

    def reordered(self, value: Any, held: TokenAxes, axis: int, raster: bool) -> Any:
        """A value of all tokens, or a table for them, from the order of a value's token axis to
        raster order, or back.

        Args:
            axis: of the tokens in `value`.
        """
        if self.token_order is None or held.kind != "tokens":
            return value
        gather = raster_axis if raster else stream_axis
        return self.call(gather, value, self.token_order, axis, held.prefix)
