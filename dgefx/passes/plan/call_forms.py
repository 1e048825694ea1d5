"""Pass 6c, call forms: masks and flags of a block that other calls of the model give otherwise.

The same layer is given None by a model that runs eagerly, a mask of padded images, and under
`torch.export` an all-true mask. So a block that takes an optional mask is traced and split once
more, with a mask in the place of None or the other way round (`passes.plan.call_masks`). And a flag
of None is as good as one of False where the block does the same with either. Asked by `analysis`
for every verified block; blocks that differ in their parameters only share the answer. Next:
`passes.plan.cost`.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from dgefx.config import DGEConfig
from dgefx.nn.callspec import CallSpec, Path
from dgefx.outputs import Call
from dgefx.passes.errors import TraceError
from dgefx.passes.plan.call_masks import MaskForms
from dgefx.passes.plan.call_probe import probe, run_quietly, with_value
from dgefx.passes.plan.graph_cache import GraphCache
from dgefx.passes.plan.plan import BlockPlan
from dgefx.passes.trace.tracer import trace


def with_forms(
    block: nn.Module,
    plan: BlockPlan,
    call: Call,
    shape: tuple[int, ...],
    config: DGEConfig,
    twins: GraphCache,
    first: BlockPlan | None = None,
) -> BlockPlan:
    """The plan with all forms of its call that hold.

    Args:
        block: not changed. call, shape: of its example run.
        first: the complete plan of a block that differs in its parameters only, if any.
    """
    if first is not None:
        forms = tuple(form.labelled(plan.name) for form in first.forms)
        spec = dataclasses.replace(plan.spec, masks=first.spec.masks, alike=first.spec.alike)
        return dataclasses.replace(
            plan,
            spec=spec,
            forms=forms,
            constants=first.constants,
            needs_grid_shape=first.needs_grid_shape,
        )
    example = CallSpec.of(block, *call)
    names = _masks(example)
    given = (call, shape, config, twins, example)
    key = plan.gradient_key
    if key is not None and key in twins.formed:
        alike, held = twins.formed[key]
        plan = dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, alike=alike))
        return MaskForms(block, plan, *given, held).run(names) if held else plan
    plan = _with_alike(block, plan, call, shape, example, names)
    masks = MaskForms(block, plan, *given)
    formed = masks.run(names) if names else plan
    if key is not None:
        twins.formed[key] = plan.spec.alike, frozenset(masks.held)
    return formed


def _masks(spec: CallSpec) -> list[str]:
    """Arguments that are a mask, or None where one could be."""
    given = ((path, spec.example.get(path[0])) for path in spec.inputs if len(path) == 1)
    masks = {
        path
        for path, value in given
        if isinstance(value, Tensor) and (value.dtype == torch.bool or value.is_floating_point())
    }
    masks |= {path for path, value in spec.fixed if value is None and len(path) == 1}
    return sorted(path[0] for path in masks if "mask" in str(path[0]).lower())


def _with_alike(
    block: nn.Module,
    plan: BlockPlan,
    call: Call,
    shape: tuple[int, ...],
    spec: CallSpec,
    masks: list[str],
) -> BlockPlan:
    """The plan, told for which arguments None and False are the same: with either, the block
    yields the same and its trace is the same."""
    paths = [path for path, value in spec.fixed if _is_flag(block, path, value, masks)]
    found = probe(block, plan, call, shape) if paths else None
    if found is None:
        return plan
    copied, small, _, wanted = found
    values = dict(spec.fixed)

    def flipped(given: Call, chosen: list[Path]) -> Call:
        for path in chosen:
            given = with_value(given, spec, path[0], False if values[path] is None else None)
        return given

    def same(path: Path) -> bool:
        result = run_quietly(copied, flipped(small, [path]))
        return result is not None and torch.equal(result, wanted)

    paths = [path for path in paths if same(path)]
    modes = (False,) if plan.train_code.is_same(plan.eval_code) else (False, True)
    before = [_code(block, call, training) for training in modes] if paths else []

    def traced_alike(chosen: list[Path]) -> bool:
        other = flipped(call, chosen)
        return None not in before and before == [_code(block, other, mode) for mode in modes]

    alike = paths if paths and traced_alike(paths) else []
    if not alike and len(paths) > 1:
        alike = [path for path in paths if traced_alike([path])]
    return dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, alike=frozenset(alike)))


def _is_flag(block: nn.Module, path: Path, value: Any, masks: list[str]) -> bool:
    if len(path) > 1 or path[0] in masks or not (value is None or value is False):
        return False
    parameter = inspect.signature(type(block).forward).parameters.get(path[0])
    plain = parameter is None or parameter.annotation is inspect.Parameter.empty
    return plain or value is False or "bool" in str(parameter and parameter.annotation)


def _code(block: nn.Module, call: Call, training: bool) -> Any:
    """What the trace of a call is, to be compared; None where it fails."""
    try:
        traced = trace(block, CallSpec.of(block, *call), training)
    except TraceError:
        return None
    constants = [(name, value.tolist()) for name, value in traced.constants.items()]
    return traced.graph.python_code("self").src, constants
