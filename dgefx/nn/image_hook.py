"""Telling a `GridShape` the grid by the image's size, where no module's output shows it.

`ImageHook` sits on the module that takes the image, found by `passes.locate.grid_source`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from dgefx.nn.grid_shape import GridShape, Size
from dgefx.nn.outlined import graphs_of
from dgefx.nn.symbolic import is_symbolic, refuse_inlined

_HOOKED = "dge_image"


class ImageHook:
    """Forward pre-hook of the module that takes the image, where no output shows the grid.

    Args:
        shape: to tell. size: of the images of the conversion. stride: pixels per token and side,
            rounded up or down at the border; None: only that size is known.
    """

    def __init__(self, shape: GridShape, size: Size, stride: Size | None) -> None:
        self.shape, self.size, self.stride = shape, size, stride

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_symbolic(args, kwargs):
            refuse_inlined(module)
        image = first_image(args, kwargs)
        if image is None:
            return
        size = (image.shape[2], image.shape[3])
        if self.stride is not None:
            self.shape.lay_out(*grids_of(size, self.stride))
        elif size == self.size:
            self.shape.lay_out(self.shape.converted)
        else:
            self.shape.lay_out()


def first_image(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first (B, C, H, W) among the arguments of a call."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() == 4:
            return value
    return None


def grids_of(size: Size, stride: Size) -> tuple[Size, Size]:
    """The grids that an image may have: border pixels short of a token dropped, or padded."""
    (height, width), (down, across) = size, stride
    return (height // down, width // across), (-(-height // down), -(-width // across))


class _ImageReader(nn.Module):
    """Called by a graph with its inputs: copies of a graph module lose hooks on itself."""

    _is_impure = True  # of no use to the graph, and to be kept in it

    def forward(self, *_inputs: Any) -> None:
        return None


def hook_images(module: nn.Module, hook: ImageHook) -> None:
    """Have `hook` see what `module` is called with."""
    if isinstance(module, fx.GraphModule):
        if _HOOKED not in module._modules:
            module.add_module(_HOOKED, _ImageReader())
            for graph in set(graphs_of(module).values()):
                inputs = graph.find_nodes(op="placeholder")
                with graph.inserting_after(inputs[-1]):
                    graph.call_module(_HOOKED, tuple(inputs))
            module.recompile()
        module = module.get_submodule(_HOOKED)
    module.register_forward_pre_hook(hook, with_kwargs=True)


def unhook_images(module: nn.Module) -> None:
    """Undo `hook_images`."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, ImageHook):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    if isinstance(module, fx.GraphModule) and _HOOKED in module._modules:
        for graph in set(graphs_of(module).values()):
            for node in graph.find_nodes(op="call_module", target=_HOOKED):
                graph.erase_node(node)
        delattr(module, _HOOKED)
        module.recompile()
