"""`correction`: a low-rank estimate of what pooling takes away from a token's update.

All tokens of a patch receive the update of their mean. What each of them misses against its own
dense update is, in good part, linear in its deviation from the mean and in how much of the patch's
energy pooling removed. `dgefx.calibration` (`correction`, `refine`) fits that map; this file
evaluates it. It is exactly zero for fine tokens and for patches of equal tokens, so both
identities of a converted block hold with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dgefx.kernels.rows import spread_rows


class Correction(NamedTuple):
    """Weights of one block's correction of rank k."""

    down: Tensor  # (2 C + 1, k): rows for the lost share, the scaled mean, the deviation
    up: Tensor  # (k, C)


def mean_features(queries: Tensor, lost: Tensor) -> Tensor:
    """(B, slots, C + 1): the lost share, and the layer-normalised query scaled by it.

    Args:
        queries: (B, slots, C) patch means.
        lost: (B, slots) share of the patch's energy that its mean does not hold, in [0, 1].
    """
    share = lost.unsqueeze(-1).to(queries.dtype)
    return torch.cat([share, share * F.layer_norm(queries, queries.shape[-1:])], -1)


def corrected_update(
    tokens: Tensor, queries: Tensor, lost: Tensor, rows: Tensor, weights: Correction
) -> Tensor:
    """The correction of every token's update.

    Args:
        tokens: (B, N, C) grid tokens. queries: (B, slots, C) patch means, or (1, T, C).
        lost: (B, slots) or (1, T), see `mean_features`.
        rows: (B, N) slot of every token.
        weights: of the block.

    Returns:
        (B, N, C).
    """
    channels = tokens.shape[-1]
    down = weights.down.to(tokens.dtype)
    # the deviation x - mean is taken after the projection, where it has k channels instead of C
    hidden = mean_features(queries, lost) @ down[: channels + 1] - queries @ down[channels + 1 :]
    pooled = (lost > 0).to(tokens.dtype).unsqueeze(-1)
    own = tokens @ down[channels + 1 :]
    spread = spread_rows(torch.cat([hidden, pooled], -1), rows)
    return ((own + spread[..., :-1]) * spread[..., -1:]) @ weights.up.to(tokens.dtype)
