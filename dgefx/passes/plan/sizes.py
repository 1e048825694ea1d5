"""On which other grids a block is what its dense block is.

A trace takes the branches of the converted size, and a block may decide by the size whether it
shifts its windows, how large they are, or anything else. So the converted block, at its finest, is
compared with the dense one on smaller and larger grids; it is restricted to those on which they
agree. After verification. Next: `passes.plan.call_forms`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import nn

from dgefx.config import DGEConfig
from dgefx.kernels.layout import has_parts
from dgefx.nn.windows import WindowRule
from dgefx.passes.plan.compare import grid_shape, is_close, randomised
from dgefx.passes.plan.example import BlockExample
from dgefx.passes.plan.install import build_block
from dgefx.passes.plan.plan import BlockPlan, HeldSizes
from dgefx.passes.trace.copies import copy_block
from dgefx.passes.trace.deterministic import Deterministic

#: tokens of all images whose attention is quick, and its scores, written out, are small
_MANY = 2048


@torch.no_grad()
def agrees(
    dense: nn.Module,
    example: BlockExample,
    plan: BlockPlan,
    config: DGEConfig,
    training: bool = False,
) -> bool | None:
    """Whether both blocks yield the same; None where the dense one does not take the grid.

    Args:
        dense: not changed; without constant parameters, see `randomise_constants`. example: on the
            grid. plan: of the converted size.
    """
    # copies: a block may note down the size that it saw
    reference = copy_block(dense, True).train(training)
    example.tell_grid(reference, plan.layout.grid)
    other = copy_block(reference, True)
    try:
        wanted = example.run(reference, Deterministic())
    except Exception:  # user code may raise anything
        return None
    try:
        shape = grid_shape(plan, example.layout.grid)
        found = example.run(build_block(other, plan, config, shape), Deterministic())
    except torch.OutOfMemoryError:
        return None
    except Exception:  # fails here, so it does not agree
        return False
    return is_close(found, wanted, example.before)


def other_grids(grid: tuple[int, int], images: int) -> list[tuple[int, int]]:
    """Half the width, half of both sides and, where that is not too much, twice both sides."""
    height, width = grid
    found = [(height, width // 2), (height // 2, width // 2), (2 * height, 2 * width)]
    most = max(_MANY // images, height * width)
    return [(h, w) for h, w in found if min(h, w) > 1 and h * w <= most]


@dataclass(frozen=True)
class _Sizes:
    """Asks one block about grids, and notes down what its branches on sizes are there."""

    dense: nn.Module
    example: BlockExample
    plan: BlockPlan
    config: DGEConfig
    answers: tuple[set[tuple[bool, ...]], set[tuple[bool, ...]]] = field(
        default_factory=lambda: (set(), set())
    )

    def hold(self, height: int, width: int) -> bool | None:
        """Whether the plan holds on a grid; None where the dense block does not take it."""
        plan, moved = self.plan.tried(False), self.example.at_grid((height, width))
        same = agrees(self.dense, moved, plan, self.config)
        if same:
            leaves = self.plan.spec.bind(*moved.call)
            for guards, found, training in zip(
                self.plan.guards, self.answers, (False, True), strict=True
            ):
                # its branches in train mode were not taken here
                apart = training and guards.questions is not None
                if not apart or agrees(self.dense, moved, plan, self.config, training):
                    found.add(guards.answered(leaves))
        return same

    def window_rule(self, rule: WindowRule, size: tuple[int, int]) -> WindowRule:
        """The rule of a block's windows, of this size, on the grids on which it holds."""
        if rule.fixed is not None:
            return rule
        grid = self.plan.layout.grid
        fixed = WindowRule(rule.size, fixed=rule.maps(grid))
        tall, wide = size
        larger = [self.hold(2 * tall, 3 * wide), self.hold(2 * tall + 1, 3 * wide - 1)]
        if True not in larger or False in larger:
            return fixed
        least = [1, 1]
        if self.hold(tall, 3 * wide) is False:
            least[0] = tall + 1
        if self.hold(2 * tall, wide) is False:
            least[1] = wide + 1
        if least == [1, 1] and self.hold(tall, wide) is False:
            least = [tall + 1, wide + 1]
        others = other_grids(grid, self.example.images)
        allowed = [(h, w) for h, w in others if h >= least[0] and w >= least[1]]
        if any(self.hold(*other) is False for other in allowed):
            return fixed
        return dataclasses.replace(rule, least=(least[0], least[1]))


def held_sizes(example: BlockExample, plan: BlockPlan, config: DGEConfig) -> HeldSizes:
    """The sizes on which a plan holds."""
    asked, rule, only_here = _Sizes(randomised(example.block), example, plan, config), None, False
    if plan.windows is not None and plan.windows.size is not None:
        tall, wide = plan.windows.size
        rule = asked.window_rule(plan.windows, (tall, wide))
        if plan.has_questions and not rule.fixed:
            asked.hold(3 * tall, 2 * wide)  # what min(H, W) and max(H, W) are, as well
    elif plan.layout.token_order is None and not has_parts(plan.layout.order):
        others = other_grids(plan.layout.grid, example.images)
        if plan.has_questions:
            others += [(width, height) for height, width in others if height != width]
        only_here = False in [asked.hold(*grid) for grid in others]
    first, second = map(frozenset, asked.answers)
    return HeldSizes(rule or plan.windows, only_here, (first, second))
