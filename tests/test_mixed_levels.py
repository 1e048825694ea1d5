"""What a block computes beside attention, below the finest granularity: right or refused.

Every block has a position table, so that the identity on patch-constant input does not apply; at
gamma 1 all of them would equal the dense model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgefx
from dgefx.config import DGEConfig
from dgefx.passes.pipeline import analyse
from dgefx.passes.plan.verify import random_levels
from tests.helpers import error, images

SIDE, DIM, HEADS = 8, 32, 2
X = images(2, 4 * SIDE)


class Block(nn.Module):
    """scale(k) is the softmax scale, around(update, x) what becomes of the update."""

    def __init__(
        self,
        scale: Callable[[Tensor], float] | None = None,
        around: Callable[[Tensor, Tensor], Tensor] = lambda update, x: update,
    ) -> None:
        super().__init__()
        self.scale, self.around = scale, around
        self.norm, self.qkv, self.proj = (
            nn.LayerNorm(DIM),
            nn.Linear(DIM, 3 * DIM),
            nn.Linear(DIM, DIM),
        )
        self.table = nn.Parameter(torch.randn(HEADS, SIDE * SIDE, SIDE * SIDE) / 2)
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.GELU())

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        scale = None if self.scale is None else self.scale(k)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.table, scale=scale)
        x = x + self.around(self.proj(out.transpose(1, 2).flatten(2)), x)
        return x + self.mlp(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, *self.qkv(self.norm(x)).chunk(3, -1))


class BesidePositions(Block):
    """An argument in front of the stream has its shape, and is added to queries and keys."""

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        y = self.norm(x)
        weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        inputs = (y + positions, y + positions, y)
        parts = (F.linear(t, w, b) for t, w, b in zip(inputs, weights, biases, strict=True))
        return self.attend(x, *parts)


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, SIDE * SIDE, DIM))
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        if isinstance(self.block, BesidePositions):
            return self.block(self.positions.expand_as(tokens), tokens)
        return self.block(tokens)


def model(**options: Callable[..., object]) -> Model:
    torch.manual_seed(0)
    return Model(Block(**options)).eval()  # type: ignore[arg-type]


@torch.no_grad()
def error_of_fine_tokens(dense: nn.Module) -> tuple[float, float]:
    """Errors of tokens that are their own queries beside coarse ones, and of all others."""
    converted = dgefx.convert(dense, 1.0, example_inputs=X)
    router = converted.block.dge_router
    levels = random_levels(converted.block, 2, torch.Generator().manual_seed(1))
    routings = []

    def route(module, inputs, _routing):  # type: ignore[no-untyped-def]
        routings.append(module.routing_for(inputs[0], levels, inputs[1]))
        return routings[0]

    router.register_forward_hook(route)
    found, wanted = converted(X), dense(X)
    slots = routings[0].token_slot
    fine = torch.stack([(line[:, None] == line).sum(1) == 1 for line in slots])
    assert fine.any() and not fine.all()
    return error(found[fine], wanted[fine]), error(found[~fine], wanted[~fine])


@pytest.mark.parametrize(
    "options",
    [
        {},
        # the temperature follows the number of keys, which queries have as many of when dense
        {"scale": lambda k: math.log(k.shape[-2]) / 10},
        {"scale": lambda k: k.shape[-2] ** -0.5},
        {"around": lambda update, x: update * (math.log(x.shape[1]) / 4)},
        {"around": lambda update, x: update / x.shape[1] * 50},
    ],
)
def test_sizes_are_those_of_the_dense_grid(options: dict[str, Callable[..., object]]) -> None:
    fine, coarse = error_of_fine_tokens(model(**options))
    assert fine < 1e-5 < coarse


def test_the_stream_is_what_updates_are_added_to() -> None:
    torch.manual_seed(0)
    dense = Model(BesidePositions()).eval()
    fine, coarse = error_of_fine_tokens(dense)
    assert fine < 1e-5 < coarse
    converted = dgefx.convert(dense, 0.6, example_inputs=X)
    with torch.no_grad():
        # its own detail stays on the stream, whatever is pooled
        update = converted(X) - dense.embed(X).flatten(2).transpose(1, 2)
        assert error(update, dense(X) - dense.embed(X).flatten(2).transpose(1, 2)) < 1


def _first_rows_zeroed(update: Tensor, x: Tensor) -> Tensor:
    update = update.clone()
    update[:, :4] = 0
    return update


def _four_tokens(update: Tensor, x: Tensor) -> Tensor:
    weight = x.mean(-1)
    return update * (weight >= weight.topk(4, 1)[0][:, -1:]).unsqueeze(-1)


@pytest.mark.parametrize(
    "around",
    [
        lambda update, x: update + (update - update.mean(0, keepdim=True)) / 2,
        lambda update, x: update + x[:, -1:],
        _first_rows_zeroed,
        lambda update, x: (
            update * (x.mean(-1, keepdim=True) >= x.mean(-1).topk(4, 1)[0][:, -1:, None])
        ),
    ],
    ids=["mixes images", "reads the last token", "zeroes the first rows", "few tokens"],
)
def test_what_queries_cannot_do_alone_is_refused_or_right(
    around: Callable[[Tensor, Tensor], Tensor],
) -> None:
    dense = model(around=around)
    (block,) = dgefx.explain(dense, 1.0, example_inputs=X).blocks
    if block.status == "converted":
        assert error_of_fine_tokens(dense)[0] < 1e-5
    else:
        assert block.reason and block.advice


@pytest.mark.parametrize(
    "around",
    [
        lambda update, x: update * 2 if bool(x.mean() > 100) else update,
        lambda update, x: update * 2 if x.mean().item() > 100 else update,
        lambda update, x: update * float(x.abs().max()),
        lambda update, x: update * 2 if torch.equal(x[0], x[1]) else update,
    ],
    ids=["bool", "item", "float", "equal"],
)
def test_branches_on_values_are_refused(around: Callable[[Tensor, Tensor], Tensor]) -> None:
    (block,) = dgefx.explain(model(around=around), 1.0, example_inputs=X).blocks
    assert block.status == "dense" and "follows the value" in block.reason


def test_guards_against_overflow_are_none() -> None:
    def clamped(update: Tensor, x: Tensor) -> Tensor:
        if torch.isinf(update).any() or torch.isnan(update).any():
            update = update.clamp(-1e4, 1e4)
        return update

    assert error_of_fine_tokens(model(around=clamped))[0] < 1e-5


class FollowsSize(Block):
    """Something in its forward follows the size, as Python sees it."""

    def __init__(self, change: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(y) * self.change(x)
        return x + self.mlp(x)


@pytest.mark.parametrize(
    ("change", "anywhere"),
    [
        (lambda x: 2.0 if x.shape[1] < SIDE * SIDE else 1.0, False),
        (lambda x: 2.0 if x.shape[1] > SIDE * SIDE else 1.0, False),
        (lambda x: float(int(x.shape[1]) ** 0.5), False),
        (lambda x: round(x.shape[1] ** -0.25, 1), False),
        (lambda x: x.shape[1] / 8, True),
        (lambda x: 2.0, True),
    ],
)
def test_blocks_that_follow_the_size_do_not_run_at_others(
    change: Callable[[Tensor], float], anywhere: bool
) -> None:
    torch.manual_seed(0)
    dense = Model(FollowsSize(change)).eval()
    converted = dgefx.convert(dense, gamma=1.0, example_inputs=(X,))
    for side in (4 * SIDE, 2 * SIDE, (4 * SIDE, 8 * SIDE)):
        x = images(2, side)
        with torch.no_grad():
            if anywhere or side == 4 * SIDE:
                assert error(converted(x), dense(x)) < 1e-5
            else:
                with pytest.raises(
                    ValueError, match=r"converted for 8 x 8.*other sizes|decides by the size"
                ):
                    converted(x)


class Limited(FollowsSize):
    """Up to which size is an argument; how much it matters a parameter."""

    def __init__(self, limit: float, scale: float) -> None:
        super().__init__(lambda x: 1.0)
        self.limit, self.gamma = limit, nn.Parameter(torch.full((DIM,), scale))

    def forward(self, x: Tensor, limit: float) -> Tensor:
        y = super().forward(x) - x
        return x + self.gamma * y * (2.0 if x.shape[1] < limit else 1.0)


class TwoLimits(nn.Module):
    def __init__(self, *blocks: Limited) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Conv2d(3, DIM, 4, 4), nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, block.limit)
        return x


@pytest.mark.parametrize("limits", [(1.5, 40.5), (40.5, 1.5), (40.5, 40.5)])
@pytest.mark.parametrize("scales", [(1e-6, 1.0), (1.0, 1e-6)])
def test_every_block_that_follows_the_size_is_found(
    limits: tuple[float, float], scales: tuple[float, float]
) -> None:
    torch.manual_seed(0)
    dense = TwoLimits(*map(Limited, limits, scales)).eval()
    analysis = analyse(dense, (X,), DGEConfig(), None)
    found = [plan.only_here for plan in analysis.plans.values()]
    assert found == [limit > 2 for limit in limits]


class ToldByAttributes(FollowsSize):
    """The model sets its sizes; on others it yields nonsense without complaint."""

    H, W = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        b, _, c = x.shape
        plane = self.norm(x).transpose(1, 2).reshape(-1, c, self.H, self.W)
        pooled = F.avg_pool2d(plane, 2).flatten(2).transpose(1, 2).reshape(b, -1, c)
        q, kv = self.qkv(self.norm(x))[..., :DIM], self.qkv(pooled)[..., DIM:]
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, -1)))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.proj(y)


class Telling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Conv2d(3, DIM, 4, 4), ToldByAttributes(lambda x: 1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        self.block.H, self.block.W = x.shape[-2:]
        return self.block(x.flatten(2).transpose(1, 2))


def test_blocks_that_are_told_their_size_by_attributes_are_not_bound() -> None:
    torch.manual_seed(0)
    analysis = analyse(Telling().eval(), (X,), DGEConfig(), None)
    assert [plan.only_here for plan in analysis.plans.values()] == [False]
