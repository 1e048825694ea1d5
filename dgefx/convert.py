"""The public calls: `convert`, `explain`, `report`, `revert`."""

from __future__ import annotations

import copy
import math
import numbers
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dgefx.analysis import Analysis, FilterFn, analyse, check_model, install, is_converted
from dgefx.config import DGEConfig
from dgefx.nn.block import DGEBlock, GridShape
from dgefx.nn.budget import solve
from dgefx.nn.capacity import Plan
from dgefx.passes.capture import Call
from dgefx.passes.rewrite import put
from dgefx.report import Report

RECORD = "dgefx_record"


@dataclass
class Record:
    """Kept on a converted model: how it was made."""

    config: DGEConfig
    gamma: float
    report: Report
    example: list[Any]  # shapes of the example call, for `load`


def _check_gamma(gamma: Any) -> float:
    if isinstance(gamma, bool) or not isinstance(gamma, numbers.Real):
        raise TypeError(f"gamma must be a number in (0, 1], found {gamma!r}")
    value = float(gamma)
    if not math.isfinite(value) or not 0.0 < value <= 1.0:
        raise ValueError(
            f"gamma must be in (0, 1]: the share of the dense model's MACs to keep, found {gamma!r}"
        )
    return value


def _check_config(config: Any) -> DGEConfig:
    if config is None:
        return DGEConfig()
    if not isinstance(config, DGEConfig):
        raise TypeError(f"config must be a dgefx.DGEConfig, found {type(config).__name__}")
    return config


def _check_filter(filter_fn: Any) -> None:
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"filter_fn must be callable as (module, name) -> bool, found {filter_fn!r}"
        )


def _check_arguments(
    model: Any, gamma: Any, config: Any, filter_fn: Any
) -> tuple[float, DGEConfig]:
    check_model(model)
    value, settings = _check_gamma(gamma), _check_config(config)
    _check_filter(filter_fn)
    return value, settings


def convert(
    model: nn.Module,
    gamma: float = 0.5,
    *,
    example_inputs: Any = None,
    calibration: Any = None,
    config: DGEConfig | None = None,
    filter_fn: FilterFn | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Rewrite a vision transformer's blocks into Dynamic Grained Encoder blocks.

    Per region of the image a router picks a granularity; patches are mean-pooled into queries,
    keys and values stay dense, and the update is un-pooled onto the residual stream (Song et al.,
    NeurIPS 2021, arXiv 2301.03831). At the finest granularity every converted block, and the
    model, were verified to equal the dense one.

    Args:
        model: any `nn.Module` with residual attention blocks over image tokens.
        gamma: MACs to keep, as a share of the dense model's, as
            `torch.utils.flop_counter.FlopCounterMode` counts both; in (0, 1].
        example_inputs: tensor, tuple of arguments or dict of keyword arguments the model takes;
            found by itself where the model states its input size (timm, Hugging Face,
            torchvision). The budget holds at this size.
        calibration: accepted for forward compatibility; not used yet.
        config: granularities, region side, routing, router. Default `DGEConfig()`.
        filter_fn: `(module, name) -> bool`, False keeps a block dense.
        inplace: rewrite `model` itself and return it.

    Returns:
        A new model of the same class with the same `state_dict` keys (plus those of learned
        routers); shapes of inputs and outputs are unchanged.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: gamma out of range or under the floor, no usable example input, nothing to
            convert (with the reason per block), or a model that is already converted. The model
            is unchanged then.
    """
    if calibration is not None and not hasattr(calibration, "__iter__"):
        raise TypeError(
            f"calibration must be an iterable of model inputs, found {type(calibration).__name__}"
        )
    value, settings = _check_arguments(model, gamma, config, filter_fn)
    analysis = analyse(model, example_inputs, settings, filter_fn)
    chosen = solve(analysis.costs, analysis.macs_dense, value)
    return install_analysis(model if inplace else copy.deepcopy(model), analysis, value, chosen)


def install_analysis(
    target: nn.Module, analysis: Analysis, gamma: float, chosen: dict[str, Plan]
) -> nn.Module:
    """Rewrite `target` itself as analysed and keep the record of it."""
    result = analysis.report(gamma, chosen)
    predicted = analysis.predicted_ratio(chosen)
    if abs(result.ratio - predicted) > 0.005:
        raise ValueError(
            f"the converted model measures a MAC ratio of {result.ratio:.3f} where its blocks add "
            f"up to {predicted:.3f}: some of them do not run as converted. Please report it"
        )
    install(target, analysis.plans, chosen, analysis.config)
    record = Record(analysis.config, gamma, result, describe_call(analysis.call))
    setattr(target, RECORD, record)
    return target


def explain(
    model: nn.Module,
    gamma: float = 0.5,
    *,
    example_inputs: Any = None,
    config: DGEConfig | None = None,
    filter_fn: FilterFn | None = None,
) -> Report:
    """What `convert` would do, without doing it. Arguments and errors as `convert`."""
    value, settings = _check_arguments(model, gamma, config, filter_fn)
    analysis = analyse(model, example_inputs, settings, filter_fn, must_convert=False)
    if not analysis.plans:
        return analysis.report(value, {})
    return analysis.report(value, solve(analysis.costs, analysis.macs_dense, value))


def conversion_record(model: Any) -> Record:
    """How `model` was converted.

    Raises:
        TypeError, ValueError: not a model, or not a converted one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    record = getattr(model, RECORD, None)
    if not isinstance(record, Record) or not is_converted(model):
        raise ValueError("model is not a converted one; call dgefx.convert(model) first")
    return record


def report(model: nn.Module) -> Report:
    """The report of the conversion that made `model`."""
    return conversion_record(model).report


def revert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The dense model again, with the converted model's current parameters.

    Raises:
        TypeError, ValueError: not a converted model.
    """
    conversion_record(model)
    target = model if inplace else copy.deepcopy(model)
    for name, module in list(target.named_modules()):
        if isinstance(module, DGEBlock):
            put(target, name, module.dense_block())
    for module in target.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, GridShape):
                del module._forward_hooks[key]
    delattr(target, RECORD)
    return target


def describe_call(call: Call) -> list[Any]:
    """Shapes of an example call in JSON's terms; see `rebuild_call`."""

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        return {"unknown": type(value).__name__}

    args, kwargs = call
    return [[describe(a) for a in args], {k: describe(v) for k, v in kwargs.items()}]
