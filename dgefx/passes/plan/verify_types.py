"""More of what is verified once for blocks that run the same code: the model's own floating type,
other numbers of images.

Outputs that are equal in float32 for two images say nothing of a branch on the type or of a number
made of the batch size: Python's, or one that the passes keep. After
`passes.plan.verify_gradients`. Next: `passes.plan.sizes`.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from dgefx.ambient import working_dtype
from dgefx.config import DGEConfig
from dgefx.passes.errors import Refused
from dgefx.passes.plan.compare import converted_copy, is_close, randomised
from dgefx.passes.plan.example import BlockExample
from dgefx.passes.plan.plan import BlockPlan
from dgefx.passes.plan.verify_gradients import smaller_grids
from dgefx.passes.trace.copies import copy_block
from dgefx.passes.trace.deterministic import Deterministic
from dgefx.precision import in_type


def verify_type(
    example: BlockExample, plan: BlockPlan, config: DGEConfig, dtype: torch.dtype
) -> None:
    """Compare both blocks once in the model's own floating type, at the finest granularity.

    Raises:
        Refused: the block branches otherwise in that type, or yields something else.
    """
    name = str(dtype).removeprefix("torch.")
    if dtype not in plan.guards[0].types & plan.guards[1].types:
        raise Refused(
            f"it decides by the floating type, and otherwise in {name}, which the model is in, "
            f"than in float32, in which conversions are verified",
            "decides by type",
        )
    if dtype is working_dtype():
        return
    reference = in_type(copy_block(example.block).eval(), dtype)
    given = example.with_noise(torch.Generator().manual_seed(8)).in_type(dtype)
    with torch.no_grad():
        try:
            wanted = given.run(reference)
        except (RuntimeError, TypeError, NotImplementedError):  # not on this device
            return
        converted = in_type(converted_copy(copy_block(reference, True), plan, config), dtype)
        try:
            found = given.run(converted)
        except (RuntimeError, TypeError, ValueError) as failed:
            raise Refused(
                f"verification: in {name} its converted code fails: {failed}", "verification failed"
            ) from failed
    update = float((wanted - given.before).double().norm())
    error = float((found - wanted).double().norm())
    # some roundings of the update, one of the sum with the stream
    eps = torch.finfo(dtype).eps
    if not error <= eps * (32 * update + 2 * float(given.before.double().norm())):
        raise Refused(
            f"verification: in {name} it differs from the dense block by {error:.1e}, of an update "
            f"of {update:.1e}",
            "verification failed",
        )


def verify_images(example: BlockExample, plan: BlockPlan, config: DGEConfig) -> None:
    """Compare both blocks on three images and, where Python made a number of a batch size, on one;
    on the smallest grid on which they are equal.

    Raises:
        Refused: the converted block keeps to the batch size of the example.
    """
    images = example.shape[plan.layout.axis("B")]
    both_modes = plan.numbers_images and not plan.train_code.is_same(plan.eval_code)
    cases = itertools.product(
        (1, 3) if plan.numbers_images else (3,), (False, True) if both_modes else (False,)
    )
    smaller = smaller_grids(example, plan)
    for count, training in cases:
        found: list[bool | None] = []
        for moved, fewer in (*smaller, (example, plan)):
            try:
                given = moved.of_images(torch.arange(count) % images)
            except Refused:  # more than the stream would have to be of another grid
                continue
            dense = randomised(example.block, training)  # it may note down what it was given
            # numbers that the block is given may be of images, or something else
            calls = [given, *given.with_numbers(images, count)]
            found = [_is_same(call, dense, fewer, config) for call in calls]
            if True in found:
                break
        if True not in found and False in found:
            raise Refused(
                f"it was traced for {images} images: for {count} it does something else",
                "follows the batch size",
            )


@torch.no_grad()
def _is_same(
    given: BlockExample, dense: nn.Module, plan: BlockPlan, config: DGEConfig
) -> bool | None:
    """Whether both blocks yield the same; None where the dense one does not take the call."""
    other = copy_block(dense, True)  # in train mode, running statistics change
    try:
        wanted = given.run(dense, Deterministic())
    except Exception:  # user code may raise anything
        return None
    try:
        found = given.run(converted_copy(other, plan, config), Deterministic())
        return is_close(found, wanted, given.before)
    except (RuntimeError, IndexError, ValueError, TypeError):
        return False
