"""The last stage: plans become `DGEBlock`s in the tree of a model.

`build_block` makes one of a plan, which the stages before use on copies to try it. `install` puts
them into a model, with what tells them the running grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from torch import nn

from dgefx.config import DGEConfig
from dgefx.nn.block import DGEBlock
from dgefx.nn.call_form import CallForm
from dgefx.nn.capacity import Plan, plans
from dgefx.nn.grid_shape import GridShape, Size
from dgefx.nn.image_hook import ImageHook, hook_images
from dgefx.nn.module_tree import put
from dgefx.nn.router import Router
from dgefx.passes.locate.grid_source import GridSource
from dgefx.passes.plan.plan import BlockPlan, kept_tensor
from dgefx.precision import floating_type


def build_block(
    dense: nn.Module,
    plan: BlockPlan,
    config: DGEConfig,
    grid_shape: GridShape | None,
    capacities: Plan | None = None,
) -> DGEBlock:
    """The converted block around `dense`, whose parameters it shares; finest unless told."""
    chosen = plans(plan.space(config), config)[-1] if capacities is None else capacities
    layout = plan.layout
    router = Router(
        config,
        layout.grid,
        layout.prefix,
        plan.channels,
        chosen,
        layout.order,
        plan.windows,
        plan.fixed_slots,
        plan.stencils,
        layout.token_order,
        plan.only_here,
    )
    router.train(dense.training)
    constants = {name: value.clone() for name, value in plan.constants.items()}
    parameter = next(dense.parameters(), None)
    if parameter is not None:
        router.to(parameter.device)
        if router.gate is not None and parameter.is_floating_point():
            router.gate.to(parameter.dtype)
        constants = {name: value.to(parameter.device) for name, value in constants.items()}
    shape = grid_shape if plan.needs_grid_shape else None
    forms = (CallForm(plan.spec, plan.eval_code, plan.train_code, plan.guards), *plan.forms)
    return DGEBlock(dense, router, forms, constants, shape)


def install(
    model: nn.Module,
    plans: Mapping[str, BlockPlan],
    sources: Mapping[str, GridSource],
    chosen: Mapping[str, Plan] | None,
    config: DGEConfig,
) -> None:
    """Replace the planned blocks of `model` by converted ones; finest unless `chosen`.

    Args:
        sources: who tells the grid to those that ask for it.

    Raises:
        ValueError: in which type a block's caches would be filled, cannot be told.
    """
    shapes: dict[tuple[GridSource, Size], GridShape] = {}
    for name, plan in plans.items():
        key = (sources.get(name), plan.layout.grid)
        if plan.needs_grid_shape and key not in shapes:
            shapes[key] = _grid_shape(model, *key)
        dense = model.get_submodule(name)
        _fill(dense, plan)
        capacities = None if chosen is None else chosen[name]
        put(model, name, build_block(dense, plan, config, shapes.get(key), capacities))


def _grid_shape(model: nn.Module, source: GridSource, grid: Size) -> GridShape:
    """The grid of a block and of those like it, told by a hook on `model`."""
    if source is None or isinstance(source, str):
        shape = GridShape(grid, None)
        if source is not None:
            model.get_submodule(source).register_forward_hook(shape)
        return shape
    shape = GridShape(grid, source.module)
    hook = ImageHook(shape, source.size, source.stride)
    hook_images(model.get_submodule(source.module), hook)
    return shape


def _fill(dense: nn.Module, plan: BlockPlan) -> None:
    """Give a block of the user's model what its first call would leave in it: a cache that is
    filled once, a table that is made anew for another size, and the size it was made for."""
    own = floating_type(dense)
    for target, value in plan.attributes.items():
        kept = kept_tensor(dense, target)
        if kept is not None and kept.shape == value.shape and kept.to(value.dtype).equal(value):
            continue
        if value.is_floating_point() and own.itemsize < value.dtype.itemsize:
            raise ValueError(
                f"block {plan.name} makes {target} in its first call: call the model once with the "
                f"example input before converting it, or convert it before model.to({own})"
            )
        kind = own if value.is_floating_point() else value.dtype
        owner, _, name = target.rpartition(".")
        setattr(dense.get_submodule(owner), name, value.detach().to(kind, copy=True))
    for setting in itertools.chain.from_iterable(guards.settings for guards in plan.guards):
        module = dense.get_submodule(setting.module)
        # modes are the model's own: the example ran in eval mode
        if setting.name != "training" and not setting.is_now(getattr(module, setting.name, None)):
            setattr(module, setting.name, setting.value)
