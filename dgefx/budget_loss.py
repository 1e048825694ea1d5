"""The public calls `budget_loss` and `measured_ratio`: how far a model is from its budget.

Most conversions hold their budget by construction. Gates without a capacity
(`DGEConfig(capacity=None)`) ask for as many queries as they like; `budget_loss` is what makes them
keep to it, and `measured_ratio` tells whether they do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dgefx.ambient import neutral
from dgefx.calibrate import check_gamma
from dgefx.calibration.images import CalibrationCalls
from dgefx.convert import revert
from dgefx.example import example_of
from dgefx.modes import evaluating
from dgefx.passes.plan.cost import count_macs
from dgefx.record import Record, conversion_record, converted_blocks, unwrap


def budget_loss(
    model: nn.Module, gamma: float | None = None, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """(ratio - gamma)^2 of the MAC ratio that the gates asked for in the last training forward.

    The paper's budget term (arXiv 2301.03831, section 3.3), with the whole model's MACs in place
    of an average over layers. The ratio is what the forward spent; its gradient is that of the
    gates' probabilities. Zero, without a gradient, where the budget holds by construction.

    Call it after the forward and add it, weighted, to the loss::

        loss = criterion(model(images), targets) + 20.0 * dgefx.budget_loss(model)

    With several processes the ratio is the mean over all of them (every process must call), and
    after the averaging of gradients by DistributedDataParallel or FSDP2 the gradient is that of one
    process on the whole batch. Activation checkpointing must not be reentrant
    (`use_reentrant=False`).
    With gradient accumulation every micro-batch has a loss of its own: divide as you divide the
    rest of the loss. At another image size than converted, the ratio is that of the same shares
    at the converted size.

    Args:
        model: converted; may be wrapped by torch.compile and DistributedDataParallel.
        gamma: target ratio in (0, 1]; None: the model's.
        group: processes to average over; None: all, where `torch.distributed` is initialised.

    Returns:
        A scalar, float32.

    Raises:
        TypeError, ValueError: not a converted model, gamma out of range, a block in eval mode, or
            no forward in train mode with gradients before.
    """
    inner = unwrap(model)
    record = conversion_record(inner)
    target = record.gamma if gamma is None else check_gamma(gamma)
    ratio = asked_ratio(inner, record)
    if record.config.capacity is None and record.gamma >= 1.0 > target:
        raise ValueError(
            f"the model is set to gamma=1, where it is dense and its gates decide nothing; for "
            f"gamma={target:g} call dgefx.set_budget(model, {target:g}) first"
        )
    if ratio is None:
        device = next((p.device for p in inner.parameters()), torch.device("cpu"))
        return torch.zeros((), device=device)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        mean = ratio.detach().clone()
        dist.all_reduce(mean, group=group)
        mean = mean / dist.get_world_size(group)
        ratio = ratio + (mean - ratio).detach()
    return (ratio - target).square()


def asked_ratio(model: nn.Module, record: Record) -> Tensor | None:
    """MAC ratio that the gates asked for, a scalar with gradient; None if it is not up to them."""
    if record.config.capacity is not None or record.gamma >= 1.0:
        return None
    demands = {}
    for name, block in converted_blocks(model, record).items():
        gate = block.dge_router.gate
        demand = None if gate is None else gate.demand
        if demand is None or not block.training:
            raise ValueError(
                f"the gate of block {name} has not been through a forward in train mode with "
                f"gradients; call budget_loss(model) after model(images), all in train mode. "
                f"With activation checkpointing use use_reentrant=False"
            )
        demands[name] = demand
    return ratio_of_queries(model, record, demands)


def ratio_of_queries(model: nn.Module, record: Record, queries: Mapping[str, Tensor]) -> Tensor:
    """MAC ratio of the model whose blocks have so many queries, of any level; gradients flow.

    Args:
        queries: per converted block, a scalar per image, prefix tokens not counted.
    """
    blocks = converted_blocks(model, record)
    spent = [
        record.costs[name].macs_asked(count)
        + record.images * blocks[name].dge_router.correction_macs_asked(count)
        for name, count in queries.items()
    ]
    return (torch.stack(spent).sum() + record.rest) / record.macs_dense


@neutral()
def measured_ratio(
    model: nn.Module, images: Iterable[Any], *, max_images: int = 512, batch_size: int = 32
) -> float:
    """MACs of a converted model over the dense model's, on images, as `FlopCounterMode` counts.

    Whatever the gates ask for on these images is in it; where the budget holds by construction it
    is what `dgefx.report` says. The model is run in eval mode; its mode is restored.

    Args:
        model: converted; torch.compile is looked through.
        images: as `dgefx.calibrate` takes them. max_images, batch_size: no more are read, and
            images per forward.

    Raises:
        TypeError, ValueError: not a converted model, or unusable images.
    """
    inner = unwrap(model)
    record = conversion_record(inner)
    example = example_of(inner, record)
    calls = CalibrationCalls.of(inner, example, images, max_images, batch_size, "measured_ratio")
    dense = revert(inner).eval()
    spent = wanted = 0
    with evaluating(inner):
        for (args, kwargs), _ in calls:
            spent += count_macs(inner, args, kwargs)
            wanted += count_macs(dense, args, kwargs)
    return spent / wanted
