"""What `train` is given, checked before anything is changed.

Called by `dgefx.training.loop.train` with its arguments; errors name the argument.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn

from dgefx.training.gates import GateSchedule
from dgefx.training.shard import reshard


def described(value: Any) -> str:
    """What was found, for an error: an instance by its type."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_task(task: Any) -> None:
    """Raise TypeError where `task` is none of timm's training tasks."""
    if isinstance(task, TrainingTask):
        return
    hint = "; for a converted model FinetuneTask(model)" if isinstance(task, nn.Module) else ""
    raise TypeError(
        f"task must be one of timm's training tasks, such as a FinetuneTask, found "
        f"{described(task)}{hint}"
    )


def check_optimizer(optimizer: Any, task: TrainingTask) -> None:
    """Raise TypeError or ValueError where `optimizer` does not train the task's model."""
    parts = (getattr(optimizer, name, None) for name in ("step", "zero_grad"))
    if isinstance(optimizer, type) or not all(map(callable, parts)):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, found {described(optimizer)}")
    reshard(task)
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    model: Any = task.get_trainable_module()
    own = {id(p) for p in model.parameters() if p.requires_grad}
    foreign = [p for key, p in held.items() if key not in {id(p) for p in task.parameters()}]
    if foreign or not own & held.keys():
        found = (
            f"{len(foreign)} of its {len(held)} are not the model's"
            if foreign
            else "none of its parameters is one that the model learns"
        )
        raise ValueError(
            f"optimizer is not one of the task's model: {found}. Was it made for the dense model, "
            f"a copy, or before the model was sharded? Make it of "
            f"param_groups(task.get_trainable_module())"
        )


def check_scheduler(
    scheduler: Any, optimizer: torch.optim.Optimizer, epochs: int, updates: int
) -> None:
    """Raise TypeError or ValueError where `scheduler` does not go with the training.

    Args:
        epochs: that it should be made for; 0: of any length.
        updates: in each of them.
    """
    if scheduler is None:
        if any(g.get("lr_scale", 1.0) != 1.0 for g in optimizer.param_groups):
            raise ValueError(
                "optimizer has groups with an lr_scale, which timm's schedulers apply, but there "
                "is no scheduler; pass one, or make the groups with param_groups(model, lr=...)"
            )
        return
    parts = (getattr(scheduler, name, None) for name in ("step", "step_update"))
    if isinstance(scheduler, type) or not all(map(callable, parts)):
        hint = "; it returns (scheduler, epochs)" if isinstance(scheduler, tuple) else ""
        raise TypeError(
            f"scheduler must be one of timm's (timm.scheduler.create_scheduler_v2 makes them), "
            f"found {described(scheduler)}{hint}"
        )
    groups = getattr(getattr(scheduler, "optimizer", optimizer), "param_groups", [])
    if [id(group) for group in groups] != [id(group) for group in optimizer.param_groups]:
        raise ValueError(
            "scheduler was made for another optimizer, so this one's learning rate would not "
            "change; make the scheduler with the optimizer that is passed"
        )
    length = getattr(scheduler, "get_cycle_length", None)  # some have none, such as steps
    if length is None or not epochs:
        return
    per_epoch = bool(getattr(scheduler, "t_in_epochs", True))
    wanted, unit = (epochs, "epochs") if per_epoch else (epochs * updates, "updates")
    if length() != wanted:
        raise ValueError(
            f"scheduler was made for {length()} {unit}, but there are {wanted} ({epochs} epochs of "
            f"{updates} updates): make it for these, or pass schedule_epochs, the number of epochs "
            f"after which it is to be over"
        )


def check_gate_schedule(schedule: GateSchedule | None, epochs: int, updates: int) -> None:
    """Raise ValueError where the schedule of the gates is not over after so many epochs."""
    last = epochs * updates - 1
    if schedule is None or not epochs or schedule.is_over(last):
        return
    wanted = schedule.steps - 1
    raise ValueError(
        f"the schedule of the task has {schedule.steps} steps and is not over after {epochs} "
        f"epochs of {updates} updates: it ends at {_settings(schedule, wanted)}, they at "
        f"{_settings(schedule, last)}. Make it with steps={epochs * updates}, or pass "
        f"schedule_epochs, the number of epochs after which it is to be over"
    )


def _settings(schedule: GateSchedule, step: int) -> str:
    noise = "with" if schedule.noise_at(step) else "without"
    temperature = schedule.temperature_at(step)
    return f"gamma={schedule.gamma_at(step):.3g}, temperature={temperature:.3g}, {noise} noise"


def check_numbers(
    epochs: int,
    start_epoch: int,
    accumulate: int,
    seed: int,
    schedule_epochs: int | None,
    clip_grad: float | None,
    amp: torch.dtype | None,
) -> None:
    """Raise TypeError or ValueError, naming the argument of `train`."""
    for name, value, least in (
        ("epochs", epochs, 0),
        ("start_epoch", start_epoch, 0),
        ("accumulate", accumulate, 1),
        ("seed", seed, 0),
        ("schedule_epochs", epochs if schedule_epochs is None else schedule_epochs, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, found {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, found {value}")
    if clip_grad is not None:
        if isinstance(clip_grad, bool) or not isinstance(clip_grad, (int, float)):
            raise TypeError(f"clip_grad must be a number or None, found {clip_grad!r}")
        if not clip_grad > 0:
            raise ValueError(
                f"clip_grad must be positive, or None for no clipping, found {clip_grad}"
            )
    if amp is not None and not isinstance(amp, torch.dtype):
        raise TypeError(f"amp must be a torch.dtype or None, found {amp!r}")
    if amp == torch.float16:
        raise ValueError("amp must not be float16, which needs a scaled loss; use torch.bfloat16")


def check_functions(**functions: Any) -> None:
    """Raise TypeError for what is neither None nor can be called."""
    for name, value in functions.items():
        if value is not None and (isinstance(value, type) or not callable(value)):
            raise TypeError(f"{name} must be a function or None, found {described(value)}")


def check_loader(loader: Any) -> int:
    """The number of its batches."""
    if not hasattr(loader, "__len__"):
        raise TypeError(f"loader must have a length, found {described(loader)} without")
    if not len(loader):
        raise ValueError("loader has no batches: fewer images than one batch, with drop_last?")
    return len(loader)


def scalar(name: str, loss: Any) -> Tensor:
    """A loss without axes.

    Raises:
        TypeError, ValueError: `name` is no tensor, or of more than one element.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name} must be a tensor, found {described(loss)}")
    if loss.numel() != 1:
        raise ValueError(
            f"{name} must be one number, found a tensor of shape {tuple(loss.shape)}; take its "
            f"mean, or use a criterion with reduction='mean'"
        )
    return loss.reshape(())
