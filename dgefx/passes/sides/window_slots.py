"""Sides, slots: which values of the query side stand in fixed slots of their windows.

Tokenwise work is done on the packed queries of an image; attention inside windows, and whatever
meets a table with an entry per slot of a window, on fixed slots. Used by `passes.sides.facts`.
"""

from __future__ import annotations

import networkx as nx
from torch import fx

from dgefx.passes.attention.core import AttentionCore
from dgefx.passes.errors import Refused
from dgefx.passes.ops import ELEMENTWISE
from dgefx.passes.sides.sides import block_flow
from dgefx.passes.sides.tables import einsum_tables
from dgefx.passes.sides.token_axes import TokenFacts


def nodes_in_slots(facts: TokenFacts) -> frozenset[fx.Node]:
    """The nodes whose values stand in slots.

    Raises:
        Refused: slots of the whole image as one window, whose tokens are not in raster order.
    """
    flow = block_flow(facts.trace.graph)
    within: set[fx.Node] = set()
    before: set[fx.Node] = set()
    for core in facts.sides.cores:
        if facts.windowed:
            within |= _interior(core, flow)
        before |= nx.ancestors(flow, core.output)
    found: set[fx.Node] = set()
    for node in facts.trace.graph.nodes:
        held = facts.token_axes.get(node)
        if node not in facts.sides.query_side or held is None:
            continue
        if held.kind in ("no_tokens", "in_transit"):
            continue
        follows = (
            facts.windowed
            and node in before
            and any(s in found for s, crosses in facts.sides.sources(node) if not crosses)
        )
        if (node in within and held.kind == "window") or follows or _meets_table(facts, node):
            if facts.layout.token_order is not None and held.kind == "tokens":
                raise Refused(
                    f"{node.name}: a table meets tokens, which are not in raster order, otherwise "
                    f"than by broadcasting",
                    "table beside the queries",
                )
            found.add(node)
    return frozenset(found)


def _interior(core: AttentionCore, flow: nx.DiGraph) -> set[fx.Node]:
    """From the product of queries and keys to the core's output."""
    scores = {node for node, _ in core.context_edges}
    after = scores.union(*(nx.descendants(flow, node) for node in scores))
    return {core.output} | (after & nx.ancestors(flow, core.output))


def _meets_table(facts: TokenFacts, node: fx.Node) -> bool:
    held = facts.token_axes[node]
    if einsum_tables(facts, node)[2]:
        return True
    if facts.name(node) not in ELEMENTWISE or held.kind != "window":
        return False
    sizes, rank = facts.axis_sizes(held), len(facts.shape(node))
    for _, source in facts.sides.tables_of(node):
        shape = facts.shape(source)
        axes = [axis - (rank - len(shape)) for axis in held.axes]
        if all(a >= 0 for a in axes) and tuple(shape[a] for a in axes) == sizes:
            return max(sizes) > 1
    return False
