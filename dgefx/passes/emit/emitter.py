"""Pass 5b, emit: the new graph, written in one walk over the old one.

Route and pool the stream, run the context side on all tokens and the query side on the queries,
un-pool the update. `passes.emit.rewrite` decides whether a block can be written at all and checks
its attention; `passes.emit.packed` is this for queries that are packed over a batch.

Windows: queries stay packed per image wherever an operation is tokenwise, so the movement of
tokens between image and windows is dropped; around the attention, and where a table has an entry
per slot of a window, they take fixed slots in their windows.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx, nn

from dgefx.kernels.constants import gather_constant
from dgefx.kernels.island import pool_flat, pool_value, unpool_flat, unpool_value
from dgefx.kernels.layout import (
    from_tokens,
    has_parts,
    queries_as_stream,
    query_count,
    to_tokens,
)
from dgefx.kernels.pool import pool, pool_onto
from dgefx.kernels.projection import arrange_projection, linear_rows, weight_rows
from dgefx.kernels.stencil import stencil_conv
from dgefx.kernels.unpool import corrected, unpool_add
from dgefx.kernels.window import (
    from_slots,
    image_count,
    lead_count,
    pool_line,
    pool_rows,
    pool_slots,
    repack,
    slot_count,
    to_slots,
)
from dgefx.nn.code import CONSTANTS
from dgefx.nn.grid_shape import remember_grid, resolve_grid
from dgefx.nn.token_order import raster_axis, raster_tokens, stream_axis, stream_tokens
from dgefx.nn.unread import unread
from dgefx.nn.windows import WindowRule
from dgefx.passes.emit.coarse_reference import CoarseReference
from dgefx.passes.errors import Refused
from dgefx.passes.layout import Layout
from dgefx.passes.ops import ELEMENTWISE, VIEWS, argument, map_sources, op_name
from dgefx.passes.sides.find_axes import TokenAxesFinder
from dgefx.passes.sides.projections import FusedProjection, Part, linear_operands
from dgefx.passes.sides.sides import Sides, block_flow, carries_tensor
from dgefx.passes.sides.token_axes import MOVES, TokenAxes, needed_share, size_inputs, size_read
from dgefx.passes.sides.window_slots import WindowSlots, axis_sizes, einsum_tables
from dgefx.passes.trace.block_trace import Trace
from dgefx.passes.trace.copies import HOOKED

#: forms whose other axes are the same in both sides
_TOKEN_KINDS = ("tokens", "grid", "window")


@dataclass
class RewrittenGraph:
    """The rewritten graph, and what it needs besides the block itself.

    positional: whether tables with a query axis take part. mixing: whether stencils or islands do.
    tokens_apart: whether nothing but attention mixes tokens, on the main path neither.
    windows: how the block partitions the grid, None if it does not. fixed_slots: whether a table
    meets queries otherwise than by broadcasting, see `dgefx.kernels.window`. stencils: kernel sizes
    of its depthwise convolutions. reference: what it must yield below the finest granularity.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    needs_grid_shape: bool
    positional: bool
    mixing: bool
    windows: WindowRule | None
    fixed_slots: bool
    stencils: frozenset[int]
    tokens_apart: bool
    reference: CoarseReference


class _Moving:
    """Stands for what the query side does not have: tokens between the image and windows."""


_MOVING = _Moving()


def _leaves(arguments: Any) -> list[Any]:
    """Everything inside nested arguments."""
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    if isinstance(arguments, (tuple, list)):
        return [leaf for part in arguments for leaf in _leaves(part)]
    if isinstance(arguments, slice):
        return _leaves((arguments.start, arguments.stop, arguments.step))
    return [arguments]


class QueryGraphEmitter:
    """Emits the new graph in one walk over the old one."""

    def __init__(
        self,
        trace: Trace,
        sides: Sides,
        finder: TokenAxesFinder,
        layout: Layout,
        fused: list[FusedProjection],
    ) -> None:
        self.trace, self.sides, self.layout = trace, sides, layout
        self.finder, self.forms = finder, finder.forms
        self.fused = fused
        self.graph = fx.Graph()
        self.query: dict[fx.Node, Any] = {}  # packed
        self.slotted: dict[fx.Node, Any] = {}  # in fixed slots of windows
        self.in_slots = WindowSlots(trace, sides, finder).choose()
        self._require_raster_slots()
        self.uses_windows = finder.windowed or bool(self.in_slots)
        self.context: dict[fx.Node, Any] = {}
        self.unpooled: dict[fx.Node, fx.Node] = {}
        self.projected: dict[tuple[fx.Node, bool], tuple[fx.Node, int]] = {}
        flow = block_flow(trace.graph)
        meeting = {node for core in sides.cores for node, _ in core.context_edges}
        #: scores and what follows: never to be computed on all tokens for a size
        self.attended = meeting.union(*(nx.descendants(flow, node) for node in meeting))
        self.positional = self.mixing = self.fixed_slots = False
        self.grid_shape: fx.Node | None = None  # where only the model knows the grid
        self.constant_names: dict[str, str] = {}
        self.stencils: set[int] = set()

    def _require_raster_slots(self) -> None:
        """Slots of the whole image as one window are numbered in raster order."""
        if self.layout.token_order is None:
            return
        for node in self.in_slots:
            if self.forms[node].kind == "tokens":
                raise Refused(
                    f"{node.name}: a table meets tokens, which are not in raster order, otherwise "
                    f"than by broadcasting",
                    "table beside the queries",
                )

    # -- prologue, walk, epilogue ------------------------------------------------------------

    def run(self) -> RewrittenGraph:
        nodes = list(self.trace.graph.nodes)
        for node in nodes:
            if node.op == "placeholder":
                self.context[node] = self.graph.placeholder(str(node.target))
        self._prologue()
        for node in nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node in self.sides.context_side:
                self.context[node] = self._emit_context(node)
            if node in self.sides.pooled:
                self._pool_again(node)
            elif node in self.sides.query_side:
                emitted = self._emit_query(node)
                (self.slotted if node in self.in_slots else self.query)[node] = emitted
            if node in self.sides.materialised:
                self.context[node] = self._materialise(node)
        self._epilogue(nodes[-1])
        self.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        self._narrow_projections()
        self.graph.lint()
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        constants = {
            new.split(".", 1)[1]: self.trace.constants[old].detach().clone()
            for old, new in self.constant_names.items()
            if new in used
        }
        return RewrittenGraph(
            self.graph,
            constants,
            self.grid_shape is not None,
            self.positional,
            self.mixing,
            self.finder.windows.rule() if self.uses_windows else None,
            self.fixed_slots,
            frozenset(self.stencils),
            not (self.mixing or self.sides.materialised),
            CoarseReference.of(
                self.trace, self.sides, self.forms, self.layout, self.finder.windows.partition
            ),
        )

    def _prologue(self) -> None:
        call, order = self.graph.call_function, self.layout.order
        stream = self.context[self.sides.stream]
        self.tokens = call(to_tokens, (stream, order))
        self.grid = self._grid(stream)
        #: of a stream in another order than raster; None otherwise
        self.token_order: fx.Node | None = None
        if self.layout.token_order is not None:
            self.token_order = self.graph.create_node("get_attr", "dge_router.token_order")
            self.tokens = call(raster_tokens, (self.tokens, self.token_order, self.grid))
        self.routing = self.graph.call_module("dge_router", (self.tokens, self.grid))
        self.queries = call(pool, (self.tokens, self.routing))
        self.query[self.sides.stream] = call(queries_as_stream, (self.queries, order))
        #: what updates add up on: the stream, or the main path's last value that replaced it
        self.base = (self.tokens, self.queries)
        if self.layout.update:
            nothing = [call(torch.zeros_like, (value,)) for value in self.base]
            self.base = (nothing[0], nothing[1])
        self.windows = call(getattr, (self.routing, "windows"))

    def _grid(self, stream: fx.Node) -> Any:
        """(H, W) of the running call: from the stream, the block's arguments, or the model."""
        call, order = self.graph.call_function, self.layout.order
        if order in ("BHWC", "BCHW"):
            axes = (1, 2) if order == "BHWC" else (2, 3)
            return tuple(self.graph.call_method("size", (stream, axis)) for axis in axes)
        pair = size_inputs(self.trace, self.layout)
        if pair is not None:
            return tuple(
                self.graph.create_node("get_attr", size.target)
                if size.op == "get_attr"
                else self.context[size]
                for size in pair
            )
        count = self.graph.call_method("size", (self.tokens, 1))
        if self.layout.prefix:
            count = call(operator.sub, (count, self.layout.prefix))
        self.grid_shape = self.graph.create_node("get_attr", "dge_grid_shape")
        asking = self.graph.create_node("get_attr", "dge_router", name="asking")
        return call(resolve_grid, (self.grid_shape, asking, stream, count))

    def _order(self, node: fx.Node) -> str:
        """The layout of a main path value."""
        form, rank = self.forms[node], len(self._shape(node))
        orders: dict[tuple[Any, ...], str] = {
            ("tokens", (1,), 0, 3): "BNC",
            ("tokens", (0,), 1, 3): "NBC",
            ("tokens", (2,), 0, 3): "BCN",
            ("grid", (1, 2), 0, 4): "BHWC",
            ("grid", (2, 3), 0, 4): "BCHW",
            ("tokens", (2,), 1, 4): self.layout.order,  # with parts that count as images
        }
        order = orders.get((form.kind, form.axes, form.batch, rank))
        if order is not None and form.prefix == (self.layout.prefix > 0):
            return order
        raise Refused(
            f"{node.name}, on the block's main path, is not laid out as a stream", "mixes tokens"
        )

    def _dense_tokens(self, value: Any, order: str) -> Any:
        """(B, N, C) in raster order of all tokens of a value laid out as a stream."""
        tokens = self.graph.call_function(to_tokens, (value, order))
        if self.token_order is None:
            return tokens
        return self.graph.call_function(raster_tokens, (tokens, self.token_order, self.grid))

    def _dense_value(self, tokens: Any, order: str) -> Any:
        """The inverse of `_dense_tokens`."""
        call = self.graph.call_function
        if self.token_order is not None:
            tokens = call(stream_tokens, (tokens, self.token_order))
        return call(from_tokens, (tokens, order, self.grid))

    def _reordered(self, value: Any, form: TokenAxes, axis: int, raster: bool) -> Any:
        """A value of all tokens, or a table for them, from the order of a form's token axis to
        raster order, or back.

        Args:
            axis: of the tokens in `value`.
        """
        if self.token_order is None or form.kind != "tokens":
            return value
        gather = raster_axis if raster else stream_axis
        operands = (value, self.token_order, axis, form.prefix)
        return self.graph.call_function(gather, operands)

    def _updated(self, node: fx.Node) -> Any:
        """(B, N, C) main path value: what it was before, plus the un-pooled update."""
        updated = self.graph.call_function(to_tokens, (self.query[node], self._order(node)))
        return self.graph.call_function(unpool_add, (*self.base, updated, self.routing))

    def _materialise(self, node: fx.Node) -> Any:
        """A value of the main path for the context side."""
        return self._dense_value(self._updated(node), self._order(node))

    def _pool_again(self, node: fx.Node) -> None:
        """The query side goes on from a value of the context's main path."""
        order = self._order(node)
        if self.forms[node].mixes:
            self.mixing = True
        tokens = self._dense_tokens(self.context[node], order)
        queries = self.graph.call_function(pool_onto, (tokens, self.routing))
        self.base = (tokens, queries)
        self.query[node] = self.graph.call_function(queries_as_stream, (queries, order))

    def _epilogue(self, output: fx.Node) -> None:
        call, order = self.graph.call_function, self.layout.order
        if self.sides.output_is_dense:
            tokens = self._dense_tokens(self.context[self.sides.output], order)
        else:
            order = self._order(self.sides.output)
            tokens = self._updated(self.sides.output)
        # a correction is of the whole block's update
        tokens = call(corrected, (tokens, self.tokens, self.queries, self.routing))
        result = self._dense_value(tokens, order)
        if self.grid_shape is not None:
            result = call(remember_grid, (self.grid_shape, result, self.grid))

        def pick(node: fx.Node) -> Any:
            if node is self.sides.output:
                return result
            if node in self.sides.unread:
                return call(unread, ())
            if node not in self.context:
                raise Refused(
                    "the block returns a value that only its query path computes", "further results"
                )
            return self.context[node]

        self.graph.output(fx.map_arg(output.args[0], pick))

    # -- the two sides ----------------------------------------------------------------------

    def _emit_context(self, node: fx.Node) -> Any:
        for fused in self.fused:
            if node in fused.context:
                return self._project(node, fused, fused.context[node], self.context, False)
        size = self._dense_size(node)
        if size is not None:
            return size
        return self._copy(node, self._for_context)

    def _for_context(self, node: fx.Node) -> Any:
        """A source of a context node: sizes that are the same in both sides are read where their
        tensor is. The number of windows is not: packed queries have one."""
        if node in self.context:
            return self.context[node]
        emitted = self.query[node]
        values = self.trace.values
        read = size_read(node, self.trace)
        form = None if read is None else self.forms.get(read[0])
        if read is not None and form is not None and form.kind == "window":
            counted = self._window_size(form, read[1])
            emitted = emitted if counted is None else counted
        elif isinstance(values[node], int) and all(
            isinstance(values[n], int) for n in node.all_input_nodes
        ):
            emitted = self._copy(node, self._for_context)
        else:
            return emitted
        self.context[node] = emitted
        return emitted

    def _window_size(self, form: TokenAxes, axis: int) -> Any:
        """The size of an axis that counts windows, None for any other axis."""
        call = self.graph.call_function
        if axis == form.batch and form.merged:
            return call(lead_count, (self.tokens, self.windows, True, form.inner))
        if axis not in form.windows:
            return None
        counts = call(getattr, (self.windows, "windows"))
        sides = [call(operator.getitem, (counts, side)) for side in (0, 1)]
        if len(form.windows) == 1:
            return call(operator.mul, tuple(sides))
        return sides[form.windows.index(axis)]

    def _dense_size(self, node: fx.Node) -> Any:
        """The size of a value of the query path on the dense grid, without computing it there."""
        read = size_read(node, self.trace)
        form = None if read is None else self.forms.get(read[0])
        if read is None or form is None or form.batch is None:
            return None
        call, axis = self.graph.call_function, read[1]
        if axis not in (form.batch, *form.axes, *form.windows) and form.kind in _TOKEN_KINDS:
            return self._kept_size(node, read[0], axis)
        if form.kind not in ("tokens", "grid") and (form.kind != "window" or self.finder.windowed):
            return None
        if self._is_padded(read[0]):
            return None
        if len(form.axes) == 2 and axis in form.axes:
            return call(operator.getitem, (self.grid, form.axes.index(axis)))
        if axis in form.axes:
            count = self.graph.call_method("size", (self.tokens, 1))
            left_out = 0 if form.prefix else self.layout.prefix
            return call(operator.sub, (count, left_out)) if left_out else count
        if axis != form.batch or has_parts(self.layout.order):
            return None
        images = self.graph.call_method("size", (self.tokens, 0))
        return call(operator.mul, (images, form.inner)) if form.inner > 1 else images

    def _is_padded(self, node: fx.Node) -> bool:
        """Whether a value was padded or cropped on its way, if only at other sizes than this."""
        while node.op != "call_module" and op_name(node, self.trace.root) in MOVES:
            source, name = self._source(node), op_name(node, self.trace.root)
            if name in ("pad", "narrow"):
                return True
            if not isinstance(source, fx.Node):
                return False
            # picking one of several, as of q, k and v, leaves the tokens alone
            index = node.args[1] if name == "getitem" else ()
            for part in index if isinstance(index, tuple) else (index,):
                if isinstance(part, slice) and part != slice(None):
                    return True
            node = source
        return False

    def _kept_size(self, node: fx.Node, source: fx.Node, axis: int) -> Any:
        """The size along an axis of no tokens, which is the same in both sides."""
        if source in self.attended:  # may be that of the keys
            value = self.query.get(source, self.slotted.get(source))
            known = isinstance(value, fx.Node)
            return self.graph.call_method("size", (value, axis)) if known else None
        # heads and channels, which the parameters fix: nothing is to be computed for them
        return None if has_parts(self.layout.order) else self.trace.values[node]

    def _emit_query(self, node: fx.Node) -> Any:
        for fused in self.fused:
            if node in fused.query:
                return self._project(node, fused, fused.query[node], self.query, True)
        form = self.forms.get(node)
        if form is not None and form.kind == "in_transit":
            return _MOVING
        moved = self._arriving(node)
        if form is not None and moved is not None:
            return self._repack(node, form, moved)
        if form is not None and self._moves_nothing(node):
            return self._packed(self._source(node), form)
        if form is not None and (form.mixes or form.kind == "full_resolution"):
            return self._legalise(node, form)
        name = op_name(node, self.trace.root)
        slots = node in self.in_slots

        def operand(source: fx.Node, crosses: bool) -> Any:
            return self._operand(source, crosses, slots)

        args, kwargs = map_sources(node, self.sides.edges, operand)
        if form is not None and form.kind != "no_tokens":
            if node.op != "call_module" and name in VIEWS:
                args = self._patched_view(node, name, args, form)
            elif name in ELEMENTWISE:
                args, kwargs = self._gathered(node, form, len(self._shape(node)), args, kwargs)
            elif name == "einsum" and slots:
                args = self._pooled_einsum(node, args)
        if name in ("split", "split_with_sizes"):
            args, kwargs = self._patched_split(node, args, kwargs)
        if any(leaf is _MOVING for leaf in _leaves((args, kwargs))):
            value = self.trace.values[node]
            kind = isinstance(value, (torch.dtype, torch.device))
            if kind and all(source in self.context for source in node.all_input_nodes):
                return self._copy(node, self.context.__getitem__)
            if kind or isinstance(value, Tensor):
                raise Refused(
                    f"{node.name} works on tokens on their way to or from windows", "windows"
                )
            return _MOVING
        core = self.sides.core_at(node)
        if core is not None:
            return core.form.emit(core, self, args, kwargs)
        return self._create(node, args, kwargs)

    def _operand(self, source: fx.Node, crosses: bool, slots: bool = False) -> Any:
        if crosses or source not in self.sides.on_queries:
            if source not in self.context and not carries_tensor(self.trace.values[source]):
                return self.query[source]  # a size that is the same on both sides
            return self.context[source]
        form = self.forms.get(source)
        if form is None or form.kind not in ("tokens", "grid", "window"):
            return self.query[source] if source in self.query else self.slotted[source]
        return self._in_slots(source, form) if slots else self._packed(source, form)

    def _packed(self, node: fx.Node, form: TokenAxes) -> Any:
        if node not in self.query:
            self.query[node] = self.graph.call_function(
                from_slots, (self.slotted[node], self.windows, tuple(form.window_axes))
            )
        return self.query[node]

    def _in_slots(self, node: fx.Node, form: TokenAxes) -> Any:
        if node not in self.slotted:
            if form.prefix or form.batch is None:
                raise Refused(
                    f"{node.name} joins images or prefix tokens where windows are needed", "windows"
                )
            self.slotted[node] = self.graph.call_function(
                to_slots, (self.query[node], self.windows, tuple(form.window_axes))
            )
        return self.slotted[node]

    # -- data movement -----------------------------------------------------------------------

    @staticmethod
    def _source(node: fx.Node) -> Any:
        return node.args[0] if node.args else None

    def _moves_nothing(self, node: fx.Node) -> bool:
        """Whether a roll, a padding or a crop leaves the tokens where they are at this size.

        At other sizes it may move them; the packed queries stay as they are in any case.
        """
        source = self._source(node)
        if node.op == "call_module" or not isinstance(source, fx.Node):
            return False
        if op_name(node, self.trace.root) not in ("roll", "pad", "getitem", "narrow"):
            return False
        before, after = self.finder.base.get(source), self.finder.base.get(node)
        return (
            self.forms.get(source) == self.forms.get(node)
            and isinstance(before, Tensor)
            and isinstance(after, Tensor)
            and torch.equal(before, after)
        )

    def _arriving(self, node: fx.Node) -> fx.Node | None:
        """Where the tokens of a value come from that were on their way until this node."""
        if node.op == "call_module" or op_name(node, self.trace.root) not in MOVES:
            return None
        source: Any = self._source(node)
        if not isinstance(source, fx.Node) or source not in self.forms:
            return None
        before, after = self.forms[source], self.forms.get(node)
        while before.kind == "in_transit" and source.args[0] in self.forms:
            source = source.args[0]
            before = self.forms[source]
            if before.kind != "in_transit":
                return source
        # a single window that was rolled: both are whole, and their tokens lie differently
        turned = after is not None and (before.kind == "window") != (after.kind == "window")
        return source if turned and after is not None and before.inner == after.inner else None

    def _repack(self, node: fx.Node, form: TokenAxes, source: fx.Node) -> Any:
        origin = self.forms[source]
        axes = form.window_axes
        taken = {axes.batch, *axes.windows, *axes.slots}
        rest = tuple(size for axis, size in enumerate(self._shape(node)) if axis not in taken)
        return self.graph.call_function(
            repack, (self._packed(source, origin), tuple(origin.window_axes), tuple(axes), rest)
        )

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        value = self.trace.values[node]
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    def _copy(self, node: fx.Node, pick: Any) -> fx.Node:
        args, kwargs = fx.map_arg((node.args, node.kwargs), pick)
        return self._create(node, args, kwargs)

    def _create(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        target: Any = node.target
        if node.op == "get_attr" and target in self.trace.constants:
            name = f"c{len(self.constant_names)}"
            target = self.constant_names.setdefault(target, f"{CONSTANTS}.{name}")
        return self.graph.create_node(node.op, target, args, kwargs, name=node.name)

    # -- fused projections -------------------------------------------------------------------

    def _project(
        self,
        node: fx.Node,
        fused: FusedProjection,
        part: Part,
        env: dict[fx.Node, Any],
        is_query: bool,
    ) -> fx.Node:
        parts = (fused.query if is_query else fused.context).values()
        first, last = min(p.start for p in parts), max(p.stop for p in parts)
        key = (fused.linear, is_query)
        if key not in self.projected:
            self.projected[key] = (self._linear_rows(fused.linear, first, last, env), first)
        projected, offset = self.projected[key]
        positions: tuple[int, ...] = ()
        if part.positions:  # windows and slots: one window of all queries, or as many as there are
            lead = part.positions[0] if has_parts(self.layout.order) else 1
            positions = (lead, -1) if is_query else (-1, *part.positions[1:])
            if is_query and self._slots_come_first(node, part):
                positions = (-1, 1)
            if len(part.positions) > 2:
                raise Refused(
                    f"{fused.linear.name}: tokens on {len(part.positions)} axes", "windows"
                )
        return self.graph.call_function(
            arrange_projection,
            (
                projected,
                part.start - offset,
                part.stop - offset,
                part.features,
                part.order,
                part.singles,
                positions,
                part.merged,
            ),
        )

    def _slots_come_first(self, node: fx.Node, part: Part) -> bool:
        """Whether the stream counts the windows of a value slot by slot."""
        form = self.forms.get(node)
        if form is None or form.kind != "window":
            return False
        return part.position_axis(0, len(self._shape(node))) in form.axes

    def _narrow_projections(self) -> None:
        """Leave out rows of a projection of which only a size was wanted, read elsewhere by now."""
        for node, _ in self.projected.values():
            readers = list(node.users)
            if not readers:
                continue
            spans: list[Any] = [reader.args[1:3] for reader in readers]
            first, last = min(a for a, _ in spans), max(b for _, b in spans)
            for reader, (start, stop) in zip(readers, spans, strict=True):
                reader.update_arg(1, start - first)
                reader.update_arg(2, stop - first)
            of_weights = [n for n in node.all_input_nodes if n.target is weight_rows]
            for cut in [node] if node.target is linear_rows else of_weights:
                offset: Any = cut.args[-2]
                cut.args = (*cut.args[:-2], offset + first, offset + last)

    def _linear_rows(
        self, linear: fx.Node, first: int, last: int, env: dict[fx.Node, Any]
    ) -> fx.Node:
        source, weight, bias = linear_operands(linear)
        if linear.op == "call_module":
            layer = self.graph.create_node("get_attr", str(linear.target))
            return self.graph.call_function(linear_rows, (layer, env[source], first, last))
        rows: list[fx.Node | None] = []
        for operand in (weight, bias):
            value = self.context[operand] if isinstance(operand, fx.Node) else None
            if value is None:
                rows.append(None)
            else:
                rows.append(self.graph.call_function(weight_rows, (value, first, last)))
        return self.graph.call_function(nn.functional.linear, (env[source], *rows))

    # -- legalising --------------------------------------------------------------------------

    def _patched_view(self, node: fx.Node, name: str, args: Any, form: TokenAxes) -> Any:
        """A view's sizes with the token axis replaced by the number of queries."""
        flat = not (len(args) > 1 and isinstance(args[-1], (tuple, list)))
        first = 2 if name == "unflatten" else 1
        if name == "unflatten" and flat:
            return args
        sizes = list(args[first:] if flat else args[-1])
        if flat and len(sizes) == 1 and len(self._shape(node)) != 1:
            return args  # one opaque size object: it comes from the stream itself
        shift = 0
        if name == "unflatten":
            source = node.args[0]
            assert isinstance(source, fx.Node) and isinstance(node.args[1], int)
            shift = node.args[1] % len(self._shape(source))
        for index in range(len(sizes)):
            if sizes[index] == -1:
                continue
            given = (node.args[first:] if flat else node.args[-1])[index]  # type: ignore[index]
            if isinstance(given, fx.Node):
                known = self.context.get(given)
                known = self._dense_size(given) if known is None else known
                sizes[index] = sizes[index] if known is None else known
            sizes[index] = self._axis_size(form, index + shift, sizes[index], node in self.in_slots)
        return (*args[:first], *sizes) if flat else (*args[:-1], tuple(sizes))

    def _axis_size(self, form: TokenAxes, axis: int, size: Any, slots: bool) -> Any:
        """The size of one axis of a view in the query side; `size`: in the context side."""
        call = self.graph.call_function
        if axis in form.axes:
            if axis != form.axes[0]:
                return 1
            if slots:
                return call(slot_count, (self.windows,))
            if form.kind == "batch_merged":
                count = call(query_count, (self.routing, form.prefix))
                return call(operator.mul, (call(image_count, (self.queries, 1)), count))
            return call(query_count, (self.routing, form.prefix))
        if form.kind != "window":
            return size
        if axis == form.batch:
            if slots:
                return call(lead_count, (self.tokens, self.windows, form.merged, form.inner))
            return call(image_count, (self.queries, form.inner))
        return 1 if axis in form.windows and not slots else size

    def _patched_split(self, node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A split of the token axis, with the part that holds the grid as long as the queries."""
        source, sizes = node.args[0], argument(node, 1, "split_size")
        axis = argument(node, 2, "dim", 0)
        form = self.forms.get(source) if isinstance(source, fx.Node) else None
        if form is None or form.kind != "tokens" or not isinstance(sizes, (tuple, list)):
            return args, kwargs
        assert isinstance(source, fx.Node) and isinstance(axis, int)
        if axis % len(self._shape(source)) != form.axes[0]:
            return args, kwargs
        prefix = self.layout.prefix if form.prefix else 0
        grid = self.layout.grid[0] * self.layout.grid[1]
        wanted: list[Any] = []
        start = 0
        for size in sizes:
            stop = start + int(self.trace.values[size] if isinstance(size, fx.Node) else size)
            head = max(0, min(stop, prefix) - start)
            body = stop - max(start, prefix)
            if body not in (0, grid) and body > 0:
                raise Refused(f"{node.name} splits the grid's tokens into parts", "mixes tokens")
            if body <= 0:
                wanted.append(head)
            elif not head:
                wanted.append(self.graph.call_function(query_count, (self.routing, False)))
            else:
                count = self.graph.call_function(query_count, (self.routing, False))
                wanted.append(self.graph.call_function(operator.add, (count, head)))
            start = stop
        tail = {"dim": axis}
        return (args[0], wanted), tail

    def _gathered(
        self, node: fx.Node, form: TokenAxes, rank: int, args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        """Operands that do not come from the stream but carry its query axis, read per query."""
        slots = node in self.in_slots
        per_axis = axis_sizes(form, self.layout, self.finder)

        def gather(original: Any, emitted: Any, at: int | str) -> Any:
            if not isinstance(original, fx.Node):
                return emitted
            if original in self.sides.on_queries:
                return self._per_image(original, emitted, form, rank)
            shape = self._shape(original)
            axes = [axis - (rank - len(shape)) for axis in form.axes]
            if any(a < 0 for a in axes) or tuple(shape[a] for a in axes) != tuple(per_axis):
                if any(a >= 0 and shape[a] > 1 for a in axes):
                    raise Refused(
                        f"{node.name} combines tokens with a table of shape {shape} that does not "
                        f"follow the query axis",
                        "table beside the queries",
                    )
                return self._per_image(original, emitted, form, rank)
            if all(s == 1 for s in per_axis):
                return self._per_image(original, emitted, form, rank)
            self.positional = True
            share: tuple[float, ...] = ()
            if self.trace.values[original].dtype == torch.bool:
                name = op_name(node, self.trace.root)
                share = (needed_share(node, name, at, self.sides.on_queries),)
            if slots:
                self.finder.windows.note_table(self.trace.values[original], form, axes, rank)
                place: Any = tuple(form.window_axes)
                operands = (emitted, self.windows, place, rank, *share)
                return self.graph.call_function(pool_slots, operands)
            if form.batch is None or form.kind == "batch_merged":
                raise Refused(
                    f"{node.name}: images are merged with another axis where a table is added",
                    "table beside the queries",
                )
            emitted = self._reordered(emitted, form, axes[0], raster=True)
            return self.graph.call_function(
                gather_constant,
                (emitted, self.routing, rank, form.batch, form.axes, form.prefix, *share),
            )

        skip = {place for consumer, place in self.sides.edges if consumer is node}
        args = tuple(
            a if i in skip else gather(o, a, i)
            for i, (o, a) in enumerate(zip(node.args, args, strict=True))
        )
        kwargs = {k: v if k in skip else gather(node.kwargs[k], v, k) for k, v in kwargs.items()}
        return args, kwargs

    def _per_image(self, original: fx.Node, emitted: Any, form: TokenAxes, rank: int) -> Any:
        """An operand without a token axis, as a value of `form` and `rank` axes meets it."""
        return emitted

    def _pooled_einsum(self, node: fx.Node, args: Any) -> Any:
        """An einsum of tokens with tables that have an entry per slot row, slot column or slot."""
        equation, tokens, tables = einsum_tables(node, self.sides, self.forms)
        if not tables:
            return args
        terms, result = equation.split("->")
        labels = terms.split(",")
        form = self.forms[tokens]
        operands = list(args[1:])
        own = labels[list(node.args[1:]).index(tokens)]
        first = own[form.axes[0]]
        for index in tables:
            self.positional = self.fixed_slots = True
            axes = [labels[index].index(own[a]) for a in form.axes if own[a] in labels[index]]
            lines = [n for n, a in enumerate(form.axes) if own[a] in labels[index]]
            partition = self.finder.windows.partition
            if len(axes) < len(form.axes) and partition is not None and partition.order:
                raise Refused(
                    f"{node.name}: a table has rows or columns of windows whose slots are in "
                    f"another order",
                    "table beside the queries",
                )
            if len(axes) == len(form.axes):
                if len(axes) == 2 and axes[1] != axes[0] + 1:
                    raise Refused(
                        f"{node.name}: a table's rows and columns are apart",
                        "table beside the queries",
                    )
                kernel: Any = pool_rows
                rest: Any = tuple(axes)
            else:
                kernel, rest = pool_line, (axes[0], lines[0])
            pooled = self.graph.call_function(kernel, (operands[index], self.windows, rest))
            if kernel is pool_rows and len(axes) == 2:
                pooled = self.graph.call_method("squeeze", (pooled, axes[1]))
                labels[index] = labels[index][: axes[1]] + labels[index][axes[1] + 1 :]
            operands[index] = pooled
            label = list(labels[index])
            label[axes[0]] = first
            labels[index] = "".join(label)
        return (",".join(labels) + "->" + result, *operands)

    def _legalise(self, node: fx.Node, form: TokenAxes) -> fx.Node:
        """A node that mixes tokens: a stencil if it is a plain depthwise convolution."""
        sources = [self.forms[s] for s, _ in self.sides.sources(node) if s in self.forms]
        if self.finder.windowed and any(f.kind == "window" for f in (form, *sources)):
            raise Refused(f"{node.name} mixes tokens inside windows", "windows")
        self.mixing = True
        depthwise = self._depthwise(node)
        if depthwise is not None:
            source, weight, bias = depthwise
            operands = (self._operand(source, False), weight, bias, self.routing)
            return self.graph.call_function(stencil_conv, (*operands, self.forms[source].inner))
        return self._island(node, form)

    def _depthwise(self, node: fx.Node) -> tuple[fx.Node, Any, Any] | None:
        if op_name(node, self.trace.root) != "conv2d" or node.op != "call_module":
            return None
        source = argument(node, 0, "input")
        conv = self.trace.root.get_submodule(str(node.target))
        assert isinstance(conv, nn.Conv2d) and isinstance(source, fx.Node)
        kernel = conv.kernel_size[0]
        plain = (
            conv.groups == conv.in_channels == conv.out_channels
            and conv.kernel_size == (kernel, kernel)
            and kernel % 2 == 1
            and conv.stride == (1, 1)
            and conv.dilation == (1, 1)
            and conv.padding in ((kernel // 2, kernel // 2), "same")
            and conv.padding_mode == "zeros"
        )
        form = self.forms.get(source)
        if type(conv) is not nn.Conv2d or hasattr(conv, HOOKED):
            return None
        if not plain or form is None or form.axes != (2, 3):
            return None
        self.stencils.add(kernel)
        weight = self.graph.create_node("get_attr", f"{node.target}.weight")
        bias = (
            None if conv.bias is None else self.graph.create_node("get_attr", f"{node.target}.bias")
        )
        return source, weight, bias

    def _island(self, node: fx.Node, form: TokenAxes) -> fx.Node:
        """Un-pool, the operation as it is, pool."""

        def dense(source: fx.Node, crosses: bool) -> Any:
            if isinstance(self.trace.values[source], int) and not crosses:
                return self._unpooled_size(source)
            return self._operand(source, crosses) if crosses else self._unpooled(source, node)

        args, kwargs = map_sources(node, self.sides.edges, dense)
        result = self._create(node, args, kwargs)
        if form.kind in ("no_tokens", "full_resolution"):
            if not isinstance(self.trace.values[node], Tensor):
                raise Refused(f"{node.name} mixes tokens", "mixes tokens")
            return result
        if form.batch != 0:
            raise Refused(
                f"{node.name} mixes tokens with images merged into another axis", "mixes tokens"
            )
        self._require_unmerged(node, form)
        result = self._reordered(result, form, form.axes[0], raster=True)
        if form.kind == "batch_merged":
            return self.graph.call_function(pool_flat, (result, self.routing, form.prefix))
        return self.graph.call_function(
            pool_value, (result, self.routing, form.axes, form.prefix, form.inner)
        )

    def _unpooled(self, source: fx.Node, reader: fx.Node) -> Any:
        """A value of the query path on all tokens."""
        emitted, form = self._operand(source, False), self.forms.get(source)
        if (
            form is None
            or source not in self.sides.on_queries
            or form.kind in ("no_tokens", "full_resolution")
        ):
            return emitted
        if form.batch != 0:
            raise Refused(
                f"{reader.name} mixes tokens with images merged into another axis", "mixes tokens"
            )
        if source not in self.unpooled:
            self._require_unmerged(reader, form)
            call, routing = self.graph.call_function, self.routing
            if form.kind == "batch_merged":
                found = call(unpool_flat, (emitted, routing, form.prefix))
            else:
                operands = (emitted, routing, form.axes, form.prefix, form.inner)
                found = call(unpool_value, operands)
            self.unpooled[source] = self._reordered(found, form, form.axes[0], raster=False)
        return self.unpooled[source]

    def _require_unmerged(self, node: fx.Node, form: TokenAxes) -> None:
        """Merged with images, tokens in another order than raster are not gathered."""
        if form.kind == "batch_merged" and self.layout.token_order is not None:
            raise Refused(
                f"{node.name} mixes tokens with images merged into another axis", "mixes tokens"
            )

    def _unpooled_size(self, size: fx.Node) -> Any:
        """A size that is computed from those of query path values, on all tokens."""
        read = size_read(size, self.trace)
        if read is not None and read[0] in self.forms and read[0] in self.sides.on_queries:
            return self.graph.call_method("size", (self._unpooled(read[0], size), read[1]))
        sources = size.all_input_nodes
        numbers = all(isinstance(self.trace.values[n], int) for n in sources)
        if size.op == "call_function" and sources and numbers:
            args, kwargs = fx.map_arg((size.args, size.kwargs), self._unpooled_size)
            return self.graph.call_function(size.target, args, kwargs)  # type: ignore[arg-type]
        return self._operand(size, False)
