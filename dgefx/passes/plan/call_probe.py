"""A block's example call with other arguments, or on another grid, tried on the dense block; and
the masks that are tried.

What `passes.plan.call_forms` and `passes.plan.call_masks` ask before they trace anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dgefx.kernels.layout import has_parts
from dgefx.nn.callspec import CallSpec
from dgefx.outputs import Call, tensors_in
from dgefx.passes.plan.plan import BlockPlan
from dgefx.passes.plan.sizes import call_at
from dgefx.passes.trace.tracer import shadow


def with_value(call: Call, spec: CallSpec, name: str, value: Any) -> Call:
    """The call with another value of one argument."""
    args, kwargs = call
    place = spec.names.index(name) if name in spec.names else len(args)
    if place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}


def run_quietly(block: nn.Module, call: Call) -> Tensor | None:
    """The block's first result; None where it fails or is not finite."""
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, call)
    try:
        with torch.no_grad():
            found = tensors_in(block(*args, **kwargs))[0]
    except Exception:  # user code may raise anything on what it does not take
        return None
    return found if bool(torch.isfinite(found).all()) else None


def _small_calls(
    plan: BlockPlan, call: Call, shape: tuple[int, ...]
) -> Iterator[tuple[Call, tuple[int, int]]]:
    """The call on smaller and smaller grids that the dense block may take, then as it is."""
    height, width = plan.layout.grid
    if plan.layout.places is None and plan.windows is None and not has_parts(plan.layout.order):
        for grid in ((2, 3), (height // 2, width // 2)):
            if min(grid) > 1:
                yield call_at(call, plan, shape, grid)[0], grid
    yield call, plan.layout.grid


def probe(
    block: nn.Module, plan: BlockPlan, call: Call, shape: tuple[int, ...]
) -> tuple[nn.Module, Call, tuple[int, int], Tensor] | None:
    """A copy of the block, the smallest call that it takes, its grid and its result."""
    copied = shadow(block).eval()
    for small, grid in _small_calls(plan, call, shape):
        found = run_quietly(copied, small)
        if found is not None:
            return copied, small, grid, found
    return None


@dataclass(frozen=True)
class MaskShape:
    """A shape that a mask may have. per_query: see `MaskInput`."""

    of: Callable[[int, int], tuple[int, ...]]
    per_query: bool | None


#: of a mask, by images and tokens, as SDPA takes it and as nn.MultiheadAttention does
MASK_SHAPES = (
    MaskShape(lambda images, tokens: (images, 1, tokens, tokens), True),
    MaskShape(lambda images, tokens: (tokens, tokens), True),
    MaskShape(lambda images, tokens: (images, tokens), None),
)


def random_mask(size: tuple[int, ...], boolean: bool, like: Tensor) -> Tensor:
    """A mask that leaves any patch of queries keys in common, whatever True stands for."""
    generator = torch.Generator().manual_seed(5)
    seen = torch.rand(size, generator=generator) > 0.4
    if len(size) > 1 and size[-2] == size[-1]:
        by_all = torch.rand((*size[:-2], 1, size[-1]), generator=generator)
        seen = (seen | (by_all > 0.8)) & (by_all > 0.2)
    seen[..., 0], seen[..., -1] = True, False
    if boolean:
        return seen.to(like.device)
    noise = torch.randn(size, generator=generator)
    return torch.where(seen, noise, -torch.inf).to(like)
