"""Emit, tables: what has an entry per token and does not come from the stream, read per query.

A query reads the mean over its patch, through `gather_constant` or, in slots of windows, the rows
of `dgefx.kernels.window`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dgefx.kernels.constants import gather_constant
from dgefx.kernels.window import pool_line, pool_rows, pool_slots
from dgefx.passes.emit.builder import GraphBuilder
from dgefx.passes.errors import Refused
from dgefx.passes.sides.tables import einsum_tables, met_by_broadcasting, table_axes
from dgefx.passes.sides.token_axes import TokenAxes, needed_share

#: (graph, operand, its node there, the token axes and the rank that it meets): the operand
#: without an entry per token, as queries meet it
Broadcast = Callable[[GraphBuilder, fx.Node, Any, TokenAxes, int], Any]


def broadcast_tables(
    build: GraphBuilder, node: fx.Node, args: Any, kwargs: Any, broadcast: Broadcast
) -> tuple[Any, Any]:
    """The operands of `node`, with tables that it broadcasts with tokens read per query."""
    met = met_by_broadcasting(build.facts, node)
    if met is None:
        return args, kwargs
    skip = {place for consumer, place in build.facts.sides.edges if consumer is node}
    held, rank = met

    def read(place: int | str, original: Any, emitted: Any) -> Any:
        if place in skip or not isinstance(original, fx.Node):
            return emitted
        if original not in build.facts.sides.on_queries:
            axes = table_axes(build.facts, node, original, held, rank)
            if axes is not None:
                share = _share(build, node, original, place)
                return _per_query(build, node, emitted, axes, met, share)
        return broadcast(build, original, emitted, held, rank)

    args = tuple(read(i, node.args[i], emitted) for i, emitted in enumerate(args))
    return args, {name: read(name, node.kwargs[name], v) for name, v in kwargs.items()}


def _share(
    build: GraphBuilder, node: fx.Node, table: fx.Node, place: int | str
) -> tuple[float, ...]:
    """Of a boolean table, see `needed_share`."""
    facts = build.facts
    if facts.trace.values[table].dtype != torch.bool:
        return ()
    return (needed_share(node, facts.name(node), place, facts.sides.on_queries),)


def _per_query(
    build: GraphBuilder,
    node: fx.Node,
    table: Any,
    axes: tuple[int, ...],
    met: tuple[TokenAxes, int],
    share: tuple[float, ...],
) -> fx.Node:
    """A table with an entry per token on `axes`."""
    build.positional = True
    held, rank = met
    if node in build.facts.in_slots:
        place = tuple(held.window_axes)
        return build.call(pool_slots, table, build.windows, place, rank, *share)
    if held.batch is None or held.kind == "batch_merged":
        raise Refused(
            f"{node.name}: images are merged with another axis where a table is added",
            "table beside the queries",
        )
    table = build.reordered(table, held, axes[0], raster=True)
    place = (held.batch, held.axes, held.prefix)
    return build.call(gather_constant, table, build.routing, rank, *place, *share)


def pooled_einsum(build: GraphBuilder, node: fx.Node, args: Any) -> Any:
    """The arguments of an einsum of tokens in slots with tables that have an entry per slot row,
    slot column or slot."""
    equation, tokens, tables = einsum_tables(build.facts, node)
    if not tables:
        return args
    terms, result = equation.split("->")
    labels = terms.split(",")
    held, partition = build.facts.token_axes[tokens], build.facts.partition
    operands = list(args[1:])
    own = labels[list(node.args[1:]).index(tokens)]
    build.positional = True
    for index in tables:
        label = labels[index]
        lines = [n for n, axis in enumerate(held.axes) if own[axis] in label]
        axes = tuple(label.index(own[held.axes[n]]) for n in lines)
        if len(axes) < len(held.axes):
            if partition is not None and partition.order:
                raise Refused(
                    f"{node.name}: a table has rows or columns of windows whose slots are in "
                    f"another order",
                    "table beside the queries",
                )
            operands[index] = build.call(
                pool_line, operands[index], build.windows, (axes[0], lines[0])
            )
        else:
            if len(axes) == 2 and axes[1] != axes[0] + 1:
                raise Refused(
                    f"{node.name}: a table's rows and columns are apart", "table beside the queries"
                )
            pooled = build.call(pool_rows, operands[index], build.windows, axes)
            if len(axes) == 2:
                pooled = build.graph.call_method("squeeze", (pooled, axes[1]))
                label = label[: axes[1]] + label[axes[1] + 1 :]
            operands[index] = pooled
        labels[index] = label[: axes[0]] + own[held.axes[0]] + label[axes[0] + 1 :]
    return (",".join(labels) + "->" + result, *operands)
