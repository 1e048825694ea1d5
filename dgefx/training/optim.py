"""Parameter groups of a converted model, with groups of their own for the learned gates.

Made once per run, before the optimiser: `param_groups(model)` goes into
`timm.optim.create_optimizer_v2` or any `torch.optim` optimiser. Weight decay and layer decay are
timm's own; what is added here are the gates' learning rate and that they do not decay.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from dgefx.nn.router import Router
from dgefx.record import unwrap
from dgefx.training.checks import check_number
from dgefx.training.shard import reshard


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.05,
    layer_decay: float | None = None,
    gate_lr_scale: float = 10.0,
    lr: float | None = None,
) -> list[dict[str, Any]]:
    """Every parameter of `model` that requires a gradient, in exactly one group.

    Gates start nearly closed, with the finest level at p = 0.95. At the learning rate of a
    fine-tuning, 5e-5 or so, they would not move in a few hundred steps; hence `gate_lr_scale`.
    The corrections that `dgefx.calibrate` fits are ordinary weights.

    A group that learns at another rate says so in one of two ways, never in both, so that it is
    not scaled twice:

    - without `lr` by an entry `lr_scale`. timm's schedulers multiply by it; PyTorch and its
      schedulers ignore it, and so does an optimiser without a scheduler;
    - with `lr` by its own `lr`, scaled already, for PyTorch's schedulers, others that scale every
      group's `lr` alike, or none.

    Args:
        model: a converted model, or a dense one for comparison; also in torch.compile or
            DistributedDataParallel, and sharded (make the groups after `shard`).
        weight_decay: of all weights but gates, biases, other vectors and what the model's
            `no_weight_decay()` names.
        layer_decay: factor of the learning rate from one layer to the one below it, over 0 and at
            most 1; needs a model with timm's `group_matcher()`. None: one rate for all layers.
        gate_lr_scale: factor of the gates' learning rate, on top of their layer's.
        lr: base learning rate, see above.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range, or there is
            nothing to train.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    decay = check_number("weight_decay", weight_decay)
    scale = check_number("gate_lr_scale", gate_lr_scale, positive=True)
    base = None if lr is None else check_number("lr", lr, positive=True)
    inner = unwrap(model)
    reshard(inner)
    exempt: Collection[str] = getattr(inner, "no_weight_decay", set)()
    if layer_decay is None:
        groups = param_groups_weight_decay(inner, decay, no_weight_decay_list=exempt)
    else:
        per_layer = check_number("layer_decay", layer_decay, positive=True)
        if per_layer > 1.0:
            raise ValueError(f"layer_decay must be at most 1, found {per_layer}")
        if not hasattr(inner, "group_matcher"):
            raise ValueError(
                f"layer_decay needs the layers of the model in order, as timm's models give them "
                f"by group_matcher(); {type(inner).__name__} has none: give it one, or leave "
                f"layer_decay at None"
            )
        groups = param_groups_layer_decay(
            inner, decay, no_weight_decay_list=exempt, layer_decay=per_layer
        )
    groups = _take_gates_out(groups, _gate_parameters(inner), scale)
    if not groups:
        raise ValueError("model has no parameter that requires a gradient, so nothing to train")
    if base is not None:
        for group in groups:
            group["lr"] = base * group.pop("lr_scale", 1.0)
    return groups


def _gate_parameters(model: nn.Module) -> set[Tensor]:
    return {
        parameter
        for router in model.modules()
        if isinstance(router, Router) and router.gate is not None
        for parameter in router.gate.parameters()
    }


def _take_gates_out(
    groups: list[dict[str, Any]], gates: set[Tensor], scale: float
) -> list[dict[str, Any]]:
    """The groups without gates, then one group of gates per learning rate."""
    kept: list[dict[str, Any]] = []
    taken: dict[float, list[Tensor]] = {}
    for group in groups:
        others = [p for p in group["params"] if p not in gates]
        found = [p for p in group["params"] if p in gates]
        if others:
            kept.append({**group, "params": others})
        if found:
            taken.setdefault(group.get("lr_scale", 1.0) * scale, []).extend(found)
    return kept + [
        {"params": found, "weight_decay": 0.0, "lr_scale": lr_scale}
        for lr_scale, found in taken.items()
    ]
