"""MACs of models and blocks, as `torch.utils.flop_counter.FlopCounterMode` counts them.

Feeds the budget solver. One multiply-accumulate is two of the counter's operations.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dgefx.ambient import Shared
from dgefx.config import DGEConfig
from dgefx.nn.block import DGEBlock
from dgefx.nn.budget import BlockCost
from dgefx.nn.capacity import Plan, plans
from dgefx.nn.grid_shape import GridShape
from dgefx.outputs import Call
from dgefx.passes.plan.install import build_block
from dgefx.passes.plan.plan import BlockPlan
from dgefx.passes.trace.wrapped_functions import stand_ins_run


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


#: nn.MultiheadAttention's fused inference path is one operation that the counter cannot see into;
#: switched off while counting
_visible_attention = Shared(_no_fast_path)


class _PlainMasks(TorchFunctionMode):
    """Attention masks as the fused kernels take them: of four axes, without a gradient.

    On the CPU the counter does not see into fused attention, but a mask of three axes, or one that
    is a parameter, makes PyTorch take the way that it sees into. Masks of pooled queries are never
    of that kind, so the attention of the dense block alone would be counted.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else named.get("attn_mask")
            query = args[0] if args else named.get("query")
            if isinstance(mask, Tensor) and isinstance(query, Tensor):
                mask = mask.detach()
                if mask.dim() == 3 and query.dim() == 4:
                    mask = mask.unsqueeze(0)
                if len(args) > 3:
                    args = (*args[:3], mask, *args[4:])
                else:
                    named["attn_mask"] = mask
        return func(*args, **named)


def count_macs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """MACs of one call of `module`, in its current mode."""
    counter = FlopCounterMode(display=False)
    with _visible_attention(), torch.no_grad(), stand_ins_run(module, True), _PlainMasks(), counter:
        module(*args, **kwargs)
    return int(counter.get_total_flops()) // 2


def block_cost(dense: nn.Module, converted: DGEBlock, call: Call, config: DGEConfig) -> BlockCost:
    """Cost of a block dense, at its finest and at its coarsest plan, and between in windows.

    Args:
        converted: its plan is changed while counting and left at the finest.
        call: the block's example call.
    """
    router = converted.dge_router
    choices = plans(router.space(router.grid), config)
    low, high = choices[0], choices[-1]

    def counted(plan: Plan) -> int:
        router.plan = plan
        return count_macs(converted, *call)

    coarsest, finest = counted(low), 0
    price, slots = 0.0, {}
    # a small grid may have no plan with every level
    mixed = [plan for plan in choices if all(plan.capacities)] or choices[1:-1]
    if router.windows is not None and mixed:
        uses = itertools.product((False, True), repeat=config.levels)
        slots = {use: router.attention_slots(Plan(tuple(map(int, use)))) for use in uses}
        middle = mixed[len(mixed) // 2]
        between = counted(middle)
    finest = counted(high)
    if slots:
        # macs = a + b * queries + price * slots, of three plans
        below, above, within = (
            slots[tuple(c > 0 for c in plan.capacities)] for plan in (low, high, middle)
        )
        share = (middle.slots - low.slots) / (high.slots - low.slots)
        extra = within - below - share * (above - below)
        price = (between - coarsest - share * (finest - coarsest)) / extra if extra else 0.0
    known = tuple(slots.items())
    return BlockCost(count_macs(dense, *call), finest, coarsest, tuple(choices), price, known)


def price(
    work: nn.Module,
    plans: Mapping[str, BlockPlan],
    calls: Mapping[str, Call],
    config: DGEConfig,
) -> dict[str, BlockCost]:
    """What every planned block costs; blocks that run the same code cost the same."""
    costs: dict[str, BlockCost] = {}
    for name, plan in plans.items():
        other = plan.same_graph_as
        if other in costs and plan.costs_like(plans[other]):
            costs[name] = costs[other]
            continue
        dense = work.get_submodule(name)
        shape = GridShape(plan.layout.grid) if plan.needs_grid_shape else None
        converted = build_block(dense, plan, config, shape)
        costs[name] = block_cost(dense, converted, calls[name], config)
    return costs
