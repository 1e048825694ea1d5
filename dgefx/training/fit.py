"""`fit_gates` and `settle_gates`: where learned gates start from, and where they end.

Before fine-tuning, after conversion (or calibration), `fit_gates`. Fresh gates ask for the finest
level everywhere, and a budget loss pushes all of them towards coarser levels alike, the early
blocks too, which everything later builds on. Fitted gates start with each block's share of the
budget, and with the regions that the detail score would pick. After fine-tuning, `settle_gates`
meets the budget on images as they are, without augmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgefx.calibrate import check_gamma
from dgefx.calibration.images import CalibrationCalls, ExampleCall, read_images
from dgefx.kernels.routing import Routing
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
    calls = _calls(inner, record, images, max_images, batch_size)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in routers}
    with _watched(inner, routers, lambda name: _Collector(seen[name])):
        for (args, kwargs), _ in calls:
            inner(*args, **kwargs)
    for name, router in routers.items():
        means, levels = (torch.cat(parts) for parts in zip(*seen[name], strict=True))
        assert router.gate is not None
        _fit(router.gate, means, levels, router.level_costs())
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
    construction.

    Args:
        model: converted, changed in place. Evaluated in eval mode; its mode is restored.
        images: as `dgefx.calibrate` takes them, prepared as for evaluation. Not the test set.
        gamma: MACs to keep, in (0, 1], from now on; None: the model's.
        max_images, batch_size: no more are read, and images per forward.

    Returns:
        the MAC ratio on these images, by the blocks' measured costs.

    Raises:
        TypeError, ValueError: not a converted model, gamma out of range, unusable images, or gates
            that cannot ask for `gamma`. The model is unchanged then.
    """
    record, inner = conversion_record(model), unwrap(model)
    target = record.gamma if gamma is None else check_gamma(gamma)
    if record.config.capacity is not None:
        return record.report.ratio
    if record.gamma >= 1.0:
        if target < 1.0:
            raise ValueError(
                f"the model is set to gamma=1, where it is dense and its gates decide nothing; for "
                f"gamma={target:g} call dgefx.set_budget(model, {target:g}) first"
            )
        return record.report.ratio
    routers = _gated_routers(inner, record, "settle_gates")
    calls = _calls(inner, record, images, max_images, batch_size)
    before = {name: r.gate.bias.detach().clone() for name, r in routers.items() if r.gate}
    finer = {name: _finer(router.level_costs()) for name, router in routers.items()}

    def ratio_at(shift: float) -> float:
        with torch.no_grad():
            for name, router in routers.items():
                assert router.gate is not None
                router.gate.bias.copy_(before[name] + shift * finer[name])
        return _asked_in_eval(inner, record, routers, calls)

    low, high = -_WIDEST, _WIDEST
    try:
        ends = ratio_at(low), ratio_at(high)
        if not ends[0] <= target <= ends[1]:
            raise ValueError(
                f"gates ask for ratios from {ends[0]:.3f} to {ends[1]:.3f}, whatever is added to "
                f"their preference for finer levels; gamma={target:g} is not among them"
            )
        best = (abs(ends[0] - target), low, ends[0])
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            found = ratio_at(middle)
            best = min(best, (abs(found - target), middle, found))
            low, high = (middle, high) if found < target else (low, middle)
        found = ratio_at(best[1])
        if target != record.gamma:  # what a budget loss would pull them back to
            apply_budget(inner, record, target)
        return found
    except BaseException:
        with torch.no_grad():
            for name, router in routers.items():
                assert router.gate is not None
                router.gate.bias.copy_(before[name])
        raise


def _gated_routers(model: nn.Module, record: Record, call: str) -> dict[str, Router]:
    check_unsharded(model, call)
    routers = {name: b.dge_router for name, b in converted_blocks(model, record).items()}
    if any(router.gate is None for router in routers.values()):
        raise ValueError(
            f'model has no gates, which {call} is for: it was converted with router="detail"; '
            f'convert it with config=DGEConfig(router="linear")'
        )
    return routers


def _calls(
    model: nn.Module, record: Record, images: Any, max_images: int, batch_size: int
) -> CalibrationCalls:
    example = ExampleCall(record.example, model)
    return CalibrationCalls(model, example, read_images(images, example, max_images, batch_size))


@contextmanager
def _watched(
    model: nn.Module, routers: dict[str, Router], hook: Callable[[str], Any]
) -> Iterator[None]:
    """Eval mode, no gradients, and a forward hook on every router."""
    modes = {module: module.training for module in model.modules()}
    hooks = [router.register_forward_hook(hook(name)) for name, router in routers.items()]
    try:
        model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in hooks:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _asked_in_eval(
    model: nn.Module, record: Record, routers: dict[str, Router], calls: CalibrationCalls
) -> float:
    """MAC ratio of what the gates ask for on these images."""
    asked = dict.fromkeys(routers, 0)

    def count(name: str) -> Callable[[Router, Any, Routing], None]:
        def hook(router: Router, _inputs: Any, routing: Routing) -> None:
            assert routing.ragged is not None
            images = routing.ragged.row.shape[0]
            asked[name] += int(routing.ragged.offsets[-1]) - images * router.prefix

        return hook

    with _watched(model, routers, count):
        for (args, kwargs), _ in calls:
            model(*args, **kwargs)
    spent = record.rest
    for name, router in routers.items():
        queries = torch.tensor(asked[name] / calls.images)
        macs = record.costs[name].macs_asked(queries)
        spent += float(macs + record.images * router.correction_macs_asked(queries))
    return spent / record.macs_dense


def _finer(costs: Tensor) -> Tensor:
    """(L,) share of the finest level's queries that every level has, of (R, L) costs."""
    mean = costs.double().mean(0)
    return mean / mean[0]


class _Collector:
    """Forward hook of a router: the regions' mean tokens, and their levels by the detail score."""

    def __init__(self, found: list[tuple[Tensor, Tensor]]) -> None:
        self.found = found

    def __call__(self, router: Router, inputs: tuple[Any, ...], _output: Any) -> None:
        tokens, grid = inputs
        self.found.append(router.gate_examples(tokens, grid))


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
