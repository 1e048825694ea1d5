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
    from dgefx.passes.emit.packed import PackedQueryEmitter


class FusedAttention(AttentionForm):
    """Masks and biases are broadcast against (images, heads, queries, keys)."""

    scales = (6, "scale")

    def __init__(self) -> None:
        super().__init__("scaled_dot_product_attention", gathers_mask=True)

    def refusal(self, node: Node) -> Reason | None:
        if argument(node, 5, "is_causal", False) is not True:
            return None
        return Reason(
            "causal attention: queries that are pooled have no place in the order",
            "causal attention",
        )

    def emit_packed(self, core: AttentionCore, emitter: PackedQueryEmitter) -> Node:
        axes, rank = emitter.forms[core.query], len(emitter._shape(core.query))
        if axes.axes != (rank - 2,) or axes.batch != 0 or rank not in (3, 4):
            raise Refused(
                f"{core.name}: queries are not laid out as (images, heads, tokens, C)",
                "packed queries",
            )
        self.require_prefix(core, emitter)
        query = emitter._operand(core.query, False)
        options: dict[str, Any] = {}
        for place, name, default in ((4, "dropout_p", 0.0), (6, "scale", None)):
            given: Any = argument(core.output, place, name, default)
            if isinstance(given, Node):
                given = emitter.context.get(given, emitter.query.get(given))
            options[name] = given
        if argument(core.output, 7, "enable_gqa", False) is True:
            options["enable_gqa"] = True
        mask = argument(core.output, 3, "attn_mask")
        if isinstance(mask, Node):
            options["attn_mask"] = self._packed_mask(core, mask, emitter)
        context = (emitter.context[core.key], emitter.context[core.value])
        return emitter.graph.create_node(
            "call_function",
            packed_attention,
            (query, *context, emitter.routing),
            options,
            name=core.name,
        )

    @staticmethod
    def _packed_mask(core: AttentionCore, mask: Node, emitter: PackedQueryEmitter) -> Any:
        """The table of all tokens in raster order; the kernel reads it per query."""
        if mask in emitter.sides.on_queries:
            raise Refused(
                f"{core.name}: its mask is made of the queries; {PER_IMAGE}", "packed queries"
            )
        rows = emitter._shape(mask)[-2:-1]
        emitter.positional |= rows != (1,)
        table = emitter.context[mask]
        if not rows or rows == (1,):
            return table
        return emitter._reordered(table, emitter.forms[core.query], -2, raster=True)
