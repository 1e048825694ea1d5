"""`train`: the epochs of a fine-tuning, for `FinetuneTask` and any other of timm's training tasks.

Called once per run (or per resumption) with a task, a loader and an optimiser; `dgefx.training.log`
has callbacks for its rows, `dgefx.training.checkpoint` what its `after_epoch` may call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import random_seed
from torch import Tensor, nn
from tqdm import tqdm

from dgefx.budget_loss import asked_ratio
from dgefx.convert import report
from dgefx.record import conversion_record, unwrap
from dgefx.training.given import (
    check_functions,
    check_gate_schedule,
    check_loader,
    check_numbers,
    check_optimizer,
    check_scheduler,
    check_task,
    described,
    scalar,
)
from dgefx.training.scalars import Row, Scalars
from dgefx.training.task import FinetuneTask


def train(
    task: TrainingTask,
    loader: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler | None = None,
    *,
    epochs: int,
    start_epoch: int = 0,
    schedule_epochs: int | None = None,
    accumulate: int = 1,
    clip_grad: float | None = 1.0,
    amp: torch.dtype | None = None,
    mixup: Mixup | None = None,
    seed: int = 0,
    log: Callable[[Row], object] | None = None,
    after_epoch: Callable[[int], object] | None = None,
    progress: bool = True,
    label: str = "train",
) -> None:
    """Train the task's model from `start_epoch` up to `epochs`.

    Every epoch is seeded from `seed`, its number and the rank. A run that stopped after an epoch
    and goes on from its checkpoint therefore draws what it would have drawn; on the CPU its losses
    are the same to the last bit. That needs a loader whose workers start anew every epoch
    (`persistent_workers=False`): persistent ones keep random states of their own.

    With `torch.distributed` initialised, every rank calls this, with the same number of batches,
    and the numbers in the rows are means over the ranks.

    Args:
        task: on its device, compiled and distributed as it is to be; `FinetuneTask.set_step` is
            called before every update.
        loader: has a length and yields (input, target), as a tuple or list. Inputs and targets are
            tensors, or dicts, lists and tuples of tensors; they are moved to the task's device. Its
            sampler's `set_epoch` is called if it has one.
        optimizer: of parameters that the task's model has now, also sharded ones.
        scheduler: of timm, made with this optimiser; `step_update` is called after every update,
            `step` after every epoch.
        epochs: in all, those before `start_epoch` included.
        schedule_epochs: the number of epochs that the scheduler, and the `GateSchedule` of the
            task, were made for; None: `epochs`. More for a part of a training, fewer for epochs at
            the last learning rate; 0: they are not asked.
        accumulate: batches per optimiser update. The gradient is that of the mean of their losses;
            the last update of an epoch may have fewer.
        clip_grad: largest 2-norm of the gradient; None: not clipped.
        amp: dtype of autocast in the forward, such as torch.bfloat16. Not float16, which needs its
            loss scaled.
        mixup: of (input, target), both tensors, before the forward.
        log: called once per update with a flat dict: epoch, step (updates before this one in the
            whole training), lr (of the first parameter group, without its `lr_scale`), gamma and
            ratio of a converted model, and every scalar that the task returns (loss and its parts).
            It is called before the update is made.
        after_epoch: called with the number of the epoch that is over, for evaluation and
            checkpoints; may change the mode of the model and draw random numbers.
        progress: show a bar on rank 0, under the name `label`.

    Raises:
        TypeError, ValueError: naming the argument; before anything was changed where it is not
            about what the loader or the task yields.
        FloatingPointError: a loss was not finite; names the step and the parts. The update was not
            made.
    """
    check_task(task)
    check_numbers(epochs, start_epoch, accumulate, seed, schedule_epochs, clip_grad, amp)
    check_functions(mixup=mixup, log=log, after_epoch=after_epoch)
    batches = check_loader(loader)
    updates = math.ceil(batches / accumulate)
    over = epochs if schedule_epochs is None else schedule_epochs
    check_optimizer(optimizer, task)
    check_scheduler(scheduler, optimizer, over, updates)
    if isinstance(task, FinetuneTask):
        check_gate_schedule(task.schedule, over, updates)
    if scheduler is not None and start_epoch:
        scheduler.step_update(start_epoch * updates)
        scheduler.step(start_epoch)
    rank, world = _rank_and_world()
    step = _Step(task, optimizer, scheduler, clip_grad, amp, mixup)
    for epoch in range(start_epoch, epochs):
        random_seed(seed + epoch * world, rank)  # no rank repeats another's epoch
        set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        task.train()
        scalars = Scalars(log, world)
        waiting = iter(loader)
        with tqdm(
            total=updates,
            desc=f"{label}, epoch {epoch + 1} of {epochs}",
            unit="update",
            leave=False,
            disable=not progress or rank > 0,
        ) as bar:
            for update in range(updates):
                count = min(accumulate, batches - update * accumulate)
                step(epoch, epoch * updates + update, _take(waiting, count), count, scalars)
                bar.set_postfix(scalars.shown, refresh=False)
                bar.update()
        if scheduler is not None:
            scheduler.step(epoch + 1)
        if after_epoch is not None:
            after_epoch(epoch)


class _Step:
    """One optimiser update after the other."""

    def __init__(
        self,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler | None,
        clip_grad: float | None,
        amp: torch.dtype | None,
        mixup: Mixup | None,
    ) -> None:
        self.task, self.optimizer, self.scheduler = task, optimizer, scheduler
        self.clip_grad, self.amp, self.mixup = clip_grad, amp, mixup
        self.held: tuple[float, float] | None = None

    def __call__(
        self, epoch: int, step: int, batches: Iterator[Any], count: int, scalars: Scalars
    ) -> None:
        """Forward and backward of `count` batches, then the update."""
        row: Row = {"epoch": epoch, "step": step, "lr": self._lr()}
        if isinstance(self.task, FinetuneTask):
            row["gamma"] = self.task.set_step(step)
        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            last = index + 1 == count
            with nullcontext() if last else self.task.no_sync():
                loss, found = self._forward(batch)
                for name, value in found.items():
                    sums[name] = sums[name] + value if name in sums else value
                if last:
                    if isinstance(self.task, FinetuneTask) and "ratio" not in sums:
                        row["ratio"] = self._held_ratio(self.task)
                    scalars.send(row, {name: value / count for name, value in sums.items()})
                (loss / count).backward()
        scalars.read()  # before the update, which a loss that is not finite must not reach
        if self.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.task.get_clip_parameters(), self.clip_grad)
        self.optimizer.step()
        self.task.update_ema(step + 1)
        if self.scheduler is not None:
            self.scheduler.step_update(step + 1)

    def _forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch, and its scalars, detached."""
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(
                f"loader must yield (input, target), found {type(batch).__name__}"
                + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
            )
        input, target = (_move(part, self.task.device) for part in batch)
        if self.mixup is not None:
            if not isinstance(input, Tensor):
                raise TypeError(f"mixup needs a tensor as input, found {type(input).__name__}")
            input, target = self.mixup(input, target)
        with self._autocast():
            result = self.task(input, target)
        if not isinstance(result, dict) or "loss" not in result:
            raise TypeError(
                f"task must return a dict with the loss under 'loss', as timm's do; "
                f"{described(self.task)} returns {described(result)}"
            )
        loss = scalar("the loss of the task", result["loss"])
        found = {
            name: value.detach()
            for name, value in {**result, "loss": loss}.items()
            if isinstance(value, Tensor) and value.ndim == 0
        }
        if isinstance(self.task, FinetuneTask):
            # not `task.ratio`, which waits for the device
            inner = unwrap(self.task.trainable_module)
            asked = asked_ratio(inner, conversion_record(inner))
            if asked is not None:
                found = {"ratio": asked.detach(), **found}
        return loss, found

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.amp is None:
            return nullcontext()
        return torch.autocast(self.task.device.type, dtype=self.amp)

    def _held_ratio(self, task: FinetuneTask) -> float:
        """Ratio of a model whose budget holds by construction; changes with gamma alone."""
        if self.held is None or self.held[0] != task.gamma:
            self.held = task.gamma, report(unwrap(task.trainable_module)).ratio
        return self.held[1]

    def _lr(self) -> float:
        group = self.optimizer.param_groups[0]
        scale = group.get("lr_scale", 1.0) if self.scheduler is not None else 1.0
        return float(group["lr"] / scale)


def _take(batches: Iterator[Any], count: int) -> Iterator[Any]:
    for _ in range(count):
        try:
            yield next(batches)
        except StopIteration:
            raise ValueError(
                "loader ended before the number of batches that its len() says"
            ) from None


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _move(part, device) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_move(part, device) for part in value]
    return value


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
