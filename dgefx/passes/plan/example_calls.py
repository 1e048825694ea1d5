"""A block's example call with other images or in another floating type, for verification."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from dgefx.outputs import Call
from dgefx.passes.plan.plan import BlockPlan
from dgefx.passes.plan.verify import stream_of


def call_in_type(call: Call, dtype: torch.dtype) -> Call:
    """The call with other floating point tensors of this type, on copies."""

    def cast(value: Tensor) -> Tensor:
        if value.requires_grad:
            return value * 1.0  # a block may write into its input
        return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()

    made: Call = pytree.tree_map_only(Tensor, cast, call)
    return made


def pick_images(stream: Tensor, plan: BlockPlan, chosen: Tensor) -> Tensor:
    return stream.index_select(plan.layout.axis("B"), chosen.to(stream.device))


def call_of_images(call: Call, plan: BlockPlan, shape: tuple[int, ...], chosen: Tensor) -> Call:
    """The call with these images of the stream, and of all that has as many on its first axis."""
    images = shape[plan.layout.axis("B")]
    stream = stream_of(call, plan, shape)

    def pick(value: Any) -> Any:
        if value is stream:
            return pick_images(stream, plan, chosen)
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == images:
            return value.index_select(0, chosen.to(value.device))
        return value

    made: Call = pytree.tree_map(pick, call)
    return made
