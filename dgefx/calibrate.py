"""The public calls `calibrate` and `set_budget`.

`calibrate` runs the steps of `dgefx.calibration` over a handful of unlabelled images and keeps the
result in the model's record; `set_budget` reads it at any time later.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dgefx.ambient import neutral
from dgefx.calibration.images import CalibrationCalls, check_count
from dgefx.calibration.session import Session, Settings
from dgefx.example import example_of
from dgefx.modes import evaluating
from dgefx.record import (
    Record,
    apply_budget,
    check_unsharded,
    conversion_record,
    converted_blocks,
    kept_on_error,
    train_corrections_like_block,
    unwrap,
)

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


@neutral()
def calibrate(
    model: nn.Module,
    images: Iterable[Any],
    gamma: float | None = None,
    *,
    max_images: int = 128,
    batch_size: int = 16,
    distance: str = "auto",
    correction_rank: int | None = None,
    refine_passes: int = 15,
    progress: bool = True,
) -> nn.Module:
    """Fit a converted model's routers, corrections and budgets to images, without labels.

    1. Per block, an importance that weighs the router's detail score is fitted.
    2. Per block, a low-rank correction of the un-pooled update is fitted, and all of them are
       refined together by gradient against the dense model's output. A correction of rank k adds
       k (3 C + 1) parameters to a block of width C, and its MACs are part of the budget. The
       model's own weights are not changed.
    3. Per block, the distance of the model's output from the dense model's is measured with this
       block alone routed, at a range of budgets. A knapsack over the blocks gives each the slots
       with which the whole model meets its budget at the least total distance. The table is kept,
       so that `set_budget` needs no images.

    Args:
        model: converted; changed in place. Evaluated in eval mode; its mode is restored. Of a model
            around a converted one (a head, a detector), the distance is that of the whole's output.
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
        refine_passes: passes over the images in which the corrections are refined by gradient, on
            mirrored, cropped and mixed views where the model takes one batch of images; 0: none.
            Fits them to images like these, at the budget and near it.
        progress: show a progress bar.

    Returns:
        `model`.

    Raises:
        TypeError: model or images of the wrong type.
        ValueError: not converted; no images, another size, NaN or infinity; gamma out of range or
            under the floor.

        Whatever is raised, by the model itself too, the model keeps the calibration and budget
        that it had.
    """
    record = conversion_record(model)
    target = unwrap(model)
    check_unsharded(target, "calibrate")
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            "model is in DistributedDataParallel, which would know nothing of corrections that are "
            "fitted now; calibrate the model before it is wrapped"
        )
    value = record.gamma if gamma is None else check_gamma(gamma)
    check_count("max_images", max_images, 1)
    check_count("batch_size", batch_size, 1)
    check_count("refine_passes", refine_passes, 0)
    if correction_rank is not None:
        check_count("correction_rank", correction_rank, 0)
    if distance not in _DISTANCES:
        raise ValueError(f"distance must be one of {_DISTANCES}, found {distance!r}")
    settings = Settings(value, distance, correction_rank, refine_passes, progress)
    calls = CalibrationCalls.of(target, example_of(target, record), images, max_images, batch_size)
    with kept_on_error(target, record):
        with evaluating(target), _bounded(target, record):
            Session(target, record, calls, settings).run()
            apply_budget(target, record, value)
        for block in converted_blocks(target, record).values():
            train_corrections_like_block(block)
    return model


def set_budget(model: nn.Module, gamma: float) -> nn.Module:
    """Set a converted model to another budget, in place; needs no images and no new conversion.

    A compiled model recompiles once for every budget that it has not had before, as often as
    `torch._dynamo.config.recompile_limit` (8) allows.

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


@contextmanager
def _bounded(model: nn.Module, record: Record) -> Iterator[None]:
    """Gates that may ask for any number of queries keep to the plans that are measured."""
    routers = [block.dge_router for block in converted_blocks(model, record).values()]
    configs = [router.config for router in routers]
    for router, config in zip(routers, configs, strict=True):
        router.config = config.bounded()
    try:
        yield
    finally:
        for router, config in zip(routers, configs, strict=True):
            router.config = config
