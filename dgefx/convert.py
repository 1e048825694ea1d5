"""The public calls: `convert`, `explain`, `report`, `revert`."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from dgefx.ambient import neutral
from dgefx.calibrate import calibrate, check_gamma
from dgefx.calibration.images import check_iterable
from dgefx.config import DGEConfig
from dgefx.copying import deep_copy
from dgefx.example import describe_call
from dgefx.nn.block import DGEBlock
from dgefx.nn.budget import solve
from dgefx.nn.capacity import Plan
from dgefx.nn.grid_shape import GridShape
from dgefx.nn.image_hook import unhook_images
from dgefx.nn.module_tree import put
from dgefx.passes.frontends.block_extraction import apply_extractions, restore
from dgefx.passes.frontends.exported import as_module, exported_inputs
from dgefx.passes.frontends.model import check_model
from dgefx.passes.pipeline import Analysis, FilterFn, analyse
from dgefx.passes.plan.install import install
from dgefx.record import (
    Record,
    check_unsharded,
    conversion_record,
    converted_blocks,
    find_parts,
    guessed_choices,
    open_gates,
    set_record,
    unwrap,
)
from dgefx.report import Report
from dgefx.rollback import undone_on_error


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
    value, settings = check_gamma(gamma), _check_config(config)
    _check_filter(filter_fn)
    return value, settings


@neutral()
def convert(
    model: nn.Module | ExportedProgram,
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
        model: any `nn.Module` with residual attention blocks over image tokens, an
            `fx.GraphModule` of such a model, or a `torch.export.ExportedProgram`, of which an
            `fx.GraphModule` is returned.
        gamma: MACs to keep, as a share of the dense model's, as
            `torch.utils.flop_counter.FlopCounterMode` counts both; in (0, 1].
        example_inputs: tensor, tuple of arguments or dict of keyword arguments the model takes;
            found by itself where the model states its input size (timm, Hugging Face,
            torchvision). The budget holds at this size.
        calibration: images to fit routers, corrections and budgets to, without labels; see
            `dgefx.calibrate`, which can also be called later, with more options. Without it the
            blocks' shares of the budget are a guess from their depth.
        config: granularities, region side, routing, router. Default `DGEConfig()`.
        filter_fn: `(module, name) -> bool`, False keeps a block dense.
        inplace: rewrite `model` itself and return it.

    Modes that the caller has entered (autocast, `torch.inference_mode`, a default device) change
    nothing: it works without them, and what it returns can be trained.

    Returns:
        A new model of the same class with the same `state_dict` keys, plus those of learned or
        calibrated routers (`*.dge_router.*`); shapes of inputs and outputs are unchanged.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: gamma out of range or under the floor, no usable example input, nothing to
            convert (with the reason per block), or a model that is already converted.

        Whatever is raised, a keyboard interrupt too, `model` is as it was, also with `inplace`.
    """
    inputs = exported_inputs(model) if example_inputs is None else example_inputs
    dense: nn.Module = as_module(model, inplace)
    value, settings = _check_arguments(dense, gamma, config, filter_fn)
    if calibration is not None:
        check_iterable("calibration", calibration)
    analysis = analyse(dense, inputs, settings, filter_fn)
    if inplace and any(parameter.is_inference() for parameter in dense.parameters()):
        warnings.warn(
            "model was made under torch.inference_mode(), so its parameters can never be trained; "
            "without inplace=True, convert() returns a copy that can",
            stacklevel=3,
        )
    chosen = _solve(analysis, value)
    target = dense if inplace else deep_copy(dense)
    with undone_on_error(target):
        install_analysis(target, analysis, value, chosen)
        return target if calibration is None else calibrate(target, calibration)


def _solve(analysis: Analysis, gamma: float) -> dict[str, Plan]:
    rest = analysis.macs_dense - sum(cost.dense for cost in analysis.costs.values())
    return solve(guessed_choices(analysis.costs), rest, analysis.macs_dense, gamma)


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
    apply_extractions(target, analysis.extractions)
    install(target, analysis.plans, analysis.sources, chosen, analysis.config)
    record = Record(
        analysis.config,
        gamma,
        result,
        describe_call(analysis.call),
        {name: analysis.costs[name] for name in analysis.plans},
        analysis.macs_dense,
        analysis.images,
    )
    set_record(target, record)
    open_gates(converted_blocks(target, record), gamma)
    return target


@neutral()
def explain(
    model: nn.Module | ExportedProgram,
    gamma: float = 0.5,
    *,
    example_inputs: Any = None,
    config: DGEConfig | None = None,
    filter_fn: FilterFn | None = None,
) -> Report:
    """What `convert` would do, without doing it. Arguments and errors as `convert`, but for three
    that the report tells of: no attention at all, attention of which no block converts, and a
    `gamma` under the floor, for which every block is shown at its coarsest (`ratio` is then the
    floor)."""
    inputs = exported_inputs(model) if example_inputs is None else example_inputs
    dense: nn.Module = as_module(model)
    value, settings = _check_arguments(dense, gamma, config, filter_fn)
    analysis = analyse(dense, inputs, settings, filter_fn, must_convert=False)
    if not analysis.plans:
        return analysis.report(value, {})
    # above the floor by what the rounding of two sums may differ
    return analysis.report(value, _solve(analysis, max(value, min(analysis.floor + 1e-9, 1.0))))


def report(model: nn.Module) -> Report:
    """The report of the conversion that made `model`, or the one converted part of it.

    Names, MACs and ratios are those of the module that was converted, at its own example inputs.

    Raises:
        TypeError, ValueError: not a converted model, or one with several converted parts.
    """
    return conversion_record(model).report


@neutral()
def revert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The dense model again, with the converted model's current parameters.

    Args:
        model: converted, or with converted parts, all of which are reverted.
        inplace: change `model` itself; it is returned, without what torch.compile or
            DistributedDataParallel put around it.

    Raises:
        TypeError, ValueError: not a converted model; it is unchanged then.
    """
    find_parts(model)
    check_unsharded(model, "revert")
    inner = unwrap(model)
    if not inplace:
        return _revert(deep_copy(inner))
    with undone_on_error(inner):
        return _revert(inner)


def _revert(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, DGEBlock):
            put(model, name, module.dense_block())
    for module in list(model.modules()):
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, GridShape):
                del module._forward_hooks[key]
        unhook_images(module)
    restore(model)
    return model
