"""`fit_gates` and `settle_gates`: where learned gates start from, and where they end.

Before fine-tuning, after conversion (or calibration), `fit_gates`. Fresh gates ask for the finest
level everywhere, and a budget loss pushes all of them towards coarser levels alike, the early
blocks too, which everything later builds on. Fitted gates start with each block's share of the
budget, and with the regions that the detail score would pick. After fine-tuning, `settle_gates`
meets the budget on images as they are, without augmentation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgefx.budget_loss import ratio_of_queries
from dgefx.calibrate import check_gamma
from dgefx.calibration.images import CalibrationCalls
from dgefx.example import example_of
from dgefx.kernels.routing import Routing
from dgefx.modes import evaluating
from dgefx.nn.gate import FINEST_PROBABILITY, Gate
from dgefx.nn.router import Router
from dgefx.record import (
    Record,
    apply_budget,
    check_unsharded,
    conversion_record,
    converted_blocks,
    unwrap,
)

#: weight of the squared weights, on standardised features
_RIDGE = 1e-3
_ITERATIONS = 60
#: preferences that are tried, in logits, and how often the interval is halved
_WIDEST = 30.0
_BISECTIONS = 14
#: of the dense model's MACs; a budget that is missed by more is told of
_MISSED = 0.005


def fit_gates(
    model: nn.Module, images: Iterable[Any], *, max_images: int = 128, batch_size: int = 16
) -> nn.Module:
    """Fit the learned gates to what the detail score would choose within the blocks' budgets.

    Per block a softmax regression from every region's mean token to the level that the detail
    score gives it under the block's present slots (calibrated, or guessed from depth); then the
    gate's preference for finer levels is shifted until its arg max asks for as many queries as
    the block has slots. The model's other weights are not changed.

    Args:
        model: converted with `router="linear"`; its gates are changed in place. Evaluated in eval
            mode; its mode is restored.
        images: as `dgefx.calibrate` takes them, without labels. A hundred are plenty.
        max_images, batch_size: no more are read, and images per forward.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: not a converted model, or one without learned gates; unusable
            images. The model is unchanged then.
    """
    record, inner = conversion_record(model), unwrap(model)
    routers = _gated_routers(inner, record, "fit_gates")
    example = example_of(inner, record)
    calls = CalibrationCalls.of(inner, example, images, max_images, batch_size, "fit_gates")
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in routers}

    def collect(name: str, inputs: tuple[Any, ...], _routing: Routing) -> None:
        seen[name].append(routers[name][0].gate_examples(*inputs))

    _run(inner, routers, calls, collect)
    for name, (router, gate) in routers.items():
        means, levels = (torch.cat(parts) for parts in zip(*seen[name], strict=True))
        _fit(gate, means, levels, router.level_costs())
    return model


def settle_gates(
    model: nn.Module,
    images: Iterable[Any],
    gamma: float | None = None,
    *,
    max_images: int = 256,
    batch_size: int = 32,
) -> float:
    """Shift the preference of all gates for finer levels until they ask for `gamma` of the MACs.

    For after fine-tuning: training sees augmented images, which have other amounts of detail than
    those that the model is used on, and a budget loss meets its target but roughly. One number is
    added to what every gate has for finer levels. Does nothing where the budget holds by
    construction. Warns if no number brings the ratio to within 0.005 of `gamma`.

    Args:
        model: converted, changed in place. Evaluated in eval mode; its mode is restored.
        images: as `dgefx.calibrate` takes them, prepared as for evaluation. Not the test set.
        gamma: MACs to keep, in (0, 1], from now on; None: the model's.
        max_images, batch_size: no more are read, and images per forward.

    Returns:
        the MAC ratio on these images, by the blocks' measured costs.

    Raises:
        TypeError, ValueError: not a converted model, gamma out of range, unusable images, gates
            that cannot ask for `gamma`, or another `gamma` than the model's where the budget holds
            by construction. The model is unchanged then.
    """
    record, inner = conversion_record(model), unwrap(model)
    target = record.gamma if gamma is None else check_gamma(gamma)
    if record.config.capacity is not None:
        if target != record.gamma:
            raise ValueError(
                f"the model keeps its budget of gamma={record.gamma:g} by construction, whatever "
                f"its gates ask for; for gamma={target:g} call dgefx.set_budget(model, {target:g})"
            )
        return record.report.ratio
    if record.gamma >= 1.0:
        if target < 1.0:
            raise ValueError(
                f"the model is set to gamma=1, where it is dense and its gates decide nothing; for "
                f"gamma={target:g} call dgefx.set_budget(model, {target:g}) first"
            )
        return record.report.ratio
    routers = _gated_routers(inner, record, "settle_gates")
    example = example_of(inner, record)
    calls = CalibrationCalls.of(inner, example, images, max_images, batch_size, "settle_gates")
    before = {name: gate.bias.detach().clone() for name, (_, gate) in routers.items()}
    finer = {name: _finer(router.level_costs()) for name, (router, _) in routers.items()}

    def shift_to(shift: float) -> None:
        with torch.no_grad():
            for name, (_, gate) in routers.items():
                gate.bias.copy_(before[name] + shift * finer[name] if shift else before[name])

    def ratio_at(shift: float) -> float:
        shift_to(shift)
        return _asked_in_eval(inner, record, routers, calls)

    low, high = -_WIDEST, _WIDEST
    try:
        ends = ratio_at(low), ratio_at(high)
        if not ends[0] <= target <= ends[1]:
            raise ValueError(
                f"gates ask for ratios from {ends[0]:.3f} to {ends[1]:.3f}, whatever is added to "
                f"their preference for finer levels; gamma={target:g} is not among them"
            )
        tried = {low: ends[0], high: ends[1]}
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            tried[middle] = found = ratio_at(middle)
            low, high = (middle, high) if found < target else (low, middle)
        best = min(tried, key=lambda shift: abs(tried[shift] - target))
        shift_to(best)
        if target != record.gamma:  # what a budget loss would pull them back to
            apply_budget(inner, record, target)
    except BaseException:
        shift_to(0.0)
        raise
    if abs(tried[best] - target) > _MISSED:
        warnings.warn(
            f"settle_gates: gates ask for {tried[best]:.3f} of the MACs on these {calls.images} "
            f"images, not for gamma={target:g}: with a little more for finer levels they go from "
            f"{tried[low]:.3f} to {tried[high]:.3f} at once; give it more images, or train the "
            f"gates further",
            stacklevel=2,
        )
    return tried[best]


def _gated_routers(model: nn.Module, record: Record, call: str) -> dict[str, tuple[Router, Gate]]:
    check_unsharded(model, call)
    found = {}
    for name, block in converted_blocks(model, record).items():
        router = block.dge_router
        if router.gate is None:
            raise ValueError(
                f'model has no gates, which {call} is for: it was converted with router="detail"; '
                f'convert it with config=DGEConfig(router="linear")'
            )
        found[name] = (router, router.gate)
    return found


def _run(
    model: nn.Module,
    routers: dict[str, tuple[Router, Gate]],
    calls: CalibrationCalls,
    look: Callable[[str, tuple[Any, ...], Routing], None],
) -> None:
    """All images through the model in eval mode; `look` gets a router's inputs and its routing."""
    with ExitStack() as stack:
        for name, (router, _) in routers.items():
            handle = router.register_forward_hook(
                lambda _m, inputs, routing, name=name: look(name, inputs, routing)
            )
            stack.callback(handle.remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        for (args, kwargs), _ in calls:
            model(*args, **kwargs)


def _asked_in_eval(
    model: nn.Module,
    record: Record,
    routers: dict[str, tuple[Router, Gate]],
    calls: CalibrationCalls,
) -> float:
    """MAC ratio of what the gates ask for on these images."""
    asked = dict.fromkeys(routers, 0)

    def count(name: str, _inputs: tuple[Any, ...], routing: Routing) -> None:
        assert routing.ragged is not None
        images = routing.ragged.row.shape[0]
        asked[name] += int(routing.ragged.offsets[-1]) - images * routing.prefix

    _run(model, routers, calls, count)
    # in double precision, as these are sums over many images
    queries = {
        name: torch.tensor(total / calls.images, dtype=torch.float64)
        for name, total in asked.items()
    }
    return float(ratio_of_queries(model, record, queries))


def _finer(costs: Tensor) -> Tensor:
    """(L,) share of the finest level's queries that every level has, of (R, L) costs."""
    mean = costs.double().mean(0)
    return mean / mean[0]


def _fit(gate: Gate, means: Tensor, levels: Tensor, costs: Tensor) -> None:
    """Softmax regression, see `fit_gates`.

    Args:
        means: (images, R, C). levels: (images, R). costs: (R, L) queries of a region at a level.
    """
    x, labels = means.flatten(0, 1).double(), levels.flatten()
    price = costs.double().repeat(means.shape[0], 1)
    middle = x.mean(0)
    spread = x.std(0, correction=0).clamp(min=1e-6 * float(x.abs().mean()) + 1e-12)
    z = (x - middle) / spread
    count = gate.out_features
    weight = torch.zeros(count, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(count, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe"
    )
    smoothing = (1.0 - FINEST_PROBABILITY) * count / max(count - 1, 1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(z @ weight.t() + bias, labels, label_smoothing=smoothing)
        loss = loss + _RIDGE * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        finer = _finer(costs)
        logits = z @ weight.t() + bias
        wanted = float(price.gather(1, labels.unsqueeze(1)).sum())
        bias = bias + _shift(logits, finer, price, wanted) * finer
        gate.weight.copy_(weight / spread)
        gate.bias.copy_(bias - (weight / spread) @ middle)


def _shift(logits: Tensor, finer: Tensor, price: Tensor, wanted: float) -> float:
    """How much more the finer levels are to be preferred so that so many queries are asked for;
    as little as will do."""

    def asked(shift: float) -> float:
        chosen = (logits + shift * finer).argmax(1, keepdim=True)
        return float(price.gather(1, chosen).sum())

    sign = 1.0 if asked(0.0) < wanted else -1.0
    near, far = 0.0, 100.0
    for _ in range(60):
        middle = (near + far) / 2
        if sign * asked(sign * middle) < sign * wanted:
            near = middle
        else:
            far = middle
    return min((0.0, sign * near, sign * far), key=lambda shift: abs(asked(shift) - wanted))
