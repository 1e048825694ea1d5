"""Accuracy without any training: calibrated dgefx against ToMe, on the same images and MAC counter.

    python benchmarks/calibration.py DeiT-Tiny-weights.safetensors IMAGES --json out.json

IMAGES has `train/WNID/*` and `val/WNID/*` (Imagenette, say). Prints, per MAC ratio, top-1 over all
1000 classes: dgefx with shares guessed from depth, dgefx calibrated once at `--gamma` and then only
`set_budget` (with the corrections refined and without), dgefx calibrated at each ratio, and token
merging (`benchmarks/tome.py`). With `--split`, it is calibrated on every other class only, and the
rows are printed for these classes and for the others.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path

import timm
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from timm.data import ImageNetInfo, create_transform
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import dgefx
from dgefx.nn import DGEBlock
from dgefx.nn.capacity import plans
from tome import ToMe, even_schedule

RATIOS = (0.35, 0.4, 0.48, 0.5, 0.6, 0.7, 0.8, 0.9)


def find_images(folder: Path) -> tuple[list[Path], Tensor]:
    """Image files in a fixed random order, and their ImageNet classes."""
    classes = {wnid: i for i, wnid in enumerate(sorted(ImageNetInfo().label_names()))}
    files = sorted(folder.glob("*/*.*"))
    random.Random(0).shuffle(files)
    return files, torch.tensor([classes[f.parent.name] for f in files])


def load_images(files: list[Path]) -> Tensor:
    """(N, 3, 224, 224)."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    transform = create_transform(224, crop_pct=1.0, interpolation="bicubic", mean=mean, std=std)
    return torch.stack([transform(Image.open(f).convert("RGB")) for f in tqdm(files, desc="read")])


@torch.inference_mode()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of all images."""
    return torch.cat([model(batch) for batch in images.split(50)])


def measured_macs(model: nn.Module, images: Tensor) -> int:
    """MACs per image by torch's counter."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images[:2])
    return counter.get_total_flops() // 4


def merging_at(model: nn.Module, ratio: float, images: Tensor, dense: int) -> ToMe:
    """The ToMe model with the largest measured ratio not above `ratio`."""
    depth = len(model.blocks)
    low, high = 0, 40 * depth  # high merges all that can be merged
    while high - low > 1:
        middle = (low + high) // 2
        found = measured_macs(ToMe(model, even_schedule(middle, depth)), images) / dense
        low, high = (low, middle) if found <= ratio else (middle, high)
    return ToMe(model, even_schedule(high, depth))


def equal_shares(model: nn.Module, ratio: float, images: Tensor, dense: int) -> nn.Module:
    """A converted model with the same share of slots in every block, at most `ratio`."""
    routers = [m.dge_router for m in model.modules() if type(m) is DGEBlock]
    found = plans(routers[0].space(routers[0].grid), routers[0].config)
    low, high = 0, len(found) - 1
    while low < high:
        middle = (low + high + 1) // 2
        for router in routers:
            router.plan = found[middle]
        fits = measured_macs(model, images) / dense <= ratio
        low, high = (middle, high) if fits else (low, middle - 1)
    for router in routers:
        router.plan = found[low]
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, help="safetensors of the timm model")
    parser.add_argument("images", type=Path, help="folder with train/ and val/")
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--calibration-images", type=int, default=100)
    parser.add_argument("--gamma", type=float, default=0.5, help="calibrate once at")
    parser.add_argument("--each", type=float, nargs="*", default=[], help="also calibrate at these")
    parser.add_argument("--equal", type=float, nargs="*", default=[], help="equal shares at these")
    parser.add_argument("--ratios", type=float, nargs="*", default=RATIOS)
    parser.add_argument("--split", action="store_true", help="calibrate on half of the classes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    dense = timm.create_model(args.model).eval()
    dense.load_state_dict(load_file(args.weights))
    train, train_labels = find_images(args.images / "train")
    val, labels = find_images(args.images / "val")
    groups = {"all": torch.ones_like(labels, dtype=torch.bool)}
    if args.split:
        classes = labels.unique()[::2]
        seen = torch.isin(train_labels, classes).tolist()
        train = [file for file, known in zip(train, seen, strict=True) if known]
        groups = {"calibrated on": torch.isin(labels, classes)}
        groups["others"] = ~groups["calibrated on"]
    calibration, images = load_images(train[: args.calibration_images]), load_images(val)
    macs = measured_macs(dense, images)
    reference = outputs(dense, images)
    correct = reference.argmax(1) == labels
    top1 = {name: 100 * float(correct[group].float().mean()) for name, group in groups.items()}
    rows: list[dict[str, float | str]] = []

    def add(label: str, model: nn.Module, asked: float) -> None:
        found = outputs(model, images)
        right = found.argmax(1) == labels
        logs, other = reference.log_softmax(-1), found.log_softmax(-1)
        distance = (logs.exp() * (logs - other)).sum(-1)
        for name, group in groups.items():
            accuracy = 100 * float(right[group].float().mean())
            row = {
                "method": label,
                "classes": name,
                "asked": asked,
                "ratio": measured_macs(model, images) / macs,
                "top-1": accuracy,
                "drop": top1[name] - accuracy,
                "KL": float(distance[group].mean()),
            }
            rows.append(row)
            tqdm.write(str({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}))

    guessed = dgefx.convert(dense, args.gamma)
    start = time.perf_counter()
    calibrated = dgefx.calibrate(copy.deepcopy(guessed), calibration)
    seconds = time.perf_counter() - start
    plain = dgefx.calibrate(copy.deepcopy(guessed), calibration, refine_passes=0)
    for ratio in args.ratios:
        if ratio in args.equal:
            add("equal shares", equal_shares(guessed, ratio, images, macs), ratio)
        add("guessed", dgefx.set_budget(guessed, ratio), ratio)
        add(f"calibrated at {args.gamma:g}", dgefx.set_budget(calibrated, ratio), ratio)
        add("calibrated, not refined", dgefx.set_budget(plain, ratio), ratio)
        add("ToMe", merging_at(dense, ratio, images, macs), ratio)
    for ratio in args.each:
        add("calibrated at each", dgefx.convert(dense, ratio, calibration=calibration), ratio)
    shown = ", ".join(f"{name} {value:.2f} %" for name, value in top1.items())
    table = Table(title=f"dense: {shown}; calibration {seconds:.0f} s, torch {torch.__version__}")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(v if isinstance(v, str) else f"{v:.3f}" for v in row.values()))
    Console(width=120).print(table)
    if args.json:
        result = {"dense top-1": top1, "calibration seconds": seconds, "rows": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
