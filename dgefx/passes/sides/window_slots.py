"""Pass 5a, slots: which values of the query side stand in fixed slots of their windows.

Tokenwise work is done on the packed queries of an image; attention inside windows, and whatever
meets a table with an entry per slot of a window, on fixed slots. Used by `passes.emit.rewrite`.
"""

from __future__ import annotations

from typing import Any

import networkx as nx
from torch import Tensor, fx

from dgefx.passes.attention.core import AttentionCore
from dgefx.passes.layout import Layout
from dgefx.passes.ops import ELEMENTWISE, op_name
from dgefx.passes.sides.find_axes import TokenAxesFinder
from dgefx.passes.sides.sides import Sides, block_flow
from dgefx.passes.sides.token_axes import TokenAxes
from dgefx.passes.sides.window_partition import Partition
from dgefx.passes.trace.block_trace import Trace


def axis_sizes(form: TokenAxes, layout: Layout, finder: TokenAxesFinder) -> tuple[int, ...]:
    """Sizes of the token axes of a value of this form, in the dense block."""
    grid = layout.grid
    if form.kind == "window":
        grid = (finder.windows.partition or Partition.whole(grid)).size
    if len(form.axes) == 2:
        return grid
    if form.kind == "batch_merged":
        return (finder.images * (grid[0] * grid[1] + (layout.prefix if form.prefix else 0)),)
    return (grid[0] * grid[1] + (layout.prefix if form.prefix else 0),)


def einsum_tables(
    node: fx.Node, sides: Sides, forms: dict[fx.Node, TokenAxes]
) -> tuple[str, fx.Node, list[int]]:
    """(equation, operand that holds tokens, positions of operands with an entry per token).

    An equation without tables, or one that is not understood, has no positions.
    """
    equation, *operands = node.args
    held = [o for o in operands if isinstance(o, fx.Node) and o in forms and o in sides.on_queries]
    held = [o for o in held if forms[o].kind in ("tokens", "grid", "window")]
    if not isinstance(equation, str) or len(held) != 1 or "->" not in equation or "." in equation:
        return "", node, []
    equation = equation.replace(" ", "")
    labels = equation.split("->")[0].split(",")
    tokens = held[0]
    own = labels[operands.index(tokens)]
    wanted = {own[axis] for axis in forms[tokens].axes}
    tables = [
        index
        for index, operand in enumerate(operands)
        if operand is not tokens and wanted & set(labels[index])
    ]
    return equation, tokens, tables


class WindowSlots:
    """See the module docstring."""

    def __init__(self, trace: Trace, sides: Sides, finder: TokenAxesFinder) -> None:
        self.trace, self.sides, self.finder = trace, sides, finder
        self.forms = finder.forms
        self.flow = block_flow(trace.graph)

    def choose(self) -> frozenset[fx.Node]:
        """The nodes whose values stand in slots."""
        within: set[fx.Node] = set()
        before: set[fx.Node] = set()
        for core in self.sides.cores:
            if self.finder.windowed:
                within |= self._interior(core)
            before |= nx.ancestors(self.flow, core.output)
        found: set[fx.Node] = set()
        for node in self.trace.graph.nodes:
            form = self.forms.get(node)
            if (
                node not in self.sides.query_side
                or form is None
                or form.kind in ("no_tokens", "in_transit")
            ):
                continue
            follows = (
                self.finder.windowed
                and node in before
                and any(s in found for s, crosses in self.sides.sources(node) if not crosses)
            )
            if (node in within and form.kind == "window") or follows or self._meets_table(node):
                found.add(node)
        return frozenset(found)

    def _interior(self, core: AttentionCore) -> set[fx.Node]:
        """From the product of queries and keys to the core's output."""
        scores = {node for node, _ in core.context_edges}
        after = scores.union(*(nx.descendants(self.flow, node) for node in scores))
        return {core.output} | (after & nx.ancestors(self.flow, core.output))

    def _meets_table(self, node: fx.Node) -> bool:
        form = self.forms[node]
        name = op_name(node, self.trace.root)
        if name == "einsum" and self.sides.core_at(node) is None:
            return bool(einsum_tables(node, self.sides, self.forms)[2])
        if name not in ELEMENTWISE or form.kind != "window":
            return False
        sizes = axis_sizes(form, self.finder.layout, self.finder)
        value: Any = self.trace.values[node]
        for source, _ in self.sides.sources(node):
            table = self.trace.values.get(source)
            if source in self.sides.on_queries or not isinstance(table, Tensor):
                continue
            axes = [axis - (value.dim() - table.dim()) for axis in form.axes]
            if all(a >= 0 for a in axes) and tuple(table.shape[a] for a in axes) == sizes:
                return max(sizes) > 1
        return False
