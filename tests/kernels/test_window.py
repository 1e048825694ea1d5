"""Windows: the patch hierarchy and the slot kernels against loops over tokens."""

from __future__ import annotations

import itertools

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dgefx.config import DGEConfig
from dgefx.kernels.pool import pool
from dgefx.kernels.unpool import unpool
from dgefx.kernels.window import WindowAxes, from_slots, pool_slots, repack, to_slots
from dgefx.nn.capacity import plans
from dgefx.nn.router import Router
from dgefx.nn.router_tables import space_of
from dgefx.nn.windows import Tiling, WindowRule, axis_map

CASES = st.fixed_dictionaries(
    {
        "size": st.tuples(st.integers(1, 8), st.integers(1, 8)),
        "shift": st.tuples(st.integers(0, 7), st.integers(0, 7)),
        "grid": st.tuples(st.integers(1, 13), st.integers(1, 13)),
        "kind": st.sampled_from(["block", "grid"]),
        "pad_first": st.booleans(),
        "whole": st.sampled_from([False, False, False, True]),
        "sides": st.sampled_from([(1,), (1, 2), (1, 2, 4), (1, 3), (1, 2, 4, 8)]),
        "region": st.booleans(),
        "plan": st.floats(0, 1),
        "seed": st.integers(0, 99),
    }
)


def draw(case: dict) -> tuple[WindowRule, Router, Tensor]:
    shift = tuple(s % w for s, w in zip(case["shift"], case["size"], strict=True))
    rule = WindowRule(
        None if case["whole"] else case["size"], case["kind"], shift, case["pad_first"]
    )
    config = DGEConfig(
        granularities=case["sides"], region=case["sides"][-1] if case["region"] else None
    )
    choices = plans(space_of(case["grid"], rule, config), config)
    plan = choices[round(case["plan"] * (len(choices) - 1))]
    torch.manual_seed(case["seed"])
    router = Router(config, case["grid"], 0, 3, plan, windows=rule)
    tokens = torch.randn(2, case["grid"][0] * case["grid"][1], 3, dtype=torch.float64)
    return rule, router, tokens


def places(rule: WindowRule, grid: tuple[int, int]) -> dict[int, tuple[int, int, int, int]]:
    """Token -> (window row, window column, slot row, slot column), from the rule's maps."""
    rows, columns = rule.maps(grid)
    found = {}
    for (r, line), (c, across) in itertools.product(enumerate(rows), enumerate(columns)):
        for (i, row), (j, column) in itertools.product(enumerate(line), enumerate(across)):
            if row >= 0 and column >= 0:
                found[row * grid[1] + column] = (r, c, i, j)
    return found


@settings(max_examples=40, deadline=None)
@given(CASES)
def test_patches_are_compact_and_inside_one_window(case: dict) -> None:
    rule, router, tokens = draw(case)
    routing = router(tokens, case["grid"])
    where = places(rule, case["grid"])
    assert sorted(where) == list(range(tokens.shape[1]))  # every token is in exactly one slot
    queries = pool(tokens, routing)
    for image in range(2):
        members: dict[int, list[int]] = {}
        for token, slot in enumerate(routing.token_slot[image].tolist()):
            members.setdefault(slot, []).append(token)
        for slot, patch in members.items():
            assert len({where[t][:2] for t in patch}) == 1
            tall = sorted({where[t][2] for t in patch})
            wide = sorted({where[t][3] for t in patch})
            assert len(patch) == len(tall) * len(wide) <= case["sides"][-1] ** 2
            assert tall[-1] - tall[0] + 1 == len(tall)
            assert wide[-1] - wide[0] + 1 == len(wide)
            torch.testing.assert_close(queries[image, slot], tokens[image, patch].mean(0))


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_patches_never_straddle_a_seam(case: dict) -> None:
    """Inside a patch, the next slot is the next token of the image (the next of the lattice)."""
    rule, router, tokens = draw(case)
    routing = router(tokens, case["grid"])
    maps = rule.maps(case["grid"])
    step = [1 if rule.kind == "block" or rule.size is None else len(m) for m in maps]
    width = case["grid"][1]
    for image in range(2):
        for slot in routing.token_slot[image].unique():
            patch = (routing.token_slot[image] == slot).nonzero().flatten()
            for values, stride in ((patch // width, step[0]), (patch % width, step[1])):
                line = values.unique()
                assert bool((line.diff() == stride).all())


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_finest_plan_is_the_identity(case: dict) -> None:
    _, router, tokens = draw(case)
    router.plan = plans(router.space(case["grid"]), router.config)[-1]
    routing = router(tokens, case["grid"])
    assert torch.equal(pool(tokens, routing), tokens)
    assert torch.equal(unpool(tokens, routing), tokens)


AXES = [
    WindowAxes(0, True, 1, (), (1,)),
    WindowAxes(0, True, 1, (), (1, 2)),
    WindowAxes(0, True, 3, (), (2,)),
    WindowAxes(1, False, 1, (2,), (4,)),
    WindowAxes(0, False, 1, (1, 2), (3, 4)),
]


def rest_of(axes: WindowAxes) -> tuple[int, ...]:
    """Sizes of the axes that are neither images, windows nor slots."""
    return (1, 2) if axes.batch == 1 else (2,)


def dense_layout(
    tokens: Tensor, rule: WindowRule, grid: tuple[int, int], axes: WindowAxes
) -> Tensor:
    """(B, N, inner, 2) tokens in the windows of a value with these axes, padding as NaN."""
    rows, columns = rule.maps(grid)
    where = places(rule, grid)
    size = (len(rows[0]), len(columns[0]))
    table = torch.full(
        (tokens.shape[0], len(rows), len(columns), *size, *tokens.shape[2:]), torch.nan
    ).double()
    for token, (r, c, i, j) in where.items():
        table[:, r, c, i, j] = tokens[:, token]
    images, inner = tokens.shape[0], tokens.shape[2]
    windows = len(rows) * len(columns)
    flat = table.flatten(1, 2) if len(axes.windows) < 2 else table
    start = flat.dim() - 4
    flat = flat if len(axes.slots) == 2 else flat.flatten(start, start + 1)
    if axes == AXES[0] or axes == AXES[1]:
        return flat[..., 0, :].flatten(0, 1)
    if axes == AXES[2]:  # (B * windows * inner, 2, slots)
        return flat.permute(0, 1, 3, 4, 2).reshape(images * windows * inner, 2, -1)
    if axes == AXES[3]:  # (1, B, windows, 2, slots)
        return flat[..., 0, :].transpose(2, 3).unsqueeze(0)
    return flat[..., 0, :]


@settings(max_examples=30, deadline=None)
@given(CASES, st.sampled_from(AXES))
def test_slots_hold_the_queries_of_their_window(case: dict, axes: WindowAxes) -> None:
    """Against the dense layout: in every window, slot by slot, the query of the token's patch."""
    rule, router, _ = draw(case)
    grid = case["grid"]
    tokens = torch.randn(2, grid[0] * grid[1], axes.inner, 2, dtype=torch.float64)
    router.plan = plans(router.space(grid), router.config)[-1]
    assume(router.plan.capacities[0] == grid[0] * grid[1])  # not a grid of single patches
    routing = router(torch.randn(2, grid[0] * grid[1], 3), grid)
    assert routing.windows is not None
    plain = WindowAxes(0, False, 1, (), (1,))
    packed = repack(tokens.flatten(2), plain, axes, rest_of(axes))
    slots = to_slots(packed, routing.windows, axes)
    wanted = dense_layout(tokens, rule, grid, axes)
    if len(axes.slots) == 2:
        shape = list(wanted.shape)
        first, second = axes.slots
        shape[first : second + 1] = [shape[first] * shape[second], 1]
        wanted = wanted.reshape(shape)
    assert slots.shape == wanted.shape
    real = ~wanted.isnan()
    assert torch.equal(slots[real], wanted[real])
    assert torch.equal(from_slots(slots, routing.windows, axes), packed)


@settings(max_examples=30, deadline=None)
@given(CASES, st.sampled_from(AXES))
def test_slots_and_back_at_any_plan(case: dict, axes: WindowAxes) -> None:
    _, router, tokens = draw(case)
    routing = router(tokens, case["grid"])
    assert routing.windows is not None
    count = sum(routing.capacities)
    rows = torch.randn(2, count, 2 * axes.inner, dtype=torch.float64)
    packed = repack(rows, WindowAxes(0, False, 1, (), (1,)), axes, rest_of(axes))
    back = from_slots(to_slots(packed, routing.windows, axes), routing.windows, axes)
    used = torch.zeros(2, count, dtype=torch.bool).scatter(1, routing.token_slot, True)
    plain = [
        repack(v, axes, WindowAxes(0, False, 1, (), (1,)), (2 * axes.inner,))
        for v in (packed, back)
    ]
    assert torch.equal(plain[0][used], plain[1][used])
    assert torch.equal(plain[0], rows)


@settings(max_examples=30, deadline=None)
@given(CASES, st.booleans(), st.booleans(), st.sampled_from(["", "windows", "all"]))
def test_pooled_tables_are_means_over_patches(
    case: dict, apart: bool, fixed: bool, lead: str
) -> None:
    """Tables shared by all windows, of every window, and of every window of every image."""
    rule, router, tokens = draw(case)
    router.has_fixed_slots = fixed
    routing = router(tokens, case["grid"])
    slots = routing.windows
    assert slots is not None
    tall, wide = slots.size
    assert fixed or slots.total <= tall * wide
    windows = slots.windows[0] * slots.windows[1]
    count = {"": 1, "windows": windows, "all": 2 * windows}[lead]
    table = torch.randn(count, 3, tall, wide, 2, dtype=torch.float64)
    given_table = table if apart else table.flatten(2, 3)
    axes = WindowAxes(0, True, 1, (), (2, 3) if apart else (2,))
    if lead == "windows":  # without an image axis: windows on an axis of their own
        axes = WindowAxes(0, False, 1, (1,), tuple(a + 1 for a in axes.slots))
    rank = given_table.dim() + (lead == "windows")
    pooled = pool_slots(given_table, slots, axes, rank)
    pooled = pooled.squeeze(axes.slots[1]) if apart else pooled
    # (images, windows, 3, S, 2), images and windows 1 where they share
    pooled = pooled.reshape(
        -1,
        windows
        if pooled.shape[0] % windows == 0 and lead != "windows"
        else pooled.shape[axes.windows[0]]
        if axes.windows
        else 1,
        3,
        slots.total,
        2,
    )
    table = table.view(-1, windows if lead else 1, 3, tall, wide, 2)
    where = places(rule, case["grid"])
    for image in range(2):
        for query in routing.token_slot[image].unique().tolist():
            patch = (routing.token_slot[image] == query).nonzero().flatten().tolist()
            window = where[patch[0]][0] * slots.windows[1] + where[patch[0]][1]
            place = int(slots.slot[image, query])
            assert place // slots.total == window
            own = table[image % len(table), window % table.shape[1]]
            mean = torch.stack([own[:, where[t][2], where[t][3]] for t in patch]).mean(0)
            found = pooled[image % len(pooled), window % pooled.shape[1]]
            torch.testing.assert_close(found[:, place % slots.total], mean)


def test_axis_map_by_hand() -> None:
    assert axis_map("block", 3, 1, False, 5) == ((1, 2, 3), (4, 0, -1))
    assert axis_map("block", 3, 1, True, 5) == ((1, 2, 3), (4, -1, 0))
    assert axis_map("grid", 2, 0, False, 6) == ((0, 3), (1, 4), (2, 5))


def test_windows_of_seven_keep_whole_patches() -> None:
    """7 = 4 + 3, also where a shift of 3 cuts the last window at 4: four coarsest patches each."""
    config = DGEConfig()
    for shift in (0, 3):
        tiling = WindowRule((7, 7), shift=(shift, shift)).tiling((28, 28), 4)
        assert isinstance(tiling, Tiling)
        assert tiling.rows.side == 8
        found = plans(tiling, config)
        assert found[0].slots == 16 * 4
        assert found[-1].slots == 28 * 28
