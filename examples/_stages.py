"""One training of the fine-tuning recipe: optimiser, schedule, processes, logs, checkpoints.

`_recipe.py` trains up to three models, each by a call of `fit`; what they share is a `Run`.
"""

from __future__ import annotations

import math
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from torch import Tensor, nn

import _data
import _measure
from dgefx.training import (
    CsvLog,
    FinetuneTask,
    GateSchedule,
    TensorBoardLog,
    load_checkpoint,
    param_groups,
    save_checkpoint,
    shard,
    train,
)


class Run:
    """Command line, device, loaders and console of this process."""

    def __init__(self, args: Namespace, device: torch.device, console: Console) -> None:
        self.args, self.device, self.console = args, device, console
        self.amp = torch.bfloat16 if args.bf16 else None
        self.config: dict[str, Any] = {}
        self.train: Any = None
        self.test: Any = None

    def set_loaders(self, config: dict[str, Any]) -> None:
        """Make the loaders, for images as timm's data `config` of the model describes them."""
        self.config = config
        if self.args.workers is not None:
            self.args.splits = replace(self.args.splits, workers=self.args.workers)
        self.train = self.loader(training=True, distributed=self.args.distributed)
        self.test = self.loader(training=False, distributed=self.args.distributed)

    def loader(self, *, training: bool, distributed: bool) -> Any:
        """Batches of this process, or with `distributed=False` of all images."""
        args = self.args
        loader = _data.loader(
            args.splits,
            self.config,
            args.batch_size,
            self.device,
            training,
            distributed=distributed,
            fresh_workers=True,
        )
        return loader if args.limit_batches is None else _data.First(loader, args.limit_batches)

    def pictures(self) -> Tensor:
        """The first test images, on the device."""
        images: Tensor = next(iter(self.loader(training=False, distributed=False)))[0]
        return images.to(self.device)

    def plain_images(self, count: int) -> list[Tensor]:
        """Some training images at random, as the test images are prepared."""
        data = _data.plain(self.args.splits.train, self.config, self.device)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.args.seed))
        return [data[index][0] for index in order[:count].tolist()]

    @property
    def updates(self) -> int:
        """Optimiser updates per epoch."""
        return math.ceil(len(self.train) / self.args.accumulate)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, and labels soft."""
        return bool(self.args.mixup or self.args.cutmix)

    @property
    def criterion(self) -> dict[str, Any]:
        """For timm's classification loss; `Mixup` smooths the labels itself."""
        return {"soft_targets": True} if self.mixes else {"smoothing": self.args.smoothing}

    def mixup(self) -> Mixup | None:
        """Mixup and CutMix, if asked for."""
        if not self.mixes:
            return None
        args = self.args
        return Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            label_smoothing=args.smoothing,
            num_classes=len(args.splits.classes),
        )

    def gate_schedule(self) -> GateSchedule:
        """Over the whole fine-tuning, also where this process does a part of it."""
        args = self.args
        return GateSchedule(
            args.gamma,
            max(1, args.epochs * self.updates),
            warmup=args.gamma_warmup,
            noise=args.noise,
        )

    def top1(self, model: nn.Module, label: str) -> float:
        """Accuracy in percent on all test images; every process must call."""
        return _measure.top1(
            model,
            self.test,
            self.device,
            label,
            amp=self.amp,
            distributed=self.args.distributed,
            progress=self.args.rank == 0,
        )

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.args.distributed:
            dist.barrier()


@dataclass(frozen=True)
class Stage:
    """A training: `epochs` in all, this process stops after `stop`; files start with `prefix`."""

    label: str
    prefix: str
    epochs: int
    lr: float
    stop: int | None = None


def fit(run: Run, task: TrainingTask, stage: Stage) -> None:
    """Train `task` as far as the stage goes, from its last checkpoint where `--resume` says so."""
    if not stage.epochs:
        return
    args = run.args
    _prepare(run, task)
    optimizer = create_optimizer_v2(
        param_groups(
            task.get_trainable_module(),
            weight_decay=args.weight_decay,
            layer_decay=args.layer_decay,
            gate_lr_scale=args.gate_lr_scale,
        ),
        opt="adamw",
        lr=stage.lr,
    )
    total = stage.epochs * run.updates
    scheduler, _ = create_scheduler_v2(  # one step of the schedule per update
        optimizer,
        sched="cosine",
        num_epochs=total,
        warmup_epochs=int(args.warmup * total),
        warmup_lr=stage.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    checkpoint = args.out / f"{stage.prefix}checkpoint.pt"
    start = 0
    if args.resume and checkpoint.is_file():
        start = load_checkpoint(checkpoint, task, optimizer)["epoch"] + 1
    with ExitStack() as stack:
        log = _Logs(run, stage, start, stack)

        def after_epoch(epoch: int) -> None:
            # a row without its checkpoint is written again by a run that resumes, not the reverse
            log.epoch(epoch, run.top1(_eval_model(task), stage.label))
            save_checkpoint(checkpoint, task, optimizer, epoch=epoch)

        train(
            task,
            run.train,
            optimizer,
            scheduler,
            epochs=stage.epochs if stage.stop is None else min(stage.epochs, stage.stop),
            start_epoch=start,
            schedule_epochs=stage.epochs,
            accumulate=args.accumulate,
            clip_grad=args.clip_grad or None,
            amp=run.amp,
            mixup=run.mixup(),
            seed=args.seed,
            log=log.update if args.rank == 0 else None,
            after_epoch=after_epoch,
            label=stage.label,
        )


def _prepare(run: Run, task: TrainingTask) -> None:
    """EMA, compiler and processes, in the order that each of them needs."""
    args = run.args
    sharded = args.fsdp and args.distributed and isinstance(task, FinetuneTask)
    if isinstance(task, FinetuneTask) and args.ema is not None:
        # foreach kernels do not take shards and whole buffers together
        ema = task.setup_ema(decay=args.ema, use_warmup=True, foreach=not sharded)
        if sharded:
            shard(ema.module)
    if sharded:
        assert isinstance(task, FinetuneTask)
        task.prepare_sharded()
    if args.compile:
        if args.config.capacity is None:
            # gates that ask freely read a number back, which is to stay within the graph
            torch._dynamo.config.capture_scalar_outputs = True
        task.compile()
    if args.distributed and not sharded:
        task.prepare_distributed([run.device.index] if run.device.type == "cuda" else None)


def _eval_model(task: TrainingTask) -> nn.Module:
    average = task.get_trainable_module(ema=True)
    if average is not None:
        assert isinstance(average.module, nn.Module)
        return average.module
    model = task.get_eval_model()
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


class _Logs:
    """What is written during a stage; by rank 0 only."""

    def __init__(self, run: Run, stage: Stage, start: int, stack: ExitStack) -> None:
        self.run, self.stage = run, stage
        self.rows: list[Any] = []
        self.epochs: Any = None
        if run.args.rank:
            return
        out, prefix, done = run.args.out, stage.prefix, start * run.updates
        self.rows.append(
            stack.enter_context(CsvLog(out / f"{prefix}log.csv", keep_before_step=done))
        )
        # an epoch's accuracy is that at the number of updates made, one more than its last step
        self.epochs = stack.enter_context(
            CsvLog(out / f"{prefix}epochs.csv", keep_before_step=done + 1 if start else 0)
        )
        if run.args.tensorboard:
            folder = out / f"{prefix}tensorboard"
            self.rows.append(
                stack.enter_context(TensorBoardLog(folder, keep_before_step=done or None))
            )

    def update(self, row: dict[str, Any]) -> None:
        """One update."""
        for log in self.rows:
            log(row)

    def epoch(self, epoch: int, accuracy: float) -> None:
        """The end of an epoch."""
        if self.epochs is None:
            return
        row = {"epoch": epoch, "step": (epoch + 1) * self.run.updates, "top1": accuracy}
        self.epochs(row)
        for log in self.rows:
            if isinstance(log, TensorBoardLog):
                log(row)
        label, total = self.stage.label, self.stage.epochs
        self.run.console.print(f"{label}: epoch {epoch + 1} of {total}, top-1 {accuracy:.1f} %")


__all__ = ["Run", "Stage", "fit"]
