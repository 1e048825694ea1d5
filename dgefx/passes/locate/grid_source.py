"""Which module tells the running grid to blocks that do not see it; after the plans are made.

The module that laid the grid out, if its output is the grid (B, C, H, W). Where it is not, because
patches were cut out by movement alone, or by a function in the model's own forward, the module that
takes the image: the grid is the image's size over a stride, which is read off the example and
asked of the dense model at another image size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from dgefx.nn.grid_shape import Size
from dgefx.nn.image_hook import first_image, grids_of
from dgefx.outputs import Call
from dgefx.passes.capture import Recorder, capture
from dgefx.passes.layout import Layout
from dgefx.passes.locate.grid import GridFinder
from dgefx.passes.plan.plan import BlockPlan, ImageSource


@dataclasses.dataclass
class Sizes:
    """What a run showed. outputs: by module, the planes that it gave; None: something else.
    images: modules that took an image before any block ran, innermost last, and its size."""

    outputs: dict[str, set[Size | None]]
    images: dict[str, Size]

    def tells(self, module: str, grid: Size) -> bool:
        """Whether the module's output is the grid."""
        return self.outputs.get(module) == {grid}


def _image_sizes(call: Call) -> set[Size]:
    leaves = [v for v in pytree.tree_leaves(call) if isinstance(v, Tensor) and v.dim() == 4]
    return {(leaf.shape[2], leaf.shape[3]) for leaf in leaves}


@contextlib.contextmanager
def watching_sizes(model: nn.Module, call: Call, blocks: set[str]) -> Iterator[Sizes]:
    """Look at the sizes that modules take and give while `model` runs; known when that ends.

    Args:
        call: that it is run on. blocks: what may convert.
    """
    wanted, sizes, calls = _image_sizes(call), Sizes({}, {}), Counter[str]()
    begun: set[str] = set()
    handles = []
    for name, module in model.named_modules():
        told = sizes if _keeps_hooks(module) else Sizes({}, {})

        def enter(
            _m: nn.Module, args: Any, kwargs: Any, name: str = name, told: Sizes = told
        ) -> None:
            calls[name] += 1
            begun.update({name} & blocks)
            image = None if begun else first_image(args, kwargs)
            if image is not None and (size := (image.shape[2], image.shape[3])) in wanted:
                told.images[name] = size

        def leave(
            _m: nn.Module, _a: Any, output: Any, name: str = name, told: Sizes = told
        ) -> None:
            plane = isinstance(output, Tensor) and output.dim() == 4
            size = (output.shape[2], output.shape[3]) if plane else None
            told.outputs.setdefault(name, set()).add(size)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()
        sizes.images = {name: size for name, size in sizes.images.items() if calls[name] == 1}


def find_sources(
    plans: dict[str, BlockPlan], sizes: Sizes, model: nn.Module, call: Call
) -> dict[str, BlockPlan]:
    """The plans with the module that tells each of them the grid, if any does.

    Args:
        sizes: of a run of `model`, dense and in eval mode, on `call`.
    """
    found: dict[str, BlockPlan] = {}
    last: dict[Size, str] = {}
    images: dict[Size, ImageSource | None] = {}
    for name, plan in plans.items():
        source, grid = plan.hook_source, plan.layout.grid
        # a module around the block hands out its plane when the block is done
        if source is None or _is_in(name, source) or not sizes.tells(source, grid):
            source = None
        # modules inside converted blocks see queries: the module that told the last block before
        elif any(_is_in(source, other) for other in plans):
            source = last.get(grid)
        else:
            last[grid] = source
        image = None
        if plan.needs_grid_shape and source is None:
            if grid not in images:
                images[grid] = _image_source(plan, sizes, model, call)
            image = images[grid]
        found[name] = dataclasses.replace(plan, hook_source=source, image_source=image)
    return found


def _keeps_hooks(module: nn.Module) -> bool:
    """Whether copies of a module have its hooks: not those with a state of their own (einops)."""
    bases = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    state = ("__getstate__", "__deepcopy__", "__reduce__", "__reduce_ex__")
    graph = isinstance(module, fx.GraphModule)  # told by a node, see `nn.image_hook`
    return graph or not any(name in vars(base) for base in bases for name in state)


def _is_in(module: str, other: str) -> bool:
    return not other or f"{module}.".startswith(f"{other}.")


def _image_source(
    plan: BlockPlan, sizes: Sizes, model: nn.Module, call: Call
) -> ImageSource | None:
    if not sizes.images:
        return None
    (module, size), grid = list(sizes.images.items())[-1], plan.layout.grid
    stride = (max(round(size[0] / grid[0]), 1), max(round(size[1] / grid[1]), 1))
    if grid in grids_of(size, stride):
        height, width = size
        for other in ((2 * height, width // 2), (height, width // 2), (2 * height, width)):
            expected = grids_of(other, stride)
            at = _grid_at(plan, model, call, size, other, expected)
            if at == grid and at not in expected:
                return None  # of any image
            if at is not None:
                return ImageSource(module, size, stride if at in expected else None)
    return ImageSource(module, size, None)


def _grid_at(
    plan: BlockPlan,
    model: nn.Module,
    call: Call,
    size: Size,
    other: Size,
    expected: tuple[Size, ...],
) -> Size | None:
    """The grid of a block's stream on images of another size; None where the model does not take
    them. (0, 0) where no argument of the block has the shape that one of `expected` gives it."""
    generator = torch.Generator().manual_seed(5)

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() != 4 or tuple(leaf.shape[2:]) != size:
            return leaf
        return torch.randn(*leaf.shape[:2], *other, generator=generator).to(leaf)

    moved: Call = pytree.tree_map(resized, call)
    recorder = Recorder(model)
    counts = {plan.layout.prefix + h * w for h, w in (*expected, plan.layout.grid)}
    layouts: list[Layout | str] = []
    axis = plan.layout.axis("N")

    def look(_m: nn.Module, args: Any, kwargs: Any) -> None:
        for leaf in pytree.tree_leaves((args, kwargs)):
            fits = isinstance(leaf, Tensor) and leaf.dim() > axis
            if fits and leaf.shape[axis] in counts:
                layouts.append(GridFinder().layout(recorder.node_of(leaf)))

    handle = model.get_submodule(plan.name).register_forward_pre_hook(look, with_kwargs=True)
    try:
        capture(model, *moved, recorder=recorder)
    except Exception:  # any model may raise anything on a size it does not take
        return None
    finally:
        handle.remove()
    grids = [layout.grid for layout in layouts if isinstance(layout, Layout)]
    return grids[0] if grids else (0, 0)
