"""Refines the corrections together, by gradient, against the dense model's output.

`dgefx.calibration.correction` fits every block to the dense stream in closed form; what the output
makes of it is only known once all blocks work together. Here the same few numbers per block are
moved down the gradient of the output's distance, over random views of the calibration images and
several budgets in turn, with the dense model as reference. No labels, and no weight of the model
is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dgefx.calibration.distance import Kind, compared, distance, reference
from dgefx.calibration.gradients import gradients, run_with_gradients
from dgefx.nn.block import DGEBlock
from dgefx.nn.capacity import Plan
from dgefx.nn.router import Router
from dgefx.outputs import Call
from dgefx.record import set_plans

#: size of a step, relative to the root mean square of the numbers that are moved
RATE = 0.02
#: of the steps, spent on warming up
_WARM_UP = 0.1


class _Handle:
    """One correction tensor, moved in units of its rows' typical size.

    Rows of one kind of feature share a unit: what a step does must not depend on the scale of the
    model's stream.
    """

    def __init__(self, parameter: nn.Parameter, groups: Sequence[int]) -> None:
        self.parameter = parameter
        self.start = parameter.detach().clone()
        sizes = [part.square().mean().sqrt().expand(len(part)) for part in self.start.split(groups)]
        self.unit = torch.cat(sizes).unsqueeze(1)
        self.moved = torch.zeros_like(self.start)

    def descend(self, gradient: Tensor | None) -> None:
        """Keep the gradient with respect to `moved`."""
        self.moved.grad = None if gradient is None else gradient * self.unit

    def write(self) -> None:
        with torch.no_grad():
            self.parameter.copy_(self.start + self.moved * self.unit)


def _handles(router: Router) -> list[_Handle]:
    down, up = router.correction_down, router.correction_up
    if down is None or up is None:
        return []
    channels = up.shape[1]
    return [_Handle(down, (1, channels, channels)), _Handle(up, (up.shape[0],))]


def refine_corrections(
    model: nn.Module,
    blocks: dict[str, DGEBlock],
    finest: Mapping[str, Plan],
    budgets: Sequence[Mapping[str, Plan]],
    views: Iterable[tuple[Call, int]],
    steps: int,
    kind: Kind,
    after_step: Callable[[], None],
) -> None:
    """Move all corrections of `blocks` against the gradient of the output's distance.

    Args:
        model: in eval mode. blocks: its converted blocks; left at the last plans.
        finest: plans of the dense model. budgets: plans to fit at, in turn.
        views: at least `steps` calls, with the images in each.

    Raises:
        NoGradientsError: the output carries no gradients. The corrections may have moved.
    """
    handles = [h for block in blocks.values() for h in _handles(block.dge_router)]
    if not handles or not steps:
        return
    for handle in handles:
        handle.parameter.requires_grad_()
    optimiser = torch.optim.Adam([h.moved for h in handles], lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    for step, (call, images) in zip(range(steps), views, strict=False):
        args, kwargs = call
        set_plans(blocks, finest)
        with torch.no_grad():
            dense = reference(model(*args, **kwargs), kind, images)
        set_plans(blocks, budgets[step % len(budgets)])
        with torch.enable_grad():
            routed = compared(run_with_gradients(model, call), kind, images)
            loss = distance(dense, routed, kind, images).mean()
            found = gradients(loss, [h.parameter for h in handles])
        known = [g for g in found if g is not None]
        if not bool(torch.isfinite(loss)) or not all(bool(g.isfinite().all()) for g in known):
            # half precision may overflow on one of the views
            found = (None,) * len(handles)
        for handle, gradient in zip(handles, found, strict=True):
            handle.descend(gradient)
        optimiser.step()
        for handle in handles:
            handle.write()
        schedule.step()
        after_step()


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine down to almost nothing at the last of `steps`."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm + 1) / (steps - warm + 1)))
