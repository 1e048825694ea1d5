"""Draw which granularity a converted model gives the regions of a photograph.

The photograph is one of the two that scikit-learn ships; the model is any of timm's with pretrained
weights, at a larger image than it was trained on, so that the map has more to show.

    python examples/photograph.py
    python examples/photograph.py --weights MODEL.safetensors --calibrate FOLDER

FOLDER holds images, at any depth; without it every block's share of the compute is a guess from its
depth. `docs/granularity.png` was made without it.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_transform
from torch import Tensor, nn

import dgefx

SIZE = (384, 576)  # the photographs are 427 x 640


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--photograph", choices=("china.jpg", "flower.jpg"), default="china.jpg")
    add("--model", default="deit_tiny_patch16_224", help="of timm (default: %(default)s)")
    add("--weights", type=Path, help="safetensors of the model (default: timm loads its own)")
    add("--gamma", type=float, default=0.5, help="share of the MACs to keep (default: %(default)s)")
    add("--calibrate", type=Path, help="folder of images to calibrate on")
    add("--calibration-images", type=int, default=12, help="(default: %(default)s)")
    add("--blocks", type=int, default=2, help="columns of the picture (default: %(default)s)")
    add("--out", type=Path, default=Path("granularity.png"), help="(default: %(default)s)")
    return parser.parse_args()


def build_model(name: str, weights: Path | None) -> nn.Module:
    """The dense model at `SIZE`, position embeddings resampled by timm."""
    overlay = None if weights is None else {"file": str(weights)}
    model = timm.create_model(name, pretrained=True, img_size=SIZE, pretrained_cfg_overlay=overlay)
    return model.eval()


def calibration_images(folder: Path, count: int, transform: nn.Module) -> Tensor:
    """`count` images drawn from all under `folder`, (count, 3, height, width)."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise SystemExit(f"--calibrate: no images under {folder}")
    random.Random(0).shuffle(files)
    return torch.stack([transform(Image.open(f).convert("RGB")) for f in files[:count]])


def main() -> None:
    """Entry point."""
    args = parse_args()
    model = build_model(args.model, args.weights)
    config = timm.data.resolve_model_data_config(model)
    mean, std = config["mean"], config["std"]
    transform = create_transform((3, *SIZE), mean=mean, std=std, crop_pct=1.0)
    photograph = transform(Image.fromarray(load_sample_image(args.photograph)))[None]

    converted = dgefx.convert(model, args.gamma, example_inputs=photograph)
    if args.calibrate is not None:
        images = calibration_images(args.calibrate, args.calibration_images, transform)
        # corrections change the update of coarse patches, not the map: left out for time
        dgefx.calibrate(converted, images, batch_size=4, correction_rank=0, refine_passes=0)
    print(dgefx.report(converted))
    with torch.inference_mode():
        for label, net in (("dense", model), ("converted", converted)):
            probability, answer = net(photograph).softmax(-1).max(-1)
            print(f"{label}: class {answer.item()}, p = {probability.item():.2f}")

    figure = dgefx.plot_granularity(converted, photograph, blocks=args.blocks, mean=mean, std=std)
    figure.savefig(args.out, dpi=150, bbox_inches="tight")
    Image.open(args.out).convert("RGB").quantize(256).save(args.out, optimize=True)  # a third
    print(f"granularity map: {args.out}")


if __name__ == "__main__":
    main()
