"""Pass 5, split and legalise: a block's graph rewritten for mixed-granularity queries.

Finds the sides and the forms of its values, refuses what cannot be written, and has the new graph
written by `passes.emit.emitter`, or by `passes.emit.packed` where images differ in their number of
queries. What is neither tokenwise nor the attention core is made legal on the way: sizes in views,
tables with a query axis, depthwise convolutions (a stencil) and any other operation that keeps the
grid (an island). Next: `passes.plan.verify`.
"""

from __future__ import annotations

from torch import fx

from dgefx.passes.emit.emitter import QueryGraphEmitter, RewrittenGraph
from dgefx.passes.emit.packed import PackedQueryEmitter
from dgefx.passes.layout import Layout
from dgefx.passes.sides.find_axes import TokenAxesFinder
from dgefx.passes.sides.projections import fused_projections
from dgefx.passes.sides.sides import find_sides
from dgefx.passes.trace.block_trace import Trace


def split(trace: Trace, stream: fx.Node, layout: Layout, packs: bool = False) -> RewrittenGraph:
    """Rewrite a traced block.

    Args:
        trace: of the block, at an example call with at least two images.
        stream: its placeholder that holds the residual stream.
        layout: of the stream.
        packs: whether the queries of a batch are packed (`dgefx.kernels.ragged`).

    Raises:
        Refused: with the reason why the block stays dense.
    """
    height, width = layout.grid
    counts = frozenset({layout.tokens, height * width, height, width})
    sides = find_sides(trace, stream, counts, layout.update, layout.first_only)
    finder = TokenAxesFinder(trace, sides, layout)
    finder.find()
    for core in sides.cores:
        core.form.check(core, finder)
    fused = fused_projections(trace, sides, finder.base)
    splitter = PackedQueryEmitter if packs else QueryGraphEmitter
    return splitter(trace, sides, finder, layout, fused).run()
