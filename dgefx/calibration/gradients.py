"""Gradients of a model's output, or one clear error where it has none.

Shared by `importance` and `refine`, the two steps of calibration that need them and do without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dgefx.outputs import Call


class NoGradientsError(Exception):
    """The model's output carries no gradients."""


def _is_fault(error: RuntimeError) -> bool:
    """Whether the device failed or memory ran out: no word about gradients."""
    faults = (torch.OutOfMemoryError, torch.AcceleratorError)
    told = any(words in str(error) for words in ("out of memory", "allocate memory"))
    return told or isinstance(error, faults)


def run_with_gradients(model: nn.Module, call: Call) -> Any:
    """The output of `call`, with its graph.

    Raises:
        NoGradientsError: the model runs without gradients only (it changes weights in place, or
            they were made in inference mode).
    """
    args, kwargs = call
    try:
        with torch.enable_grad():
            return model(*args, **kwargs)
    except RuntimeError as error:
        if _is_fault(error):
            raise
        with torch.no_grad():
            model(*args, **kwargs)  # whatever is wrong with the model itself is raised here
        raise NoGradientsError(str(error)) from error


def gradients(
    scalar: Tensor, tensors: Sequence[Tensor], retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Of `scalar`, None for tensors that it does not depend on.

    Raises:
        NoGradientsError: the graph is cut, or an operation has no derivative.
    """
    if not scalar.requires_grad:
        raise NoGradientsError("its graph is cut, by detach() or no_grad()")
    try:
        return torch.autograd.grad(scalar, tensors, retain_graph=retain_graph, allow_unused=True)
    except RuntimeError as error:  # an operation without a derivative
        if _is_fault(error):
            raise
        raise NoGradientsError(str(error)) from error
