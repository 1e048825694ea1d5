"""What the three kernels of `dgefx::attend` share: block sizes, and where a tile of rows lies.

Block sizes follow from the head sizes, the dtype and the mean group, by a rule: benchmarking at
the first call would stall it, and would let two processes round differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
#: offsets that a program compares at once to find its group
CHUNK = tl.constexpr(128)


class Tiles(NamedTuple):
    """One launch: rows and keys per block (powers of two from 16), warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


class Sizes(NamedTuple):
    """Shapes of one call, and `unit`, which divides every stride of its inputs."""

    rows: int  # T
    groups: int  # G
    heads: int  # H
    keys: int  # M
    head: int  # D, of queries and keys
    value: int  # E, of values
    unit: int

    @property
    def widest(self) -> int:
        return max(padded(self.head), padded(self.value))


def padded(size: int) -> int:
    """The power of two that a head of `size` takes in a block; a matrix unit wants 16."""
    return max(16, triton.next_power_of_2(size))


def sizes_of(q: Tensor, k: Tensor, v: Tensor, strided: Sequence[Tensor]) -> Sizes:
    """`Sizes` of a call that reads `strided`.

    Triton knows of an integer argument at most that 16 divides it. A head of 72 would then be read
    one number at a time, so strides are passed in units of a 16-byte load wherever they have any.
    """
    unit = 16 // q.element_size()
    if any(stride % unit for tensor in strided for stride in tensor.stride()[:-1]):
        unit = 1
    return Sizes(q.shape[0], k.shape[0], q.shape[1], k.shape[2], q.shape[2], v.shape[3], unit)


def dense_last(tensor: Tensor) -> Tensor:
    """The tensor, copied if its last dimension is strided."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def widens(kernel: Any, dtype: torch.dtype) -> bool:
    """Whether operands of matrix products become float32 first: in Triton's interpreter (3.6 to
    3.8 at least), which would multiply the bit patterns of bfloat16 as integers."""
    return dtype == torch.bfloat16 and not isinstance(kernel, triton.JITFunction)


def constants(sizes: Sizes, tiles: Tiles, has_bias: bool, wide: bool = False) -> dict[str, Any]:
    """Compile-time arguments that all three kernels take."""
    block_keys = min(tiles.keys, padded(sizes.keys))
    return {
        "HEAD": sizes.head,
        "VALUE": sizes.value,
        "PAD_HEAD": padded(sizes.head),
        "PAD_VALUE": padded(sizes.value),
        "UNIT": sizes.unit,
        "HAS_BIAS": has_bias,
        "WHOLE": sizes.keys % block_keys == 0,
        "WIDE": wide,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_KEYS": block_keys,
    }


def row_tiles(rows: int, groups: int, block: int) -> int:
    """Tiles that hold all rows however they are grouped; see `locate_rows`."""
    return rows // block + groups + 2


def forward_tiles(sizes: Sizes, dtype: torch.dtype, has_bias: bool) -> Tiles:
    """Block sizes of `attend_forward_kernel`.

    These and those below are the largest that spill next to nothing and stay under 99 KiB of
    shared memory, what sm_86, sm_89 and sm_120 have, on sm_80 and sm_90 as well: see
    tests/kernels/test_attend_compiles.py. A bias is float32 per score, so it costs both.
    """
    wide = sizes.widest > 64
    if dtype == torch.float32:  # no matrix unit: every operand passes through registers
        return Tiles(32 if wide else 64, 32, 8, 2)
    # tall tiles read keys less often, short ones leave less of a small group's last tile empty
    tall = sizes.rows >= 256 * sizes.groups and not (wide and has_bias)
    keys = 32 if wide and has_bias else 64
    return Tiles(128 if tall else 64, keys, 8 if tall else 4, 2 if wide or has_bias else 3)


def query_backward_tiles(sizes: Sizes, dtype: torch.dtype, has_bias: bool) -> Tiles:
    """Block sizes of `attend_query_backward_kernel`."""
    wide = sizes.widest > 64
    if dtype == torch.float32:
        return Tiles(32 if wide else 64, 32, 8, 2)
    if wide or has_bias:
        return Tiles(64, 32, 8 if wide and has_bias else 4, 2)
    return Tiles(64, 64, 4, 3)


def context_backward_tiles(sizes: Sizes, dtype: torch.dtype, has_bias: bool) -> Tiles:
    """Block sizes of `attend_context_backward_kernel`."""
    if dtype == torch.float32:
        return Tiles(32, 32, 8, 2)
    if sizes.widest > 64:
        return Tiles(32, 64, 8, 2)
    return Tiles(64, 32 if has_bias else 64, 4, 2)


@triton.jit
def locate_rows(
    offsets: tl.tensor,
    rows: tl.tensor,
    groups: tl.tensor,
    tile: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(group, first row, rows from there to the group's end) of a tile; none left: exit.

    Groups are 0 to `groups` - 1; -1 and `groups` are the idle rows in front and behind. Group g,
    from row b, begins at tile b // BLOCK + g + 1. That leaves every group tiles enough, as
    ceil((e - b) / BLOCK) <= e // BLOCK - b // BLOCK + 1, and needs no sum over lengths: offsets
    alone say which tile is whose.
    """
    before = 0
    for first in range(0, groups + 1, CHUNK):
        index = first + tl.arange(0, CHUNK)
        begins = tl.load(offsets + index, mask=index <= groups, other=0)
        before += tl.sum(
            ((index <= groups) & (begins // BLOCK + index + 1 <= tile)).to(tl.int32), 0
        )
    begin = tl.load(offsets + before - 1, mask=before > 0, other=0)
    end = tl.load(offsets + before, mask=before <= groups, other=0)
    end = tl.where(before <= groups, end, rows)
    start = begin + (tile - begin // BLOCK - before) * BLOCK
    return before - 1, start, (end - start).to(tl.int32)


@triton.jit
def load_rows(
    pointer: tl.tensor,
    stride: tl.tensor,
    left: tl.tensor,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """(BLOCK, PADDED) rows from `pointer` on, zero beyond `left` rows and WIDTH columns; as float32
    if WIDE, see `widens`."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    pointers = pointer + row.to(tl.int64) * stride * UNIT + column
    if WHOLE:
        if WIDTH == PADDED:
            value = tl.load(pointers)
        else:
            value = tl.load(pointers, mask=column < WIDTH, other=0.0)
    else:
        value = tl.load(pointers, mask=(row < left) & (column < WIDTH), other=0.0)
    if WIDE:
        value = value.to(tl.float32)
    return value


@triton.jit
def store_rows(
    pointer: tl.tensor,
    stride: tl.tensor,
    left: tl.tensor,
    value: tl.tensor,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the first `left` rows and WIDTH columns of a (BLOCK, PADDED) block."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    pointers = pointer + row.to(tl.int64) * stride + column
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=(row < left) & (column < WIDTH))
