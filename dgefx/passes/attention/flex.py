"""`flex_attention` without `score_mod` and `block_mask`, a form of `passes.attention.registry`.

Such a call is `scaled_dot_product_attention`, which stands in for it while a model is looked at and
in converted blocks: FlexAttention has no gradients on the CPU, and its FLOPs cannot be counted. Any
other call stays dense.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from dgefx.passes.attention.core import AttentionForm
from dgefx.passes.ops import argument
from dgefx.passes.reasons import Reason


class FlexAttention(AttentionForm):
    """Only calls that are more than `scaled_dot_product_attention` are left to match."""

    def __init__(self) -> None:
        name = "torch.nn.attention.flex_attention.flex_attention"
        super().__init__("flex_attention", [name])

    def refusal(self, node: Node) -> Reason | None:
        given = (argument(node, 3, "score_mod"), argument(node, 4, "block_mask"))
        if given == (None, None):
            return Reason("flex_attention that returns more than its output", "further results")
        return Reason(
            "flex_attention with score_mod or block_mask: they ask for the place of a query, of "
            "which pooled queries have several",
            "attention mask",
        )

    def stand_in(
        self,
        counting: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Any = None,
        block_mask: Any = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        kernel_options: Any = None,
        *,
        return_aux: Any = None,
    ) -> Any:
        masks = score_mod is not None or block_mask is not None
        if return_lse or return_aux is not None or (masks and not counting):
            return NotImplemented
        # traced as it is called
        options: dict[str, Any] = {"enable_gqa": True} if enable_gqa else {}
        return F.scaled_dot_product_attention(query, key, value, scale=scale, **options)
