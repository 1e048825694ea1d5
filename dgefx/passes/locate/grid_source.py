"""Which module tells the running grid to blocks that do not see it; after the plans are made.

The module that laid the grid out, if its output is the grid (B, C, H, W). Where it is not, because
patches were cut out by movement alone, or by a function in the model's own forward, the module that
takes the image: the grid is the image's size over a stride, which is read off the example and
asked of the dense model at another image size.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from dgefx.nn.grid_shape import Size
from dgefx.nn.image_hook import grids_of
from dgefx.outputs import Call
from dgefx.passes.capture import Capture, capture
from dgefx.passes.layout import Layout
from dgefx.passes.locate.grid import GridFinder
from dgefx.passes.locate.sites import Located


@dataclass(frozen=True)
class ImageSource:
    """The module whose input tells the grid; size, stride: see `ImageHook`."""

    module: str
    size: Size
    stride: Size | None


#: a module whose output is the grid, or one that takes the image; None: nobody tells
GridSource = str | ImageSource | None


def find_sources(
    located: Located,
    converted: Collection[str],
    asking: Collection[str],
    model: nn.Module,
    call: Call,
) -> dict[str, GridSource]:
    """Who tells each block its grid.

    Args:
        converted: names of the blocks that convert. asking: those that do not see their grid.
        model, call: dense and in eval mode, and what it was captured on.
    """
    sites = [site for site in located.sites if site.name in converted]
    last: dict[Size, str] = {}
    images: dict[Size, ImageSource | None] = {}
    found: dict[str, GridSource] = {}
    for site in sites:
        source, grid = site.layout.source, site.layout.grid
        # a module around the block hands out its plane when the block is done
        if source is None or _is_in(site.name, source) or not _tells(located, model, source, grid):
            source = None
        # modules inside converted blocks see queries: the module that told the last block before
        elif any(_is_in(source, other.name) for other in sites):
            source = last.get(grid)
        else:
            last[grid] = source
        if site.name not in asking:
            continue
        if source is None and grid not in images:
            images[grid] = _image_source(located, site.name, site.layout, model, call)
        found[site.name] = source or images[grid]
    return found


def _is_in(module: str, other: str) -> bool:
    return not other or f"{module}.".startswith(f"{other}.")


def _keeps_hooks(module: nn.Module) -> bool:
    """Whether copies of a module have its hooks: not those with a state of their own (einops)."""
    bases = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    state = ("__getstate__", "__deepcopy__", "__reduce__", "__reduce_ex__")
    graph = isinstance(module, fx.GraphModule)  # told by a node, see `nn.image_hook`
    return graph or not any(name in vars(base) for base in bases for name in state)


def _tells(located: Located, model: nn.Module, module: str, grid: Size) -> bool:
    """Whether the module's output is the grid."""
    outputs = [call.output for call in located.capture.calls[module]]
    shapes = [out.meta["shape"] if isinstance(out, fx.Node) else () for out in outputs]
    planes = all(len(shape) == 4 and shape[2:] == grid for shape in shapes)
    return planes and _keeps_hooks(model.get_submodule(module))


def _takes_image(located: Located, model: nn.Module, call: Call) -> tuple[str, Size] | None:
    """The innermost module that takes an image, before any block runs, and the image's size."""
    leaves = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
    sizes = {tuple(leaf.shape[2:]) for leaf in leaves if leaf.dim() == 4}
    blocks, found = {site.name for site in located.sites}, None
    for name, (first, *others) in located.capture.calls.items():
        if name in blocks:
            break
        given = [v for v in (*first.args, *first.kwargs.values()) if isinstance(v, fx.Node)]
        size = next((n.meta["shape"][2:] for n in given if len(n.meta["shape"]) == 4), None)
        if size in sizes and not others and _keeps_hooks(model.get_submodule(name)):
            found = name, size
    return found


def _image_source(
    located: Located, name: str, layout: Layout, model: nn.Module, call: Call
) -> ImageSource | None:
    """The module that takes the image, with the stride of the block's grid where it has one."""
    taken = _takes_image(located, model, call)
    if taken is None:
        return None
    (module, size), grid = taken, layout.grid
    stride = (max(round(size[0] / grid[0]), 1), max(round(size[1] / grid[1]), 1))
    if grid in grids_of(size, stride):
        height, width = size
        for other in ((2 * height, width // 2), (height, width // 2), (2 * height, width)):
            expected = grids_of(other, stride)
            captured = _captured_at(model, call, size, other)
            if captured is None:
                continue
            at = _grid_in(captured, name, layout, expected)
            if at == grid and at not in expected:
                return None  # of any image
            return ImageSource(module, size, stride if at in expected else None)
    return ImageSource(module, size, None)


def _captured_at(model: nn.Module, call: Call, size: Size, other: Size) -> Capture | None:
    """The model on images of another size; None where it does not take them."""
    generator = torch.Generator().manual_seed(5)

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() != 4 or tuple(leaf.shape[2:]) != size:
            return leaf
        return torch.randn(*leaf.shape[:2], *other, generator=generator).to(leaf)

    args, kwargs = pytree.tree_map(resized, call)
    try:
        return capture(model, args, kwargs)
    except Exception:  # any model may raise anything on a size it does not take
        return None


def _grid_in(
    captured: Capture, name: str, layout: Layout, expected: tuple[Size, ...]
) -> Size | None:
    """The grid of a block's stream; None where no argument of the block has the shape that one of
    `expected`, or the grid of the example, gives it."""
    counts = {layout.prefix + h * w for h, w in (*expected, layout.grid)}
    axis, finder = layout.axis("N"), GridFinder()
    for call in captured.calls.get(name, ()):
        for node in pytree.tree_leaves((call.args, call.kwargs)):
            shape = node.meta["shape"] if isinstance(node, fx.Node) else ()
            found = finder.layout(node) if len(shape) > axis and shape[axis] in counts else ""
            if isinstance(found, Layout):
                return found.grid
    return None
