"""`Ragged`: queries of a batch packed one image after the other, each image with its own number.

The average budget's counterpart of `dgefx.kernels.allocate.Slots`. In a block's generated code the
packed queries stand as one image with T queries: (1, T, C). Rows past the last image are idle:
they hold finite values, no token reads them and no gradient reaches them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from dgefx.kernels.routing import Routing


class Ragged(NamedTuple):
    """B images, T packed queries, P patches of all levels.

    Patches are numbered with the prefix tokens in front, then level by level.
    """

    patch: Tensor  # (T,) int64 patch of every query, -1 where idle
    image: Tensor  # (T,) int64 image of every query, 0 where idle
    offsets: Tensor  # (B + 1,) int64 first query of every image, and the end of the last
    row: Tensor  # (B, prefix + N) int64 query of every token
    patch_row: Tensor  # (B, prefix + P) int64 query of every patch, -1 where it has none
    patches: int  # prefix + P

    def flat(self, prefix: int = 0, tables: int | None = None) -> Tensor:
        """(T,) row of every query's patch in a (B, patches - prefix, ...) table of patches.

        Args:
            prefix: tokens in front that the table leaves out; their queries read any row.
            tables: as many as there are images, or 1 for all images; B if None.
        """
        count = self.patches - prefix
        image = self.image if tables is None else self.image % tables
        return image * count + (self.patch - prefix).clamp(min=0)


def level_counts(levels: Tensor, costs: Sequence[Tensor]) -> Tensor:
    """(B, L) queries of every level.

    Args:
        levels: (B, R). costs: per level (R,) patches of every region.
    """
    return torch.stack(
        [torch.where(levels == level, cost, 0).sum(1) for level, cost in enumerate(costs)], 1
    )


def assign_ragged(
    levels: Tensor,
    patch_region: Sequence[Tensor],
    token_patch: Sequence[Tensor],
    costs: Sequence[Tensor],
    existing: Sequence[Tensor | None],
    prefix: int,
    total: int,
) -> Ragged:
    """Number the chosen patches of a batch: image by image, prefix tokens first, then level by
    level in raster order (at the finest level the queries are the tokens, in their order).

    Args:
        levels: (B, R).
        patch_region: per level (P,). token_patch: per level (N,). costs: per level (R,).
        existing: per level (P,) bool, or None where every patch holds tokens.
        prefix: tokens in front of the grid, each a query.
        total: T, at least as many as there are.
    """
    images, device = levels.shape[0], levels.device
    ends = (level_counts(levels, costs).sum(1) + prefix).cumsum(0)
    offsets = F.pad(ends, (1, 0))
    parts = []
    for level, region in enumerate(patch_region):
        part, exists = (levels == level)[:, region], existing[level]
        parts.append(part if exists is None else part & exists)
    chosen = F.pad(torch.cat(parts, 1), (prefix, 0), value=True)
    count = chosen.shape[1]
    row = chosen.long().cumsum(1) - 1 + offsets[:-1, None]
    ids = torch.arange(images * count, device=device)
    table = torch.full((total + 1,), -1, dtype=torch.int64, device=device)
    table = table.scatter(0, torch.where(chosen, row, total).flatten(), ids)[:total]
    token_level = levels[:, patch_region[0]]
    column, start = None, prefix
    for level, (patches, region) in enumerate(zip(token_patch, patch_region, strict=True)):
        own = (patches + start).expand_as(token_level)
        column = own if column is None else torch.where(token_level == level, own, column)
        start += region.shape[0]
    assert column is not None
    if prefix:
        front = torch.arange(prefix, device=device).expand(images, -1)
        column = torch.cat([front, column], 1)
    return Ragged(
        torch.where(table < 0, -1, table % count),
        (table // count).clamp(min=0),
        offsets,
        row.gather(1, column),
        torch.where(chosen, row, -1),
        count,
    )


def assign_all(row: Tensor, exists: Tensor, prefix: int) -> Ragged:
    """Every patch of every level is a query of every image, see `dgefx.kernels.alternatives`.

    Args:
        row: (B, N) query of every grid token's chosen patch, among its image's.
        exists: (P,) bool, which of the patches hold tokens; the others compute any finite values.
    """
    (images, _), device = row.shape, row.device
    count = prefix + exists.shape[0]
    start = torch.arange(images, device=device)[:, None] * count
    own = torch.arange(count, device=device)
    there = F.pad(exists, (prefix, 0), value=True)
    front = torch.arange(prefix, device=device).expand(images, -1)
    queries = torch.arange(images * count, device=device)
    return Ragged(
        torch.where(there, own, prefix).repeat(images),
        queries // count,
        torch.arange(images + 1, device=device) * count,
        torch.cat([front, row], 1) + start,
        torch.where(there, own + start, -1),
        count,
    )


def to_padded(queries: Tensor, ragged: Ragged, longest: int) -> Tensor:
    """(T, F) packed rows to (B, longest, F), rows past an image's own holding others' values."""
    place = ragged.offsets[:-1, None] + torch.arange(longest, device=queries.device)
    place = place.clamp(max=queries.shape[0] - 1)
    return queries.index_select(0, place.flatten()).unflatten(0, place.shape)


def from_padded(padded: Tensor, ragged: Ragged) -> Tensor:
    """The inverse of `to_padded`; idle rows hold any finite values."""
    longest = padded.shape[1]
    own = torch.arange(ragged.patch.shape[0], device=padded.device) - ragged.offsets[ragged.image]
    place = ragged.image * longest + own.clamp(max=longest - 1)
    return padded.flatten(0, 1).index_select(0, place)


def spread_images(
    value: Tensor, routing: Routing, rank: int, batch: int, axes: tuple[int, ...]
) -> Tensor:
    """A value with one entry per image (a drop path's mask, a condition) for packed queries.

    Args:
        value: broadcastable to a value of `rank` axes, images on `batch`, 1 on `axes`.

    Returns:
        `rank` axes: 1 on `batch`, queries on the first of `axes`.
    """
    assert routing.ragged is not None
    value = value.reshape((1,) * (rank - value.dim()) + tuple(value.shape))
    rows = value.movedim(batch, 0).index_select(0, routing.ragged.image)
    place = [axis for axis in range(rank) if axis != batch].index(axes[0])
    return rows.movedim(0, place).squeeze(place + 1).unsqueeze(batch)


def _body_rows(ragged: Ragged, prefix: int) -> Tensor:
    """(T - B * prefix,) rows of the queries that are no prefix tokens, idle ones last."""
    images = ragged.row.shape[0]
    count = ragged.patch.shape[0] - images * prefix
    place = torch.arange(count, device=ragged.patch.device)
    ends = ragged.offsets[1:] - prefix * torch.arange(1, images + 1, device=place.device)
    image = torch.searchsorted(ends, place, right=True).clamp(max=images - 1)
    return place + prefix * (image + 1)


def body_queries(value: Tensor, routing: Routing, axis: int) -> Tensor:
    """A packed value without the queries of prefix tokens."""
    ragged = routing.ragged
    assert ragged is not None
    if not routing.prefix:
        return value
    return value.index_select(axis, _body_rows(ragged, routing.prefix))


def body_slots(routing: Routing) -> Tensor:
    """(B, N) the query of every grid token among `body_queries`."""
    ragged = routing.ragged
    assert ragged is not None
    images = torch.arange(1, ragged.row.shape[0] + 1, device=ragged.row.device)
    return routing.token_slot - routing.prefix * images[:, None]


def split_prefix(value: Tensor, routing: Routing, axis: int) -> tuple[Tensor, Tensor]:
    """A packed value's queries of prefix tokens, image by image, and all the others."""
    ragged = routing.ragged
    assert ragged is not None
    front = torch.arange(routing.prefix, device=value.device)
    rows = (ragged.offsets[:-1, None] + front).flatten()
    return value.index_select(axis, rows), body_queries(value, routing, axis)


def join_prefix(prefix: Tensor, body: Tensor, routing: Routing, axis: int) -> Tensor:
    """The inverse of `split_prefix`."""
    ragged = routing.ragged
    assert ragged is not None
    images, count = ragged.row.shape[0], routing.prefix
    place = torch.arange(ragged.patch.shape[0], device=prefix.device)
    idle, first = ragged.patch < 0, (ragged.patch >= 0) & (ragged.patch < count)
    before = torch.where(idle, images, ragged.image + 1) * count
    row = torch.where(first, ragged.image * count + ragged.patch, images * count + place - before)
    return torch.cat([prefix, body], axis).index_select(axis, row)


def repeat_images(value: Tensor, tokens: Tensor, axis: int) -> Tensor:
    """Prefix tokens on `axis` that are the same for all images, or one set per image on axis 0 (1
    if that is `axis`), as `join_prefix` takes them."""
    batch = 0 if axis else 1
    first = value.movedim(batch, 0)
    each = first.expand(tokens.shape[0], *first.shape[1:])
    place = axis - 1 if axis else 0
    return each.movedim(0, place).flatten(place, place + 1).unsqueeze(batch)
