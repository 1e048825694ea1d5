"""The command line of the fine-tuning examples: what it offers, and what it refuses.

`parse` is called by `_recipe.main` with the defaults of one example.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import ParseKwargs

import _data
import dgefx

# What may differ between a run and its resumption without changing the curve.
_FREE = (
    "compare_dense",
    "compile",
    "device",
    "out",
    "overwrite",
    "resume",
    "stop_after_epoch",
    "tensorboard",
    "workers",
)


@dataclass(frozen=True)
class Defaults:
    """What one example stands for.

    `img_size` and `model_kwargs` go with the embedded digits and the example's own model only.
    """

    description: str
    model: str
    out: str
    epochs: int
    img_size: int
    config: dgefx.DGEConfig
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    dense_epochs: int = 5
    lr: float = 2e-4
    gamma_warmup: float = 0.0
    noise: float = 0.0
    path: str = "sparse"


def parse(defaults: Defaults, argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked; adds `splits` (images) and `config` (a `DGEConfig`)."""
    parser = _parser(defaults)
    args = parser.parse_args(argv)
    problem = (
        _check_model(args)
        or _check_numbers(args)
        or _check_files(args)
        or _check_config(args, defaults)
    )
    if problem:
        parser.error(problem)
    own = not (args.pretrained or args.weights or args.model_kwargs or args.data)
    if own and args.model == defaults.model:
        args.model_kwargs = dict(defaults.model_kwargs)
    if args.img_size is None and args.data is None:
        args.img_size = defaults.img_size
    try:
        if args.data is None:
            args.splits = _data.digits(args.img_size, args.seed)
        else:
            args.splits = _data.image_folder(args.data, args.seed)
    except ValueError as error:
        parser.error(str(error))
    if problem := _check_resume(args):
        parser.error(problem)
    return args


def _parser(defaults: Defaults) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=defaults.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_model(parser.add_argument_group("model and images"), defaults)
    _add_conversion(parser.add_argument_group("conversion"), defaults)
    _add_training(parser.add_argument_group("fine-tuning"), defaults)
    _add_run(parser.add_argument_group("run"), defaults)
    return parser


def _add_model(group: Any, defaults: Defaults) -> None:
    add = group.add_argument
    add("--model", default=defaults.model, help="any timm model (default: %(default)s)")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="NAME=VALUE")
    add("--pretrained", action="store_true", help="let timm load its weights")
    add("--weights", type=Path, help="file with weights of the dense model, instead")
    add("--data", type=Path, help="image folder (default: scikit-learn's digits)")
    add("--img-size", type=int, help=f"(default: {defaults.img_size} for digits, or the model's)")
    add("--batch-size", type=int, default=32, help="per process (default: %(default)s)")
    add("--workers", type=int, help="processes that load images (default: up to 8; digits: none)")
    add(
        "--dense-epochs",
        type=int,
        help="training of the dense model before the conversion "
        f"(default: {defaults.dense_epochs} from scratch, 3 with a new head, else 0)",
    )
    add("--dense-lr", type=float, help="(default: 1e-3 from scratch, else that of --lr)")


def _add_conversion(group: Any, defaults: Defaults) -> None:
    add, config = group.add_argument, defaults.config
    add("--gamma", type=float, default=0.5, help="share of the MACs to keep (default: %(default)s)")
    add("--router", choices=("detail", "linear"), help=f"(default: {config.router})")
    add("--routing", choices=("nested", "region", "layer"), help=f"({config.routing_mode})")
    add("--budget", choices=("per_image", "average"), help=f"(default: {config.budget})")
    add("--capacity", choices=("budget", "none"), help=f"(default: {config.capacity or 'none'})")
    add("--calibration-images", type=int, default=100, help="(default: %(default)s)")
    add("--fresh-gates", action="store_true", help="start gates nearly closed, as in the paper")


def _add_training(group: Any, defaults: Defaults) -> None:
    add = group.add_argument
    add("--epochs", type=int, default=defaults.epochs, help="(default: %(default)s)")
    add("--lr", type=float, default=defaults.lr, help="(default: %(default)s)")
    add("--warmup", type=float, default=0.1, help="share of the updates (default: %(default)s)")
    add("--weight-decay", type=float, default=0.05, help="(default: %(default)s)")
    add("--layer-decay", type=float, help="learning rate of a layer over that of the next")
    add("--gate-lr-scale", type=float, default=10.0, help="(default: %(default)s)")
    add(
        "--gamma-warmup",
        type=float,
        default=defaults.gamma_warmup,
        help="share of the updates in which gamma falls from 1 (default: %(default)s)",
    )
    add(
        "--noise",
        type=float,
        default=defaults.noise,
        help="share of the updates with Gumbel noise in the gates (default: %(default)s)",
    )
    add(
        "--path",
        choices=("sparse", "dense"),
        default=defaults.path,
        help="what gates are trained on: the chosen queries or all (default: %(default)s)",
    )
    add(
        "--budget-weight",
        type=float,
        default=20.0,
        help="of the budget loss (default: %(default)s)",
    )
    add("--distill-weight", type=float, default=1.0, help="of the teacher (default: %(default)s)")
    add("--smoothing", type=float, default=0.1, help="of the labels (default: %(default)s)")
    add("--mixup", type=float, default=0.0, help="alpha (default: off)")
    add("--cutmix", type=float, default=0.0, help="alpha (default: off)")
    add("--clip-grad", type=float, default=1.0, help="largest norm, 0: off (default: %(default)s)")
    add("--accumulate", type=int, default=1, help="batches per update (default: %(default)s)")
    add("--ema", type=float, metavar="DECAY", help="average the weights, keep the average")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--compile", action="store_true", help="torch.compile model and teacher")
    add("--fsdp", action="store_true", help="with torchrun: shard the converted model (else DDP)")


def _add_run(group: Any, defaults: Defaults) -> None:
    add = group.add_argument
    add("--out", type=Path, default=Path(defaults.out), help="folder (default: %(default)s)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="start afresh over the run in --out")
    add("--stop-after-epoch", type=int, metavar="N", help="stop early, to be resumed")
    add("--limit-batches", type=int, metavar="N", help="per epoch and test, for quick tries")
    add("--compare-dense", action="store_true", help="fine-tune the dense model as long, too")
    add("--tensorboard", action="store_true", help="also write curves for TensorBoard")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)


def _check_model(args: argparse.Namespace) -> str | None:
    if not timm.is_model(args.model) and ":" not in args.model:
        near = ", ".join(timm.list_models(f"{args.model.split('_')[0]}*")[:8])
        return f"--model: timm has no {args.model!r}" + (f"; it has {near}" if near else "")
    if args.pretrained and args.weights:
        return "--pretrained and --weights: give one of the two"
    if args.weights and not args.weights.is_file():
        return f"--weights: no such file: {args.weights}"
    return None


def _check_numbers(args: argparse.Namespace) -> str | None:
    def given(*names: str) -> list[tuple[str, Any]]:
        found = [(name, getattr(args, name.replace("-", "_"))) for name in names]
        return [(name, value) for name, value in found if value is not None]

    for name, value in given(
        "batch-size",
        "img-size",
        "accumulate",
        "limit-batches",
        "stop-after-epoch",
        "calibration-images",
    ):
        if value < 1:
            return f"--{name} must be at least 1, not {value}"
    for name, value in given(
        "epochs",
        "dense-epochs",
        "workers",
        "weight-decay",
        "clip-grad",
        "mixup",
        "cutmix",
        "budget-weight",
        "distill-weight",
    ):
        if not value >= 0:
            return f"--{name} must not be negative, not {value}"
    for name, value in given("lr", "dense-lr", "gate-lr-scale"):
        if not value > 0:
            return f"--{name} must be positive, not {value}"
    for name, value in given("gamma", "layer-decay"):
        if not 0 < value <= 1:
            return f"--{name} must be above 0 and at most 1, not {value}"
    for name, value in given("warmup", "gamma-warmup", "noise"):
        if not 0 <= value <= 1:
            return f"--{name} is a share of the updates, from 0 to 1, not {value}"
    for name, value in given("smoothing", "ema"):
        if not 0 <= value < 1:
            return f"--{name} must be at least 0 and under 1, not {value}"
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        return f"--mixup and --cutmix mix pairs; --batch-size must be even, not {args.batch_size}"
    return None


def _check_files(args: argparse.Namespace) -> str | None:
    if args.out.exists() and not args.out.is_dir():
        return f"--out: {args.out} is a file"
    if args.resume and args.overwrite:
        return "--resume and --overwrite: give one of the two"
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        return f"--device {args.device}: {error}"
    return None


def _check_config(args: argparse.Namespace, defaults: Defaults) -> str | None:
    """Set `args.config`: the example's, with what the command line says otherwise."""
    base = defaults.config
    router = args.router or base.router
    budget = args.budget or base.budget
    if args.capacity is not None:
        capacity = None if args.capacity == "none" else "budget"
    else:  # free gates only where there are any
        capacity = base.capacity if (budget, router) == ("average", "linear") else "budget"
    routing = args.routing or (base.routing if router == base.router else None)
    try:
        args.config = dgefx.DGEConfig(
            router=router, budget=budget, capacity=capacity, routing=routing
        )
    except ValueError as error:
        return f"--router, --routing, --budget, --capacity: {error}"
    return None


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What determines the curve, in JSON's terms."""
    values = {k: v for k, v in vars(args).items() if k not in (*_FREE, "splits", "config")}
    values["config"] = args.config.to_dict()
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def settings_file(args: argparse.Namespace) -> Path:
    """Where a run keeps its settings."""
    return Path(args.out) / "settings.json"


def _check_resume(args: argparse.Namespace) -> str | None:
    path = settings_file(args)
    if not args.resume:
        if path.exists() and not args.overwrite:
            return (
                f"--out: {args.out} holds a run already; --resume goes on with it, --overwrite "
                f"starts afresh, or name another folder"
            )
        return None
    if not path.is_file():
        return f"--resume: there is no run in {args.out}"
    then, now = json.loads(path.read_text()), settings(args)
    differing = [key for key in now if then.get(key) != now[key]]
    if differing:
        said = ", ".join(
            f"--{key.replace('_', '-')} was {then.get(key)!r} and is {now[key]!r}"
            for key in differing
        )
        return f"--resume: the run in {args.out} had other settings: {said}"
    return None


__all__ = ["Defaults", "parse", "settings", "settings_file"]
