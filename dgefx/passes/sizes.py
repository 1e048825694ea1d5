"""Pass 6b, sizes: on which other grids a block is what its dense block is.

A trace takes the branches of the converted size, and a block may decide by the size whether it
shifts its windows, how large they are, or anything else. So the converted block, at its finest, is
compared with the dense one on smaller and larger grids; it is bound to those on which they agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dgefx.config import DGEConfig
from dgefx.kernels.layout import has_parts
from dgefx.nn.block import GridShape
from dgefx.nn.windows import WindowRule
from dgefx.passes.capture import Call
from dgefx.passes.rewrite import BlockPlan, build_block
from dgefx.passes.trace import copy_block
from dgefx.passes.verify import TOLERANCE, output_tensors, relative_error, stream_leaf

#: attention of twice as many is still quick, and small where it is written out
_FEW_TOKENS = 1024


def call_at(call: Call, plan: BlockPlan, shape: tuple[int, ...], grid: tuple[int, int]) -> Call:
    """The block's call with a random stream, and its sizes, of another grid."""
    size = plan.layout.shape_at(shape, grid)
    leaves, spec = pytree.tree_flatten(call)
    generator = torch.Generator().manual_seed(4)
    place = stream_leaf(leaves, plan, shape)
    leaves[place] = torch.randn(size, generator=generator).to(leaves[place])
    for index in range(len(leaves)):
        pair = leaves[index - 1 : index + 1]
        if all(isinstance(size, int) for size in pair) and tuple(pair) == plan.layout.grid:
            leaves[index - 1], leaves[index] = grid
    moved: Call = pytree.tree_unflatten(leaves, spec)
    return moved


def _copied(arguments: Any) -> Any:
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, arguments)


def _agrees(
    dense: nn.Module, plan: BlockPlan, call: Call, config: DGEConfig, grid: tuple[int, int]
) -> bool | None:
    """Whether both blocks yield the same; None where the dense one does not take the grid."""
    args, kwargs = call
    # copies: a block may note down the size that it saw, and write its update into its input
    reference, other = copy_block(dense).eval(), copy_block(dense).eval()
    with torch.no_grad():
        try:
            wanted = reference(*_copied(args), **_copied(kwargs))
        except Exception:  # user code may raise anything
            return None
        shape = GridShape(grid) if plan.needs_grid_shape else None
        try:
            found = build_block(other, plan, config, shape)(*args, **kwargs)
        except Exception:  # fails here, so it does not agree
            return False
    pairs = output_tensors(found)[:1], output_tensors(wanted)[:1]
    return relative_error(*pairs) <= TOLERANCE


def bound(
    dense: nn.Module, plan: BlockPlan, call: Call, shape: tuple[int, ...], config: DGEConfig
) -> BlockPlan:
    """The plan, bound to the sizes on which it holds.

    Args:
        dense: not changed. call, shape: of its example run.
    """

    def agrees(*grid: int) -> bool | None:
        place = (grid[0], grid[1])
        return _agrees(dense, plan, call_at(call, plan, shape, place), config, place)

    rule = plan.windows
    if rule is not None:
        return dataclasses.replace(plan, windows=_bound_rule(rule, plan.layout.grid, agrees))
    if plan.layout.places is not None or has_parts(plan.layout.order):
        return plan
    found = [agrees(*grid) for grid in _other_grids(plan.layout.grid)]
    return dataclasses.replace(plan, only_here=False in found)


def _other_grids(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Smaller ones, one of them of the same form, and where that is not too much a larger one."""
    height, width = grid
    smaller = [(height, width // 2), (height // 2, width // 2)]
    larger = [(height, 2 * width)] if height * width <= _FEW_TOKENS else []
    return [found for found in smaller + larger if min(found) > 1]


def _bound_rule(
    rule: WindowRule, grid: tuple[int, int], agrees: Callable[..., bool | None]
) -> WindowRule:
    if rule.size is None or rule.fixed is not None:
        return rule
    tall, wide = rule.size
    larger = [agrees(2 * tall, 3 * wide), agrees(2 * tall + 1, 3 * wide - 1)]
    if True not in larger or False in larger:
        rows, columns = rule.maps(grid)
        return WindowRule(rule.size, fixed=(rows, columns))
    least = [1, 1]
    if agrees(tall, 3 * wide) is False:
        least[0] = tall + 1
    if agrees(2 * tall, wide) is False:
        least[1] = wide + 1
    if least == [1, 1] and agrees(tall, wide) is False:
        least = [tall + 1, wide + 1]
    return dataclasses.replace(rule, least=(least[0], least[1]))
