"""Sides, windows: what partition a block's data movement makes, read off token numbers.

Roll, pad and partition move tokens without changing them. Run on token numbers they say which
token sits in which slot of which window; from that follows the `WindowRule` that the converted
block keeps. It is compared with the movement itself on other grid sizes too, so that a converted
block either lays out windows as the dense one does or refuses the size. Used by
`passes.sides.find_axes`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgefx.nn.windows import AxisMap, WindowOrder, WindowRule, axis_map
from dgefx.passes.labels import varies

#: per axis, slots before which patches end
Cuts = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Partition:
    """The windows of one grid.

    rows, columns: per window, the token in every slot along the axis; -1: padding.
    order: how the block numbers windows and slots; None: row by row.
    """

    grid: tuple[int, int]
    rows: AxisMap
    columns: AxisMap
    order: WindowOrder | None = None

    @classmethod
    def whole(cls, grid: tuple[int, int]) -> Partition:
        """One window over everything."""
        return cls(grid, (tuple(range(grid[0])),), (tuple(range(grid[1])),))

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of slots in a window."""
        return len(self.rows[0]), len(self.columns[0])

    @property
    def windows(self) -> tuple[int, int]:
        """(rows, columns) of windows."""
        return len(self.rows), len(self.columns)

    def numbers(self, images: int) -> Tensor:
        """(images, window rows, window columns, slot rows, slot columns): 1 + image * H * W +
        token, 0 in padding; windows and slots by the block's numbers."""
        row, column = torch.tensor(self.rows), torch.tensor(self.columns)
        down, right = row[:, None, :, None], column[None, :, None, :]
        first = torch.arange(images).view(-1, 1, 1, 1, 1) * (self.grid[0] * self.grid[1])
        tokens = first + down * self.grid[1] + right + 1
        tokens = torch.where((down < 0) | (right < 0), 0, tokens)
        if self.order is None:
            return tokens
        windows, slots = (torch.tensor(numbers).argsort() for numbers in self.order)
        tokens = tokens.flatten(3, 4)[..., slots].flatten(1, 2)[:, windows]
        return tokens.unflatten(1, self.windows).unflatten(3, self.size)


def read_partition(
    numbers: Tensor,
    images: int,
    grid: tuple[int, int],
    slots: set[int],
    permuted: bool = False,
) -> Partition | None:
    """The partition that token numbers show, or None where they show none.

    Args:
        numbers: of any shape, 1 + image * H * W + token; 0: padding. Equal along channels.
        images: in the batch. slots: how many tokens may attend to each other.
        permuted: whether windows may be in any order, and slots in one that is the same in all.
    """
    moving = [axis for axis in range(numbers.dim()) if varies(numbers, axis)]
    for axis in reversed(range(numbers.dim())):
        if axis not in moving:
            numbers = numbers.select(axis, 0)
    sizes = list(numbers.shape)
    if not sizes or sizes[0] % images:
        return None
    sizes = [images, sizes[0] // images, *sizes[1:]]
    numbers = numbers.reshape(sizes)
    tokens = grid[0] * grid[1]
    for split in range(2, len(sizes) + 1):
        count = torch.Size(sizes[split:]).numel()
        if count not in slots:
            continue
        table = numbers.reshape(images, -1, count)
        shift = torch.arange(images).view(-1, 1, 1) * tokens
        local = torch.where(table > 0, table - 1 - shift, -1)
        if not torch.equal(local, local[:1].expand_as(local)):
            return None
        found = _read_table(local[0], grid)
        return _read_permuted(local[0], grid) if found is None and permuted else found
    return None


def _read_permuted(table: Tensor, grid: tuple[int, int]) -> Partition | None:
    """`_read_table` with windows sorted by their first tokens, and the slots of all of them as the
    tokens of one are."""
    if bool((table < 0).any()):  # padding has no place to be sorted by
        return None
    windows, slots = table.amin(1).argsort(), table[0].argsort()
    found = _read_table(table[windows][:, slots], grid)
    if found is None:
        return None
    order = WindowOrder(tuple(windows.tolist()), tuple(slots.tolist()))
    return dataclasses.replace(found, order=order)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _read_table(table: Tensor, grid: tuple[int, int]) -> Partition | None:
    """A (windows, slots) table of tokens as rows times columns."""
    windows, slots = table.shape
    row, column = table // grid[1], table % grid[1]
    row, column = (torch.where(table < 0, -1, t) for t in (row, column))
    for width in _divisors(slots):
        for across in _divisors(windows):
            shape = (windows // across, across, slots // width, width)
            rows = _axis(row.view(shape).permute(0, 2, 1, 3))
            columns = _axis(column.view(shape).permute(1, 3, 0, 2))
            if rows is None or columns is None:
                continue
            padded = (rows[:, None, :, None] < 0) | (columns[None, :, None, :] < 0)
            if not torch.equal(padded, table.view(shape) < 0):
                continue
            found = Partition(grid, _axis_map(rows), _axis_map(columns))
            if _complete(found.rows, grid[0]) and _complete(found.columns, grid[1]):
                return found
    return None


def _axis(places: Tensor) -> Tensor | None:
    """(windows, slots) of one axis, if the other axis' windows and slots (last two) do not matter
    beyond padding."""
    flat = places.flatten(2)
    value = flat.amax(2)
    fits = (flat == value.unsqueeze(2)) | (flat < 0)
    return value if bool(fits.all()) else None


def _axis_map(tokens: Tensor) -> AxisMap:
    return tuple(tuple(line) for line in tokens.tolist())


def _complete(tokens: AxisMap, length: int) -> bool:
    """Whether every token of the axis is in one slot."""
    return sorted(t for line in tokens for t in line if t >= 0) == list(range(length))


def candidate_rules(partition: Partition) -> list[WindowRule]:
    """The rules that make this partition of this grid."""
    per_axis = []
    for tokens, length in zip((partition.rows, partition.columns), partition.grid, strict=True):
        window = len(tokens[0])
        found = set()
        for kind in ("block", "grid"):
            for pad_first in (False, True):
                for shift in range(length):
                    if axis_map(kind, window, shift, pad_first, length) == tokens:
                        found.add((kind, pad_first, shift))
                        break
        per_axis.append(found)
    rules = []
    for kind, pad_first, shift in sorted(per_axis[0]):
        for other_kind, other_pad, other_shift in sorted(per_axis[1]):
            if (kind, pad_first) == (other_kind, other_pad):
                rules.append(
                    WindowRule(partition.size, kind, (shift, other_shift), pad_first, None)
                )
    return rules


def fixed_rule(partition: Partition, cuts: Cuts = ((), ())) -> WindowRule:
    """The partition as it is, for this grid alone."""
    maps = (partition.rows, partition.columns)
    return WindowRule(partition.size, fixed=maps, cuts=cuts, order=partition.order)


#: scores as far down as this are of keys that a softmax leaves nothing of
_HIDES = -50.0


def mask_cuts(table: Tensor, size: tuple[int, int]) -> tuple[set[int], set[int]]:
    """Slot rows and slot columns at which a table that differs between windows changes.

    What all windows share (a position bias) may change from slot to slot, a mask may not inside a
    patch: its mean would let tokens attend to what none of them may. What hides keys is a mask,
    even if all windows share it.

    Args:
        table: (windows, slots, rest...). size: (rows, columns) of slots.
    """
    value = torch.nan_to_num(table.float(), neginf=-1e4, posinf=1e4)
    hides = (value <= _HIDES) * value.abs().max()
    own = torch.stack([value - value[:1], hides], -1).unflatten(1, size)
    limit = 1e-4 * max(float(value.abs().max()), 1e-30)
    found = []
    for axis in (1, 2):
        step = own.diff(dim=axis).abs().movedim(axis, 0).flatten(1).amax(1)
        found.append({int(i) + 1 for i in (step > limit).nonzero()})
    return found[0], found[1]


def fits(rule: WindowRule, partition: Partition) -> bool:
    """Whether the rule makes this partition."""
    made: Any = rule.maps(partition.grid)
    return bool(made == (partition.rows, partition.columns))
