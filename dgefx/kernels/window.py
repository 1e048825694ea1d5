"""Queries in their windows: between the packed queries of an image and slots per window.

Every window has the same number of slots, so attention of all windows is one dense batched call
whose idle rows are never read. A table (position bias, mask) has a row for every patch that a
window can hold, of every level in use (7 x 7 tokens with sides 1, 2, 4: 49 + 16 + 4 rows). Patches
that are chosen do not overlap, so 49 slots hold them, and every slot reads its row; blocks whose
tables meet queries otherwise than by broadcasting have a fixed slot for every row instead.
Everything that is tokenwise runs on the packed queries, which are fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgefx.kernels.pool import patch_sums
from dgefx.kernels.rows import gather_rows, spread_rows
from dgefx.kernels.window_slots import WindowSlots


class WindowAxes(NamedTuple):
    """How a value holds windows.

    batch: the image axis; `merged`: it counts windows too, and `inner` values per window (heads).
    windows: axes of their own that count windows (one, or rows and columns), if any.
    slots: the slot axis, or its two axes; packed queries stand as (queries, 1) there.
    """

    batch: int
    merged: bool
    inner: int
    windows: tuple[int, ...]
    slots: tuple[int, ...]


#: `WindowAxes` as generated code writes it
AxesLike = tuple[int, bool, int, tuple[int, ...], tuple[int, ...]]


def to_slots(value: Tensor, slots: WindowSlots, axes: AxesLike) -> Tensor:
    """Packed queries to slots.

    Args:
        value: images (times `inner`) on the batch axis, 1 on window axes, queries on the first
            slot axis, 1 on the second.

    Returns:
        The same axes; windows where they belong, S on the first slot axis.
    """
    axes = WindowAxes(*axes)
    rows, rest, names = _rows(value, axes)
    images = slots.query.shape[0]
    placed = spread_rows(rows, slots.query)
    count = slots.windows[0] * slots.windows[1]
    placed = placed.view(images, count, slots.total, *rest)
    return _arrange(placed, names, slots.windows, slots.total, axes)


def from_slots(value: Tensor, slots: WindowSlots, axes: AxesLike) -> Tensor:
    """The inverse of `to_slots`."""
    axes = WindowAxes(*axes)
    count = slots.windows[0] * slots.windows[1]
    images = value.shape[axes.batch] // axes.inner
    images = images // count if axes.merged else images
    # (images, windows, slots, inner, rest...) of the value, whatever its axes
    shape: list[int] = []
    lead: dict[str, int] = {}
    rest: list[int] = []
    for axis, size in enumerate(value.shape):
        if axis == axes.batch:
            lead["batch"] = len(shape)
            shape.append(images)
            if axes.merged:
                lead["window"] = len(shape)
                shape.append(count)
            if axes.inner > 1:
                rest.append(len(shape))
                shape.append(axes.inner)
        elif axis in axes.windows:
            lead.setdefault("window", len(shape))
            if axis == axes.windows[0]:
                shape.append(count)
        elif axis in axes.slots:
            if axis == axes.slots[0]:
                lead["slot"] = len(shape)
                shape.append(slots.total)
        else:
            rest.append(len(shape))
            shape.append(size)
    if "window" not in lead:
        lead["window"] = len(shape)
        shape.append(1)
    table = value.reshape(shape).permute(lead["batch"], lead["window"], lead["slot"], *rest)
    kept = table.shape[3:]
    if slots.slot.dim() == 1:
        packed = table.reshape(images * count * slots.total, -1)
        packed = packed.index_select(0, slots.slot).unsqueeze(0)
        images = 1
    else:
        packed = gather_rows(table.reshape(images, count * slots.total, -1), slots.slot)
    names = ["inner"] if axes.inner > 1 else []
    names += ["rest"] * (len(kept) - len(names))
    count = packed.shape[1]
    return _arrange(packed.view(images, 1, count, *kept), names, (1, 1), count, axes)


def repack(value: Tensor, source: AxesLike, target: AxesLike, rest: Sequence[int]) -> Tensor:
    """Packed queries laid out as another value holds them: what is left of moving tokens.

    Args:
        rest: sizes of the target's axes that are none of images, windows, slots.
    """
    target = WindowAxes(*target)
    rows, _, _ = _rows(value, WindowAxes(*source))
    names = ["inner"] if target.inner > 1 else []
    sizes = [target.inner] * len(names) + list(rest)
    names += ["rest"] * len(rest)
    shaped = rows.view(rows.shape[0], 1, rows.shape[1], *sizes)
    return _arrange(shaped, names, (1, 1), rows.shape[1], target)


def lead_count(tokens: Tensor, slots: WindowSlots, merged: bool, inner: int) -> int:
    """Size of the image axis of a value in slots."""
    windows = slots.windows[0] * slots.windows[1] if merged else 1
    return tokens.shape[0] * windows * inner


def slot_count(slots: WindowSlots) -> int:
    """Slots per window."""
    return slots.total


def _rows(value: Tensor, axes: WindowAxes) -> tuple[Tensor, list[int], list[str]]:
    """(images, queries, F) of packed queries, the sizes that make F, and their names."""
    names: list[str] = []
    order: list[int] = []
    shift = 0
    if axes.inner > 1:
        value = value.unflatten(axes.batch, (-1, axes.inner))
        names.append("inner")
        order.append(axes.batch + 1)
        shift = 1
    moved = {a: a + (shift if a > axes.batch else 0) for a in range(value.dim() - shift)}
    skip = {axes.batch, *axes.windows, *axes.slots}
    for axis, place in moved.items():
        if axis not in skip:
            order.append(place)
            names.append("rest")
    singles = [moved[a] for a in (*axes.windows, *axes.slots[1:])]
    table = value.permute(moved[axes.batch], moved[axes.slots[0]], *order, *singles)
    sizes = list(table.shape[2 : 2 + len(order)])
    return table.reshape(table.shape[0], table.shape[1], -1), sizes, names


def _arrange(
    value: Tensor, names: list[str], windows: tuple[int, int], slots: int, axes: WindowAxes
) -> Tensor:
    """(images, windows, slots, [inner], rest...) to the axes of the value."""
    images, count = value.shape[0], windows[0] * windows[1]
    inner = 1 if "inner" in names else 0
    rest = iter(range(3 + inner, value.dim()))
    total = len(axes.windows) + len(axes.slots) + 1 + value.dim() - 3 - inner
    order: list[int] = []
    shape: list[int] = []
    for axis in range(total):
        if axis == axes.batch:
            order += [0] + ([1] if axes.merged else []) + ([3] if inner else [])
            shape.append(images * (count if axes.merged else 1) * (axes.inner if inner else 1))
        elif axis in axes.windows:
            if axis == axes.windows[0]:
                order.append(1)
            position = axes.windows.index(axis)
            shape.append(count if len(axes.windows) == 1 else windows[position])
        elif axis in axes.slots:
            if axis == axes.slots[0]:
                order.append(2)
            shape.append(slots if axis == axes.slots[0] else 1)
        else:
            place = next(rest)
            order.append(place)
            shape.append(value.shape[place])
    if 1 not in order:  # a single window without an axis of its own
        value = value.squeeze(1)
        order = [place - 1 if place > 1 else place for place in order]
    return value.permute(order).reshape(shape)


def pool_rows(
    table: Tensor, slots: WindowSlots, axes: tuple[int, ...], share: float = 0.5
) -> Tensor:
    """A constant with an entry per token of a window, for every row: the mean over its patch.

    Args:
        table: the window's tokens on `axes` (one axis, or rows and columns).
        share: a boolean is true where more than this share of the patch's entries are.

    Returns:
        Rows on the first of `axes`, 1 on the second.
    """
    boolean = table.dtype == torch.bool
    value = table.float() if boolean else table
    if len(axes) == 2:
        value = value.flatten(axes[0], axes[1])
    axis = axes[0]
    value = value.movedim(axis, 0)
    rest = value.shape[1:]
    flat = value.reshape(1, value.shape[0], -1)
    tables = slots.tables
    top = max(slots.levels)
    parts = []
    if top:
        sums = patch_sums(flat, (flat.shape[1], 1), slots.sides[: top + 1], tables.places)
    for level in slots.levels:
        if level == 0:
            parts.append(flat[0])
            continue
        means = sums[level].flatten(1, 2)[0].index_select(0, tables.local[level])
        parts.append((means / tables.counts[level][:, None]).to(flat.dtype))
    pooled = parts[0] if len(parts) == 1 else torch.cat(parts, 0)
    pooled = pooled.view(-1, *rest).movedim(0, axis)
    pooled = pooled.unsqueeze(axis + 1) if len(axes) == 2 else pooled
    return pooled > share if boolean else pooled


def pool_slots(
    table: Tensor, slots: WindowSlots, axes: AxesLike, rank: int, share: float = 0.5
) -> Tensor:
    """A constant for every slot, to be broadcast with a value in slots.

    Args:
        table: broadcastable to the value, with an entry per token of a window.
        axes: of the value, which has `rank` axes.
        share: see `pool_rows`.
    """
    axes = WindowAxes(*axes)
    table = table.reshape((1,) * (rank - table.dim()) + tuple(table.shape))
    pooled = pool_rows(table, slots, axes.slots, share)
    if slots.row is None:
        return pooled
    windows = slots.windows[0] * slots.windows[1]
    # every axis for itself: images, windows, heads on the image axis; 1 where the table has none
    lead = pooled.shape[axes.batch]
    inner = axes.inner if lead % axes.inner == 0 and lead > 1 else 1
    own = windows if axes.merged and lead > inner else 1
    pooled = pooled.unflatten(axes.batch, (lead // (own * inner), own, inner))
    moved = [a + 2 if a > axes.batch else a for a in range(rank)]
    apart = [moved[a] for a in axes.windows]
    rest = [moved[a] for a in range(rank) if a not in (axes.batch, *axes.windows, *axes.slots)]
    order = [axes.batch, axes.batch + 1, *apart, moved[axes.slots[0]], axes.batch + 2, *rest]
    order += [moved[a] for a in axes.slots[1:]]
    flat = pooled.permute(order)
    flat = flat.flatten(1, 1 + len(apart))  # (images or 1, windows or 1, rows, inner or 1, rest)
    images, count, rows = flat.shape[:3]
    kept = flat.shape[3 : 4 + len(rest)]
    batch = slots.row.shape[0]
    index = slots.row.view(batch, windows, slots.total)
    if count > 1:
        index = index + (torch.arange(windows, device=index.device) * rows)[:, None]
    image = torch.arange(batch, device=index.device) % images
    index = index + (image * count * rows)[:, None, None]
    entries = flat.reshape(images * count * rows, -1).index_select(0, index.flatten())
    names = ["inner"] + ["rest"] * len(rest)
    shaped = entries.view(batch, windows, slots.total, *kept)
    if axes.inner == 1:
        shaped, names = shaped.squeeze(3), names[1:]
    else:
        shaped = shaped.expand(-1, -1, -1, axes.inner, *kept[1:])
    return _arrange(shaped, names, slots.windows, slots.total, axes)


def pool_line(table: Tensor, slots: WindowSlots, place: tuple[int, int]) -> Tensor:
    """As `pool_rows`, of a table with an entry per slot row, or per slot column.

    Args:
        place: (axis of the table, 0 for rows or 1 for columns).
    """
    axis, line = place
    entries = table.movedim(axis, 0)
    rows, columns = slots.size
    shape = (rows, columns, *entries.shape[1:])
    spread = entries.unsqueeze(1 - line).expand(shape)
    return pool_rows(spread, slots, (0, 1)).squeeze(1).movedim(0, axis)
