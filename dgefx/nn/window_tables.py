"""Tables of a tiling for the kernels: places of tokens, and fixed slots of patches in windows.

Built once per block at the converted size by `dgefx.nn.router`, and again for any other size.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dgefx.kernels.pool import Places
from dgefx.kernels.window_slots import WindowTables
from dgefx.nn.hierarchy import existing_patches, side_counts
from dgefx.nn.windows import AxisTiling, Tiling


def _places(rows: tuple[int, ...], columns: tuple[int, ...], width: int) -> Places:
    row, column = torch.tensor(rows)[:, None], torch.tensor(columns)
    filled = ((row >= 0) & (column >= 0)).reshape(-1, 1)
    token = (row.clamp(min=0) * width + column.clamp(min=0)).reshape(-1)
    return Places(token, None if bool(filled.all()) else filled, (len(rows), len(columns)))


def tiling_places(tiling: Tiling) -> Places:
    """The token at every place of the tiling."""
    return _places(tiling.rows.line, tiling.columns.line, tiling.columns.length)


def _slot_places(tiling: Tiling) -> Places:
    """The window slot, by the block's number, at every place of one window."""
    lines = []
    for axis in (tiling.rows, tiling.columns):
        line = [-1] * axis.side
        for slot, place in enumerate(axis.places):
            line[place] = slot
        lines.append(tuple(line))
    places = _places(lines[0], lines[1], len(tiling.columns.places))
    return places._replace(token=_numbered_slots(places.token, tiling))


def _numbered_slots(slots: Tensor, tiling: Tiling) -> Tensor:
    """The block's numbers of slots that are counted row by row."""
    return slots if tiling.order is None else torch.tensor(tiling.order.slots)[slots]


def _window_numbers(rows: Tensor, columns: Tensor, tiling: Tiling) -> Tensor:
    """The block's numbers of the windows of all combinations of window rows and columns."""
    windows = _raster(rows, columns, tiling.windows[1])
    return windows if tiling.order is None else torch.tensor(tiling.order.windows)[windows]


def _token_slots(axis: AxisTiling) -> tuple[Tensor, Tensor]:
    """(window, slot) of every token along the axis."""
    window = torch.empty(axis.length, dtype=torch.int64)
    slot = torch.empty_like(window)
    for index, tokens in enumerate(axis.tokens):
        for place, token in enumerate(tokens):
            if token >= 0:
                window[token], slot[token] = index, place
    return window, slot


def _raster(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    return (rows[:, None] * width + columns).reshape(-1)


def _token_level(tiling: Tiling) -> tuple[Tensor, Tensor, Tensor]:
    """(members, window, index) of the level of single tokens; padding is -1."""
    (row_window, row_slot), (column_window, column_slot) = (
        _token_slots(axis) for axis in (tiling.rows, tiling.columns)
    )
    slots = (len(tiling.rows.places), len(tiling.columns.places))
    window = _window_numbers(row_window, column_window, tiling)
    index = _numbered_slots(_raster(row_slot, column_slot, slots[1]), tiling)
    members = torch.full((tiling.windows[0] * tiling.windows[1], slots[0] * slots[1]), -1)
    members[window, index] = torch.arange(window.numel())
    return members, window, index


def _coarse_level(tiling: Tiling, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(local, counts, members, window, index) of a level of larger patches."""
    counts = [torch.tensor(axis.slot_counts(side)) for axis in (tiling.rows, tiling.columns)]
    per_patch = _raster_product(counts[0], counts[1])
    local = per_patch.nonzero().flatten()
    tall, wide = len(counts[0]), len(counts[1])
    height, width = side_counts(tiling, side)
    row, column = torch.arange(height), torch.arange(width)
    window = _window_numbers(row // tall, column // wide, tiling)
    position = _raster(row % tall, column % wide, wide)
    number = torch.zeros_like(per_patch)
    number[local] = torch.arange(local.numel())
    index = number[position]
    whole = torch.zeros(tiling.windows[0] * tiling.windows[1], tall * wide).long()
    whole[window, position] = torch.arange(window.numel())
    return local, per_patch[local], whole[:, local], window, index


def _raster_product(rows: Tensor, columns: Tensor) -> Tensor:
    return (rows[:, None] * columns).reshape(-1)


def window_tables(tiling: Tiling, sides: tuple[int, ...]) -> WindowTables:
    """See `WindowTables`."""
    members, window, index = _token_level(tiling)
    count = members.shape[1]
    tables = WindowTables(
        _slot_places(tiling),
        [torch.arange(count)],
        [torch.ones(count, dtype=torch.int64)],
        [members],
        [window],
        [index],
    )
    for side in sides[1:]:
        parts = _coarse_level(tiling, side)
        for column, part in zip(tables[1:], parts, strict=True):
            assert isinstance(column, list)
            column.append(part)
    return tables


@functools.lru_cache(maxsize=64)
def tiling_tensors(tiling: Tiling, sides: tuple[int, ...]) -> dict[str, Tensor]:
    """Every table of a tiling by a name, on the CPU; kept, so not to be changed."""
    # a first call in inference mode must not leave tensors that training cannot save
    with torch.inference_mode(False):
        return _all_tensors(tiling, sides)


def _all_tensors(tiling: Tiling, sides: tuple[int, ...]) -> dict[str, Tensor]:
    found = _flat_tensors(window_tables(tiling, sides))
    places = tiling_places(tiling)
    found["place_token"] = places.token
    if places.filled is not None:
        found["place_filled"] = places.filled
    for level, side in enumerate(sides):
        exists = existing_patches(tiling, side)
        if exists is not None:
            found[f"existing_{level}"] = exists
    return found


def _flat_tensors(tables: WindowTables) -> dict[str, Tensor]:
    """The inverse is `from_tensors`."""
    found = {"slot_token": tables.places.token}
    if tables.places.filled is not None:
        found["slot_filled"] = tables.places.filled
    for name in WindowTables._fields[1:]:
        for level, tensor in enumerate(getattr(tables, name)):
            found[f"slot_{name}_{level}"] = tensor
    return found


def from_tensors(found: dict[str, Tensor], shape: tuple[int, int], levels: int) -> WindowTables:
    """The tables back from their tensors; `shape`: places of one window."""
    places = Places(found["slot_token"], found.get("slot_filled"), shape)
    columns = [
        [found[f"slot_{name}_{level}"] for level in range(levels)]
        for name in WindowTables._fields[1:]
    ]
    return WindowTables(places, *columns)
