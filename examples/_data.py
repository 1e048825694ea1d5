"""Data for the examples: scikit-learn's digits or a folder of images, through timm.data."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import ImageDataset, create_dataset, create_loader
from torch.utils.data import DataLoader, Dataset

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "valid", "validation", "test")


class Digits(Dataset[tuple[torch.Tensor, int]]):
    """scikit-learn's 1797 hand-written digits (8 x 8 pixels), framed and enlarged."""

    def __init__(self, images: np.ndarray, targets: np.ndarray, size: int) -> None:
        pixels = (images * (255.0 / 16.0)).round().astype(np.uint8)
        pixels = np.pad(pixels, ((0, 0), (1, 1), (1, 1)))  # the strokes touch the border
        self.images = [
            Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")
            for image in pixels
        ]
        self.targets = targets.tolist()
        self.transform: Any = None  # timm's create_loader sets it

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.targets[index]


@dataclass(frozen=True)
class Splits:
    """A training and a test set of labelled images, and the augmentation that suits them."""

    train: Dataset[Any]
    test: Dataset[Any]
    classes: tuple[str, ...]
    augmentation: dict[str, Any]
    workers: int


def digits(size: int, seed: int) -> Splits:
    """Four fifths of the digits to train on, the rest to test on; nothing is downloaded."""
    bunch = load_digits()
    parts = train_test_split(
        bunch.images, bunch.target, test_size=0.2, random_state=seed, stratify=bunch.target
    )
    train_images, test_images, train_targets, test_targets = parts
    # Small shifts and zooms only: a digit must neither be mirrored nor recoloured.
    augmentation = {"scale": (0.8, 1.0), "ratio": (0.9, 1.1), "hflip": 0.0, "color_jitter": 0.0}
    return Splits(
        train=Digits(train_images, train_targets, size),
        test=Digits(test_images, test_targets, size),
        classes=tuple(str(name) for name in bunch.target_names),
        augmentation=augmentation,
        workers=0,
    )


def _find(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _split(dataset: ImageDataset, root: Path, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """Divide one folder of classes: four fifths to train on, one fifth to test on."""
    samples = dataset.reader.samples
    targets = [target for _, target in samples]
    other = create_dataset("", str(root), search_split=False)
    try:
        dataset.reader.samples, other.reader.samples = train_test_split(
            samples, test_size=0.2, random_state=seed, stratify=targets
        )
    except ValueError as error:
        raise ValueError(f"cannot split the images under {root}: {error}") from error
    return dataset, other


def image_folder(folder: Path, seed: int) -> Splits:
    """Images in ``folder/train/CLASS`` and ``folder/val/CLASS``; a lone split is divided in two.

    Raises ValueError with a message for the user when the folder has another layout.
    """
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}")
    train_root, test_root = _find(folder, TRAIN_NAMES), _find(folder, TEST_NAMES)
    root = train_root or test_root or folder
    try:
        train = create_dataset("", str(root), search_split=False)
        class_to_idx: dict[str, int] = train.reader.class_to_idx
        if train_root and test_root:
            test = create_dataset("", str(test_root), class_map=class_to_idx, search_split=False)
        else:
            train, test = _split(train, root, seed)
    except RuntimeError as error:  # timm's "Found 0 images in subfolders of ..."
        raise ValueError(str(error)) from error
    if len(class_to_idx) < 2:
        raise ValueError(
            f"{root} holds {len(class_to_idx)} class; expected one sub-folder of images per class, "
            f"as in {folder / 'train' / 'CLASS'} and {folder / 'val' / 'CLASS'}"
        )
    workers = min(8, os.cpu_count() or 1)
    return Splits(train, test, tuple(class_to_idx), {"scale": (0.5, 1.0)}, workers)


def loader(
    splits: Splits,
    config: dict[str, Any],
    batch_size: int,
    device: torch.device,
    training: bool,
    *,
    distributed: bool = False,
    fresh_workers: bool = False,
) -> DataLoader[Any]:
    """Batches of one split, transformed as timm's data ``config`` of the model asks.

    Args:
        batch_size: per process.
        distributed: every process gets its part of the images.
        fresh_workers: start the workers anew every epoch, so that their random numbers follow from
            the epoch's seed and a resumed run repeats them.
    """
    dataset: Any = splits.train if training else splits.test
    if training and len(dataset) < batch_size:
        raise SystemExit(f"{len(dataset)} training images do not fill one batch of {batch_size}")
    return create_loader(
        dataset,
        input_size=config["input_size"],
        batch_size=batch_size,
        is_training=training,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        num_workers=splits.workers,
        persistent_workers=splits.workers > 0 and not fresh_workers,
        pin_memory=device.type == "cuda",
        use_prefetcher=False,
        distributed=distributed,
        device=device,
        **(splits.augmentation if training else {}),
    )


def plain(dataset: Any, config: dict[str, Any], device: torch.device) -> Any:
    """A training set without augmentation: its images as the model is tested on them."""
    loader = create_loader(
        copy.copy(dataset),  # the loader sets its transform
        input_size=config["input_size"],
        batch_size=1,
        is_training=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        num_workers=0,
        use_prefetcher=False,
        device=device,
    )
    return loader.dataset


class First:
    """The first batches of every pass over a loader, for quick tries."""

    def __init__(self, loader: DataLoader[Any], batches: int) -> None:
        self.loader, self.batches = loader, batches
        self.sampler = loader.sampler

    def __len__(self) -> int:
        return min(self.batches, len(self.loader))

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.loader), self.batches)
