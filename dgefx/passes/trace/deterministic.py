"""Random numbers in train mode: runs without them, for the passes that compare values.

Where everything was dropped, nothing is seen of how a value holds tokens
(`passes.sides.find_axes`). And packed queries, in the order of windows or of images, draw other
numbers than the dense block's tokens do from the same seed; without random numbers both must be
equal (`passes.plan.verify`).
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@functools.cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


@functools.cache
def _cuda_devices() -> range:
    return range(torch.cuda.device_count())  # asks the driver, in every call


def random_numbers_kept() -> AbstractContextManager[None]:
    """Leaves PyTorch's random numbers, of all devices, as they were."""
    return torch.random.fork_rng(devices=_cuda_devices())


def seed_all(number: int) -> None:
    """As `torch.manual_seed` where there is a device to seed beside the CPU. Where there is none,
    that queues a call, with its formatted stack, for each kind that there could be."""
    if _has_accelerator():
        torch.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


class Deterministic(TorchFunctionMode):
    """Dropout that drops nothing, drop path that drops no image.

    Args:
        per_element: leave out the dropout of single numbers only: what is drawn for whole images or
            channels stays, and must come out as in the dense block.
    """

    def __init__(self, per_element: bool = False) -> None:
        super().__init__()
        self.per_element = per_element

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if self.per_element and name not in ("dropout", "scaled_dot_product_attention"):
            return func(*args, **kwargs)
        if "dropout" in name and name != "dropout_":
            return args[0] if args else kwargs["input"]
        if name == "bernoulli_":
            probability = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            return args[0].fill_(probability)
        if name in ("rand", "rand_like"):
            return func(*args, **kwargs).fill_(1.0 - 1e-6)
        if name == "scaled_dot_product_attention":
            kwargs["dropout_p"] = 0.0
            args = args[:4]
        return func(*args, **kwargs)
