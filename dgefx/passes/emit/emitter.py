"""Emit: the new graph, written in one walk over the old one.

Route and pool the stream, run the context side on all tokens and the query side on the queries,
un-pool the update. What differs between the two budgets is a strategy
(`passes.emit.per_image`, `passes.emit.packed`).

Windows: queries stay packed per image wherever an operation is tokenwise, so the movement of
tokens between image and windows is dropped; around the attention, and where a table has an entry
per slot of a window, they take fixed slots in their windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dgefx.kernels.layout import has_parts, queries_as_stream, to_tokens
from dgefx.kernels.pool import pool_onto
from dgefx.kernels.unpool import corrected, unpool_add
from dgefx.kernels.window import repack
from dgefx.nn.grid_shape import remember_grid
from dgefx.nn.unread import unread
from dgefx.nn.windows import WindowRule
from dgefx.passes.emit.builder import GraphBuilder
from dgefx.passes.emit.coarse_reference import CoarseReference
from dgefx.passes.emit.full_resolution import MixingEmitter
from dgefx.passes.emit.per_image import PerImageQueries
from dgefx.passes.emit.projections import ProjectionEmitter
from dgefx.passes.emit.sizes import shaped
from dgefx.passes.emit.tables import broadcast_tables, pooled_einsum
from dgefx.passes.errors import Refused
from dgefx.passes.ops import map_sources
from dgefx.passes.sides.facts import BlockFacts
from dgefx.passes.sides.sides import is_size
from dgefx.passes.sides.token_axes import MOVES, TokenAxes, stream_axes


@dataclass(frozen=True)
class RewrittenGraph:
    """The rewritten graph, and what it needs besides the block itself.

    positional: whether tables with a query axis take part. mixing: whether stencils or operations
    at full resolution do. tokens_apart: whether nothing but attention mixes tokens, on the main
    path neither. windows: how the block partitions the grid, None if it does not. fixed_slots:
    whether a table meets queries otherwise than by broadcasting, see `dgefx.kernels.window`.
    stencils: kernel sizes of its depthwise convolutions. reference: what it must yield below the
    finest granularity.
    """

    graph: fx.Graph
    constants: Mapping[str, Tensor]
    needs_grid_shape: bool
    positional: bool
    mixing: bool
    windows: WindowRule | None
    fixed_slots: bool
    stencils: frozenset[int]
    tokens_apart: bool
    reference: CoarseReference


def emit(facts: BlockFacts, budget: PerImageQueries) -> RewrittenGraph:
    """The graph of a block on mixed-granularity queries.

    Args:
        budget: how the queries of a batch lie.

    Raises:
        Refused: with the reason why the block stays dense.
    """
    return _Emitter(facts, budget).run()


class _Emitter:
    """One walk over a block's nodes."""

    def __init__(self, facts: BlockFacts, budget: PerImageQueries) -> None:
        self.facts, self.sides, self.budget = facts, facts.sides, budget
        self.build = build = GraphBuilder(facts)
        budget.check(build)
        self.projections, self.mixing = ProjectionEmitter(build), MixingEmitter(build)
        stream = build.call(queries_as_stream, build.queries, facts.layout.order)
        build.query[self.sides.stream] = stream
        #: what updates add up on: the stream, or the main path's last value that replaced it
        self.base = (build.tokens, build.queries)
        if facts.layout.update:
            self.base = (
                build.call(torch.zeros_like, build.tokens),
                build.call(torch.zeros_like, build.queries),
            )

    def run(self) -> RewrittenGraph:
        facts, build = self.facts, self.build
        nodes = list(facts.trace.graph.nodes)
        for node in nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node in self.sides.context_side:
                build.context[node] = self._emit_context(node)
            if node in self.sides.pooled:
                self._pool_again(node)
            elif node in self.sides.query_side:
                emitted = self._emit_query(node)
                if emitted is not None:
                    (build.slotted if node in facts.in_slots else build.query)[node] = emitted
            if node in self.sides.materialised:
                order = self._order(node)
                build.context[node] = build.dense_value(self._updated(node, order), order)
        self._epilogue(nodes[-1])
        graph = build.graph
        graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        graph.lint()
        return RewrittenGraph(
            graph,
            build.constants(),
            build.grid_shape is not None,
            build.positional,
            build.mixing,
            facts.rule if facts.uses_windows else None,
            facts.fixed_slots,
            frozenset(build.stencils),
            not (build.mixing or self.sides.materialised),
            CoarseReference.of(
                facts.trace, self.sides, facts.token_axes, facts.layout, facts.partition
            ),
        )

    # -- the main path -----------------------------------------------------------------------

    def _order(self, node: fx.Node) -> str:
        """The layout of a main path value."""
        held, rank = self.facts.token_axes[node], len(self.facts.shape(node))
        layout = self.facts.layout
        orders: dict[tuple[Any, ...], str] = {
            ("tokens", (1,), 0, 3): "BNC",
            ("tokens", (0,), 1, 3): "NBC",
            ("tokens", (2,), 0, 3): "BCN",
            ("grid", (1, 2), 0, 4): "BHWC",
            ("grid", (2, 3), 0, 4): "BCHW",
        }
        if has_parts(layout.order):
            orders["tokens", (2,), stream_axes(layout).batch, 4] = layout.order
        order = orders.get((held.kind, held.axes, held.batch, rank))
        if order is not None and held.prefix == (layout.prefix > 0):
            return order
        if held.kind in ("tokens", "grid") and held.batch is None:
            raise Refused(
                "what it makes of an image depends on the other images of the batch", "mixes images"
            )
        raise Refused(
            f"{node.name}, on the block's main path, is not laid out as a stream", "mixes tokens"
        )

    def _updated(self, node: fx.Node, order: str) -> Any:
        """(B, N, C) main path value: what it was before, plus the un-pooled update."""
        updated = self.build.call(to_tokens, self.build.query[node], order)
        return self.build.call(unpool_add, *self.base, updated, self.build.routing)

    def _pool_again(self, node: fx.Node) -> None:
        """The query side goes on from a value of the context's main path."""
        build, order = self.build, self._order(node)
        build.mixing |= self.facts.token_axes[node].mixes
        tokens = build.dense_tokens(build.context[node], order)
        queries = build.call(pool_onto, tokens, build.routing)
        self.base = (tokens, queries)
        build.query[node] = build.call(queries_as_stream, queries, order)

    def _epilogue(self, output: fx.Node) -> None:
        build, order = self.build, self.facts.layout.order
        if self.sides.output_is_dense:
            tokens = build.dense_tokens(build.context[self.sides.output], order)
        else:
            order = self._order(self.sides.output)
            tokens = self._updated(self.sides.output, order)
        # a correction is of the whole block's update
        tokens = build.call(corrected, tokens, build.tokens, build.queries, build.routing)
        result = build.dense_value(tokens, order)
        if build.grid_shape is not None:
            result = build.call(remember_grid, build.grid_shape, result, build.grid)

        def pick(node: fx.Node) -> Any:
            if node is self.sides.output:
                return result
            if node in self.sides.unread:
                return build.call(unread)
            if node not in build.context and not is_size(self.facts.trace, node):
                raise Refused(
                    "the block returns a value that only its query path computes", "further results"
                )
            return build.operand(node, crosses=True)

        build.graph.output(fx.map_arg(output.args[0], pick))

    # -- the two sides -----------------------------------------------------------------------

    def _emit_context(self, node: fx.Node) -> Any:
        projected = self.projections.emit(node, context=True)
        if projected is not None:
            return projected
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda source: self.build.operand(source, crosses=True)
        )
        return self.build.create(node, args, kwargs)

    def _emit_query(self, node: fx.Node) -> Any:
        """None for what queries do not need: tokens on their way to or from windows."""
        build, facts = self.build, self.facts
        held = facts.token_axes.get(node)
        special = self.budget.emit(build, node) or self.projections.emit(node, context=False)
        moving = held is not None and held.kind == "in_transit"
        if special is not None or moving or facts.is_replaced(node, context=False):
            return special
        if held is not None:
            origin = self._origin(node, held)
            if origin is not None:
                return self._repack(node, held, origin)
            if self._moves_nothing(node):
                return build.packed(self._source(node), held)
            if held.mixes or held.kind == "full_resolution":
                return self.mixing.emit(node, held)
        slots = node in facts.in_slots

        def operand(source: fx.Node, crosses: bool) -> Any:
            return build.operand(source, crosses, slots)

        args, kwargs = map_sources(node, self.sides.edges, operand)
        args, kwargs = broadcast_tables(build, node, args, kwargs, self.budget.broadcast)
        if slots:
            args = pooled_einsum(build, node, args)
        args, kwargs = shaped(build, node, args, kwargs)
        core = self.sides.core_at(node)
        if core is not None:
            return core.form.emit(core, build, args, kwargs)
        return build.create(node, args, kwargs)

    # -- data movement -----------------------------------------------------------------------

    @staticmethod
    def _source(node: fx.Node) -> Any:
        return node.args[0] if node.args else None

    def _moves_nothing(self, node: fx.Node) -> bool:
        """Whether a roll, a padding or a crop leaves the tokens where they are at this size.

        At other sizes it may move them; the packed queries stay as they are in any case.
        """
        source, values = self._source(node), self.facts.values
        if node.op == "call_module" or not isinstance(source, fx.Node):
            return False
        if self.facts.name(node) not in ("roll", "pad", "getitem", "narrow"):
            return False
        before, after = values.get(source), values.get(node)
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            return False
        held, kept = (self.facts.token_axes.get(n) for n in (source, node))
        if held is None or kept is None or dataclasses.replace(held, mixes=kept.mixes) != kept:
            return False
        return torch.equal(before, after)

    def _origin(self, node: fx.Node, held: TokenAxes) -> fx.Node | None:
        """Where the tokens of a value come from that were on their way until this node."""
        axes = self.facts.token_axes
        source: Any = self._source(node)
        if node.op == "call_module" or self.facts.name(node) not in MOVES or source not in axes:
            return None
        before = axes[source]
        while before.kind == "in_transit" and source.args[0] in axes:
            source = source.args[0]
            before = axes[source]
            if before.kind != "in_transit":
                return source
        # a single window that was rolled: both are whole, and their tokens lie differently
        turned = (before.kind == "window") != (held.kind == "window")
        return source if turned and before.inner == held.inner else None

    def _repack(self, node: fx.Node, held: TokenAxes, source: fx.Node) -> Any:
        origin = self.facts.token_axes[source]
        shape = enumerate(self.facts.shape(node))
        rest = tuple(size for axis, size in shape if axis not in held.counting_axes)
        packed = self.build.packed(source, origin)
        places = tuple(origin.window_axes), tuple(held.window_axes)
        return self.build.call(repack, packed, *places, rest)
