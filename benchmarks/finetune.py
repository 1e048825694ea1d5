"""Accuracy after a short fine-tuning, on real weights: top-1 over 1000 classes, step by step.

    python benchmarks/finetune.py DeiT-Tiny-weights.safetensors IMAGES --gamma 0.5 0.4

IMAGES has `train/WNID/*` and `val/WNID/*` (Imagenette, say). A model of pretrained weights is
converted, calibrated on a hundred training images (with `--router linear` its gates are fitted to
them), and fine-tuned on the training images with the dense model as its only teacher: no labels are
used, since with the labels of ten classes any model would learn to answer with these ten alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import Tensor, nn

import _common as common
import dgefx
from calibration import find_images, load_images, outputs
from dgefx.training import (
    FinetuneTask,
    GateSchedule,
    fit_gates,
    param_groups,
    set_gates,
    settle_gates,
    train,
)

SETTLING_IMAGES = 256


class Chunks:
    """So many batches at a time from a loader without end: `train` evaluates between them."""

    def __init__(self, loader: Any, count: int) -> None:
        self.loader, self.count = loader, count
        self.endless = self._endless()

    def _endless(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return (next(self.endless) for _ in range(self.count))


def training_batches(folder: Path, batch_size: int, workers: int) -> Any:
    """Random crops and mirror images of the training images, as timm makes them."""
    return create_loader(
        create_dataset("", str(folder), search_split=False),
        input_size=(3, 224, 224),
        batch_size=batch_size,
        is_training=True,
        scale=(0.35, 1.0),
        color_jitter=0.0,
        interpolation="bicubic",
        num_workers=workers,
        persistent_workers=workers > 0,
        use_prefetcher=False,
    )


def config_of(args: argparse.Namespace) -> dgefx.DGEConfig:
    return dgefx.DGEConfig(
        router=args.router,
        routing=args.routing,
        budget=args.budget,
        capacity=None if args.capacity == "none" else "budget",
    )


def recover(
    dense: nn.Module, gamma: float, args: argparse.Namespace, val: tuple[Tensor, Tensor]
) -> list[dict[str, Any]]:
    """One conversion and its fine-tuning: a row per evaluation."""
    random_seed(args.seed)
    images, labels = val
    model = dgefx.convert(dense, gamma, example_inputs=images[:2], config=config_of(args))
    files, _ = find_images(args.images / "train")
    calibration = load_images(files[: args.calibration_images])
    if args.router == "detail":
        dgefx.calibrate(model, calibration)
    elif not args.fresh_gates:
        fit_gates(model, calibration)
        dgefx.calibrate(model, calibration, correction_rank=0, refine_passes=0)
        fit_gates(model, calibration)
    steps = args.steps
    schedule = GateSchedule(
        gamma,
        steps,
        warmup=args.gamma_warmup,
        temperature=tuple(args.temperature),
        noise=args.noise,
    )
    rows: list[dict[str, Any]] = []

    def evaluate(step: int) -> None:
        model.eval()
        accuracy = 100 * float((outputs(model, images).argmax(1) == labels).float().mean())
        ratio = dgefx.measured_ratio(model, images, max_images=args.ratio_images)
        rows.append(
            {
                "gamma": gamma,
                "step": step,
                "ratio": ratio,
                "top-1": accuracy,
                "seconds": time.perf_counter() - start,
            }
        )
        print(rows[-1], flush=True)

    start = time.perf_counter()
    evaluate(0)  # before any schedule: at gamma
    task = FinetuneTask(
        model,
        task_loss_weight=0.0,
        budget_loss_weight=args.budget_loss_weight,
        schedule=schedule,
    )
    set_gates(model, path=args.path)
    optimizer = create_optimizer_v2(
        param_groups(model, weight_decay=0.05, gate_lr_scale=args.gate_lr_scale),
        opt="adamw",
        lr=args.lr,
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=steps,
        warmup_epochs=steps // 20,
        warmup_lr=args.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    chunks = Chunks(
        training_batches(args.images / "train", args.batch_size, args.workers), args.every
    )
    last = steps // args.every

    def after_epoch(epoch: int) -> None:
        if epoch + 1 == last and args.router == "linear":
            settle_gates(model, load_images(files[-SETTLING_IMAGES:]))
        evaluate((epoch + 1) * args.every)

    train(
        task,
        chunks,
        optimizer,
        scheduler,
        epochs=last,
        after_epoch=after_epoch,
        seed=args.seed,
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("weights", type=Path, help="safetensors of the timm model")
    add("images", type=Path, help="folder with train/ and val/")
    add("--model", default="deit_tiny_patch16_224")
    add("--gamma", type=float, nargs="*", default=[0.5, 0.4])
    add("--steps", type=int, default=200)
    add("--every", type=int, default=50, help="steps between evaluations")
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=1e-4)
    add("--router", choices=("detail", "linear"), default="detail")
    add("--routing", choices=("nested", "region", "layer"))
    add("--budget", choices=("per_image", "average"), default="per_image")
    add("--capacity", choices=("budget", "none"), default="budget")
    add("--path", choices=("sparse", "dense"), default="sparse")
    add("--noise", type=float, default=0.0)
    add("--temperature", type=float, nargs=2, default=(1.0, 1.0))
    add("--gamma-warmup", type=float, default=0.0)
    add("--budget-loss-weight", type=float, default=20.0)
    add("--gate-lr-scale", type=float, default=10.0)
    add("--fresh-gates", action="store_true", help="start gates nearly closed, as in the paper")
    add("--calibration-images", type=int, default=100)
    add("--ratio-images", type=int, default=256, help="validation images to measure the ratio on")
    add("--val-images", type=int, help="(default: all)")
    add("--workers", type=int, default=0)
    add("--seed", type=int, default=0)
    add("--json", type=Path)
    args = parser.parse_args()

    dense = timm.create_model(args.model).eval()
    dense.load_state_dict(load_file(args.weights))
    files, labels = find_images(args.images / "val")
    val = load_images(files[: args.val_images]), labels[: args.val_images]
    accuracy = 100 * float((outputs(dense, val[0]).argmax(1) == val[1]).float().mean())
    rows = [{"gamma": 1.0, "step": 0, "ratio": 1.0, "top-1": accuracy}]
    print(rows[0], flush=True)
    for gamma in args.gamma:
        rows += recover(dense, gamma, args, val)
    for row in rows:
        row["drop"] = accuracy - row["top-1"]
    columns = ("gamma", "step", "ratio", "top-1", "drop", "seconds")
    common.print_table(f"{args.model}, dense {accuracy:.1f} %", columns, rows)
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("weights", "images", "json")}
    common.write_json(args.json, common.environment(torch.device("cpu")), rows, settings=settings)


if __name__ == "__main__":
    main()
