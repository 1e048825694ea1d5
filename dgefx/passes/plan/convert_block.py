"""One block through its stages: plan, verify, sizes, call forms. Called by `passes.pipeline`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from dgefx.config import DGEConfig
from dgefx.passes.plan.call_forms import with_forms
from dgefx.passes.plan.example import BlockExample
from dgefx.passes.plan.graph_cache import GraphCache
from dgefx.passes.plan.plan import BlockPlan, plan_block
from dgefx.passes.plan.sizes import held_sizes
from dgefx.passes.plan.verify import verify_block
from dgefx.passes.plan.verify_gradients import verify_gradients
from dgefx.passes.plan.verify_types import verify_images, verify_type
from dgefx.passes.stage_log import log_stage


@dataclasses.dataclass(frozen=True)
class BlocksBefore:
    """plans: of the model's blocks that were converted, with the floating types that they are of in
    the user's model. cache: what was found for them."""

    plans: Mapping[str, BlockPlan]
    types: Mapping[str, torch.dtype]
    cache: GraphCache


def convert_block(
    example: BlockExample,
    idle: frozenset[str],
    dtype: torch.dtype,
    config: DGEConfig,
    before: BlocksBefore,
) -> BlockPlan:
    """The plan of a block that equals its dense block.

    Args:
        idle: parts of the block that do nothing in eval mode. dtype: its own floating type.
        before: blocks of the same model.

    Raises:
        Refused, TraceError: the reason why it stays dense.
    """
    cache = before.cache
    plan = plan_block(example, config.packs, cache, idle)
    refused = plan.same_graph_as and plan.same_graph_as not in before.plans
    if refused and not plan.exact_at_any_level:  # its coarse levels were not compared there
        plan = plan_block(example, config.packs)
    try:
        _verify(example, plan, config, before)
    except Exception:
        if set(plan.graphs_of) == {example.name}:
            raise
        plan = plan_block(example, config.packs)
        _verify(example, plan, config, before)
    log_stage(example.name, "plan, verified", plan)
    example = dataclasses.replace(example, rank=plan.rank)
    first = before.plans.get(plan.copy_of)
    sizes = cache.sizes.get(plan.code_key) if plan.code_key is not None else None
    if sizes is None:
        sizes = held_sizes(example, plan, config)
        if plan.code_key is not None:
            cache.sizes[plan.code_key] = sizes
    log_stage(example.name, "sizes", sizes)
    plan = dataclasses.replace(plan, reference=None).restricted(sizes)
    plan = with_forms(example, plan, config, cache, first)
    log_stage(example.name, "call forms", [form.spec.masks for form in plan.forms])
    if first is None or before.types[plan.copy_of] != dtype:
        verify_type(example, plan, config, dtype)
    return plan


def _verify(
    example: BlockExample, plan: BlockPlan, config: DGEConfig, before: BlocksBefore
) -> None:
    """Verify a block in all that was not verified for those before it."""
    example = dataclasses.replace(example, rank=plan.rank)
    first, compared = before.plans.get(plan.copy_of), before.cache.compared
    passed = first is not None and plan.runs_like(first)
    verify_block(example, plan, config, copy_passed=passed)
    if passed or (plan.code_key is not None and plan.code_key in compared and not plan.functions):
        return
    verify_gradients(example, plan, config)
    verify_images(example, plan, config)
    if plan.code_key is not None:
        compared.add(plan.code_key)
