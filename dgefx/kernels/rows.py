"""Row gathers: the only way tokens move between the dense grid and the query slots.

Gathering whole rows of a flattened table keeps channels contiguous; `torch.gather` with an index
expanded over channels reads one element at a time and costs more than the attention it saves.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of every image's table.

    Args:
        table: (B, P, C).
        index: (B, K) int64, 0 <= index < P.

    Returns:
        (B, K, C), `table[b, index[b, k]]`.
    """
    batch, rows, channels = table.shape
    start = torch.arange(batch, device=index.device)[:, None] * rows
    flat = (index + start).reshape(-1)
    return table.reshape(batch * rows, channels).index_select(0, flat).view(batch, -1, channels)


def spread_rows(table: Tensor, index: Tensor) -> Tensor:
    """`gather_rows` of per-image tables (B, P, C), or of one table (1, T, C) that holds the rows
    of all images, to (B, K, C)."""
    images, rows = table.shape[:2]
    # no branch on the number of tables: `torch.jit.trace` of one image would keep it
    start = torch.arange(index.shape[0], device=index.device) % images * rows
    flat = (index + start[:, None]).flatten()
    return table.flatten(0, 1).index_select(0, flat).unflatten(0, index.shape)
