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
from dgefx.nn.grid_shape import GridShape
from dgefx.nn.windows import WindowRule
from dgefx.outputs import Call, output_tensors
from dgefx.passes.plan.plan import BlockPlan, build_block
from dgefx.passes.plan.verify import is_close, stream_leaf
from dgefx.passes.randomise import randomise_constants
from dgefx.passes.trace.attributes import told_sizes
from dgefx.passes.trace.tracer import copy_block

#: tokens of all images whose attention is quick, and its scores, written out, are small
_MANY = 2048


def call_at(
    call: Call, plan: BlockPlan, shape: tuple[int, ...], grid: tuple[int, int]
) -> tuple[Call, Tensor]:
    """The block's call with a random stream, and its sizes, of another grid; and the stream."""
    size = plan.layout.shape_at(shape, grid)
    leaves, spec = pytree.tree_flatten(call)
    generator = torch.Generator().manual_seed(4)
    place = stream_leaf(leaves, plan, shape)
    stream = torch.randn(size, generator=generator).to(leaves[place])
    leaves[place] = stream
    for index in range(len(leaves)):
        pair = leaves[index - 1 : index + 1]
        if all(isinstance(size, int) for size in pair) and tuple(pair) == plan.layout.grid:
            leaves[index - 1], leaves[index] = grid
    moved: Call = pytree.tree_unflatten(leaves, spec)
    return moved, stream


def _copied(arguments: Any) -> Any:
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, arguments)


def agrees(
    dense: nn.Module,
    plan: BlockPlan,
    call: Call,
    stream: Tensor,
    config: DGEConfig,
    grid: tuple[int, int],
) -> bool | None:
    """Whether both blocks yield the same; None where the dense one does not take the grid.

    Args:
        dense: not changed; without constant parameters, see `randomise_constants`.
    """
    args, kwargs = call
    # copies: a block may note down the size that it saw, and write its update into its input
    reference = copy_block(dense, True).eval()
    _tell(reference, plan, grid)
    other = copy_block(reference, True)
    with torch.no_grad():
        try:
            wanted = reference(*_copied(args), **_copied(kwargs))
        except Exception:  # user code may raise anything
            return None
        shape = GridShape(grid) if plan.needs_grid_shape else None
        try:
            found = build_block(other, plan, config, shape)(*_copied(args), **_copied(kwargs))
        except torch.OutOfMemoryError:
            return None
        except Exception:  # fails here, so it does not agree
            return False
    before = torch.zeros_like(stream) if plan.layout.update else stream
    return is_close(output_tensors(found)[0], output_tensors(wanted)[0], before)


def _tell(block: nn.Module, plan: BlockPlan, grid: tuple[int, int]) -> None:
    """Set the sizes that a model tells its block by attributes."""
    for (part, name), axis in told_sizes(block, plan.layout.grid).items():
        setattr(block.get_submodule(part), name, grid[axis])


def bound(
    dense: nn.Module, plan: BlockPlan, call: Call, shape: tuple[int, ...], config: DGEConfig
) -> BlockPlan:
    """The plan, bound to the sizes on which it holds.

    Args:
        dense: not changed. call, shape: of its example run.
    """
    copied = copy_block(dense)
    randomise_constants(copied)
    unasked, answers = plan.unasked(), (set(plan.guards[0].answers), set(plan.guards[1].answers))

    def holds(*grid: int) -> bool | None:
        place = (grid[0], grid[1])
        moved, stream = call_at(call, plan, shape, place)
        same = agrees(copied, unasked, moved, stream, config, place)
        if same:
            leaves = plan.spec.bind(*moved)
            for guards, found in zip(plan.guards, answers, strict=True):
                found.add(guards.answered(leaves))
        return same

    rule, images = plan.windows, plan.layout.images(shape)
    others = other_grids(plan.layout.grid, images)
    if rule is not None and rule.size is not None:
        tall, wide = rule.size
        rule = _bound_rule(rule, (tall, wide), plan.layout.grid, others, holds)
        plan = dataclasses.replace(plan, windows=rule)
        if any(guards.questions for guards in plan.guards) and not rule.fixed:
            holds(3 * tall, 2 * wide)  # what min(H, W) and max(H, W) are, as well
        return _answering(plan, answers)
    unknown = plan.layout.places is not None or has_parts(plan.layout.order)
    if unknown:
        return plan
    if any(guards.questions for guards in plan.guards):
        others += [(width, height) for height, width in others if height != width]
    found = [holds(*grid) for grid in others]
    return _answering(dataclasses.replace(plan, only_here=False in found), answers)


def _answering(
    plan: BlockPlan, answers: tuple[set[tuple[bool, ...]], set[tuple[bool, ...]]]
) -> BlockPlan:
    first, second = (held.also_on(a) for held, a in zip(plan.guards, answers, strict=True))
    return dataclasses.replace(plan, guards=(first, second))


def other_grids(grid: tuple[int, int], images: int) -> list[tuple[int, int]]:
    """Half the width, half of both sides and, where that is not too much, twice both sides."""
    height, width = grid
    found = [(height, width // 2), (height // 2, width // 2), (2 * height, 2 * width)]
    most = max(_MANY // images, height * width)
    return [(h, w) for h, w in found if min(h, w) > 1 and h * w <= most]


def _bound_rule(
    rule: WindowRule,
    size: tuple[int, int],
    grid: tuple[int, int],
    others: list[tuple[int, int]],
    agrees: Callable[..., bool | None],
) -> WindowRule:
    """size: of a window. others: grids to ask about besides those of a few windows."""
    if rule.fixed is not None:
        return rule
    tall, wide = size

    def fixed() -> WindowRule:
        rows, columns = rule.maps(grid)
        return WindowRule(rule.size, fixed=(rows, columns))

    larger = [agrees(2 * tall, 3 * wide), agrees(2 * tall + 1, 3 * wide - 1)]
    if True not in larger or False in larger:
        return fixed()
    least = [1, 1]
    if agrees(tall, 3 * wide) is False:
        least[0] = tall + 1
    if agrees(2 * tall, wide) is False:
        least[1] = wide + 1
    if least == [1, 1] and agrees(tall, wide) is False:
        least = [tall + 1, wide + 1]
    allowed = [(h, w) for h, w in others if h >= least[0] and w >= least[1]]
    if any(agrees(*other) is False for other in allowed):
        return fixed()
    return dataclasses.replace(rule, least=(least[0], least[1]))
