"""Train a vision transformer, halve its compute with dgefx, and measure what that costs and gains.

Without options: a PVT v2-B0 is trained from scratch on scikit-learn's digits (a few minutes on two
CPU cores, nothing is downloaded), converted to Dynamic Grained Encoder blocks at half its
multiply-accumulates, calibrated on a hundred unlabelled training images, timed compiled against the
dense model, and fine-tuned for a moment with the dense model as teacher. It ends with a table, and
with a picture of the granularity every image region was given.

    python examples/quickstart.py
    python examples/quickstart.py --model deit_tiny_patch16_224 --pretrained --data FOLDER

FOLDER has `train/CLASS/*.jpg` and `val/CLASS/*.jpg`, or one of the two, which is then split.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import (
    ClassificationTask,
    DistillationTeacher,
    LogitDistillationTask,
    TrainingTask,
)
from timm.utils import random_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import _data
import _measure
import dgefx

DIGITS_SIZE = 128
CALIBRATION_IMAGES = 100


def parse_args() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="pvt_v2_b0", help="any timm model (default: %(default)s)")
    add("--data", type=Path, help="image folder (default: scikit-learn's digits)")
    add("--pretrained", action="store_true", help="let timm load its weights; only fit the head")
    add("--gamma", type=float, default=0.5, help="share of the MACs to keep (default: %(default)s)")
    add("--epochs", type=int, help="training epochs (default: 5; with --data 20, or 3 for a head)")
    add("--finetune-epochs", type=int, default=2, help="after conversion (default: %(default)s)")
    add("--batch-size", type=int, default=32, help="(default: %(default)s)")
    add("--img-size", type=int, help="(default: 128 for the digits, else the model's own)")
    add("--out", type=Path, default=Path("quickstart-out"), help="(default: %(default)s)")
    add("--no-compile", action="store_true", help="time the models without torch.compile")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if not timm.is_model(args.model) and ":" not in args.model:
        near = ", ".join(timm.list_models(f"{args.model.split('_')[0]}*")[:8])
        parser.error(f"--model: timm has no {args.model!r}" + (f"; it has {near}" if near else ""))
    if not 0.0 < args.gamma <= 1.0:
        parser.error(f"--gamma must be above 0 and at most 1, not {args.gamma}")
    if min(args.batch_size, args.finetune_epochs + 1, (args.epochs or 0) + 1) < 1:
        parser.error("--batch-size must be positive, and no number of epochs negative")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is a file")
    try:
        args.device = torch.device(args.device)
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {error}")
    try:
        args.splits = load_splits(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def load_splits(args: argparse.Namespace) -> _data.Splits:
    """The digits, or the images under `--data`."""
    if args.data is None:
        args.img_size = args.img_size or DIGITS_SIZE
        return _data.digits(args.img_size, args.seed)
    return _data.image_folder(args.data, args.seed)


def build_model(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any], bool]:
    """The dense model, timm's data configuration for it, and whether its head is new."""
    cfg = timm.get_pretrained_cfg(args.model) if timm.is_model(args.model) else None
    extra: dict[str, Any] = {}
    if args.img_size and (cfg is None or cfg.fixed_input_size):
        extra["img_size"] = args.img_size  # other models take any size
    classes = len(args.splits.classes)
    model: Any = timm.create_model(
        args.model, pretrained=args.pretrained, num_classes=classes, **extra
    )
    options = {"img_size": args.img_size}
    if args.data is None:
        options["crop_pct"] = 1.0
    config = timm.data.resolve_data_config(options, model=model)
    new_head = model.pretrained_cfg["num_classes"] != classes
    return model.to(args.device), config, new_head


def run_epochs(
    task: TrainingTask,
    trained: nn.Module,
    loader: DataLoader[Any],
    epochs: int,
    lr: float,
    label: str,
) -> None:
    """Train `trained`, a part of `task`, with AdamW on a warmed-up cosine schedule."""
    total = epochs * len(loader)
    if total == 0:
        return
    optimizer = create_optimizer_v2(trained, opt="adamw", lr=lr, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(  # one step of the schedule per update
        optimizer,
        sched="cosine",
        num_epochs=total,
        warmup_epochs=total // 8,
        warmup_lr=lr / 100,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    parameters = [p for p in trained.parameters() if p.requires_grad]
    batches = (batch for _ in range(epochs) for batch in loader)
    bar = tqdm(batches, total=total, desc=label, unit="batch")
    for update, (images, targets) in enumerate(bar, start=1):
        loss = task(images.to(task.device), targets.to(task.device))["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step_update(update)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def train_dense(
    model: Any, loader: DataLoader[Any], args: argparse.Namespace, new_head: bool
) -> None:
    """From scratch; of a pretrained model only the head, and that only when it is new."""
    smoothing = {"smoothing": 0.1}
    task = ClassificationTask(model, criterion_kwargs=smoothing, device=args.device, verbose=False)
    if not args.pretrained:
        epochs = args.epochs if args.epochs is not None else (5 if args.data is None else 20)
        run_epochs(task.train(), model, loader, epochs, 1e-3, "train")
    elif new_head:
        epochs = args.epochs if args.epochs is not None else 3
        model.requires_grad_(False)
        classifier = model.get_classifier()  # a tuple in models with a distillation head
        heads = classifier if isinstance(classifier, tuple) else (classifier,)
        head = nn.ModuleList(heads).requires_grad_(True)
        run_epochs(task.eval(), head, loader, epochs, 1e-2, "fit the head")
        model.requires_grad_(True)


def finetune(
    converted: nn.Module, dense: nn.Module, loader: DataLoader[Any], args: argparse.Namespace
) -> None:
    """Cross-entropy plus KL to the dense model's logits."""
    teacher = DistillationTeacher(dense, device=args.device)
    task = LogitDistillationTask(converted, teacher, device=args.device, verbose=False)
    run_epochs(task.train(), converted, loader, args.finetune_epochs, 2e-4, "fine-tune")


def measure(
    model: nn.Module,
    converted: nn.Module,
    loaders: tuple[DataLoader[Any], DataLoader[Any]],
    args: argparse.Namespace,
    problem: str | None,
) -> list[_measure.Row]:
    """Accuracy and paired compiled times: dense, converted, and converted after fine-tuning."""
    train_loader, test_loader = loaders
    images = next(iter(test_loader))[0].to(args.device)
    report = dgefx.report(converted)
    fast_dense = model if problem else torch.compile(model)
    fast_converted = converted if problem else torch.compile(converted, fullgraph=True)

    def row(label: str) -> _measure.Row:
        accuracy = _measure.top1(converted, test_loader, args.device, label)
        speed = _measure.compare(fast_dense, fast_converted, images)
        dense_ms.append(speed.dense_ms)
        return _measure.Row(
            label, accuracy, report.macs, report.ratio, speed.other_ms, speed.speed_up
        )

    dense_ms: list[float] = []
    dense_accuracy = _measure.top1(model, test_loader, args.device, "dense")
    rows = [row("converted")]
    if args.finetune_epochs:
        finetune(converted, model, train_loader, args)
        rows.append(row("converted + fine-tuned"))
    dense = _measure.Row("dense", dense_accuracy, report.macs_dense, 1.0, min(dense_ms), 1.0)
    return [dense, *rows]


def run(args: argparse.Namespace) -> None:
    """Train, convert, measure, fine-tune, measure again, and draw."""
    console = Console()
    model, config, new_head = build_model(args)
    train_loader = _data.loader(args.splits, config, args.batch_size, args.device, training=True)
    test_loader = _data.loader(args.splits, config, args.batch_size, args.device, training=False)
    train_dense(model, train_loader, args, new_head)
    model.eval()

    console.print(f"converting {args.model} to {args.gamma:g} of its MACs ...", highlight=False)
    images = next(iter(test_loader))[0][:4].to(args.device)
    converted = dgefx.convert(model, gamma=args.gamma, example_inputs=images[:2])
    dgefx.calibrate(converted, train_loader, max_images=CALIBRATION_IMAGES)
    print(dgefx.report(converted))

    problem = "--no-compile" if args.no_compile else _measure.compile_problem(args.device)
    if problem:
        console.print(f"timing the models without torch.compile: {problem}", highlight=False)
    rows = measure(model, converted, (train_loader, test_loader), args, problem)
    timing = "eager" if problem else "compiled"
    title = f"{args.model}, {timing}, batches of {args.batch_size} on {args.device}"
    console.print(_measure.table(rows, title))

    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "granularity.png"
    figure = dgefx.plot_granularity(converted, images, mean=config["mean"], std=config["std"])
    figure.savefig(picture, dpi=150)
    curves = args.out / "sensitivity.png"
    dgefx.plot_sensitivity(converted).savefig(curves, dpi=150)
    console.print(f"granularity map: {picture}, layer curves: {curves}", highlight=False)


def main() -> None:
    """Entry point."""
    args = parse_args()
    random_seed(args.seed)
    run(args)


if __name__ == "__main__":
    main()
