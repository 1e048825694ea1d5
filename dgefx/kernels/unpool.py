"""`unpool_add`: every token receives the update of its patch's query.

The last step of a converted block: y = x + unpool(y_q - q) (arXiv 2301.03831, eq. 4).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dgefx.kernels.alternatives import weighted_updates
from dgefx.kernels.correction import corrected_update
from dgefx.kernels.routing import Routing
from dgefx.kernels.rows import gather_rows
from dgefx.kernels.unpool_op import unpool_add_op


def _token_rows(routing: Routing) -> Tensor:
    """(B, prefix + N) row of every token among (prefix + slots) queries."""
    if routing.ragged is not None:
        return routing.ragged.row
    rows = routing.token_slot
    if not routing.prefix:
        return rows
    own = torch.arange(routing.prefix, device=rows.device).expand(rows.shape[0], -1)
    return torch.cat([own, rows + routing.prefix], 1)


def unpool(queries: Tensor, routing: Routing) -> Tensor:
    """(B, prefix + slots, C) queries to (B, prefix + N, C) tokens by copying each to its patch."""
    rows = _token_rows(routing)
    if routing.ragged is not None:
        return queries.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)
    return gather_rows(queries, rows)


def unpool_add(tokens: Tensor, queries: Tensor, updated: Tensor, routing: Routing) -> Tensor:
    """Residual stream plus the un-pooled update.

    Args:
        tokens: (B, prefix + N, C), the block's input, or a later value of its main path.
        queries: (B, prefix + slots, C), its patch means.
        updated: (B, prefix + slots, C), the block's query path applied to `queries`.

    Returns:
        (B, prefix + N, C).
    """
    if routing.packing is not None:
        gate = routing.gate
        if gate is not None and routing.ragged is None:
            gate = F.pad(gate, (routing.prefix, 0), value=1.0)
        rows = unpool_add_op(
            tokens.flatten(0, 1),
            queries.flatten(0, 1),
            updated.flatten(0, 1),
            None if gate is None else gate.flatten(),
            routing.packing,
        )
        return rows.view(tokens.shape)
    update = updated - queries
    if routing.gate is not None:
        front = 0 if routing.ragged is not None else routing.prefix
        gate = F.pad(routing.gate, (front, 0), value=1.0)
        update = update * gate.unsqueeze(-1).to(update.dtype)
    output = tokens + unpool(update, routing)
    if routing.alternatives is not None:
        output = output + weighted_updates(
            update, routing.alternatives, routing.token_region, routing.prefix
        )
    return output


def corrected(output: Tensor, tokens: Tensor, queries: Tensor, routing: Routing) -> Tensor:
    """The block's output with the correction of its update, where the router has one.

    Args:
        output: (B, prefix + N, C). tokens, queries: the block's input and its patch means.
    """
    if routing.correction is None or routing.lost is None:
        return output
    prefix = routing.prefix
    correction = corrected_update(
        tokens[:, prefix:],
        queries if routing.ragged is not None else queries[:, prefix:],
        routing.lost,
        routing.token_slot,
        routing.correction,
    )
    return output + F.pad(correction, (0, 0, prefix, 0))
