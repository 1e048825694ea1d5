"""Gradients of a model's output, or one clear error where it has none.

Shared by `importance` and `refine`, the two steps of calibration that need them and do without.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NoGradientsError(Exception):
    """The model's output carries no gradients."""


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
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # an operation without a derivative
        raise NoGradientsError(str(error)) from error
