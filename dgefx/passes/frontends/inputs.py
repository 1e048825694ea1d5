"""Example inputs: what the user gave, or what the model says about its input size.

Used by `convert` and `explain` before any pass runs. Two images at least: with one, a batch axis
cannot be told from any other axis of size 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dgefx.ambient import working_dtype
from dgefx.outputs import Call, clone_call


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int) and not isinstance(size, bool):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= set(size):
        return int(size["height"]), int(size["width"])
    if isinstance(size, (tuple, list)) and len(size) >= 2 and all(isinstance(s, int) for s in size):
        return size[-2], size[-1]
    return None


def _stated_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Image sizes that the model states about itself, most specific first."""
    config = getattr(model, "config", None)
    named = ("img_size", "image_size")
    places: list[tuple[Any, tuple[str, ...]]] = [
        (getattr(model, "patch_embed", None), ("img_size",)),
        (model, named),
        (getattr(model, "pretrained_cfg", None), ("input_size",)),
        (getattr(model, "default_cfg", None), ("input_size",)),
        (config, ("image_size", "img_size")),
        (getattr(config, "vision_config", None), ("image_size",)),
        *((module, named) for module in model.modules()),
    ]
    sizes = (
        _pair(owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None))
        for owner, names in places
        for name in names
    )
    return list(dict.fromkeys(size for size in sizes if size is not None))


def _channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 3


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def _two_images(call: Call) -> Call:
    """Repeat a single example image."""

    def twice(leaf: Any) -> Any:
        if _is_list_of_images(leaf):
            return [*leaf, *leaf]
        if isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[0] == 1:
            return leaf.repeat(2, *(1 for _ in leaf.shape[1:]))
        return leaf

    repeated: Call = pytree.tree_map(twice, call, is_leaf=_is_list_of_images)
    return repeated


def _is_list_of_images(value: Any) -> bool:
    """Whether it is what detectors take: images of (C, H, W) that may differ in size."""
    images = isinstance(value, list) and all(isinstance(v, Tensor) and v.dim() == 3 for v in value)
    return images and bool(value)


def given_call(example_inputs: Any) -> Call:
    """(args, kwargs) of the user's example inputs.

    Raises:
        TypeError: neither a tensor, nor a tuple or list of arguments, nor a mapping.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    raise TypeError(
        f"example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments, "
        f"found {type(example_inputs).__name__}"
    )


def _detached(call: Call) -> Call:
    def clean(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        copied = leaf.detach().clone()
        return copied.to(working_dtype()) if copied.is_floating_point() else copied

    cleaned: Call = pytree.tree_map(clean, call)
    return cleaned


def run_example(model: nn.Module, call: Call) -> Any:
    """The model's output for an example call, without gradients."""
    args, kwargs = clone_call(call)
    with torch.no_grad():
        return model(*args, **kwargs)


def batch_size(call: Call) -> int:
    """Images in an example call: the first axis of its first image-like tensor, or the length of
    a list of images.

    Raises:
        ValueError: no tensor with at least two axes.
    """
    leaves = pytree.tree_leaves(call, is_leaf=_is_list_of_images)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    lists = [leaf for leaf in leaves if _is_list_of_images(leaf)]
    if lists and not any(tensor.dim() >= 4 for tensor in tensors):
        return len(lists[0])
    for axes in (4, 3, 2):
        for tensor in tensors:
            if tensor.dim() >= axes:
                return tensor.shape[0]
    raise ValueError("example_inputs hold no tensor of images")


def resolve_inputs(model: nn.Module, example_inputs: Any) -> tuple[Call, Any]:
    """An example call of at least two images that the model accepts, and its output.

    Args:
        model: in eval mode; called to try the inputs.
        example_inputs: as given to `convert`.

    Raises:
        TypeError: of an unknown kind.
        ValueError: none found, or the model rejects them.
    """
    if example_inputs is not None:
        return _try_given(model, _detached(given_call(example_inputs)))
    device, dtype = _place(model)
    sizes = _stated_sizes(model)
    errors = []
    for height, width in sizes:
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(2, _channels(model), height, width, generator=generator).to(
            device, dtype
        )
        call: Call = ((image,), {})
        try:
            return call, run_example(model, call)
        except Exception as error:  # any model may raise anything on a size it does not take
            errors.append(f"{height} x {width}: {error}")
    tried = f" (tried {'; '.join(errors)})" if errors else ""
    raise ValueError(
        f"no example input: {type(model).__name__} does not say which input size it takes"
        f"{tried}; pass example_inputs=, for example torch.randn(1, 3, 224, 224)"
    )


def _try_given(model: nn.Module, call: Call) -> tuple[Call, Any]:
    if any(isinstance(leaf, Tensor) and not leaf.numel() for leaf in pytree.tree_leaves(call)):
        raise ValueError("example_inputs hold an empty tensor; pass one image or more")
    try:
        output = run_example(model, call)
    except Exception as error:  # any model may raise anything
        raise ValueError(
            f"example_inputs: the model rejects them: {type(error).__name__}: {error}"
        ) from error
    if batch_size(call) > 1:
        return call, output
    doubled = _two_images(call)
    try:
        return doubled, run_example(model, doubled)
    except Exception as error:
        raise ValueError(
            f"example_inputs: the model takes one image but not a batch of two "
            f"({type(error).__name__}: {error}); pass example_inputs with two images"
        ) from error
