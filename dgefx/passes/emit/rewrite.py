"""Sides and emit: a block's graph rewritten for mixed-granularity queries.

Finds out about the block (`passes.sides.facts`), refuses what cannot be written, and has the new
graph written (`passes.emit.emitter`). Next: `passes.plan.verify`.
"""

from __future__ import annotations

from torch import fx

from dgefx.passes.emit.emitter import RewrittenGraph, emit
from dgefx.passes.emit.packed import PackedQueries
from dgefx.passes.emit.per_image import PerImageQueries
from dgefx.passes.layout import Layout
from dgefx.passes.sides.facts import find_facts
from dgefx.passes.stage_log import log_stage
from dgefx.passes.trace.block_trace import Trace


def split(trace: Trace, stream: fx.Node, layout: Layout, packs: bool, name: str) -> RewrittenGraph:
    """Rewrite a traced block.

    Args:
        trace: of the block, at an example call with at least two images.
        stream: its placeholder that holds the residual stream.
        layout: of the stream.
        packs: whether the queries of a batch are packed (`dgefx.kernels.ragged`).
        name: of the block.

    Raises:
        Refused: with the reason why the block stays dense.
    """
    facts = find_facts(trace, stream, layout)
    log_stage(name, "sides", facts)
    for core in facts.sides.cores:
        core.form.check(core, facts)
    return emit(facts, PackedQueries(facts) if packs else PerImageQueries(facts))
