"""Float32 at its full precision, for comparing converted blocks with dense ones.

`torch.backends.cudnn.allow_tf32` is on by default, and `torch.set_float32_matmul_precision` is a
common setting: both round operands to ten bits or seven, by which two orders of the same sums then
differ. Used by `dgefx.analysis`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 or bfloat16 inside float32 products and convolutions, on any device, in the context.

    Settings made through `fp32_precision`, which PyTorch does not let one read by the older names,
    are left as they are.
    """
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
