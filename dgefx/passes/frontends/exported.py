"""Programs of `torch.export` as models: what `convert` takes besides an `nn.Module`.

An exported program has no modules that are called, and the module that `ExportedProgram.module()`
makes of it refuses `train()` and `eval()` and guards the sizes of its inputs. Both become a plain
`fx.GraphModule` with the same parameters, names and calling convention, whose blocks
`passes.frontends.block_extraction` finds.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

_GUARDS = "_guards_fn"

_ONE_IMAGE = (
    "the program was exported for a batch of exactly one image, in which the batch axis cannot be "
    "told from other axes of size 1; export it with a dynamic batch axis,\n"
    "    torch.export.export(model, (images,), "
    'dynamic_shapes=({0: torch.export.Dim("batch")},))\n'
    "with two images or more in `images`, or with a batch of two or more"
)


def is_exported_module(module: Any) -> bool:
    """Whether `ExportedProgram.module()` made it: a graph module that refuses train() and eval(),
    and that guards the sizes of its inputs."""
    if not isinstance(module, fx.GraphModule):
        return False
    return "train" in vars(module) or any(n.target == _GUARDS for n in module.graph.nodes)


def as_module(model: Any, inplace: bool = False) -> Any:
    """A plain module of an exported program; anything else as it is.

    Args:
        inplace: whether `model` itself is to be changed.

    Raises:
        ValueError: a program for one image only, or one that was to be changed in place.
    """
    if isinstance(model, ExportedProgram):
        _refuse_in_place(inplace, "an ExportedProgram")
        return _plain(model.module())
    if is_exported_module(model):
        _refuse_in_place(inplace, "the module of an ExportedProgram")
        return _plain(model)
    return model


def exported_inputs(model: Any) -> Any:
    """The example inputs that a program was exported with, as `example_inputs` are given."""
    if not isinstance(model, ExportedProgram) or model.example_inputs is None:
        return None
    args, kwargs = model.example_inputs
    if args and kwargs:
        return None
    return dict(kwargs) if kwargs else tuple(args)


def _refuse_in_place(inplace: bool, what: str) -> None:
    if inplace:
        raise ValueError(
            f"inplace=True: {what} cannot be changed itself; leave inplace out and use the "
            f"fx.GraphModule that convert() returns"
        )


def _plain(module: nn.Module) -> fx.GraphModule:
    assert isinstance(module, fx.GraphModule)
    graph = copy.deepcopy(module.graph)
    for node in graph.find_nodes(op="call_module", target=_GUARDS):
        graph.erase_node(node)
    inputs = graph.find_nodes(op="placeholder")
    for node in inputs:
        if isinstance(value := node.meta.get("val"), Tensor):
            # a dynamic axis is no int
            sizes = tuple(size if type(size) is int else None for size in value.shape)
            if len(sizes) == 4 and sizes[0] == 1:
                raise ValueError(_ONE_IMAGE)
            with graph.inserting_after(inputs[-1]):
                checked = graph.call_function(_of_sizes, (node, node.name, sizes))
            node.replace_all_uses_with(checked, lambda user, own=checked: user is not own)
    return fx.GraphModule(module, graph).eval()


def _of_sizes(value: Tensor, name: str, sizes: tuple[int | None, ...]) -> Tensor:
    """An input of a converted program; None for an axis of any size.

    Raises:
        ValueError: of another shape. The program has its sizes written into it: it would compute
            something else, or fail somewhere.
    """
    fixed = [axis for axis, size in enumerate(sizes) if size is not None]
    if value.dim() != len(sizes) or any(value.shape[axis] != sizes[axis] for axis in fixed):
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(
            f"{name}: the program was exported for inputs of shape ({wanted}), found "
            f"{tuple(value.shape)}; export it with dynamic_shapes for axes that are to vary"
        )
    return value
