"""`Alternatives`: queries of all granularities at once, to train gates on what they turned down.

The paper's training path (arXiv 2301.03831, section 3.3). Every patch of every level is a query,
every token still receives the update of its chosen patch, and each level's update is
added once more with a weight that is zero and carries the gate's gradient. The forward is that of
the sparse path; a gate learns from every level instead of the one that it chose. Made by
the router in training, read by `unpool_add` and around operations at full resolution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dgefx.kernels.rows import gather_rows


class Alternatives(NamedTuple):
    """B images, N grid tokens, R regions, L levels, S queries per image with prefix tokens."""

    weights: Tensor  # (B, R, L) zeros whose gradient is that of the levels' probabilities
    rows: Tensor  # (L, N) query of every token at every level, among the S of its image
    chosen: tuple[Tensor, ...]  # per level (B, P) bool, whether the patch is one that was chosen


def alternative_rows(token_patch: tuple[Tensor, ...], counts: list[int], prefix: int) -> Tensor:
    """`Alternatives.rows`: queries stand as prefix tokens, then all patches level by level.

    Args:
        token_patch: per level (N,) patch of every token. counts: per level, patches.
    """
    starts = [prefix + sum(counts[:level]) for level in range(len(counts))]
    return torch.stack([ids + start for ids, start in zip(token_patch, starts, strict=True)])


def weighted_updates(
    update: Tensor, alternatives: Alternatives, token_region: Tensor, prefix: int
) -> Tensor:
    """(B, prefix + N, C) zeros with the gradient of every level's probability.

    Args:
        update: (B, S, C), or packed (1, B * S, C).
        token_region: (N,) region of every token.
    """
    images, levels = alternatives.weights.shape[0], alternatives.rows.shape[0]
    update = update.detach().reshape(images, -1, update.shape[-1])
    weights = alternatives.weights.to(update.dtype)
    total = None
    for level in range(levels):
        picked = gather_rows(update, alternatives.rows[level].expand(images, -1))
        part = picked * weights[:, :, level].index_select(1, token_region).unsqueeze(-1)
        total = part if total is None else total + part
    assert total is not None
    return F.pad(total, (0, 0, prefix, 0))


def unpool_levels(rows: Tensor, alternatives: Alternatives, dropped: int) -> list[Tensor]:
    """A value of the query path on all tokens as if every region were at one level, level by level.

    Args:
        rows: (B, S - dropped, F), or packed (1, B * (S - dropped), F).
        dropped: prefix tokens that the value has no queries of.

    Returns:
        Per level (B, N, F).
    """
    images = alternatives.weights.shape[0]
    rows = rows.reshape(images, -1, rows.shape[-1])
    return [gather_rows(rows, (level - dropped).expand(images, -1)) for level in alternatives.rows]


def choose(mixed: Tensor, alone: Tensor, alternatives: Alternatives, level: int) -> Tensor:
    """(B, P, F) of patches: computed among the chosen granularities where the patch is one of
    them, else as if the whole image were at its level."""
    return torch.where(alternatives.chosen[level].unsqueeze(-1), mixed, alone)
