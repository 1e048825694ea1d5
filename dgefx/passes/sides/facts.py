"""Sides, together: all that is known about a traced block before its new graph is written.

`find_facts` runs the analyses of `passes.sides` one after the other. What comes out is the only
input of `passes.emit`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import fx

from dgefx.passes.layout import Layout
from dgefx.passes.sides.find_axes import find_token_axes
from dgefx.passes.sides.projections import FusedProjection, fused_projections, moves_data
from dgefx.passes.sides.sides import find_sides
from dgefx.passes.sides.tables import einsum_tables, find_cuts
from dgefx.passes.sides.token_axes import TokenFacts
from dgefx.passes.sides.window_partition import fixed_rule
from dgefx.passes.sides.window_slots import nodes_in_slots
from dgefx.passes.trace.block_trace import Trace


@dataclass(frozen=True)
class BlockFacts(TokenFacts):
    """What the analyses found about a block.

    in_slots: nodes whose values stand in fixed slots of windows. rule: also of masks, with which
        it is for this grid alone. fixed_slots: whether a table meets queries otherwise than by
        broadcasting, see `dgefx.kernels.window`. fused: linear layers that both sides want.
    """

    in_slots: frozenset[fx.Node]
    fixed_slots: bool
    fused: tuple[FusedProjection, ...]

    def __str__(self) -> str:
        """For `passes.stage_log`: on which side a node runs, and how its value holds tokens."""
        sides = {
            "queries": self.sides.query_side,
            "pooled": self.sides.pooled,
            "context": self.sides.context_side,
            "un-pooled": self.sides.materialised,
        }
        lines = [f"windows: {self.rule if self.windowed else None}"]
        for node in self.trace.graph.nodes:
            where = " and ".join(side for side, nodes in sides.items() if node in nodes)
            held = self.token_axes.get(node) if node in self.sides.on_queries else None
            if where:
                lines.append(f"{node}: {where}" + (f", {held}" if held else ""))
        return "\n".join(lines)

    @property
    def uses_windows(self) -> bool:
        """Whether queries stand in slots, of windows or of the whole image as one."""
        return self.windowed or bool(self.in_slots)

    def is_replaced(self, node: fx.Node, context: bool) -> bool:
        """Whether a value is of a fused projection and a side computes parts of it instead."""
        while not any(node in fused.parts(context) for fused in self.fused):
            if any(fused.linear is node for fused in self.fused):
                return True
            if not moves_data(node, self.trace):
                return False
            node = node.all_input_nodes[0]
        return False


def find_facts(trace: Trace, stream: fx.Node, layout: Layout) -> BlockFacts:
    """Analyse a traced block.

    Args:
        trace: of the block, at an example call with at least two images.
        stream: its placeholder that holds the residual stream.
        layout: of the stream.

    Raises:
        Refused: with the reason why the block stays dense.
    """
    sides = find_sides(trace, stream, layout.update, layout.first_only)
    found = find_token_axes(trace, sides, layout)
    in_slots = nodes_in_slots(found)
    cuts = find_cuts(found, in_slots)
    if found.partition is not None and any(cuts):
        found = dataclasses.replace(found, rule=fixed_rule(found.partition, cuts))
    return BlockFacts(
        **vars(found),
        in_slots=in_slots,
        fixed_slots=any(einsum_tables(found, node)[2] for node in in_slots),
        fused=tuple(fused_projections(found)),
    )
