"""`shard`: FSDP2 for a converted model, one communication group per converted block.

Called on every rank after `dgefx.convert` and before the optimiser is made and before
torch.compile.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dgefx.record import conversion_record, converted_blocks


def shard(model: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    """Shard parameters, gradients and optimiser state over the ranks, in place.

    `torch.distributed.fsdp.fully_shard` on every converted block, then on the model with whatever
    is left. The blocks keep the converted forward. What the router decides depends on a rank's own
    images only, except with `budget="average"`, where a rank shares its queries out over its part
    of the batch.

    A sharded model trains and evaluates; its weights are written and read by
    `dgefx.training.checkpoint`. It cannot be copied, pickled or reverted: load the weights into an
    unsharded converted model for that. Calibrate before: corrections fitted later would be
    parameters that FSDP2 knows nothing of, and differ between the ranks. EMA weights copy the
    model, so set them up before too, with `foreach=False`, and shard their copy alike.

    Args:
        model: a converted model, bare; all ranks with the same weights, as FSDP2 does not
            synchronise them.
        mesh: ranks to shard over; None: all of them.
        options: passed to every `fully_shard`, such as `mp_policy` and `reshard_after_forward`.

    Returns:
        `model` itself.

    Raises:
        TypeError, ValueError: not a converted model, or one that is wrapped or sharded already.
    """
    if isinstance(model, DistributedDataParallel):
        raise ValueError("model is in DistributedDataParallel; shard takes its place, pass .module")
    if hasattr(model, "_orig_mod"):
        raise ValueError("model is in torch.compile; shard the model itself, then compile it")
    blocks = converted_blocks(model, conversion_record(model))
    if done := [n for n, m in model.named_modules() if isinstance(m, FSDPModule)]:
        raise ValueError(f"model is sharded already: modules {done}")
    known = {id(block): name for name, block in blocks.items()}
    for module in model.modules():
        if (name := known.get(id(getattr(module, "_orig_mod", None)))) is not None:
            raise ValueError(f"block {name} is in torch.compile; shard the model, then compile it")
    for block in blocks.values():
        if block is not model:
            fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def reshard(model: nn.Module) -> None:
    """Put the sharded parameters back in their places, if `model` is sharded.

    FSDP2 leaves whole parameters there after a forward without a backward. An optimiser made
    then, or names looked up then, would be of tensors that nobody trains.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
