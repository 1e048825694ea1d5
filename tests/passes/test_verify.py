"""The verification of blocks refuses what is wrong only below the finest granularity."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dgefx.config import DGEConfig
from dgefx.kernels.routing import Routing
from dgefx.nn.block import DGEBlock
from dgefx.passes.pipeline import analyse
from dgefx.passes.plan import compare
from dgefx.passes.plan.verify import random_levels
from tests.helpers import Attention, TinyViT, images


class Sabotage:
    """Builds blocks whose pooled tokens, or tokens beside pooled ones, come out wrong."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.build = compare.build_block

    def __call__(self, *args: object, **kwargs: object) -> DGEBlock:
        block = self.build(*args, **kwargs)
        routings: list[Routing] = []
        route = block.dge_router.routing_for

        def routing_for(*given: object) -> Routing:
            routings.append(route(*given))
            return routings[-1]

        def spoil(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            if not routings:  # at the finest
                return output
            slot = routings.pop().token_slot
            users = torch.zeros(len(slot), int(slot.max()) + 1, dtype=torch.long)
            pooled = users.scatter_add_(1, slot, torch.ones_like(slot)).gather(1, slot) > 1
            wrong = {"coarse": pooled, "fine": ~pooled, "nothing": pooled & ~pooled}[self.what]
            return output + 0.1 * wrong[..., None]

        block.dge_router.routing_for = routing_for
        block.register_forward_hook(spoil)
        return block


@pytest.mark.parametrize("routing", ["nested", "region", "layer"])
@pytest.mark.parametrize("side", [(4, 4), (4, 8), (8, 8), (7, 9)])
@pytest.mark.parametrize("what", ["coarse", "fine", "nothing"])
def test_wrong_tokens_are_refused(what: str, side: tuple[int, int], routing: str) -> None:
    count = side[0] * side[1]

    def make(dim: int) -> Attention:
        """With a table, so that nothing holds on patch-constant input."""
        return Attention(dim, 2, torch.randn(2, count, count) if what == "fine" else None)

    model, x = TinyViT(depth=1, make=make).eval(), images(2, (4 * side[0], 4 * side[1]))
    config = DGEConfig() if routing == "nested" else DGEConfig(routing=routing)
    with mock.patch.object(compare, "build_block", Sabotage(what)):
        analysis = analyse(model, (x,), config, None, must_convert=False)
    reasons = [why.text for why in analysis.reasons.values()]
    if what == "nothing":
        assert not reasons
    else:
        expected = {"coarse": "patch-constant input", "fine": "fine tokens beside coarse ones"}
        assert expected[what] in reasons[0]


@pytest.mark.parametrize("side", [(4, 4), (8, 8), (16, 16)])
def test_random_levels_have_coarse_and_fine_regions(side: tuple[int, int]) -> None:
    model, x = TinyViT(depth=1).eval(), images(2, (4 * side[0], 4 * side[1]))
    analysis = analyse(model, (x,), DGEConfig(), None)
    block = next(m for m in analysis.work.modules() if isinstance(m, DGEBlock))
    for seed in range(20):
        levels = random_levels(block, 4, torch.Generator().manual_seed(seed))
        assert bool((levels[::2] == 2).any(1).all())
        assert bool((levels[1::2] == 0).any(1).all())
        assert bool((levels[1::2] > 0).any(1).all())
