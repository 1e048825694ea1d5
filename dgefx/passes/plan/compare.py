"""When the results of a converted and of a dense block are equal, and what is compared.

What `verify`, `verify_gradients`, `verify_types` and `sizes` share.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgefx.config import DGEConfig
from dgefx.nn.block import DGEBlock
from dgefx.nn.grid_shape import GridShape
from dgefx.passes.errors import Refused
from dgefx.passes.plan.install import build_block
from dgefx.passes.plan.plan import BlockPlan
from dgefx.passes.randomise import randomise_constants
from dgefx.passes.trace.copies import copy_block

#: of the block's update (its output less its input) or the model's output, in float32
TOLERANCE = 1e-5
#: rounding of the stream itself when the update is added to it, relative to the stream
_ROUNDING = 1e-6


def grid_shape(plan: BlockPlan, grid: tuple[int, int] | None = None) -> GridShape | None:
    """What tells a block that is tried its grid, if anything has to; that of the plan if None."""
    return GridShape(grid or plan.layout.grid) if plan.needs_grid_shape else None


def converted_copy(dense: nn.Module, plan: BlockPlan, config: DGEConfig) -> DGEBlock:
    """The converted block around a copy of the dense one, at the finest granularity."""
    return build_block(dense, plan.tried(), config, grid_shape(plan))


def randomised(block: nn.Module, training: bool = False) -> nn.Module:
    """A copy of a dense block without constant parameters."""
    copied = copy_block(block).train(training)
    randomise_constants(copied)
    return copied


def distance(found: Tensor, wanted: Tensor, before: Tensor) -> tuple[float, float]:
    """(distance of two outputs of a block, what rounding may make of it), as 2-norms.

    Args:
        before: the stream that the block updates.
    """
    update = (wanted - before).double().norm().item()
    error = (found.double() - wanted.double()).norm().item()
    return error, TOLERANCE * update + _ROUNDING * before.double().norm().item()


def is_close(found: Tensor, wanted: Tensor, before: Tensor) -> bool:
    """Whether two outputs of a block are equal up to rounding, by the update of its stream."""
    if found.shape != wanted.shape:
        return False
    error, limit = distance(found, wanted, before)
    return error <= limit


def require_equal(found: Tensor, wanted: Tensor, before: Tensor, what: str) -> None:
    """Raise Refused where a converted block's output differs from its dense block's."""
    if not bool(torch.isfinite(wanted).all()):
        raise Refused("verification: the dense block yields NaN or infinity", "NaN or infinity")
    if is_close(found, wanted, before):
        return
    if found.shape != wanted.shape:
        differs = f"is of shape {tuple(found.shape)}, the dense block's of {tuple(wanted.shape)}"
    elif not bool(torch.isfinite(found).all()):
        differs = "yields NaN or infinity where the dense block does not"
    else:
        error, limit = distance(found, wanted, before)
        differs = (
            f"differs from the dense block by {error:.1e}, where rounding is at most {limit:.1e} "
            f"(2-norms)"
        )
    raise Refused(f"verification: {what} {differs}", "verification failed")
