"""A picture of what every converted block decided: the granularity map over the input images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import Patch, Rectangle
from torch import Tensor, nn

from dgefx.nn import DGEBlock

COLOURS = ("tab:red", "tab:orange", "tab:cyan", "tab:blue", "tab:purple")  # finest first


@dataclass(frozen=True)
class BlockMap:
    """The levels one block chose: (images, region rows, region columns), 0 = finest."""

    name: str
    grid: tuple[int, int]
    region: int
    sides: tuple[int, ...]
    levels: np.ndarray


def _block_map(name: str, routing: Any) -> BlockMap:
    height, width = routing.grid
    region = routing.region
    rows, columns = -(-height // region), -(-width // region)
    levels = routing.levels.cpu().numpy().reshape(-1, rows, columns)
    return BlockMap(name, (height, width), region, tuple(routing.granularities), levels)


@torch.inference_mode()
def block_maps(model: nn.Module, images: Tensor) -> list[BlockMap]:
    """Run `model` on `images` and collect the routing of every converted block."""
    found: dict[str, BlockMap] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, DGEBlock):

            def keep(_: nn.Module, __: Any, routing: Any, name: str = name) -> None:
                found[name] = _block_map(name, routing)

            handles.append(module.dge_router.register_forward_hook(keep))
    try:
        model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def choose(maps: list[BlockMap], count: int) -> list[BlockMap]:
    """At most `count` maps, spread over the depth; blocks with one level everywhere come last."""
    mixed = [block for block in maps if np.ptp(block.levels) > 0]
    pool = mixed if mixed else maps
    index = np.unique(np.linspace(0, len(pool) - 1, min(count, len(pool))).round().astype(int))
    return [pool[i] for i in index]


def _cells(block: BlockMap, image: int, size: tuple[int, int]) -> tuple[list[Rectangle], list[Any]]:
    """One rectangle per patch, in pixels of an image of `size` (height, width), with its colour."""
    step_y, step_x = size[0] / block.grid[0], size[1] / block.grid[1]
    cells, colours = [], []
    for row, column in np.ndindex(*block.levels.shape[1:]):
        level = block.levels[image, row, column]
        top, left = row * block.region, column * block.region
        bottom = min(top + block.region, block.grid[0])
        right = min(left + block.region, block.grid[1])
        side = block.sides[level]
        for y in range(top, bottom, side):
            for x in range(left, right, side):
                height, width = min(side, bottom - y), min(side, right - x)
                corner = (x * step_x - 0.5, y * step_y - 0.5)
                cells.append(Rectangle(corner, width * step_x, height * step_y))
                colours.append(to_rgba(COLOURS[level % len(COLOURS)], 0.35))
    return cells, colours


def _draw_map(axes: Axes, picture: np.ndarray, block: BlockMap, image: int) -> None:
    axes.imshow(picture)
    cells, colours = _cells(block, image, picture.shape[:2])
    axes.add_collection(
        PatchCollection(cells, facecolors=colours, edgecolors=(1, 1, 1, 0.7), linewidths=0.4)
    )


def _pixels(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Undo the normalisation: (B, H, W, 3) in [0, 1]."""
    scale, shift = torch.tensor(std).view(-1, 1, 1), torch.tensor(mean).view(-1, 1, 1)
    return (images.cpu() * scale + shift).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def draw(
    model: nn.Module,
    images: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    path: Path,
    blocks: int = 4,
) -> None:
    """Write a PNG: a row per image, first the image, then up to `blocks` granularity maps."""
    maps = choose(block_maps(model, images), blocks)
    pictures = _pixels(images, mean, std)
    rows, columns = len(pictures), 1 + len(maps)
    size = (2.2 * columns, 2.2 * rows + 0.9)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for row, picture in enumerate(pictures):
        axes[row, 0].imshow(picture)
        for column, block in enumerate(maps, start=1):
            _draw_map(axes[row, column], picture, block, row)
    axes[0, 0].set_title("input", fontsize=9)
    for axis, block in zip(axes[0, 1:], maps, strict=True):
        axis.set_title(f"{block.name}\n{block.grid[0]} x {block.grid[1]} tokens", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    sides = max((block.sides for block in maps), key=len, default=())
    legend = [
        Patch(color=to_rgba(COLOURS[i % len(COLOURS)], 0.6), label=f"one query per {side} x {side}")
        for i, side in enumerate(sides)
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=max(1, len(legend)), fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
