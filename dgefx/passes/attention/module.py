"""`nn.MultiheadAttention` and the function that it calls, a form of `passes.attention.registry`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.fx import Node

from dgefx.kernels.packed_attention import packed_multi_head_attention
from dgefx.passes.attention.core import PER_IMAGE, AttentionCore, AttentionForm
from dgefx.passes.errors import Refused
from dgefx.passes.ops import argument
from dgefx.passes.reasons import Reason
from dgefx.passes.trace.copies import HOOKED

if TYPE_CHECKING:
    from dgefx.passes.emit.builder import GraphBuilder
    from dgefx.passes.sides.token_axes import TokenFacts


class ModuleAttention(AttentionForm):
    """Its result is a tuple, which has no token axes."""

    def __init__(self) -> None:
        super().__init__("multi_head_attention_forward")

    def refusal(self, node: Node) -> Reason | None:
        if not isinstance(node.kwargs.get("attn_mask"), Node):
            return None
        return Reason("nn.MultiheadAttention with an attention mask", "attention mask")

    def check_axes(self, core: AttentionCore, facts: TokenFacts) -> None:
        axes = facts.token_axes.get(core.query)
        if axes is not None and axes.kind in ("window", "in_transit") and facts.windowed:
            raise Refused(
                "nn.MultiheadAttention inside windows", "nn.MultiheadAttention in windows"
            )

    def emit_packed(self, core: AttentionCore, build: GraphBuilder) -> Node:
        """From the module's parameters."""
        node = core.output
        if node.op != "call_module":
            raise Refused(
                f"{node.name}: F.multi_head_attention_forward by itself; {PER_IMAGE}",
                "packed queries",
            )
        module = build.facts.trace.root.get_submodule(str(node.target))
        plain = (
            type(module) is nn.MultiheadAttention
            and not hasattr(module, HOOKED)
            and module._qkv_same_embed_dim
            and module.bias_k is None
            and not module.add_zero_attn
        )
        if not plain or argument(node, 3, "key_padding_mask") is not None:
            raise Refused(
                f"{node.name}: an nn.MultiheadAttention with extras; {PER_IMAGE}", "packed queries"
            )
        assert isinstance(module, nn.MultiheadAttention)
        batch = 0 if module.batch_first else 1
        axes, rank = build.facts.token_axes[core.query], len(build.facts.shape(core.query))
        if axes.batch != batch or rank != 3:
            raise Refused(
                f"{node.name}: queries are not laid out as (images, tokens, C)", "packed queries"
            )
        self.require_prefix(core, build)
        weights = []
        for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
            owner, _, leaf = name.rpartition(".")
            there = getattr(module.get_submodule(owner), leaf) is not None
            weights.append(build.attribute(f"{node.target}.{name}") if there else None)
        operands = (
            build.operand(core.query),
            build.context[core.key],
            build.context[core.value],
            build.routing,
            *weights,
            module.num_heads,
            module.batch_first,
            module.dropout if module.training else 0.0,
        )
        return build.graph.create_node(
            "call_function", packed_multi_head_attention, operands, name=node.name
        )
