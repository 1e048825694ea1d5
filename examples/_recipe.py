"""The recipe of the fine-tuning examples: dense model, conversion, fine-tuning, table.

`main` is called by `finetune_pvt.py` and `finetune_swin.py` with their defaults; the command line
is `_arguments.py`'s. With torchrun every process runs all of it, on its part of the images; the
folder `--out` must be the same for all. In it:

    settings.json                what the run was asked for
    dense-checkpoint.pt, ...     after each epoch of the dense model's own training, if any
    start/                       the converted (and calibrated) model before its fine-tuning
    checkpoint.pt                after each epoch of the fine-tuning
    log.csv, epochs.csv          one row per update, accuracy after each epoch
    model/                       the fine-tuned model, for dgefx.load
    granularity.png              what it gives which region
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from rich.console import Console
from timm.data import resolve_data_config
from timm.models import load_checkpoint as load_weights
from timm.task import ClassificationTask
from timm.utils import init_distributed_device, random_seed
from torch import nn

import _arguments
import _measure
import dgefx
from _stages import Run, Stage, fit
from dgefx.training import FinetuneTask, fit_gates, param_groups, set_gates, settle_gates

SETTLING_IMAGES = 256


def main(defaults: _arguments.Defaults, argv: list[str] | None = None) -> FinetuneTask:
    """The whole run; returns the task as it was when its training ended."""
    args = _arguments.parse(defaults, argv)
    device = init_distributed_device(args)
    try:
        return _main(args, device, defaults.dense_epochs)
    finally:
        if args.distributed:
            dist.destroy_process_group()


def _main(args: Namespace, device: torch.device, scratch_epochs: int) -> FinetuneTask:
    run = Run(args, device, Console(quiet=args.rank > 0, highlight=False))
    random_seed(args.seed)
    dense, config, new_head = build_model(args, device)
    run.set_loaders(config)
    goes_on = started(args)  # before any process may start it
    if not goes_on:
        rehearse(run, dense)
    run.barrier()  # every process has read its settings
    if args.rank == 0:
        prepare_folder(args)
    run.barrier()
    if not goes_on:
        train_dense(run, dense, scratch_epochs, new_head)
        if args.rank == 0:
            convert(run, dense)
        run.barrier()
    converted = dgefx.load(args.out / "start", dense)
    dense = dgefx.revert(converted).eval()
    task = finetune(run, converted)
    if args.stop_after_epoch is not None and args.stop_after_epoch < args.epochs:
        run.console.print(f"stopped after epoch {args.stop_after_epoch}; go on with --resume")
        return task
    summarise(run, dense)
    return task


def build_model(args: Namespace, device: torch.device) -> tuple[nn.Module, dict[str, Any], bool]:
    """The dense model, timm's data configuration for it, and whether its head is new."""
    cfg = timm.get_pretrained_cfg(args.model) if timm.is_model(args.model) else None
    extra: dict[str, Any] = dict(args.model_kwargs)
    if args.img_size and (cfg is None or cfg.fixed_input_size):
        extra.setdefault("img_size", args.img_size)  # other models take any size
    classes = len(args.splits.classes)
    model: Any = timm.create_model(
        args.model,
        pretrained=args.pretrained and not started(args),
        num_classes=classes,
        **extra,
    )
    if args.weights and not started(args):
        try:
            load_weights(model, str(args.weights))
        except RuntimeError as error:
            raise SystemExit(
                f"--weights {args.weights} does not fit {args.model}: {error}"
            ) from None
    options = {"img_size": args.img_size}
    if args.data is None:
        options["crop_pct"] = 1.0
    config = resolve_data_config(options, model=model)
    new_head = args.pretrained and model.pretrained_cfg["num_classes"] != classes
    return model.to(device), config, new_head


def started(args: Namespace) -> bool:
    """Whether the run in `--out` that is resumed has come as far as its fine-tuning."""
    return args.resume and (args.out / "start" / "dgefx.json").is_file()


def rehearse(run: Run, dense: nn.Module) -> None:
    """Convert a copy, so that what is refused (a gamma under the floor, say) is refused before an
    earlier run is deleted and the dense model trained."""
    args = run.args
    try:
        converted = dgefx.convert(
            dense, gamma=args.gamma, example_inputs=run.pictures()[:2], config=args.config
        )
        set_gates(converted, path=args.path)
        param_groups(converted, layer_decay=args.layer_decay)
    except ValueError as error:
        raise SystemExit(f"nothing was done: {error}") from None


def prepare_folder(args: Namespace) -> None:
    """Make `--out`; with `--overwrite` without what an earlier run left to resume from."""
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        return
    for stale in args.out.glob("*checkpoint.pt"):
        stale.unlink()
    shutil.rmtree(args.out / "start", ignore_errors=True)
    content = json.dumps(_arguments.settings(args), indent=2)
    _arguments.settings_file(args).write_text(content + "\n")


def train_dense(run: Run, model: nn.Module, scratch_epochs: int, new_head: bool) -> None:
    """From scratch, or a little where the head is new; other weights are taken as they are."""
    args = run.args
    scratch = not (args.pretrained or args.weights)
    epochs = args.dense_epochs
    if epochs is None:
        epochs = scratch_epochs if scratch else 3 if new_head else 0
    lr = args.dense_lr or (1e-3 if scratch else args.lr)
    task = ClassificationTask(
        model, criterion_kwargs=run.criterion, device=run.device, verbose=False
    )
    fit(run, task, Stage("dense", "dense-", epochs, lr))
    model.eval()


def convert(run: Run, dense: nn.Module) -> None:
    """Convert, calibrate, and keep the result in `--out/start`. On one process."""
    args = run.args
    run.console.print(f"converting {args.model} to {args.gamma:g} of its MACs ...")
    random_seed(args.seed)  # of new gates
    converted = dgefx.convert(
        dense, gamma=args.gamma, example_inputs=run.pictures()[:2], config=args.config
    )
    if args.config.router == "detail":
        images = run.loader(training=True, distributed=False)
        dgefx.calibrate(converted, images, max_images=args.calibration_images)
    elif not args.fresh_gates:
        pictures = run.plain_images(args.calibration_images)
        fit_gates(converted, pictures)
        # only what each block's share of the budget is worth: gates are all that the paper adds
        dgefx.calibrate(converted, pictures, correction_rank=0, refine_passes=0)
        fit_gates(converted, pictures)
    print(dgefx.report(converted))  # rich would break its lines
    part = args.out / "start.part"
    shutil.rmtree(part, ignore_errors=True)
    dgefx.save(converted, part)
    part.rename(args.out / "start")  # complete, or not there


def finetune(run: Run, converted: nn.Module) -> FinetuneTask:
    """Train to the budget, with the dense model as teacher."""
    args = run.args
    set_gates(converted, path=args.path)
    task = FinetuneTask(
        converted,
        criterion_kwargs=run.criterion,
        distill_loss_weight=args.distill_weight,
        budget_loss_weight=args.budget_weight,
        schedule=run.gate_schedule(),
        verbose=False,
    )
    fit(run, task, Stage("fine-tune", "", args.epochs, args.lr, args.stop_after_epoch))
    return task


@dataclass(frozen=True)
class Measured:
    """Top-1 in percent on all test images, and MACs over the dense model's on some of them."""

    accuracy: float
    ratio: float

    @classmethod
    def of(cls, run: Run, model: nn.Module) -> Measured:
        """Every process tests its images, rank 0 counts."""
        accuracy = run.top1(model, "converted")
        ratio = 0.0
        if run.args.rank == 0:
            images = run.loader(training=False, distributed=False)
            ratio = dgefx.measured_ratio(model, images, batch_size=run.args.batch_size)
        run.barrier()
        return cls(accuracy, ratio)


def summarise(run: Run, dense: nn.Module) -> None:
    """Test, save and draw the fine-tuned model, and print the table."""
    args = run.args
    tuned = dgefx.load(args.out / "start", dense)
    start = Measured.of(run, tuned)
    if args.epochs:
        content = torch.load(args.out / "checkpoint.pt", map_location="cpu", weights_only=True)
        tuned.load_state_dict(content["state_dict_ema" if args.ema is not None else "state_dict"])
        settle_gates(tuned, run.plain_images(SETTLING_IMAGES))
    end = Measured.of(run, tuned)
    macs = dgefx.report(tuned).macs_dense
    results = [_measure.Result("dense", run.top1(dense, "dense"), macs, 1.0)]
    if args.compare_dense:
        task = ClassificationTask(
            dense, criterion_kwargs=run.criterion, device=run.device, verbose=False
        )
        fit(run, task, Stage("dense, as long", "compare-", args.epochs, args.lr))
        accuracy = run.top1(dense, "dense, as long")
        results.append(_measure.Result("dense, trained as long", accuracy, macs, 1.0))
    for label, found in (("converted", start), ("converted + fine-tuned", end)):
        results.append(_measure.Result(label, found.accuracy, found.ratio * macs, found.ratio))
    if args.rank == 0:
        dgefx.save(tuned, args.out / "model")
        draw(run, tuned, args.out / "granularity.png")
    title = f"{args.model}, gamma {args.gamma:g}, {args.epochs} epochs of fine-tuning"
    run.console.print(_measure.results_table(results, title))


def draw(run: Run, model: nn.Module, path: Path) -> None:
    """The granularities of a few test images."""
    config = run.config
    pictures = run.pictures()[:4]
    figure = dgefx.plot_granularity(model, pictures, mean=config["mean"], std=config["std"])
    figure.savefig(path, dpi=150)
    run.console.print(f"granularity map: {path}, model: {path.parent / 'model'}")


__all__ = ["main"]
