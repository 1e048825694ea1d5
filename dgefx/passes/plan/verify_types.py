"""Pass 6d, more of what is verified once per block: its own floating type, its images.

Outputs that are equal in float32 for two images say nothing of a branch on the type or of a number
made of the batch size. Called by `dgefx.passes.pipeline` after `passes.plan.verify_gradients`, once
for blocks that run the same code.
"""

from __future__ import annotations

import torch
from torch import nn

from dgefx.ambient import working_dtype
from dgefx.config import DGEConfig
from dgefx.outputs import Call, output_tensors
from dgefx.passes.errors import Refused
from dgefx.passes.plan.example_calls import call_in_type, call_of_images, pick_images
from dgefx.passes.plan.plan import BlockPlan
from dgefx.passes.plan.verify import converted_copy, is_close, replaced_stream, stream_of
from dgefx.passes.randomise import randomise_constants
from dgefx.passes.trace.tracer import copy_block
from dgefx.precision import in_type


def verify_type(
    dense: nn.Module,
    plan: BlockPlan,
    call: Call,
    shape: tuple[int, ...],
    config: DGEConfig,
    dtype: torch.dtype,
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
    reference = in_type(copy_block(dense).eval(), dtype)
    noise = torch.randn(
        stream_of(call, plan, shape).shape, generator=torch.Generator().manual_seed(8)
    )
    stream = noise.to(stream_of(call, plan, shape)).to(dtype)
    probe = replaced_stream(call, plan, shape, stream)
    with torch.no_grad():
        try:
            args, kwargs = call_in_type(probe, dtype)
            wanted = output_tensors(reference(*args, **kwargs))[0]
        except (RuntimeError, TypeError, NotImplementedError):  # not on this device
            return
        args, kwargs = call_in_type(probe, dtype)
        converted = in_type(converted_copy(copy_block(reference, True), plan, config), dtype)
        try:
            found = output_tensors(converted(*args, **kwargs))[0]
        except (RuntimeError, TypeError, ValueError) as failed:
            raise Refused(
                f"verification: in {name} its converted code fails: {failed}", "verification failed"
            ) from failed
    before = torch.zeros_like(stream) if plan.layout.update else stream
    update = float((wanted - before).double().norm())
    error = float((found - wanted).double().norm())
    # some roundings of the update, one of the sum with the stream
    eps = torch.finfo(dtype).eps
    if not error <= eps * (32 * update + 2 * float(before.double().norm())):
        raise Refused(
            f"verification: in {name} it differs from the dense block by {error:.1e}, of an update "
            f"of {update:.1e}",
            "verification failed",
        )


def verify_images(
    dense: nn.Module, plan: BlockPlan, call: Call, shape: tuple[int, ...], config: DGEConfig
) -> None:
    """Compare both blocks on one image and on three, where Python made a number of a batch size.

    Raises:
        Refused: the converted block keeps to the batch size of the example.
    """
    images = shape[plan.layout.axis("B")]
    for count in (1, 3):
        chosen = torch.arange(count) % images
        probe = call_of_images(call, plan, shape, chosen)
        stream = pick_images(stream_of(call, plan, shape), plan, chosen)
        with torch.no_grad():
            reference = copy_block(dense).eval()
            randomise_constants(reference)
            converted = converted_copy(copy_block(reference, True), plan, config)
            try:
                args, kwargs = call_in_type(probe, stream.dtype)
                wanted = output_tensors(reference(*args, **kwargs))[0]
            except Exception:  # user code may raise anything
                continue
            try:
                args, kwargs = call_in_type(probe, stream.dtype)
                found = output_tensors(converted(*args, **kwargs))[0]
                same = is_close(found, wanted, 0 * stream if plan.layout.update else stream)
            except (RuntimeError, IndexError, ValueError, TypeError):
                same = False
        if not same:
            raise Refused(
                f"it makes a number of the batch size, with which it was traced for {images} "
                f"images: for {count} it does something else",
                "follows the batch size",
            )
