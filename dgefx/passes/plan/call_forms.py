"""Call forms: masks and flags of a block that other calls of the model give otherwise.

The same layer is given None by a model that runs eagerly, a mask of padded images, and under
`torch.export` an all-true mask. So a block that takes an optional mask is planned once more, with a
mask in the place of None or the other way round (`passes.plan.call_masks`). And a flag of None is
as good as one of False where the block does the same with either. Asked for every verified block;
blocks that run the same code share the answer. Next: `passes.plan.cost`.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dgefx.config import DGEConfig
from dgefx.nn.callspec import CallSpec, Path
from dgefx.passes.errors import TraceError
from dgefx.passes.plan.call_masks import HeldForm, MaskForms, smallest_call
from dgefx.passes.plan.example import BlockExample
from dgefx.passes.plan.graph_cache import GraphCache
from dgefx.passes.plan.plan import BlockPlan
from dgefx.passes.trace.block_trace import trace


@dataclass(frozen=True)
class KnownForms:
    """What holds for all blocks of one signature: for which flags None and False are the same, and
    which forms of masks."""

    same_flags: frozenset[Path]
    masks: frozenset[HeldForm]


def with_forms(
    example: BlockExample,
    plan: BlockPlan,
    config: DGEConfig,
    cache: GraphCache,
    first: BlockPlan | None = None,
) -> BlockPlan:
    """The plan with all forms of its call that hold.

    Args:
        first: the complete plan of a block that differs in its parameters only, if any.
    """
    if first is not None:
        return dataclasses.replace(
            plan,
            spec=dataclasses.replace(plan.spec, masks=first.spec.masks, alike=first.spec.alike),
            forms=tuple(form.labelled(plan.name) for form in first.forms),
            constants=first.constants,
            needs_grid_shape=first.needs_grid_shape,
        )
    spec = CallSpec.of(example.block, *example.call)
    names = _mask_names(spec)
    known = None if plan.code_key is None else cache.forms.get(plan.code_key)
    same = _same_flags(example, plan, spec, names) if known is None else known.same_flags
    plan = dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, alike=same))
    forms = MaskForms(example, plan, config, cache, spec, None if known is None else known.masks)
    if names and (known is None or known.masks):
        plan = forms.run(names)
    if plan.code_key is not None:
        cache.forms.setdefault(plan.code_key, KnownForms(same, frozenset(forms.held)))
    return plan


def _mask_names(spec: CallSpec) -> list[str]:
    """Arguments that are a mask, or None where one could be."""
    given = ((path, spec.example.get(path[0])) for path in spec.inputs if len(path) == 1)
    masks = {
        path
        for path, value in given
        if isinstance(value, Tensor) and (value.dtype == torch.bool or value.is_floating_point())
    }
    masks |= {path for path, value in spec.fixed if value is None and len(path) == 1}
    return sorted(path[0] for path in masks if "mask" in str(path[0]).lower())


def _same_flags(
    example: BlockExample, plan: BlockPlan, spec: CallSpec, masks: list[str]
) -> frozenset[Path]:
    """The arguments for which None and False are the same: with either, the block yields the same
    and its trace is the same."""
    values = dict(spec.fixed)
    paths = [path for path in values if _is_flag(example.block, path, values[path], masks)]
    found = smallest_call(example, plan) if paths else None
    if found is None:
        return frozenset()
    small, gives, wanted = found

    def flipped(given: BlockExample, chosen: list[Path]) -> BlockExample:
        for path in chosen:
            other = False if values[path] is None else None
            given = given.with_argument(spec.names, path[0], other)
        return given

    paths = [path for path in paths if _equal(gives(flipped(small, [path])), wanted)]
    before = [_code(example, training) for training in (False, True)] if paths else []

    def traced_alike(chosen: list[Path]) -> bool:
        other = flipped(example, chosen)
        return None not in before and before == [_code(other, mode) for mode in (False, True)]

    if paths and traced_alike(paths):
        return frozenset(paths)
    return frozenset(path for path in paths if len(paths) > 1 and traced_alike([path]))


def _equal(found: Tensor | None, wanted: Tensor) -> bool:
    return found is not None and torch.equal(found, wanted)


def _is_flag(block: nn.Module, path: Path, value: Any, masks: list[str]) -> bool:
    if len(path) > 1 or path[0] in masks or not (value is None or value is False):
        return False
    parameter = inspect.signature(type(block).forward).parameters.get(path[0])
    plain = parameter is None or parameter.annotation is inspect.Parameter.empty
    return plain or value is False or "bool" in str(parameter and parameter.annotation)


def _code(example: BlockExample, training: bool) -> Any:
    """What the trace of a call is, to be compared; None where it fails."""
    try:
        spec = CallSpec.of(example.block, *example.call)
        traced = trace(example.block, spec, training)
    except TraceError:
        return None
    constants = [(name, value.tolist()) for name, value in traced.constants.items()]
    return traced.graph.python_code("self").src, constants
