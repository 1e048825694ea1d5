"""Windows of attention, as numbers: which token is in which slot of which window, on any grid.

A `WindowRule` is what `dgefx.passes.sides.window_partition` reads off a block's data movement
(roll, pad, partition). On a grid it gives a `Tiling`: the grid with its tokens rearranged window by
window and cut wherever no patch may continue, which is what the patch hierarchy
(`dgefx.nn.hierarchy`) is built on. Rows and columns are independent of each other throughout.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

#: per window, the token along one axis in every slot; -1: padding
AxisMap = tuple[tuple[int, ...], ...]


def axis_map(kind: str, window: int, shift: int, pad_first: bool, length: int) -> AxisMap:
    """Tokens of one axis in windows.

    Args:
        kind: "block" (neighbours share a window) or "grid" (tokens a stride apart do).
        window: slots along the axis. shift: of the cyclic roll, towards the start.
        pad_first: padding is appended before the roll instead of after it.
        length: tokens along the axis.
    """
    padded = -(-length // window) * window
    tokens = list(range(length))
    fill = [-1] * (padded - length)
    line = tokens + fill if pad_first else tokens
    cut = shift % len(line)
    line = line[cut:] + line[:cut]
    line = line if pad_first else line + fill
    count = padded // window
    if kind == "grid":
        return tuple(tuple(line[start::count]) for start in range(count))
    return tuple(tuple(line[i * window : (i + 1) * window]) for i in range(count))


def usual_step(tokens: AxisMap) -> int:
    """From slot to slot, the most common distance in the image."""
    steps = [b - a for line in tokens for a, b in pairwise(line) if b > a >= 0]
    return max(sorted(set(steps)), key=steps.count) if steps else 1


def borders_of(tokens: AxisMap, step: int) -> tuple[int, ...]:
    """Slots at which, in some window, the image does not continue: a roll's seam, padding."""
    return tuple(
        slot
        for slot in range(1, len(tokens[0]))
        if any(
            (line[slot - 1] < 0) != (line[slot] < 0)
            or (line[slot] >= 0 and line[slot] - line[slot - 1] != step)
            for line in tokens
        )
    )


@dataclass(frozen=True)
class AxisTiling:
    """One axis, its windows padded so that patches of every side are aligned.

    tokens: see `AxisMap`. places: place of every slot within a window. side: places per window.
    line: the token at every place of the whole axis; -1: none. length: tokens along the axis.
    """

    tokens: AxisMap
    places: tuple[int, ...]
    side: int
    line: tuple[int, ...]
    length: int

    @classmethod
    def of(cls, tokens: AxisMap, unit: int, step: int, cuts: tuple[int, ...] = ()) -> AxisTiling:
        """Cut at every border, and before the slots `cuts`; each piece starts at a multiple of
        `unit`, the coarsest side.

        Args:
            step: distance in the image from slot to slot.
        """
        borders = (*sorted({*borders_of(tokens, step), *cuts}), len(tokens[0]))
        places: list[int] = []
        side = 0
        for first, last in pairwise((0, *borders)):
            places.extend(range(side, side + last - first))
            side += -(-(last - first) // unit) * unit
        line = [-1] * (side * len(tokens))
        for window, slots in enumerate(tokens):
            for place, token in zip(places, slots, strict=True):
                line[window * side + place] = token
        length = sum(token >= 0 for token in line)
        return cls(tokens, tuple(places), side, tuple(line), length)

    def counts(self, side: int) -> tuple[int, ...]:
        """Tokens in every patch of `side` places; 0 where there is none."""
        filled = [token >= 0 for token in self.line]
        return tuple(sum(filled[i : i + side]) for i in range(0, len(filled), side))

    def slot_counts(self, side: int) -> tuple[int, ...]:
        """Slots in every patch of one window."""
        filled = set(self.places)
        return tuple(
            sum(place in filled for place in range(i, i + side)) for i in range(0, self.side, side)
        )


class WindowOrder(NamedTuple):
    """How a block numbers its windows and their slots: the block's number of every one, counted row
    by row."""

    windows: tuple[int, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Tiling:
    """A grid of tokens rearranged window by window.

    order: see `WindowRule`.
    """

    rows: AxisTiling
    columns: AxisTiling
    order: WindowOrder | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) tokens of the image."""
        return self.rows.length, self.columns.length

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of places."""
        return len(self.rows.line), len(self.columns.line)

    @property
    def windows(self) -> tuple[int, int]:
        """(rows, columns) of windows."""
        return len(self.rows.tokens), len(self.columns.tokens)

    @property
    def full(self) -> bool:
        """Whether every place holds a token."""
        return self.shape == self.grid

    def counts(self, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Per axis, tokens in every patch of `side`."""
        return _tiling_counts(self, side)

    def children(self, fine: int, coarse: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Per axis, patches of side `fine` that hold tokens in every patch of side `coarse`."""
        return _tiling_children(self, fine, coarse)


@functools.lru_cache(maxsize=512)
def _tiling_counts(tiling: Tiling, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tiling.rows.counts(side), tiling.columns.counts(side)


@functools.lru_cache(maxsize=512)
def _tiling_children(
    tiling: Tiling, fine: int, coarse: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ratio = coarse // fine
    rows, columns = (
        tuple(sum(c > 0 for c in counts[i : i + ratio]) for i in range(0, len(counts), ratio))
        for counts in tiling.counts(fine)
    )
    return rows, columns


@dataclass(frozen=True)
class WindowRule:
    """How a block partitions a grid, for every size of it.

    size: (rows, columns) of slots in a window; None: one window over the whole grid.
    kind, shift, pad_first: see `axis_map`. fixed: only at the size it was read at, as these maps.
    cuts: per axis, slots before which patches end besides (borders of an attention mask).
    least: tokens that each axis must have at least; on less, the block lays out other windows.
    order: how the block numbers windows and slots, by which its values and tables are laid out;
        None: row by row.
    """

    size: tuple[int, int] | None = None
    kind: str = "block"
    shift: tuple[int, int] = (0, 0)
    pad_first: bool = False
    fixed: tuple[AxisMap, AxisMap] | None = None
    cuts: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    least: tuple[int, int] = (1, 1)
    order: WindowOrder | None = None

    def maps(self, grid: tuple[int, int]) -> tuple[AxisMap, AxisMap]:
        """Per axis, the token in every slot of every window.

        Raises:
            ValueError: the rule is known at one size only, and this is another.
        """
        if self.fixed is not None:
            known = tuple(
                sum(token >= 0 for line in tokens for token in line) for tokens in self.fixed
            )
            if known != grid:
                raise ValueError(
                    f"a converted block with windows got a grid of {grid[0]} x {grid[1]} tokens; "
                    f"it was converted for {known[0]} x {known[1]}; the dense block may lay out "
                    f"other windows on other sizes. convert() the model at this image size"
                )
            return self.fixed
        if grid[0] < self.least[0] or grid[1] < self.least[1]:
            least = f"{self.least[0]} x {self.least[1]}"
            raise ValueError(
                f"a converted block with windows got a grid of {grid[0]} x {grid[1]} tokens; on "
                f"less than {least} the dense block lays out other windows than at the size it was "
                f"converted for. convert() the model at this image size"
            )
        if self.size is None:
            return (tuple(range(grid[0])),), (tuple(range(grid[1])),)
        rows, columns = (
            axis_map(self.kind, self.size[axis], self.shift[axis], self.pad_first, grid[axis])
            for axis in (0, 1)
        )
        return rows, columns

    def step(self, tokens: AxisMap) -> int:
        """Distance in the image from slot to slot of one of `maps`."""
        if self.fixed is not None:
            return usual_step(tokens)
        return len(tokens) if self.kind == "grid" and self.size is not None else 1

    def tiling(self, grid: tuple[int, int], unit: int) -> Tiling:
        """The tiling of `grid` for patches of sides up to `unit`."""
        return _tiling(self, (int(grid[0]), int(grid[1])), unit)


@functools.lru_cache(maxsize=128)
def _tiling(rule: WindowRule, grid: tuple[int, int], unit: int) -> Tiling:
    rows, columns = (
        AxisTiling.of(tokens, unit, rule.step(tokens), cuts)
        for tokens, cuts in zip(rule.maps(grid), rule.cuts, strict=True)
    )
    return Tiling(rows, columns, rule.order)
