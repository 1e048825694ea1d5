"""What a converted model decides and costs, as tensors and as pictures.

`granularity_maps` needs only torch; the two `plot_` functions import matplotlib when called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dgefx.calibration.images import ExampleCall, one_batch, placed
from dgefx.example import example_of
from dgefx.kernels.routing import Routing
from dgefx.modes import evaluating
from dgefx.nn.hierarchy import side_counts
from dgefx.record import block_macs, conversion_record, converted_blocks, unwrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("tab:red", "tab:orange", "tab:cyan", "tab:blue", "tab:purple")  # finest first
DEFAULT_BLOCKS = 4  # columns of `plot_granularity`


@torch.no_grad()
def _routings(model: nn.Module, images: Any, asked_by: str) -> dict[str, Routing]:
    record = conversion_record(model)
    target = unwrap(model)
    example = ExampleCall(example_of(target, record), target, asked_by)
    tensors = one_batch(images, example)
    found: dict[str, Routing] = {}
    with ExitStack() as stack:
        for name, block in converted_blocks(target, record).items():
            handle = block.dge_router.register_forward_hook(
                lambda _m, _a, routing, name=name: found.setdefault(name, routing)
            )
            stack.callback(handle.remove)
        args, kwargs = placed(tensors, target, example)
        stack.enter_context(evaluating(target))
        target(*args, **kwargs)
    return found


def granularity_maps(model: nn.Module, images: Any) -> dict[str, Tensor]:
    """The granularity that every converted block gives every region of some images.

    Args:
        model: converted. Run in eval mode; its mode is restored.
        images: one batch as the model takes it: a tensor (also of a single image), a tuple that
            begins with the model's tensors, or a dict.

    Returns:
        Per block, in the order they run, an int64 tensor (B, rows, columns) on the CPU: the patch
        side in tokens (1 is the finest) of every cell of `DGEConfig.region_side` tokens a side;
        for blocks with windows, whose patches end where windows do, of every token.

    Raises:
        TypeError, ValueError: not a converted model, or no batch of images.
    """
    routings = _routings(model, images, "granularity_maps")
    return {name: _sides(routing) for name, routing in routings.items()}


def _sides(routing: Routing) -> Tensor:
    """A block's map, see `granularity_maps`."""
    levels = routing.levels.cpu()
    cells = side_counts(routing.grid, routing.region)
    if routing.windows is not None:
        levels, cells = levels[:, routing.token_region.cpu()], routing.grid
    return torch.tensor(routing.granularities)[levels].unflatten(1, cells)


def _patches(sides: Tensor, routing: Routing) -> list[tuple[int, int, int, int, int]]:
    """(top, left, height, width, side) in tokens of every patch of one image's map."""
    height, width = routing.grid
    region = routing.region
    found = []
    for row, line in enumerate(sides.tolist()):
        for column, side in enumerate(line):
            top, left = row * region, column * region
            if side > region and (top % side or left % side):
                continue  # a cell inside a larger patch
            end_y = min(top + max(side, region), height)
            end_x = min(left + max(side, region), width)
            for y in range(top, end_y, side):
                for x in range(left, end_x, side):
                    found.append((y, x, min(side, end_y - y), min(side, end_x - x), side))
    return found


def _window_patches(
    sides: Tensor, token_slot: Tensor, columns: int
) -> list[tuple[int, int, int, int, int]]:
    """As `_patches`, from the slot of every token; a patch of tokens that lie apart (grid
    attention) is drawn token by token."""
    found = []
    for slot in token_slot.unique():
        members = (token_slot == slot).nonzero().flatten()
        y, x = members // columns, members % columns
        top, left = int(y.min()), int(x.min())
        height, width = int(y.max()) - top + 1, int(x.max()) - left + 1
        side = int(sides[y[0], x[0]])
        if height * width == len(members):
            found.append((top, left, height, width, side))
        else:
            found += [(int(i), int(j), 1, 1, side) for i, j in zip(y, x, strict=True)]
    return found


def _pixels(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """(B, H, W, 3) in [0, 1]: normalisation undone, or each image stretched to the range."""
    shown = images.detach().float().cpu()
    if mean is not None and std is not None:
        shown = shown * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    else:
        low = shown.amin((1, 2, 3), keepdim=True)
        shown = (shown - low) / (shown.amax((1, 2, 3), keepdim=True) - low).clamp(min=1e-12)
    if shown.shape[1] not in (1, 3):
        shown = shown.mean(1, keepdim=True)
    return shown.clamp(0, 1).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)


def _mixing(sides: Tensor) -> float:
    """How much a block's map (B, rows, columns) mixes granularities: the entropy of the shares
    that they have of an image, in nats, as mean over the images. 0 where every image has one."""
    shares = torch.stack([(sides == side).flatten(1).double().mean(1) for side in sides.unique()])
    return float(torch.special.entr(shares).sum(0).mean())


def _most_mixed(maps: Mapping[str, Tensor], count: int | None) -> list[str]:
    """The `count` blocks that mix granularities most, in the order they run; where fewer mix them
    at all, others, spread over the depth, make up the number. Without a `count`: up to
    `DEFAULT_BLOCKS`, and others only where no block mixes."""
    mixing = {name: value for name, sides in maps.items() if (value := _mixing(sides)) > 0}
    if count is None:
        count = min(DEFAULT_BLOCKS, len(mixing) or DEFAULT_BLOCKS)
    chosen = sorted(mixing, key=lambda name: mixing[name], reverse=True)[:count]
    others = [name for name in maps if name not in mixing]
    missing = min(count - len(chosen), len(others))
    last = len(others) - 1
    chosen += [others[round(i * last / max(missing - 1, 1))] for i in range(missing)]
    return [name for name in maps if name in chosen]


def _draw_map(axes: Axes, picture: Tensor, sides: Tensor, routing: Routing, image: int) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    axes.imshow(picture.numpy())
    step_y, step_x = picture.shape[0] / routing.grid[0], picture.shape[1] / routing.grid[1]
    cells, colours = [], []
    if routing.windows is None:
        patches = _patches(sides, routing)
    else:
        patches = _window_patches(sides, routing.token_slot[image].cpu(), routing.grid[1])
    for y, x, height, width, side in patches:
        corner = (x * step_x - 0.5, y * step_y - 0.5)
        cells.append(Rectangle(corner, width * step_x, height * step_y))
        level = routing.granularities.index(side)
        colours.append(to_rgba(COLOURS[level % len(COLOURS)], 0.35))
    line = (1, 1, 1, 0.7)
    axes.add_collection(PatchCollection(cells, facecolors=colours, edgecolors=line, linewidths=0.4))


def plot_granularity(
    model: nn.Module,
    images: Any,
    *,
    blocks: int | Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Figure:
    """Granularity maps over the images: a row per image, a column per block.

    Args:
        model: converted.
        images: one batch, see `granularity_maps`; drawn from its first tensor, (B, C, H, W).
        blocks: names of the blocks to show, or how many: those that mix granularities most over
            these images, in the order they run. The default is up to four that mix at all; blocks
            with one granularity everywhere are shown only where a number asks for more, or where
            all blocks are such, spread over the depth.
        mean, std: of the normalisation, to be undone for showing; without them every image is
            stretched to the full range.

    Returns:
        A matplotlib figure, not shown; `figure.savefig(path)` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: not a converted model, no images, an unknown block.
    """
    from matplotlib.colors import to_rgba
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    routings = _routings(model, images, "plot_granularity")
    maps = {name: _sides(routing) for name, routing in routings.items()}
    names = _most_mixed(maps, blocks) if isinstance(blocks, int | None) else list(blocks)
    if unknown := sorted(set(names) - set(routings)):
        raise ValueError(f"blocks {unknown} are not converted blocks; there are {list(routings)}")
    target = unwrap(model)
    example = ExampleCall(example_of(target, conversion_record(target)), target)
    pictures = _pixels(one_batch(images, example)[example.first], mean, std)
    columns = 1 + len(names)
    row_height = 2.2 * pictures.shape[1] / pictures.shape[2]
    figure = Figure(figsize=(2.2 * columns, row_height * len(pictures) + 0.9), layout="constrained")
    axes: Any = figure.subplots(len(pictures), columns, squeeze=False)
    for row, picture in enumerate(pictures):
        axes[row, 0].imshow(picture.numpy())
        for column, name in enumerate(names, start=1):
            _draw_map(axes[row, column], picture, maps[name][row], routings[name], row)
    axes[0, 0].set_title("input", fontsize=9)
    for axis, name in zip(axes[0, 1:], names, strict=True):
        grid = routings[name].grid
        axis.set_title(f"{name}\n{grid[0]} x {grid[1]} tokens", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    sides = max((r.granularities for r in routings.values()), key=len)
    legend = [
        Patch(color=to_rgba(COLOURS[i % len(COLOURS)], 0.6), label=f"one query per {side} x {side}")
        for i, side in enumerate(sides)
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=9)
    return figure


def plot_sensitivity(model: nn.Module) -> Figure:
    """The calibration's curves: a block's MAC ratio against what the output loses, and the shares
    that the present budget gives the blocks.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: not a converted model, or not calibrated.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    record = conversion_record(model)
    if record.calibration is None:
        raise ValueError("model is not calibrated; call dgefx.calibrate(model, images) first")
    tables = record.calibration.tables
    blocks = converted_blocks(unwrap(model), record)
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    curves, shares = panels
    for index, (name, table) in enumerate(tables.items()):
        cost, router = record.costs[name], blocks[name].dge_router
        slots = {plan.slots: plan for plan in table.plans}
        points = [
            (block_macs(cost, router, slots[s], record.images) / cost.dense, loss)
            for s, loss in table.measured
        ]
        colour = colormaps["viridis"](index / max(len(tables) - 1, 1))
        points.append((1.0, 0.0))
        curves.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            "o-",
            markersize=3,
            color=colour,
            label=name,
        )
    unit = "KL, nats" if record.calibration.distance == "kl" else "relative squared distance"
    curves.set_yscale("symlog", linthresh=1e-3)
    curves.set(xlabel="MAC ratio of the block", ylabel=f"loss of the output ({unit})")
    curves.legend(fontsize=6, ncols=2)
    present = {b.name: b.ratio for b in record.report.blocks}
    shares.bar(range(len(tables)), [present[name] for name in tables])
    shares.set_xticks(range(len(tables)), list(tables), rotation=90, fontsize=6)
    shares.set(ylabel="MAC ratio of the block", ylim=(0, 1.05))
    shares.set_title(f"gamma {record.gamma:g}: whole model {record.report.ratio:.3f}", fontsize=9)
    return figure
