"""`unpool_add`: every token receives the update of its patch's query.

The last step of a converted block: y = x + unpool(y_q - q) (arXiv 2301.03831, eq. 4).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dgefx.kernels.correction import corrected_update
from dgefx.kernels.routing import Routing
from dgefx.kernels.rows import gather_rows


def _token_rows(routing: Routing) -> Tensor:
    """(B, prefix + N) row of every token among (prefix + slots) queries."""
    rows = routing.token_slot
    if not routing.prefix:
        return rows
    own = torch.arange(routing.prefix, device=rows.device).expand(rows.shape[0], -1)
    return torch.cat([own, rows + routing.prefix], 1)


def unpool(queries: Tensor, routing: Routing) -> Tensor:
    """(B, prefix + slots, C) queries to (B, prefix + N, C) tokens by copying each to its patch."""
    return gather_rows(queries, _token_rows(routing))


def unpool_add(
    tokens: Tensor,
    queries: Tensor,
    updated: Tensor,
    routing: Routing,
    block_tokens: Tensor | None = None,
    block_queries: Tensor | None = None,
) -> Tensor:
    """Residual stream plus the un-pooled update, and its correction where the router has one.

    Args:
        tokens: (B, prefix + N, C), the block's input, or a later value of its main path.
        queries: (B, prefix + slots, C), `pool(tokens, routing)`.
        updated: (B, prefix + slots, C), the block's query path applied to `queries`.
        block_tokens, block_queries: the block's input and its queries, where `tokens` and
            `queries` are later ones; the correction is a map of the input.

    Returns:
        (B, prefix + N, C).
    """
    update = updated - queries
    if routing.gate is not None:
        gate = F.pad(routing.gate, (routing.prefix, 0), value=1.0)
        update = update * gate.unsqueeze(-1).to(update.dtype)
    updated_tokens = tokens + unpool(update, routing)
    if routing.correction is None or routing.lost is None:
        return updated_tokens
    prefix = routing.prefix
    correction = corrected_update(
        (tokens if block_tokens is None else block_tokens)[:, prefix:],
        (queries if block_queries is None else block_queries)[:, prefix:],
        routing.lost,
        routing.token_slot,
        routing.correction,
    )
    return updated_tokens + F.pad(correction, (0, 0, prefix, 0))
