"""Pass 5, split and legalise: a block's graph rewritten for mixed-granularity queries.

Finds the sides and the forms of its values, refuses what cannot be written, and has the new graph
written by `passes.emit.emitter`, or by `passes.emit.packed` where images differ in their number of
queries. What is neither tokenwise nor the attention core is made legal on the way: sizes in views,
tables with a query axis, depthwise convolutions (a stencil) and any other operation that keeps the
grid (an island). Next: `passes.plan.verify`.
"""

from __future__ import annotations

from torch import fx

from dgefx.passes.attention.core import AttentionCore
from dgefx.passes.emit.emitter import QueryGraphEmitter, RewrittenGraph
from dgefx.passes.emit.packed import PackedQueryEmitter
from dgefx.passes.errors import Refused
from dgefx.passes.layout import Layout
from dgefx.passes.ops import argument
from dgefx.passes.sides.find_axes import TokenAxesFinder
from dgefx.passes.sides.projections import fused_projections
from dgefx.passes.sides.sides import find_sides
from dgefx.passes.trace.tracer import Trace


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
    forms = finder.find()
    for core in sides.cores:
        _refuse_masks(core)
        form = forms.get(core.output)
        if core.kind == "multi_head_attention_forward":
            asks = forms.get(core.query)  # its output is a tuple and has no form
            if asks is not None and asks.kind in ("window", "in_transit") and finder.windowed:
                raise Refused(
                    "nn.MultiheadAttention inside windows", "nn.MultiheadAttention in windows"
                )
        elif form is not None and form.kind == "full_resolution":
            # queries that are fewer than the tokens were refused before (`passes.locate.sites`)
            raise Refused(
                "its queries reach the attention in an order of tokens that is not followed "
                "(windows, strides)",
                "windows",
            )
        elif form is None or form.kind in ("no_tokens", "in_transit") or form.mixes:
            if core.kind == "grid_sample":
                raise Refused(
                    "deformable attention whose sampling grid does not follow the tokens",
                    "output does not follow queries",
                )
            raise Refused(
                "its output does not follow the tokens of its queries",
                "output does not follow queries",
            )
    fused = fused_projections(trace, sides, finder.base)
    splitter = PackedQueryEmitter if packs else QueryGraphEmitter
    return splitter(trace, sides, finder, layout, fused).run()


def _refuse_masks(core: AttentionCore) -> None:
    node = core.output
    if (
        core.kind == "scaled_dot_product_attention"
        and argument(node, 5, "is_causal", False) is True
    ):
        raise Refused(
            "causal attention: queries that are pooled have no place in the order",
            "causal attention",
        )
    if core.kind == "multi_head_attention_forward" and isinstance(
        node.kwargs.get("attn_mask"), fx.Node
    ):
        raise Refused("nn.MultiheadAttention with an attention mask", "attention mask")
