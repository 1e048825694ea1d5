"""`Packing`: where every query and every token of a batch is, as flat rows.

What the operators `dgefx::pool`, `dgefx::unpool_add` and `dgefx::stencil` read, in both budget
modes: tokens of all images are rows of one (rows, C) table, queries of all images rows of another.
Prefix tokens are patches of one token each, in front of the patches of the grid. The router makes
one where tensors are on a GPU; without one, the kernels work in plain PyTorch on `Routing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dgefx.kernels.ragged import Ragged


class Members(NamedTuple):
    """Tokens of every patch of one image: P patches of all levels, prefix tokens first."""

    start: Tensor  # (P + 1,) int64; patch p has the tokens token[start[p] : start[p + 1]]
    token: Tensor  # (M,) int64, counted from the image's first token, prefix included
    longest: int  # most tokens in any patch


class Packing(NamedTuple):
    """Q queries and R = images * tokens rows; every token is in exactly one query that is not idle.

    patch: (Q,) int64 patch of every query, -1 where the slot is idle: it then holds any finite
        values, nothing reads it, and it must receive no gradient.
    base: (Q,) int64, the row of the first token of the query's image; 0 where idle.
    row: (R,) int64, the query of every token.
    """

    patch: Tensor
    base: Tensor
    row: Tensor
    members: Members


def image_members(
    token_patch: Sequence[Tensor], counts: Sequence[int], prefix: int, longest: int
) -> Members:
    """Members of every patch of one image, without reading anything back from the device.

    Args:
        token_patch: per level (N,) patch of every grid token. counts: per level, its patches.
        prefix: tokens in front of the grid.
        longest: most tokens in any patch.
    """
    front = torch.arange(prefix, device=token_patch[0].device)
    tokens, sizes = [front], [torch.ones_like(front)]
    for patches, count in zip(token_patch, counts, strict=True):
        tokens.append(patches.argsort(stable=True) + prefix)
        sizes.append(patches.new_zeros(count).scatter_add(0, patches, torch.ones_like(patches)))
    start = F.pad(torch.cat(sizes).cumsum(0), (1, 0))
    return Members(start, torch.cat(tokens), longest)


def static_packing(ids: Tensor, token_slot: Tensor, prefix: int, members: Members) -> Packing:
    """The packing of images with equally many queries: prefix tokens, then the slots.

    Args:
        ids: (B, slots) patch in every slot, counted without prefix tokens, -1 where it is idle.
        token_slot: (B, N) slot of every grid token.
        prefix: tokens in front of the grid.
    """
    images, slots = ids.shape
    image = torch.arange(images, device=ids.device)[:, None]
    front = torch.arange(prefix, device=ids.device).expand(images, -1)
    patch = torch.cat([front, torch.where(ids < 0, -1, ids + prefix)], 1)
    rows = torch.cat([front, token_slot + prefix], 1)
    tokens = prefix + token_slot.shape[1]
    base = torch.where(patch < 0, 0, image * tokens)
    row = rows + image * (prefix + slots)
    return Packing(patch.flatten(), base.flatten(), row.flatten(), members)


def ragged_packing(ragged: Ragged, members: Members) -> Packing:
    """The packing of a ragged routing."""
    base = torch.where(ragged.patch < 0, 0, ragged.image * ragged.row.shape[1])
    return Packing(ragged.patch, base, ragged.row.flatten(), members)
