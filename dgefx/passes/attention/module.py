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
    from dgefx.passes.emit.packed import PackedQueryEmitter
    from dgefx.passes.sides.find_axes import TokenAxesFinder


class ModuleAttention(AttentionForm):
    """Its result is a tuple, which has no token axes."""

    def __init__(self) -> None:
        super().__init__("multi_head_attention_forward")

    def refusal(self, node: Node) -> Reason | None:
        if not isinstance(node.kwargs.get("attn_mask"), Node):
            return None
        return Reason("nn.MultiheadAttention with an attention mask", "attention mask")

    def check_axes(self, core: AttentionCore, finder: TokenAxesFinder) -> None:
        axes = finder.forms.get(core.query)
        if axes is not None and axes.kind in ("window", "in_transit") and finder.windowed:
            raise Refused(
                "nn.MultiheadAttention inside windows", "nn.MultiheadAttention in windows"
            )

    def emit_packed(self, core: AttentionCore, emitter: PackedQueryEmitter) -> Node:
        """From the module's parameters."""
        node = core.output
        if node.op != "call_module":
            raise Refused(
                f"{node.name}: F.multi_head_attention_forward by itself; {PER_IMAGE}",
                "packed queries",
            )
        module = emitter.trace.root.get_submodule(str(node.target))
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
        if emitter.forms[core.query].batch != batch or len(emitter._shape(core.query)) != 3:
            raise Refused(
                f"{node.name}: queries are not laid out as (images, tokens, C)", "packed queries"
            )
        self.require_prefix(core, emitter)
        weights = []
        for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
            owner, _, leaf = name.rpartition(".")
            there = getattr(module.get_submodule(owner), leaf) is not None
            weights.append(
                emitter.graph.create_node("get_attr", f"{node.target}.{name}") if there else None
            )
        operands = (
            emitter._operand(core.query, False),
            emitter.context[core.key],
            emitter.context[core.value],
            emitter.routing,
            *weights,
            module.num_heads,
            module.batch_first,
            module.dropout if module.training else 0.0,
        )
        return emitter.graph.create_node(
            "call_function", packed_multi_head_attention, operands, name=node.name
        )
