"""What every block alone costs the model's output, at a range of budgets.

For each block: candidate plans that follow from how its gains are spread over the calibration
images, the distance of the output with only this block routed at some of them, and interpolation
between. The dense stream before the block is replayed from memory, so only what comes after runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dgefx.calibration.distance import Kind, compared, distance, reference
from dgefx.nn.block import DGEBlock
from dgefx.nn.capacity import Plan, plan_from_fractions, plans
from dgefx.outputs import Call

#: shares of the finest plan's slots that are measured, beside the coarsest plan
SHARES = (0.85, 0.7, 0.55, 0.42, 0.32, 0.24, 0.16)
_THRESHOLDS = 192


def clone(value: Any) -> Any:
    """A copy of every tensor in `value`: a model may change its activations in place."""
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)


class GainRecorder:
    """Collects the gains of one block's router over the calibration images."""

    def __init__(self, block: DGEBlock) -> None:
        self.router = block.dge_router
        self.gains: list[list[Tensor]] = []
        self.handle = self.router.register_forward_hook(self._keep)

    def _keep(self, _router: nn.Module, args: Any, _routing: Any) -> None:
        tokens, grid = args
        if grid == self.router.grid:
            found = self.router.gains(self.router.scores(tokens, grid), grid)
            self.gains.append([g.detach().float().cpu() for g in found])

    def candidates(self) -> tuple[Plan, ...]:
        """Plans by rising slots, all coarse to all fine.

        Each is what one threshold on the gains gives on average over the images, so that a block
        mixes granularities as its own detail asks for.
        """
        self.handle.remove()
        router = self.router
        grid, config = router.space(router.grid), router.config
        known = plans(grid, config)
        if config.routing_mode == "layer" or not self.gains or config.levels == 1:
            return known
        gains = [torch.cat(level) for level in zip(*self.gains, strict=True)]
        pooled = torch.cat([g.flatten() for g in gains]).double().sort().values
        picks = torch.linspace(0, len(pooled) - 1, _THRESHOLDS, dtype=torch.float32).round().long()
        found = {plan.slots: plan for plan in (known[0], known[-1])}
        for threshold in pooled[picks].unique().tolist():
            fractions = router.level_fractions(gains, threshold)
            plan = plan_from_fractions(grid, config, fractions)
            if known[0].slots < plan.slots < known[-1].slots:
                found.setdefault(plan.slots, plan)
        if len(found) < min(len(known), len(SHARES)):
            for plan in known:
                found.setdefault(plan.slots, plan)
        return tuple(found[slots] for slots in sorted(found))


def measured_plans(candidates: Sequence[Plan]) -> list[int]:
    """Indices of the candidates to measure, all but the finest (whose distance is 0)."""
    finest = candidates[-1].slots
    picks = {0}
    for share in SHARES:
        picks.add(
            min(range(len(candidates)), key=lambda i: abs(candidates[i].slots / finest - share))
        )
    picks.discard(len(candidates) - 1)
    return sorted(picks)


def interpolate(candidates: Sequence[Plan], measured: dict[int, float]) -> tuple[float, ...]:
    """Sensitivity of every candidate: linear between the measured ones, falling with the slots.

    Args:
        measured: index of a candidate to its distance; 0 for the finest is added.
    """
    points = [(candidates[-1].slots, 0.0)]
    worst = 0.0
    for index in sorted(measured, reverse=True):
        worst = max(worst, measured[index])  # noise must not make a coarser plan look better
        points.append((candidates[index].slots, worst))
    points.reverse()
    values = []
    for plan in candidates:
        right = next(i for i, (slots, _) in enumerate(points) if slots >= plan.slots)
        slots, value = points[right]
        if right and slots > plan.slots:
            before, other = points[right - 1]
            part = (slots - plan.slots) / (slots - before)
            value += (other - value) * part
        values.append(value)
    return tuple(values)


class Trajectory:
    """One batch through the dense model: the output and what every block returned.

    Args:
        blocks: the converted blocks, at their finest plans.
        images: in the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: dict[str, DGEBlock],
        call: Call,
        images: int,
        kind: Kind,
    ) -> None:
        self.model, self.blocks, self.call, self.images = model, blocks, call, images
        returned: dict[str, list[Any]] = {name: [] for name in blocks}
        self.order: list[str] = []

        def keep(name: str, output: Any) -> None:
            returned[name].append(clone(output))
            if name not in self.order:
                self.order.append(name)

        with ExitStack() as stack:
            for name, block in blocks.items():
                # first of all hooks: the replayed output goes through the others again
                handle = block.register_forward_hook(
                    lambda _m, _a, output, name=name: keep(name, output), prepend=True
                )
                stack.callback(handle.remove)
            args, kwargs = clone(call)
            self.output = reference(model(*args, **kwargs), kind, images)
        # a block that runs several times cannot be replayed from one output
        self.replayable = {n: r[0] for n, r in returned.items() if len(r) == 1}

    def measure(self, name: str, chosen: Sequence[Plan], kind: Kind) -> list[float]:
        """Sum over the batch of the output's distance with `name` alone routed, per plan."""
        router = self.blocks[name].dge_router
        finest = router.plan
        totals = []
        with self._replayed(name):
            for plan in chosen:
                router.plan = plan
                try:
                    args, kwargs = clone(self.call)
                    routed = self.model(*args, **kwargs)
                finally:
                    router.plan = finest
                found = compared(routed, kind, self.images)
                totals.append(float(distance(self.output, found, kind, self.images).sum()))
        return totals

    @contextmanager
    def _replayed(self, name: str) -> Iterator[None]:
        with ExitStack() as stack:
            for before in self.order[: self.order.index(name)] if name in self.order else []:
                if before in self.replayable:
                    stack.enter_context(self.blocks[before].replaying(self.replayable[before]))
            yield
