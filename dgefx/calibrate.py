"""The public calls `calibrate` and `set_budget`.

`calibrate` runs the steps of `dgefx.calibration` over a handful of unlabelled images and keeps the
result in the model's record; `set_budget` reads it at any time later.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dgefx.calibration.correction import fit_correction
from dgefx.calibration.distance import Kind, distance, find_kind, logits_of, reference
from dgefx.calibration.images import ExampleCall, placed, read_images
from dgefx.calibration.importance import ImportanceFit
from dgefx.calibration.sensitivity import (
    GainRecorder,
    Trajectory,
    interpolate,
    measured_plans,
)
from dgefx.nn.budget import floor_ratio, guess_losses, solve
from dgefx.nn.capacity import Plan, plans
from dgefx.passes.capture import Call
from dgefx.record import (
    BlockTable,
    Calibration,
    Record,
    apply_budget,
    budget_choices,
    conversion_record,
    converted_blocks,
    unwrap,
)

_SEED = 0
#: budget at which corrections are fitted where the model's own leaves nothing to correct
_MIDDLE_GAMMA = 0.5
_DISTANCES = ("auto", "kl", "relative")


def check_gamma(gamma: Any) -> float:
    """gamma as a float; TypeError or ValueError if it is no number in (0, 1]."""
    if isinstance(gamma, bool) or not isinstance(gamma, numbers.Real):
        raise TypeError(f"gamma must be a number in (0, 1], found {gamma!r}")
    value = float(gamma)
    if not math.isfinite(value) or not 0.0 < value <= 1.0:
        raise ValueError(
            f"gamma must be in (0, 1]: the share of the dense model's MACs to keep, found {gamma!r}"
        )
    return value


def _check_count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, found {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, found {value}")
    return value


def calibrate(
    model: nn.Module,
    images: Iterable[Any],
    gamma: float | None = None,
    *,
    max_images: int = 128,
    batch_size: int = 16,
    distance: str = "auto",
    correction_rank: int | None = None,
    progress: bool = True,
) -> nn.Module:
    """Fit a converted model's routers and budgets to images, without labels or training.

    Per block: an importance that weighs the router's detail score, and the distance of the model's
    output from the dense model's with this block alone routed, at a range of budgets. A knapsack
    over the blocks gives each the slots with which the whole model meets its budget at the least
    total distance; the table is kept, so that `set_budget` needs no images. Then, block by block,
    a low-rank correction of the un-pooled update is fitted, and kept where the output confirms it.
    The model's weights are not changed; a correction of rank k adds k (3 C + 1) parameters to a
    block of width C, and its MACs are part of the budget.

    Args:
        model: converted; changed in place. Evaluated in eval mode; its mode is restored.
        images: any iterable of model inputs of the size it was converted for: a DataLoader (what
            follows the images in a batch, such as labels, is ignored), single images or batches,
            dicts, or one tensor. Moved to the model's device and dtype. 100 images are plenty.
        gamma: MACs to keep, in (0, 1]; None keeps the present budget.
        max_images: no more are read.
        batch_size: images per forward pass.
        distance: "kl" of the logits, "relative" squared distance of all outputs, or "auto": KL
            where the output is a classifier's logits.
        correction_rank: rank of the corrections; None: a 24th of the block's width, at least
            4. 0: none.
        progress: show a progress bar.

    Returns:
        `model`.

    Raises:
        TypeError: model or images of the wrong type.
        ValueError: not converted; no images, another size, NaN or infinity; gamma out of range or
            under the floor. The model then keeps its calibration and budget, if it had one.
    """
    record = conversion_record(model)
    target = unwrap(model)
    value = record.gamma if gamma is None else check_gamma(gamma)
    _check_count("max_images", max_images, 1)
    _check_count("batch_size", batch_size, 1)
    if correction_rank is not None:
        _check_count("correction_rank", correction_rank, 0)
    if distance not in _DISTANCES:
        raise ValueError(f"distance must be one of {_DISTANCES}, found {distance!r}")
    example = ExampleCall(record.example, target)
    batches = read_images(images, example, max_images, batch_size)
    with _preserved(target, record):
        calls = _Calls(target, example, batches)
        session = _Session(target, record, calls, distance, correction_rank, progress)
        session.run(value)
        apply_budget(target, record, value)
    return model


def set_budget(model: nn.Module, gamma: float) -> nn.Module:
    """Set a converted model to another budget, in place; needs no images and no new conversion.

    A compiled model recompiles once for every budget that it has not had before.

    Args:
        model: converted, calibrated or not (then the blocks' shares are a guess from depth); may
            be wrapped by `torch.compile`.
        gamma: MACs to keep, between the model's floor and 1.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: not converted, gamma out of range or under the floor. The model is
            unchanged then.
    """
    record = conversion_record(model)
    apply_budget(unwrap(model), record, check_gamma(gamma))
    return model


class _Calls:
    """The calibration batches as calls of the model, made anew each time."""

    def __init__(
        self, model: nn.Module, example: ExampleCall, batches: list[dict[int | str, Tensor]]
    ) -> None:
        self.model, self.example, self.batches = model, example, batches
        self.images = sum(next(iter(batch.values())).shape[0] for batch in batches)

    def __iter__(self) -> Iterator[Call]:
        for batch in self.batches:
            yield placed(batch, self.model, self.example)

    def __len__(self) -> int:
        return len(self.batches)


@contextmanager
def _preserved(model: nn.Module, record: Record) -> Iterator[None]:
    """Eval mode inside; modes after; and on failure the calibration and budget from before."""
    modes = {module: module.training for module in model.modules()}
    kept = record.calibration, record.gamma, record.report
    routers = {n: b.dge_router for n, b in converted_blocks(model, record).items()}
    states = {n: (r.plan, r.importance, r.correction) for n, r in routers.items()}
    model.eval()
    try:
        yield
    except BaseException:
        record.calibration, record.gamma, record.report = kept
        for name, router in routers.items():
            router.plan, importance, correction = states[name]
            router.set_importance(importance)
            router.set_correction(correction)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Session:
    """One calibration: the steps over all blocks."""

    def __init__(
        self,
        model: nn.Module,
        record: Record,
        calls: _Calls,
        wanted: str,
        rank: int | None,
        progress: bool,
    ) -> None:
        self.model, self.record, self.calls, self.rank = model, record, calls, rank
        self.blocks = converted_blocks(model, record)
        for block in self.blocks.values():
            router = block.dge_router
            router.set_importance(None)
            router.set_correction(None)
            router.plan = plans(router.grid, router.config)[-1]
        self.kind = self._kind(wanted)
        passes = 2 + len(self.blocks) * (1 if rank == 0 else 3)
        self.bar = tqdm(
            total=len(calls) * passes, desc="calibrate", unit="pass", disable=not progress
        )

    @torch.no_grad()
    def run(self, gamma: float) -> None:
        """All steps; leaves the calibration in the record and the corrections in the routers."""
        with self.bar:
            self._fit_importance()
            candidates = self._candidates()
            if self.rank != 0:
                # corrections change what a block loses, and fit only where it will be used: a first
                # round at a guessed allocation, to be measured with, and one at the measured one
                self._correct(candidates, self._guess(candidates), gamma, trusted=True)
            tables = self._measure(candidates)
            if self.rank != 0:
                self._correct(candidates, tables, gamma, trusted=False)
            self._keep(tables)

    def _keep(self, tables: dict[str, BlockTable]) -> None:
        self.record.calibration = Calibration(self.kind, self.calls.images, tables)

    def _guess(self, candidates: dict[str, tuple[Plan, ...]]) -> dict[str, BlockTable]:
        last = max(len(candidates) - 1, 1)
        return {
            name: BlockTable(found, guess_losses(found, index / last), ())
            for index, (name, found) in enumerate(candidates.items())
        }

    def _set(self, chosen: dict[str, Plan]) -> None:
        for name, plan in chosen.items():
            self.blocks[name].dge_router.plan = plan

    def _allocation(self, tables: dict[str, BlockTable], gamma: float) -> dict[str, Plan] | None:
        """Plans at `gamma`, or at a middle budget where that leaves nothing to correct."""
        self._keep(tables)
        choices = budget_choices(self.model, self.record)
        rest, dense = self.record.rest, self.record.macs_dense
        floor = floor_ratio(choices, rest, dense)
        for wanted in (max(gamma, floor), max(_MIDDLE_GAMMA, floor), floor):
            chosen = solve(choices, rest, dense, wanted)
            if any(any(plan.capacities[1:]) for plan in chosen.values()):
                return chosen
        return None

    def _correct(
        self,
        candidates: dict[str, tuple[Plan, ...]],
        tables: dict[str, BlockTable],
        gamma: float,
        trusted: bool,
    ) -> None:
        """Fit all corrections at the allocation that `tables` give; leaves the blocks finest.

        Args:
            trusted: keep them all, or only those that bring the output closer to the dense one by
                more than their MACs would, spent on queries.
        """
        routed = self._allocation(tables, gamma)
        finest = {name: found[-1] for name, found in candidates.items()}
        if routed is None:
            self.bar.update(len(self.calls) * len(self.blocks))
            return
        for block in self.blocks.values():
            block.dge_router.set_correction(None)
        dense: list[list[Tensor]] = []
        before, price = torch.inf, 0.0
        if not trusted:
            self._set(finest)
            dense = [reference(self._run(call), self.kind) for call in self.calls]
            self._set(routed)
            before = self._routed_distance(dense)
            price = self._price(tables, gamma)
        for name, block in self.blocks.items():
            router = block.dge_router
            if not any(routed[name].capacities[1:]):
                self.bar.update(len(self.calls))
                continue
            rank = max(4, router.channels // 24) if self.rank is None else self.rank
            rank = min(rank, router.channels)
            router.set_correction(
                fit_correction(self.model, self.blocks, name, finest, routed, self._counted(), rank)
            )
            if trusted:
                continue
            after = self._routed_distance(dense)
            macs = self.record.images * router.correction_macs(routed[name])
            if after + self.calls.images * macs * price < before:
                before = after
            else:
                router.set_correction(None)
        self._set(finest)

    def _price(self, tables: dict[str, BlockTable], gamma: float) -> float:
        """Loss per MAC at `gamma`: what it costs to take a little of the budget away.

        Over a twentieth of what the budget leaves above the floor: a smaller step is all noise.
        """
        self._keep(tables)
        choices = budget_choices(self.model, self.record)
        rest, dense = self.record.rest, self.record.macs_dense
        floor = floor_ratio(choices, rest, dense)
        gamma = min(max(gamma, floor), 1.0)
        step = max(0.05 * (gamma - floor), 1e-6)
        losses = []
        for budget in (gamma, max(gamma - step, floor)):
            chosen = solve(choices, rest, dense, budget)
            losses.append(sum(_loss(tables[n], plan) for n, plan in chosen.items()))
        return max(losses[1] - losses[0], 0.0) / (step * dense)

    def _run(self, call: Call) -> Any:
        args, kwargs = call
        return self.model(*args, **kwargs)

    def _counted(self) -> Iterator[Call]:
        for call in self.calls:
            yield call
            self.bar.update()

    def _routed_distance(self, dense: list[list[Tensor]]) -> float:
        """Sum over the images of the distance of the model as it is set now."""
        pairs = zip(self.calls, dense, strict=True)
        return sum(float(distance(d, self._run(c), self.kind).sum()) for c, d in pairs)

    @torch.no_grad()
    def _kind(self, wanted: str) -> Kind:
        """The distance to use; also a first look at the dense output."""
        linear: set[int] = set()
        handles = [
            module.register_forward_hook(lambda _m, _a, out: linear.add(out.data_ptr()))
            for module in self.model.modules()
            if isinstance(module, nn.Linear)
        ]
        args, kwargs = next(iter(self.calls))
        try:
            output = self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        tensors = reference(output, "relative")
        if not tensors or not all(bool(torch.isfinite(t).all()) for t in tensors):
            raise ValueError(
                "the dense model yields no output, NaN or infinity on the calibration images"
            )
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
        fit = ImportanceFit(scored, self.kind, _SEED)
        try:
            for call in self.calls:
                fit.add(self.model, call)
                self.bar.update()
        except RuntimeError as error:
            warnings.warn(
                f"calibrate: the output carries no gradients ({error}); regions are scored by "
                f"their detail alone",
                stacklevel=4,
            )
            return
        for name, weight in fit.weights().items():
            scored[name].dge_router.set_importance(weight)

    def _candidates(self) -> dict[str, tuple[Plan, ...]]:
        recorders = {name: GainRecorder(block) for name, block in self.blocks.items()}
        try:
            for call in self._counted():
                self._run(call)
        finally:
            for recorder in recorders.values():
                recorder.handle.remove()
        return {name: recorder.candidates() for name, recorder in recorders.items()}

    def _trajectory(self, call: Call) -> Trajectory:
        return Trajectory(self.model, self.blocks, call, lambda out: reference(out, self.kind))

    def _measure(self, candidates: dict[str, tuple[Plan, ...]]) -> dict[str, BlockTable]:
        picks = {name: measured_plans(found) for name, found in candidates.items()}
        totals = {name: [0.0] * len(picks[name]) for name in picks}
        for call in self.calls:
            trajectory = self._trajectory(call)
            for name, found in candidates.items():
                chosen = [found[i] for i in picks[name]]
                for index, value in enumerate(trajectory.measure(name, chosen, self.kind)):
                    totals[name][index] += value
                self.bar.update()
        tables = {}
        for name, found in candidates.items():
            losses = {
                i: t / self.calls.images for i, t in zip(picks[name], totals[name], strict=True)
            }
            measured = tuple((found[i].slots, loss) for i, loss in losses.items())
            tables[name] = BlockTable(found, interpolate(found, losses), measured)
        return tables


def _loss(table: BlockTable, plan: Plan) -> float:
    return table.losses[table.plans.index(plan)]
