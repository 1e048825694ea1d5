"""Time of a training step: forward, backward and optimiser, converted against dense.

    python benchmarks/training_step.py --gamma 0.5

Both steps are called in turn in one run, on the same batch, and the share is the median of paired
quotients; beside it the share of the MACs that is left, which is what the time could be at best.
`--teacher` adds the dense teacher's forward to the converted model's step.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import _common as common
import dgefx
from dgefx.training import FinetuneTask, set_gates
from dgefx.training.optim import param_groups

MODELS = ("deit_tiny_patch16_224", "vit_small_patch16_224", "swin_tiny_patch4_window7_224")


def make_step(model: nn.Module, task: nn.Module, x: Tensor, y: Tensor) -> Any:
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-5))

    def step() -> None:
        optimizer.zero_grad()
        task(x, y)["loss"].backward()
        optimizer.step()

    return step


def measure(name: str, mode: str, args: argparse.Namespace, device: torch.device) -> common.Row:
    torch.manual_seed(0)
    dense = timm.create_model(name).to(device)
    size = dense.pretrained_cfg["input_size"]
    x = torch.randn(args.batch_size, *size, device=device)
    y = torch.randint(0, 1000, (args.batch_size,), device=device)
    config = dgefx.DGEConfig(router=args.router)
    model = dgefx.convert(dense, args.gamma, example_inputs=x[:2], config=config)
    set_gates(model, path=args.path)
    own = FinetuneTask(model, teacher="dense" if args.teacher else None, verbose=False).train()
    # the same task around a model with nothing to save: only the model differs
    whole = timm.task.ClassificationTask(dense, device=device, verbose=False).train()
    if mode == "compiled":
        own.compile()
        whole.compile()
    steps = {"dense": make_step(dense, whole, x, y), "converted": make_step(model, own, x, y)}
    for step in steps.values():
        for _ in range(2):
            step()
    calls = {key: functools.partial(step) for key, step in steps.items()}
    times = common.wall_times(calls, device, args.runs, args.seconds)
    share = 1 / common.speed_up(times["dense"], times["converted"])
    return {
        "model": name,
        "mode": mode,
        "gamma": args.gamma,
        "MAC ratio": dgefx.report(model).ratio,
        "dense ms": statistics.median(times["dense"]),
        "converted ms": statistics.median(times["converted"]),
        "time ratio": share,
        "rounds": len(times["dense"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="*", default=MODELS)
    add("--modes", nargs="*", default=("eager", "compiled"), choices=("eager", "compiled"))
    add("--gamma", type=float, default=0.5)
    add("--router", choices=("detail", "linear"), default="detail")
    add("--path", choices=("sparse", "dense"), default="sparse")
    add("--batch-size", type=int, default=16)
    add("--runs", type=int, default=15)
    add("--seconds", type=float, default=90.0, help="limit of the timing of one row")
    add("--teacher", action="store_true")
    add("--device", default=common.default_device())
    add("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = []
    for name in args.models:
        for mode in args.modes:
            rows.append(measure(name, mode, args, device))
            print(rows[-1], flush=True)
    common.print_table(f"training step, batch {args.batch_size}, {device}", list(rows[0]), rows)
    common.write_json(args.json, common.environment(device), rows)


if __name__ == "__main__":
    main()
