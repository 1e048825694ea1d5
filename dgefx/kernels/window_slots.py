"""Where the queries of a routing sit in their windows: `WindowSlots`, made by the router.

Every window has as many slots as tokens, or a fixed one for every row of its tables; see
`dgefx.kernels.window`, which moves values between packed queries and slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dgefx.kernels.pool import Places
from dgefx.kernels.ragged import Ragged


class WindowTables(NamedTuple):
    """What is fixed for one window, and for one grid of them. P patches of an image at a level, p
    of a window (none of them empty in every window); lists have an entry per level."""

    places: Places  # of the tokens of one window
    local: list[Tensor]  # (p,) patch id, within a window, of every row of the level
    counts: list[Tensor]  # (p,) tokens of the window in each of them, padding counted
    members: list[Tensor]  # (windows, p) patch id, within the image
    window: list[Tensor]  # (P,) window of every patch
    number: list[Tensor]  # (P,) its number among the p


class WindowSlots(NamedTuple):
    """Where the queries of one call are. S slots per window, w windows per image."""

    query: Tensor  # (B, w * S) packed query in every slot; any, where the slot is idle
    slot: Tensor  # (B, slots) place among w * S of every packed query; ragged: (T,) among B * w * S
    row: Tensor | None  # (B, w * S) table row of every slot; None: slots are rows
    total: int  # S
    windows: tuple[int, int]  # rows, columns; w = rows * columns
    size: tuple[int, int]  # rows, columns of tokens in a window
    levels: tuple[int, ...]  # those in use
    sides: tuple[int, ...]  # patch side per level
    tables: WindowTables


def window_slots(
    tables: WindowTables,
    patches: Sequence[Tensor | None],
    patch_slot: Tensor,
    windows: tuple[int, int],
    size: tuple[int, int],
    sides: tuple[int, ...],
    fixed: bool,
) -> WindowSlots:
    """The slots of one routing.

    Args:
        patches, patch_slot: see `dgefx.kernels.allocate.Slots`.
        fixed: a slot for every row, see the module docstring.
    """
    levels = tuple(level for level, ids in enumerate(patches) if ids is not None)
    parts = []
    for level, place in zip(levels, _places(tables, levels), strict=True):
        ids = patches[level]
        assert ids is not None
        parts.append(place[ids])
    query = _queries_of_rows(tables, patch_slot, levels)
    place = torch.cat(parts, 1)
    if fixed or query.shape[1] <= windows[0] * windows[1] * size[0] * size[1]:
        rows = query.shape[1] // (windows[0] * windows[1])
        query = query.clamp(min=0)
        return WindowSlots(query, place, None, rows, windows, size, levels, sides, tables)
    query, row, target = _close_up(query, windows, size)
    slot = target.gather(1, place).clamp(min=0)  # idle queries read any slot
    return WindowSlots(query, slot, row, size[0] * size[1], windows, size, levels, sides, tables)


def ragged_window_slots(
    tables: WindowTables,
    ragged: Ragged,
    used: Sequence[bool],
    windows: tuple[int, int],
    size: tuple[int, int],
    sides: tuple[int, ...],
    fixed: bool,
) -> WindowSlots:
    """`window_slots` of a ragged routing without prefix tokens.

    Args:
        used: per level, whether any image may have it.
    """
    levels = tuple(level for level, is_used in enumerate(used) if is_used)
    found = dict(zip(levels, _places(tables, levels), strict=True))
    counts = [window.shape[0] for window in tables.window]
    by_level = ragged.patch_row.split(counts, 1)
    query = _queries_of_rows(tables, torch.cat([by_level[level] for level in levels], 1), levels)
    place_of = torch.cat(
        [
            found[level] if level in found else torch.zeros_like(window)
            for level, window in enumerate(tables.window)
        ]
    )
    # among the rows of all windows of all images
    place = ragged.image * query.shape[1] + place_of[ragged.patch.clamp(min=0)]
    if fixed or query.shape[1] <= windows[0] * windows[1] * size[0] * size[1]:
        rows = query.shape[1] // (windows[0] * windows[1])
        query = query.clamp(min=0)
        return WindowSlots(query, place, None, rows, windows, size, levels, sides, tables)
    query, row, target = _close_up(query, windows, size)
    held = torch.arange(target.shape[0], device=target.device)[:, None] * query.shape[1]
    slot = (target + held).flatten()[place].clamp(min=0, max=query.numel() - 1)
    return WindowSlots(query, slot, row, size[0] * size[1], windows, size, levels, sides, tables)


def _places(tables: WindowTables, levels: Sequence[int]) -> list[Tensor]:
    """Per level (P,): place of every patch among the rows of all windows."""
    rows = sum(tables.local[level].shape[0] for level in levels)
    found, offset = [], 0
    for level in levels:
        found.append(tables.window[level] * rows + tables.number[level] + offset)
        offset += tables.local[level].shape[0]
    return found


def _queries_of_rows(tables: WindowTables, patch_slot: Tensor, levels: Sequence[int]) -> Tensor:
    """(B, w * rows) the query of every row of every window, -1 where there is none."""
    columns, start = [], 0
    for level in levels:
        # a slot of padding points past all patches
        members = tables.members[level]
        columns.append(torch.where(members < 0, patch_slot.shape[1], members + start))
        start += tables.window[level].shape[0]
    known = F.pad(patch_slot, (0, 1), value=-1)
    return known[:, torch.cat(columns, 1).flatten()]


def _close_up(
    query: Tensor, windows: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """As many slots per window as tokens, from one per row.

    Returns:
        (B, w * S) query in every slot, (B, w * S) its row, (B, w * rows) slot of every row.
    """
    count = size[0] * size[1]
    active = query.view(query.shape[0], windows[0] * windows[1], -1) >= 0
    rows = active.shape[2]
    rank = active.long().cumsum(2) - 1
    window = torch.arange(active.shape[1], device=query.device)[:, None]
    target = (window * count + rank).flatten(1)
    held = active.shape[1] * count
    # one scatter for both: which query, and which row
    packed = query * rows + torch.arange(rows, device=query.device).repeat(active.shape[1])
    table = torch.zeros((query.shape[0], held + 1), dtype=torch.int64, device=query.device)
    table = table.scatter(1, torch.where(active.flatten(1), target, held), packed)[:, :held]
    return table // rows, table % rows, target
