"""Kernels against naive float64 loops, shapes drawn by hypothesis."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dgefx.config import DGEConfig
from dgefx.kernels.allocate import allocate_levels
from dgefx.kernels.constants import gather_constant
from dgefx.kernels.correction import Correction, corrected_update
from dgefx.kernels.pool import pool
from dgefx.kernels.routing import Routing
from dgefx.kernels.stencil import full_resolution_conv, stencil_rows
from dgefx.kernels.unpool import corrected, unpool, unpool_add
from dgefx.nn.capacity import plan_of, plans
from dgefx.nn.hierarchy import nested_levels
from dgefx.nn.router import Router

CASES = st.fixed_dictionaries(
    {
        "height": st.integers(1, 12),
        "width": st.integers(1, 12),
        "prefix": st.integers(0, 2),
        "sides": st.sampled_from([(1,), (1, 2), (1, 2, 4), (1, 3), (1, 4), (1, 2, 4, 8)]),
        "factor": st.sampled_from([None, 1, 2]),  # None: nested routing
        "count": st.integers(1, 3),
        "seed": st.integers(0, 999),
    }
)


def members(routing: Routing, image: int) -> list[list[int]]:
    """Tokens of every patch of one image, by walking the patches of every level; a patch is there
    if the region that it begins in has its level."""
    height, width = routing.grid
    columns = -(-width // routing.region)
    found = []
    for level, side in enumerate(routing.granularities):
        for top in range(0, height, side):
            for left in range(0, width, side):
                region = (top // routing.region) * columns + left // routing.region
                if int(routing.levels[image, region]) == level:
                    rows = range(top, min(top + side, height))
                    found.append(
                        [i * width + j for i in rows for j in range(left, min(left + side, width))]
                    )
    return found


def draw(case: dict, channels: int = 3) -> tuple[Tensor, Routing, Router]:
    torch.manual_seed(case["seed"])
    grid = (case["height"], case["width"])
    region = None if case["factor"] is None else case["sides"][-1] * case["factor"]
    config = DGEConfig(granularities=case["sides"], region=region)
    router = Router(config, grid, case["prefix"], channels, plans(grid, config)[-1])
    tokens = torch.randn(
        case["count"], case["prefix"] + grid[0] * grid[1], channels, dtype=torch.float64
    )
    regions = router.region_cost_0.shape[0]
    levels = torch.randint(0, len(case["sides"]), (case["count"], regions))
    if config.routing_mode == "nested" and config.levels > 1:
        levels = nested_levels(levels, grid, case["sides"])
    return tokens, router.routing_for(tokens, levels), router


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_pool_and_unpool(case: dict) -> None:
    tokens, routing, _ = draw(case)
    prefix = case["prefix"]
    queries = pool(tokens, routing)
    back = unpool(queries, routing)
    for image in range(case["count"]):
        assert torch.equal(queries[image, :prefix], tokens[image, :prefix])
        patches = members(routing, image)
        assert sorted(t for patch in patches for t in patch) == list(
            range(routing.grid[0] * routing.grid[1])
        )
        for patch in patches:
            mean = tokens[image, [prefix + t for t in patch]].mean(0)
            for token in patch:
                slot = prefix + int(routing.token_slot[image, token])
                assert torch.allclose(queries[image, slot], mean)
                assert torch.equal(back[image, prefix + token], queries[image, slot])


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_unpool_add_ignores_padding_slots(case: dict) -> None:
    tokens, routing, _ = draw(case)
    queries = pool(tokens, routing)
    updated = torch.randn_like(queries)
    used = torch.zeros(queries.shape[:2], dtype=torch.bool)
    used[:, : case["prefix"]] = True
    used.scatter_(1, routing.token_slot + case["prefix"], True)
    poisoned = updated.masked_fill(~used.unsqueeze(-1), float("nan"))
    found = unpool_add(tokens, queries, poisoned, routing)
    assert torch.allclose(found, tokens + unpool(updated - queries, routing))


THIRDS = {"height": 2, "width": 7, "prefix": 0, "sides": (1, 3), "factor": 2, "count": 1}


@settings(max_examples=20, deadline=None)
@given(CASES, st.sampled_from([3, 5]))
@example({**THIRDS, "seed": 104}, 3)
def test_stencil_equals_convolution(case: dict, kernel: int) -> None:
    _, routing, _ = draw({**case, "prefix": 0}, channels=4)
    slots = sum(routing.capacities)
    hidden = torch.randn(case["count"], slots, 4, dtype=torch.float64)
    weight = torch.randn(4, 1, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    dense = unpool(hidden, routing._replace(prefix=0)).transpose(1, 2).unflatten(2, routing.grid)
    convolved = torch.nn.functional.conv2d(dense, weight, bias, padding=kernel // 2, groups=4)
    convolved = convolved.flatten(2).transpose(1, 2)
    stencil = stencil_rows(hidden, weight, bias, routing)
    dense = full_resolution_conv(hidden.transpose(1, 2).unsqueeze(-1), weight, bias, routing)
    for image in range(case["count"]):
        for patch in members(routing, image):
            slot = int(routing.token_slot[image, patch[0]])
            mean = convolved[image, patch].mean(0)
            # float64 sums of at most 25 terms for each of 64 tokens, all about 1: 1e-13 at worst
            assert torch.allclose(stencil[image, slot], mean, rtol=0, atol=1e-12)
            assert torch.allclose(dense[image, :, slot, 0], mean, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(CASES, st.booleans())
def test_gather_constant(case: dict, with_prefix: bool) -> None:
    _, routing, _ = draw(case)
    prefix, count = case["prefix"], case["count"]
    extra = prefix if with_prefix else 0
    grid_tokens = routing.grid[0] * routing.grid[1]
    table = torch.randn(1, 2, extra + grid_tokens, 5, dtype=torch.float64)
    found = gather_constant(table, routing, 4, 0, (2,), with_prefix)
    assert found.shape == (count, 2, extra + sum(routing.capacities), 5)
    for image in range(count):
        assert torch.equal(found[image, :, :extra], table[0, :, :extra])
        for patch in members(routing, image):
            slot = extra + int(routing.token_slot[image, patch[0]])
            mean = table[0][:, [extra + t for t in patch]].mean(1)
            assert torch.allclose(found[image, :, slot], mean)


@settings(max_examples=60, deadline=None)
@given(CASES, st.floats(0, 1))
def test_router_fills_its_slots_and_never_more(case: dict, where: float) -> None:
    tokens, _, router = draw(case)
    choices = plans(router.grid, router.config)
    router.plan = choices[round(where * (len(choices) - 1))]
    routing = router(tokens, router.grid)
    assert routing.capacities == router.plan.capacities
    again = router.routing_for(tokens, routing.levels)
    for needed, capacity in zip(again.capacities, routing.capacities, strict=True):
        assert needed <= capacity
    # every token is served by a patch that holds it
    queries, back = pool(tokens, routing), pool(tokens, again)
    assert torch.allclose(unpool(queries, routing), unpool(back, again))


def test_detail_wins_the_slots() -> None:
    """One detailed region among flat ones becomes fine; ranks follow the within-patch variance."""
    config = DGEConfig(routing="region")
    choices = plans((16, 16), config)
    plan = next(p for p in choices if p.capacities[0] == 16)
    router = Router(config, (16, 16), 0, 4, plan)
    x = torch.zeros(2, 16, 16, 4)
    x[0, 4:8, 8:12] = torch.randn(4, 4, 4)
    x[1, 12:16, 0:4] = torch.randn(4, 4, 4)
    levels = router(x.flatten(1, 2), (16, 16)).levels
    assert (levels[0] == 0).nonzero().flatten().tolist() == [6]
    assert (levels[1] == 0).nonzero().flatten().tolist() == [12]


def test_nested_detail_wins_the_slots() -> None:
    """One detailed 2 x 2 patch is split down to tokens, its neighbours only where it drags them."""
    config = DGEConfig()
    plan = plan_of((8, 8), config, (4, 3, 3))  # one 4 x 4 split, one of its 2 x 2 split again
    router = Router(config, (8, 8), 0, 4, plan)
    x = torch.zeros(2, 8, 8, 4)
    x[0, 0:2, 6:8] = torch.randn(2, 2, 4)  # 2 x 2 cell 3
    x[1, 6:8, 0:2] = torch.randn(2, 2, 4)  # 2 x 2 cell 12
    levels = router(x.flatten(1, 2), (8, 8)).levels.view(2, 4, 4)
    first = [[2, 2, 1, 0], [2, 2, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]]
    assert levels[0].tolist() == first
    assert levels[1].tolist() == [[2, 2, 2, 2], [2, 2, 2, 2], [1, 1, 2, 2], [0, 1, 2, 2]]


@settings(max_examples=40, deadline=None)
@given(CASES)
def test_correction_equals_the_formula(case: dict) -> None:
    """Against the definition, token by token: zero for fine tokens, linear in the features."""
    tokens, routing, router = draw(case, channels=5)
    torch.manual_seed(case["seed"])
    weights = Correction(
        torch.randn(11, 2, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    )
    router.set_correction(weights)
    routing = router.routing_for(tokens, routing.levels)
    queries = pool(tokens, routing)
    found = (
        corrected(unpool_add(tokens, queries, queries, routing), tokens, queries, routing) - tokens
    )
    prefix = case["prefix"]
    assert torch.equal(found[:, :prefix], torch.zeros_like(found[:, :prefix]))
    for image in range(case["count"]):
        for patch in members(routing, image):
            x = tokens[image, [prefix + t for t in patch]]
            mean = x.mean(0)
            lost = 1 - mean.square().sum() * len(patch) / x.square().sum()
            normal = (mean - mean.mean()) / (mean.var(correction=0) + 1e-5).sqrt()
            for token, own in zip(patch, x, strict=True):
                features = torch.cat([lost.view(1), lost * normal, own - mean])
                wanted = features @ weights.down @ weights.up
                fine = (
                    routing.granularities[0] == 1
                    and int(routing.levels[image, router.patch_region_0[token]]) == 0
                )
                wanted = torch.zeros_like(wanted) if fine else wanted
                assert torch.allclose(found[image, prefix + token], wanted, atol=1e-9)


def test_correction_gradients() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw_tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    rows = torch.tensor([[0, 0, 1, 1, 2]])
    lost = torch.tensor([[0.0, 0.3, 0.6]], dtype=torch.float64)

    def run(tokens: Tensor, queries: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return corrected_update(tokens, queries, lost, rows, Correction(down, up))

    inputs = draw_tensor(1, 5, 3), draw_tensor(1, 3, 3), draw_tensor(7, 2), draw_tensor(2, 3)
    assert torch.autograd.gradcheck(run, inputs)


def test_allocate_respects_clipped_costs() -> None:
    gains = torch.tensor([[[5.0], [4.0], [3.0], [2.0]]])
    costs = [torch.tensor([16, 8, 16, 4]), torch.tensor([1, 1, 1, 1])]
    levels = allocate_levels(gains, costs, (20, 4), (None, None))
    # the best fits, the second (8) no longer does, the last (4) fills what is left
    assert levels.tolist() == [[0, 1, 1, 0]]
