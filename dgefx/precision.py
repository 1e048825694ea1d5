"""Float32 at its full precision, and float64, for comparing converted models with dense ones.

`torch.backends.cudnn.allow_tf32` is on by default, and `torch.set_float32_matmul_precision` is a
common setting: both round operands to ten bits or seven, by which two orders of the same sums then
differ. Used by `dgefx.passes.pipeline` and `dgefx.coverage`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dgefx.ambient import Shared


def in_float64(value: Any) -> Any:
    """Arguments or outputs of a model with every floating point tensor in float64."""
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)


def in_type(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module` itself with its floating point tensors in this type. `module.to(dtype)` would cast
    complex ones (rotary tables) too."""
    return module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


def floating_type(module: nn.Module) -> torch.dtype:
    """The type of a module's first floating point parameter; float32 without any."""
    types = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(types, torch.float32)


@contextmanager
def _full_float32() -> Iterator[None]:
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        yield
        return
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


#: no TF32 or bfloat16 inside float32 products and convolutions, on any device, in the context.
#: Settings made through `fp32_precision`, which PyTorch does not let one read by the older names,
#: are left as they are
full_float32 = Shared(_full_float32)
