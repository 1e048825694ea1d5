"""Images: any iterable of model inputs to checked calls of one size.

First step of `dgefx.calibrate`, and of every other call that takes images; nothing of the model is
touched before all images were read. Errors name the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dgefx.calibration.augment import random_views
from dgefx.outputs import Call

#: names under which data sets keep images, if the model's own parameter name is not among them
_IMAGE_KEYS = ("pixel_values", "image", "images", "img", "x", "input")


class ExampleCall:
    """How the model was called at conversion: which arguments are tensors, and of which shape.

    Args:
        described: as `dgefx.example.describe_call` writes it.
        asked_by: name of the public call that takes the images, for errors.
    """

    def __init__(self, described: list[Any], model: nn.Module, asked_by: str = "calibrate") -> None:
        self.asked_by = asked_by
        self.images = f"{asked_by}: images"
        args, kwargs = described
        self.args, self.kwargs = list(args), dict(kwargs)
        self.slots: list[int | str] = [i for i, a in enumerate(self.args) if "shape" in a]
        self.slots += [k for k, v in self.kwargs.items() if "shape" in v]
        self.first = self.slots[0]
        names = [p for p in inspect.signature(model.forward).parameters if p != "self"]
        own = self.first if isinstance(self.first, str) else (names or ["x"])[0]
        self.image_keys = (own, *_IMAGE_KEYS)

    def described(self, slot: int | str) -> Any:
        return self.args[slot] if isinstance(slot, int) else self.kwargs[slot]

    def tensors(self, item: Any, index: int) -> dict[int | str, Any]:
        """The tensors of one item of the iterable, by the argument they are."""
        if isinstance(item, Tensor):
            found: dict[int | str, Any] = {self.first: item}
        elif isinstance(item, Mapping):
            found = {slot: item[slot] for slot in self.slots if slot in item}
            if self.first not in found:
                key = next((k for k in self.image_keys if k in item), None)
                if key is None:
                    raise ValueError(
                        f"{self.images}: item {index} is a dict with {sorted(map(str, item))}, but "
                        f"the model's images are called {self.image_keys[0]!r}"
                    )
                found[self.first] = item[key]
        elif isinstance(item, (tuple, list)) and item:
            if isinstance(item[0], Mapping):
                return self.tensors(item[0], index)
            found = dict(zip(self.slots, item, strict=False))
        else:
            raise TypeError(
                f"{self.images} must yield tensors, tuples that begin with one, or dicts; item "
                f"{index} is {type(item).__name__}"
            )
        missing = [slot for slot in self.slots if slot not in found]
        if missing:
            raise ValueError(
                f"{self.images}: item {index} lacks the argument(s) {missing} that the model was "
                f"converted with"
            )
        return found

    def call(self, tensors: dict[int | str, Tensor]) -> Call:
        """(args, kwargs) with `tensors` in their places."""

        def value(slot: int | str, described: Any) -> Any:
            if slot in tensors:
                return tensors[slot]
            if "unknown" in described:
                raise ValueError(
                    f"{self.images}: the model was converted with an argument of type "
                    f"{described['unknown']}, which {self.asked_by} cannot supply"
                )
            return described["value"]

        args = tuple(value(i, d) for i, d in enumerate(self.args))
        return args, {k: value(k, d) for k, d in self.kwargs.items()}


def _checked(
    value: Any, slot: int | str, example: ExampleCall, index: int, any_size: bool = False
) -> Tensor:
    """A batch of images of the shape at conversion, or with as many axes."""
    wanted, about = example.described(slot), f"{example.images}: item {index}"
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{about} holds {type(value).__name__} where the model takes a tensor; "
            f"apply the model's transform first"
        )
    shape = list(wanted["shape"])
    batch = value.detach()
    if batch.dim() == len(shape) - 1:
        batch = batch.unsqueeze(0)
    same_size = batch.dim() == len(shape) and list(batch.shape[1:]) == shape[1:]
    if batch.dim() != len(shape) or (not same_size and not any_size):
        raise ValueError(
            f"{about} has shape {tuple(value.shape)}, but the model was converted for "
            f"{tuple(shape[1:])} per image, the size its budget holds at; resize the images, or "
            f"convert with example_inputs of their size"
        )
    dtype = getattr(torch, wanted["dtype"])
    if dtype.is_floating_point != batch.is_floating_point():
        raise TypeError(
            f"{about} is {batch.dtype}, the model takes {dtype}; apply the model's "
            f"transform (scaling and normalisation) first"
        )
    if batch.is_floating_point() and not bool(torch.isfinite(batch).all()):
        raise ValueError(f"{about} holds NaN or infinity")
    return batch


def check_count(name: str, value: Any, least: int) -> int:
    """`value`, if it is an integer of at least `least`; TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, found {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, found {value}")
    return value


def check_iterable(name: str, images: Any) -> None:
    """Raise TypeError where argument `name` is no iterable of model inputs; starts no loader."""
    iterable = hasattr(images, "__iter__") or hasattr(images, "__getitem__")
    if isinstance(images, (str, bytes, Mapping)) or not iterable:
        raise TypeError(
            f"{name} must be an iterable of model inputs (a DataLoader, a data set, a list of "
            f"tensors, a tensor of images), found {type(images).__name__}"
        )


def _items(images: Any, name: str) -> Iterator[Any]:
    """The items of an iterable or of a map-style data set, argument `name`."""
    check_iterable(name, images)
    if not hasattr(images, "__iter__") and hasattr(images, "__len__"):
        return (images[index] for index in range(len(images)))
    return iter(images)


def read_images(
    images: Iterable[Any], example: ExampleCall, limit: int, batch_size: int
) -> list[dict[int | str, Tensor]]:
    """Batches of at most `batch_size` images; at most `limit` images are read.

    Args:
        images: tensors (one image or a batch), tuples that begin with the model's tensors (what
            follows, such as labels, is ignored), or dicts; or one tensor with all images.

    Raises:
        TypeError, ValueError: not iterable, empty, another shape or dtype, NaN; `limit` or
            `batch_size` is not a number of images.
    """
    check_count("max_images", limit, 1)
    check_count("batch_size", batch_size, 1)
    shape = example.described(example.first)["shape"]
    if isinstance(images, Tensor) and (
        images.dim() == len(shape) or list(images.shape) == shape[1:]
    ):
        images = [images]  # a batch, or a single image
    items = _items(images, example.images)
    columns: dict[int | str, list[Tensor]] = {slot: [] for slot in example.slots}
    count = 0
    for index, item in enumerate(items):
        found = example.tensors(item, index)
        batches = {slot: _checked(found[slot], slot, example, index) for slot in example.slots}
        sizes = {slot: batch.shape[0] for slot, batch in batches.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"{example.images}: item {index} has tensors of different batch sizes {sizes}"
            )
        for slot, batch in batches.items():
            # a copy: a loader may fill the same memory again
            columns[slot].append(batch[: limit - count].clone())
        count += min(next(iter(sizes.values())), limit - count)
        if count >= limit:
            break
    if not count:
        raise ValueError(f"{example.images} is empty: at least one image is needed")
    whole = {slot: torch.cat(parts) for slot, parts in columns.items()}
    starts = list(range(0, count, batch_size))
    if batch_size > 2 and count > 1 and count % batch_size == 1:
        starts[-1] -= 1  # which axis of an output is the images' cannot be told from one image
    return [
        {slot: tensor[start:stop] for slot, tensor in whole.items()}
        for start, stop in pairwise([*starts, count])
    ]


def one_batch(images: Any, example: ExampleCall) -> dict[int | str, Tensor]:
    """The tensors of one batch, of any size that the model takes.

    Raises:
        TypeError, ValueError: no batch (a loader, say), or of another rank or dtype, or NaN.
    """
    if not isinstance(images, (Tensor, Mapping, tuple, list)):
        raise TypeError(
            f"{example.images} must be one batch as the model takes it (a tensor, a tuple that "
            f"begins with one, or a dict), found {type(images).__name__}"
        )
    found = example.tensors(images, 0)
    first, rest = found[example.first], []
    if isinstance(images, (tuple, list)):  # labels may follow, but no further images
        rest = [t for t in images[len(example.slots) :] if isinstance(t, Tensor) and t.dim() > 2]
    if isinstance(first, Tensor) and any(t.shape[1:] == first.shape[1:] for t in rest):
        raise ValueError(
            f"{example.images} is a list of several batches; pass one, or torch.cat them"
        )
    return {slot: _checked(found[slot], slot, example, 0, any_size=True) for slot in example.slots}


def placed(batch: dict[int | str, Tensor], model: nn.Module, example: ExampleCall) -> Call:
    """The call of one batch on the model's device, floating images in the model's dtype."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return example.call(dict(batch))
    return example.call(
        {
            slot: t.to(parameter.device, parameter.dtype if t.is_floating_point() else t.dtype)
            for slot, t in batch.items()
        }
    )


class CalibrationCalls:
    """Images as calls of the model, made anew each time.

    Args:
        batches: as `read_images` returns them.
    """

    def __init__(
        self, model: nn.Module, example: ExampleCall, batches: list[dict[int | str, Tensor]]
    ) -> None:
        self.model, self.example, self.batches = model, example, batches
        self.sizes = [next(iter(batch.values())).shape[0] for batch in batches]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        described: list[Any],
        images: Iterable[Any],
        limit: int,
        batch_size: int,
        asked_by: str = "calibrate",
    ) -> CalibrationCalls:
        """From any iterable of images, see `read_images`; `described` and `asked_by` as
        `ExampleCall` takes them."""
        example = ExampleCall(described, model, asked_by)
        return cls(model, example, read_images(images, example, limit, batch_size))

    @property
    def images(self) -> int:
        """How many there are."""
        return sum(self.sizes)

    def __iter__(self) -> Iterator[tuple[Call, int]]:
        """Calls, with the number of images in each."""
        for batch, size in zip(self.batches, self.sizes, strict=True):
            yield placed(batch, self.model, self.example), size

    def __len__(self) -> int:
        return len(self.batches)

    def some(self, share: int) -> CalibrationCalls:
        """Every `share`-th batch."""
        return CalibrationCalls(self.model, self.example, self.batches[::share])

    def views(self, generator: torch.Generator) -> Iterator[tuple[Call, int]]:
        """Once through the images in random order, altered at random (`random_views`) where the
        model takes nothing but a batch of images; batches as large as the first."""
        whole = {slot: torch.cat([b[slot] for b in self.batches]) for slot in self.batches[0]}
        order = torch.randperm(self.images, generator=generator)
        for picked in order.split(self.sizes[0]):
            batch = {slot: tensor[picked.to(tensor.device)] for slot, tensor in whole.items()}
            (first, tensor), *others = batch.items()
            if not others and tensor.dim() == 4 and tensor.is_floating_point():
                batch[first] = random_views(tensor, generator)
            yield placed(batch, self.model, self.example), len(picked)
