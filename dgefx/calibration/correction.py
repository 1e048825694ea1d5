"""Fits every block's correction of the un-pooled update; see `dgefx.kernels.correction`.

Block by block in the order they run, on the stream of the routed model as it is so far: what the
block's output misses against the dense model's own stream at that place is regressed on the
correction's features (ridge, closed form), and the map is reduced to a low rank by keeping the
directions in which its predictions vary most. So a block also makes up for what earlier ones lost.
Fitted on the dense stream instead, one block at a time, corrections look twice as good alone and
are worse together.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dgefx.kernels.correction import Correction
from dgefx.kernels.routing import Routing
from dgefx.nn.block import DGEBlock
from dgefx.nn.capacity import Plan
from dgefx.outputs import Call
from dgefx.record import set_plans

#: of every feature's own variance
RIDGE = 0.3


class _Enough(Exception):
    """Ends a forward pass once the block of interest has run."""


class _Passage:
    """What one forward pass left at one block."""

    tokens: Tensor  # (B, prefix + N, C), the router's input
    routing: Routing
    stream: Tensor  # (B, prefix + N, C), the block's output


def _run_until(model: nn.Module, block: DGEBlock, call: Call) -> _Passage | None:
    """Run `model` up to and with the first call of `block`; None if it is not called."""
    passage = _Passage()
    args, kwargs = call

    def keep_routing(_router: nn.Module, inputs: Any, routing: Routing) -> None:
        passage.tokens, passage.routing = inputs[0].clone(), routing

    def keep_stream(_block: nn.Module, _inputs: Any, output: Any) -> None:
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() >= 3:
                grid = passage.routing.grid
                passage.stream = block.dge_router.tokens_of(leaf.detach(), grid).clone()
                raise _Enough
        raise RuntimeError("the block returns no stream")

    with ExitStack() as stack:
        stack.callback(block.dge_router.register_forward_hook(keep_routing).remove)
        stack.callback(block.register_forward_hook(keep_stream).remove)
        try:
            model(*args, **kwargs)
        except _Enough:
            return passage
    return None


def fit_correction(
    model: nn.Module,
    blocks: dict[str, DGEBlock],
    name: str,
    finest: dict[str, Plan],
    routed: dict[str, Plan],
    calls: Iterable[Call],
    rank: int,
) -> Correction | None:
    """The correction of one block, given those of the blocks before it.

    Args:
        model: in eval mode. blocks: its converted blocks.
        name: of the block to fit; it must have no correction yet.
        finest, routed: plans of all blocks for the dense stream and for the routed one. The blocks
            are left at `routed`.
        rank: of the result, at most C.

    Returns:
        None where there is nothing to correct.
    """
    block = blocks[name]
    router = block.dge_router
    normal: tuple[Tensor, Tensor] | None = None
    for call in calls:
        set_plans(blocks, finest)
        dense = _run_until(model, block, call)
        set_plans(blocks, routed)
        found = _run_until(model, block, call)
        if dense is None or found is None:
            return None
        tokens, routing = found.tokens, found.routing
        features = router.correction_features(tokens, routing)  # (B, N, 2 C + 1)
        token_region = router.tables(routing.grid, tokens.device)[0].patch_region
        pooled = (routing.levels > 0)[:, token_region]
        x = features[pooled].double()
        y = (dense.stream.double() - found.stream.double())[:, router.prefix :][pooled]
        left, right = x.t() @ x, x.t() @ y
        normal = (left, right) if normal is None else (normal[0] + left, normal[1] + right)
    return None if normal is None else _solve(*normal, rank)


def _solve(left: Tensor, right: Tensor, rank: int) -> Correction | None:
    """Ridge regression from its normal equations (F, F) and (F, C), reduced to `rank`."""
    if not bool(right.abs().max() > 0):
        return None
    variance = left.diagonal()
    penalty = torch.diag(RIDGE * variance + 1e-6 * variance.mean())
    full = torch.linalg.solve(left + penalty, right)
    # principal directions of what the map predicts
    _, directions = torch.linalg.eigh(full.t() @ left @ full)
    up = directions[:, -rank:]
    down = full @ up
    if not bool(torch.isfinite(down).all()):
        return None
    return Correction(down.float(), up.t().contiguous().float())
