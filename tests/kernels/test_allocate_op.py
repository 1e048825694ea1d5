"""`dgefx::allocate` against a loop over the patches of every image; integers, so exactly.

The Triton kernels run on the GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if not torch.cuda.is_available():
    # Triton reads it at its own import, which the next ones here are
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")


from dgefx.kernels.allocate_op import allocate, allocate_reference
from dgefx.kernels.gpu.allocate import launch_allocate
from tests.helpers import COMPILERS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POISON = -(10**12)

CASES = st.fixed_dictionaries(
    {
        "height": st.integers(1, 12),
        "width": st.integers(1, 12),
        "sides": st.sampled_from([(1,), (1, 2), (1, 2, 4), (1, 3), (1, 4), (1, 2, 4, 8)]),
        "missing": st.booleans(),  # some patches hold no tokens
        "one_level": st.booleans(),  # all regions at one level: the others are empty
        "count": st.integers(1, 3),
        "slack": st.integers(-3, 3),  # slots more or fewer than the patches need
        "gap": st.integers(0, 2),  # idle slots behind every segment
        "seed": st.integers(0, 999),
    }
)


class Tables(NamedTuple):
    """The tensors that `allocate` takes, and the number of slots."""

    levels: Tensor
    patch_region: Tensor
    patch_level: Tensor
    exists: Tensor
    token_patch: Tensor
    segment: Tensor
    total: int


def loop(tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    """By the definition, one patch after the other."""
    levels, region, level, exists, token_patch, segment = (t.tolist() for t in tables[:6])
    images, patches, tokens = len(levels), len(region), len(token_patch[0])
    patch = torch.full((tables.total,), -1)
    patch_slot = torch.full((images, patches), -1)
    token_slot = torch.full((images, tokens), -1)
    for b in range(images):
        following = list(segment[b])
        for p in range(patches):
            if exists[p] and levels[b][region[p]] == level[p]:
                if following[level[p]] < tables.total:
                    patch[following[level[p]]] = p + b * patches
                    patch_slot[b, p] = following[level[p]]
                following[level[p]] += 1
        for t in range(tokens):
            own = levels[b][region[token_patch[0][t]]]
            token_slot[b, t] = patch_slot[b, token_patch[own][t]]
    return patch, patch_slot, token_slot


def draw(case: dict) -> Tables:
    """A grid's hierarchy and random levels; every segment holds what its level needs."""
    generator = torch.Generator().manual_seed(case["seed"])
    height, width, sides = case["height"], case["width"], case["sides"]
    region, across = sides[-1], -(-width // sides[-1])
    regions, level, token_patch = [], [], []
    for index, side in enumerate(sides):
        columns, first = -(-width // side), len(regions)
        for top in range(0, height, side):
            for left in range(0, width, side):
                regions.append(top // region * across + left // region)
                level.append(index)
        token_patch.append(
            [first + y // side * columns + x // side for y in range(height) for x in range(width)]
        )
    patch_region, patch_level = torch.tensor(regions), torch.tensor(level)
    shape = (case["count"], -(-height // region) * across)
    levels = torch.randint(0, len(sides), shape, generator=generator)
    if case["one_level"]:
        levels[:] = levels[0, 0]
    exists = torch.ones(len(regions), dtype=torch.bool)
    if case["missing"]:
        exists = torch.rand(len(regions), generator=generator) < 0.8
    chosen = exists & (levels[:, patch_region] == patch_level)
    needed = torch.stack([chosen[:, patch_level == k].sum(1) for k in range(len(sides))], 1)
    lengths = (needed + case["gap"]).flatten()
    ends = lengths.cumsum(0)
    tables = Tables(
        levels,
        patch_region,
        patch_level,
        exists,
        torch.tensor(token_patch),
        (ends - lengths).view_as(needed),
        max(int(ends[-1]) + case["slack"], 1),
    )
    return Tables(*(tensor.to(DEVICE) for tensor in tables[:6]), tables.total)


def poisoned(*args: Any, **kwargs: Any) -> Tensor:
    """What no kernel writes shows."""
    return torch.full(*args, POISON, **kwargs)


def check(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for mine, other in zip(found, wanted, strict=True):
        assert torch.equal(mine.cpu(), other)


@settings(max_examples=120, deadline=None)
@given(CASES)
def test_allocate(case: dict) -> None:
    tables = draw(case)
    wanted = loop(tables)
    check(launch_allocate(*tables, empty=poisoned), wanted)
    check(allocate_reference(*tables), wanted)
    check(allocate(*tables), wanted)


def test_many_patches_and_transposed_levels() -> None:
    """More patches per level than a block counts at once; inputs that are not contiguous."""
    case = {"height": 45, "width": 61, "sides": (1, 2), "missing": True, "one_level": False}
    tables = draw({**case, "count": 2, "slack": 0, "gap": 1, "seed": 5})
    assert tables.patch_region.shape[0] > 3000
    wanted = loop(tables)
    turned = tables._replace(
        levels=tables.levels.T.contiguous().T, segment=tables.segment.T.contiguous().T
    )
    check(launch_allocate(*turned, empty=poisoned), wanted)
    check(allocate(*turned), wanted)


def test_nothing_outside_the_slots_is_written() -> None:
    """The slots are the middle of a longer table, which must stay as it is around them."""
    case = {"height": 6, "width": 5, "sides": (1, 2), "missing": False, "one_level": False}
    tables = draw({**case, "count": 2, "slack": -3, "gap": 0, "seed": 1})
    kept = []

    def guarded(shape: tuple[int, ...], **kwargs: Any) -> Tensor:
        size = torch.Size(shape).numel()
        table = torch.full((size + 16,), POISON, **kwargs)
        kept.append(table)
        return table[8 : size + 8].view(shape)

    check(launch_allocate(*tables, empty=guarded), loop(tables))
    for table in kept:
        assert (table[:8] == POISON).all() and (table[-8:] == POISON).all()


FIXED = {
    "height": 5,
    "width": 7,
    "sides": (1, 2, 4),
    "missing": True,
    "one_level": False,
    "count": 2,
    "slack": 1,
    "gap": 1,
    "seed": 7,
}


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.dgefx.allocate.default, tuple(draw(FIXED)))


def test_results_have_no_gradient() -> None:
    assert not any(tensor.requires_grad for tensor in allocate(*draw(FIXED)))


@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_equals_eager(backend: str) -> None:
    """One graph, for any number of images and slots."""

    def run(*tables: Any) -> tuple[Tensor, ...]:
        patch, patch_slot, token_slot = allocate(*tables)
        return patch + 1, patch_slot, token_slot

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for change in ({}, {"count": 3}, {"slack": 2, "seed": 8}, {"slack": -2}):
        tables = draw({**FIXED, **change})
        check(compiled(*tables), tuple(t.cpu() for t in run(*tables)))
