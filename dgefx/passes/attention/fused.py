"""Fused attention: `scaled_dot_product_attention`, a form of `passes.attention.registry`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.fx import Node

from dgefx.kernels.packed_attention import packed_attention
from dgefx.passes.attention.core import PER_IMAGE, AttentionCore, AttentionForm
from dgefx.passes.errors import Refused
from dgefx.passes.ops import argument
from dgefx.passes.reasons import Reason

if TYPE_CHECKING:
    from dgefx.passes.emit.builder import GraphBuilder


class FusedAttention(AttentionForm):
    """Masks and biases are broadcast against (images, heads, queries, keys)."""

    def __init__(self) -> None:
        super().__init__("scaled_dot_product_attention", gathers_mask=True)

    def refusal(self, node: Node) -> Reason | None:
        if argument(node, 5, "is_causal", False) is not True:
            return None
        return Reason(
            "causal attention: queries that are pooled have no place in the order",
            "causal attention",
        )

    def emit_packed(self, core: AttentionCore, build: GraphBuilder) -> Node:
        axes, rank = build.facts.token_axes[core.query], len(build.facts.shape(core.query))
        if axes.axes != (rank - 2,) or axes.batch != 0 or rank not in (3, 4):
            raise Refused(
                f"{core.name}: queries are not laid out as (images, heads, tokens, C)",
                "packed queries",
            )
        self.require_prefix(core, build)
        query = build.operand(core.query)
        options: dict[str, Any] = {}
        for place, name, default in ((4, "dropout_p", 0.0), (6, "scale", None)):
            given: Any = argument(core.output, place, name, default)
            options[name] = build.operand(given) if isinstance(given, Node) else given
        if argument(core.output, 7, "enable_gqa", False) is True:
            options["enable_gqa"] = True
        mask = argument(core.output, 3, "attn_mask")
        if isinstance(mask, Node):
            options["attn_mask"] = self._packed_mask(core, mask, build)
        context = (build.context[core.key], build.context[core.value])
        return build.graph.create_node(
            "call_function",
            packed_attention,
            (query, *context, build.routing),
            options,
            name=core.name,
        )

    @staticmethod
    def _packed_mask(core: AttentionCore, mask: Node, build: GraphBuilder) -> Any:
        """The table of all tokens in raster order; the kernel reads it per query."""
        if mask in build.facts.sides.on_queries:
            raise Refused(
                f"{core.name}: its mask is made of the queries; {PER_IMAGE}", "packed queries"
            )
        rows = build.facts.shape(mask)[-2:-1]
        build.positional |= rows != (1,)
        table = build.context[mask]
        if not rows or rows == (1,):
            return table
        return build.reordered(table, build.facts.token_axes[core.query], -2, raster=True)
