"""What the memory-bound row kernels share: how a launch is made and how a table is cut into blocks.

Used by `collect`, `spread` and `allocate`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: elements of one block: 8 for each of 128 threads, one 16-byte load in half precision
ELEMENTS = 1024
#: channels of one block; wider rows take several, so that 384 or 768 channels fill them all
CHANNELS = 128
#: most rows of one block, where channels are few
ROWS = 32


class Blocks(NamedTuple):
    """Rows and channels of one program, powers of two."""

    rows: int
    channels: int


def identity(kernel: Any) -> Any:
    """How a kernel is launched outside a compiler: as it is."""
    return kernel


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which with several need not be the tensor's."""
    return torch.cuda.device_of(tensor) if torch.cuda.device_count() > 1 else nullcontext()


def blocks_of(channels: int) -> Blocks:
    """By a rule, as nothing but memory traffic counts here: whole rows where they fit."""
    wide = min(max(1 << (int(channels) - 1).bit_length(), 16), CHANNELS)
    return Blocks(min(ELEMENTS // wide, ROWS), wide)


def cover(size: int, block: int) -> int:
    """Blocks that cover `size`, which may be symbolic."""
    return (size + block - 1) // block
