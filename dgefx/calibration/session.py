"""One calibration: its steps over all blocks of a model, in order.

Called by `dgefx.calibrate`, which restores the model if a step fails. Every step leaves the blocks
at their finest plans; the result is in the routers (importance, correction) and in the record.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dgefx.calibration.correction import fit_correction
from dgefx.calibration.distance import Kind, compared, distance, find_kind, logits_of, reference
from dgefx.calibration.gradients import NoGradientsError
from dgefx.calibration.images import CalibrationCalls
from dgefx.calibration.importance import ImportanceFit
from dgefx.calibration.refine import refine_corrections
from dgefx.calibration.sensitivity import (
    GainRecorder,
    Trajectory,
    interpolate,
    measured_plans,
)
from dgefx.kernels.correction import Correction
from dgefx.nn.budget import floor_ratio, guess_losses, solve
from dgefx.nn.capacity import Plan, plans
from dgefx.outputs import Call
from dgefx.record import (
    BlockTable,
    Calibration,
    Record,
    budget_choices,
    converted_blocks,
    set_plans,
)

_SEED = 0
#: budget at which corrections are fitted where the model's own leaves nothing to correct
_MIDDLE_GAMMA = 0.5
#: of the batches, one in so many is enough to share out the budget for the refinement
_FEW = 4

Candidates = dict[str, tuple[Plan, ...]]
Tables = dict[str, BlockTable]


@dataclass(frozen=True)
class Settings:
    """Options of `dgefx.calibrate`, checked."""

    gamma: float
    distance: str
    correction_rank: int | None
    refine_passes: int
    progress: bool


class Session:
    """One calibration of `model`, which is in eval mode."""

    def __init__(
        self, model: nn.Module, record: Record, calls: CalibrationCalls, settings: Settings
    ) -> None:
        self.model, self.record, self.calls, self.settings = model, record, calls, settings
        self.blocks = converted_blocks(model, record)
        for block in self.blocks.values():
            router = block.dge_router
            router.set_importance(None)
            router.set_correction(None)
            router.plan = plans(router.space(router.grid), router.config)[-1]
        self.finest = {name: block.dge_router.plan for name, block in self.blocks.items()}
        record.calibration = None
        self.gradients = True  # until found otherwise
        self._check_budget()
        self.kind = self._kind(settings.distance)
        blocks, batches = len(self.blocks), len(calls)
        steps = batches * (2 + blocks)
        if settings.correction_rank != 0:
            steps += 2 * batches * blocks + len(calls.some(_FEW)) * blocks
            steps += batches * settings.refine_passes
        self.bar = tqdm(total=steps, desc="calibrate", unit="step", disable=not settings.progress)

    @torch.no_grad()
    def run(self) -> None:
        """All steps; the calibration is then in the record."""
        with self.bar:
            self._fit_importance()
            candidates = self._candidates()
            if self.settings.correction_rank != 0:
                # corrections fit only where they will be used, and what a block loses depends on
                # its correction: so first at a guessed allocation, then at the measured one
                self._fit_corrections(self._guess(candidates))
                self._drop_unaffordable(final=False)
                tables = self._measure(candidates, self.calls.some(_FEW))
                self._fit_corrections(tables)
                self._drop_unaffordable(final=True)
                if self.settings.refine_passes:
                    self._refine(tables)
            self._keep(self._measure(candidates, self.calls))
            self.bar.update(self.bar.total - self.bar.n)

    def _keep(self, tables: Tables) -> None:
        self.record.calibration = Calibration(self.kind, self.calls.images, tables)

    def _check_budget(self) -> None:
        """Raise ValueError before any work where the budget is under the floor."""
        choices = budget_choices(self.model, self.record)
        solve(choices, self.record.rest, self.record.macs_dense, self.settings.gamma)

    def _kind(self, wanted: str) -> Kind:
        """The distance to use; also a first look at the dense outputs."""
        kind: Kind | None = None
        for (args, kwargs), images in self.calls:
            linear: list[Tensor] = []  # kept alive, so that no address is used twice

            def keep(_module: nn.Module, _args: object, out: object, kept: list[Tensor]) -> None:
                if isinstance(out, Tensor) and out.dim() == 2:
                    kept.append(out)

            handles = [
                module.register_forward_hook(functools.partial(keep, kept=linear))
                for module in self.model.modules()
                if isinstance(module, nn.Linear) and kind is None and wanted == "auto"
            ]
            try:
                with torch.no_grad():
                    output = self.model(*args, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()
            tensors = compared(output, "relative", images)
            if not tensors or not all(bool(torch.isfinite(t).all()) for t in tensors):
                raise ValueError(
                    "the dense model yields no output, NaN or infinity on the calibration images"
                )
            if kind is None:
                kind = self._chosen_kind(wanted, output, {t.data_ptr() for t in linear})
        assert kind is not None
        return kind

    def _chosen_kind(self, wanted: str, output: object, linear: set[int]) -> Kind:
        if wanted == "auto":
            return find_kind(self.model, output, linear)
        if wanted == "kl" and logits_of(output) is None:
            raise ValueError(
                'distance="kl" needs an output (B, classes), or one with such logits; use '
                '"relative" or "auto"'
            )
        return "kl" if wanted == "kl" else "relative"

    def _fit_importance(self) -> None:
        scored = {n: b for n, b in self.blocks.items() if b.dge_router.config.router == "detail"}
        if not scored:
            self.bar.update(len(self.calls))
            return
        fit = ImportanceFit(scored, self.kind, _SEED)
        try:
            for call, images in self.calls:
                fit.add(self.model, call, images)
                self.bar.update()
        except NoGradientsError as error:
            self._warn_of_no_gradients(error)
            return
        for name, weight in fit.weights().items():
            scored[name].dge_router.set_importance(weight)

    def _warn_of_no_gradients(self, error: NoGradientsError) -> None:
        self.gradients = False
        warnings.warn(
            f"calibrate: the output carries no gradients ({error}); regions are scored by their "
            f"detail alone, and corrections are not refined",
            stacklevel=7,
        )

    def _candidates(self) -> Candidates:
        recorders = {name: GainRecorder(block) for name, block in self.blocks.items()}
        try:
            for call, _ in self._counted():
                args, kwargs = call
                self.model(*args, **kwargs)
        finally:
            for recorder in recorders.values():
                recorder.handle.remove()
        return {name: recorder.candidates() for name, recorder in recorders.items()}

    def _counted(self) -> Iterator[tuple[Call, int]]:
        for pair in self.calls:
            yield pair
            self.bar.update()

    def _guess(self, candidates: Candidates) -> Tables:
        return {
            name: BlockTable(found, guess_losses(found, index, len(candidates)), ())
            for index, (name, found) in enumerate(candidates.items())
        }

    def _allocations(self, tables: Tables) -> list[dict[str, Plan]]:
        """Plans at the budget, some under and some over it; none where nothing can be coarse.

        A budget that leaves nothing to correct is replaced by a middle one.
        """
        self._keep(tables)
        choices = budget_choices(self.model, self.record)
        rest, dense = self.record.rest, self.record.macs_dense
        floor = floor_ratio(choices, rest, dense)
        for wanted in (self.settings.gamma, _MIDDLE_GAMMA, floor):
            gamma = min(max(wanted, floor), 1.0)
            chosen = solve(choices, rest, dense, gamma)
            if any(any(plan.capacities[1:]) for plan in chosen.values()):
                near = (gamma - (gamma - floor) / 3, gamma + (1.0 - gamma) / 5)
                return [chosen, *(solve(choices, rest, dense, value) for value in near)]
        return []

    def _fit_corrections(self, tables: Tables) -> None:
        """In closed form, block by block, at the allocation that `tables` give."""
        allocations = self._allocations(tables)
        if not allocations:
            return
        routed = allocations[0]
        for block in self.blocks.values():
            block.dge_router.set_correction(None)
        for name, block in self.blocks.items():
            router = block.dge_router
            if not any(routed[name].capacities[1:]):
                self.bar.update(len(self.calls))
                continue
            rank = self.settings.correction_rank
            rank = max(4, router.channels // 24) if rank is None else rank
            rank = min(rank, router.channels)
            calls = (call for call, _ in self._counted())
            router.set_correction(
                fit_correction(self.model, self.blocks, name, self.finest, routed, calls, rank)
            )
        set_plans(self.blocks, self.finest)

    def _drop_unaffordable(self, final: bool) -> None:
        """Take corrections away, last block first, until the floor is not above the budget; say so
        where it is `final`."""
        dropped = 0
        for block in reversed(list(self.blocks.values())):
            choices = budget_choices(self.model, self.record)
            floor = floor_ratio(choices, self.record.rest, self.record.macs_dense)
            if floor <= self.settings.gamma:
                break
            dropped += block.dge_router.correction is not None
            block.dge_router.set_correction(None)
        if dropped and final:
            warnings.warn(
                f"calibrate: gamma={self.settings.gamma:g} is so close to the floor that it has no "
                f"room for the corrections of {dropped} blocks; they stay without at any budget "
                f"until the model is calibrated at a larger one",
                stacklevel=6,
            )

    def _refine(self, tables: Tables) -> None:
        """By gradient; kept where it brings the output closer on the images themselves."""
        budgets = self._allocations(tables)
        if not budgets or not self.gradients:
            return
        routers = [block.dge_router for block in self.blocks.values()]
        kept = [
            Correction(*(t.detach().clone() for t in r.correction)) if r.correction else None
            for r in routers
        ]
        before, after = self._routed_distance(budgets[0]), torch.inf
        steps = len(self.calls) * self.settings.refine_passes
        try:
            refine_corrections(
                self.model,
                self.blocks,
                self.finest,
                budgets,
                self._views(),
                steps,
                self.kind,
                self.bar.update,
            )
            after = self._routed_distance(budgets[0])
        except NoGradientsError as error:
            self._warn_of_no_gradients(error)
        if not after < before:
            for router, correction in zip(routers, kept, strict=True):
                router.set_correction(correction)
        set_plans(self.blocks, self.finest)

    def _views(self) -> Iterator[tuple[Call, int]]:
        generator = torch.Generator().manual_seed(_SEED)
        while True:
            yield from self.calls.views(generator)

    def _routed_distance(self, routed: dict[str, Plan]) -> float:
        """Sum over the images of the distance of the model with these plans."""
        total = 0.0
        for (args, kwargs), images in self.calls:
            set_plans(self.blocks, self.finest)
            dense = reference(self.model(*args, **kwargs), self.kind, images)
            set_plans(self.blocks, routed)
            found = compared(self.model(*args, **kwargs), self.kind, images)
            total += float(distance(dense, found, self.kind, images).sum())
        return total

    def _measure(self, candidates: Candidates, calls: CalibrationCalls) -> Tables:
        """What every block alone loses at every candidate, with its present correction."""
        set_plans(self.blocks, self.finest)
        picks = {name: measured_plans(found) for name, found in candidates.items()}
        totals = {name: [0.0] * len(picks[name]) for name in picks}
        for call, images in calls:
            trajectory = Trajectory(self.model, self.blocks, call, images, self.kind)
            for name, found in candidates.items():
                chosen = [found[i] for i in picks[name]]
                for index, value in enumerate(trajectory.measure(name, chosen, self.kind)):
                    totals[name][index] += value
                self.bar.update()
        tables = {}
        for name, found in candidates.items():
            losses = {i: t / calls.images for i, t in zip(picks[name], totals[name], strict=True)}
            if not all(loss < torch.inf for loss in losses.values()):  # also NaN
                raise ValueError(
                    f"the model yields NaN or infinity with block {name} alone at coarser "
                    f"granularities, although not when dense; calibrate it in float32 or bfloat16"
                )
            measured = tuple((found[i].slots, loss) for i, loss in losses.items())
            tables[name] = BlockTable(found, interpolate(found, losses), measured)
        return tables
