"""Random stencil cases, and the definition that `test_stencil_op` checks them against."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from dgefx.kernels.packing import Members, Packing

Grid = tuple[int, int]
Patch = tuple[int, list[int]]  # id, tokens of one image

CASES = st.fixed_dictionaries(
    {
        "grid": st.one_of(
            st.tuples(st.integers(1, 7), st.integers(1, 7)),
            st.tuples(st.just(1), st.integers(1, 12)),
            st.sampled_from([(8, 8), (9, 5), (4, 12)]),
        ),
        "sides": st.sampled_from([(1,), (1, 2, 4), (1, 3)]),
        "kernel": st.sampled_from([3, 5]),
        "images": st.integers(1, 2),
        "order": st.sampled_from(["segments", "packed", "shuffled"]),
        "idle": st.integers(0, 3),
        "channels": st.sampled_from([1, 3, 33, 64]),
        "seed": st.integers(0, 999),
    }
)


def all_patches(grid: Grid, sides: tuple[int, ...]) -> list[tuple[int, int, int, list[int]]]:
    """(side, top, left, tokens) of the patches of all levels, in the order of their ids."""
    height, width = grid
    found = []
    for side in sides:
        for top in range(0, height, side):
            for left in range(0, width, side):
                rows = range(top, min(top + side, height))
                columns = range(left, min(left + side, width))
                found.append((side, top, left, [i * width + j for i in rows for j in columns]))
    return found


def partition(grid: Grid, sides: tuple[int, ...], draw: random.Random) -> list[Patch]:
    """A random partition of one image: every patch, coarsest first, is kept or split."""
    patches = all_patches(grid, sides)
    free, found = set(range(grid[0] * grid[1])), []
    for side in reversed(sides):
        for index, (own, _, _, tokens) in enumerate(patches):
            if own == side and free.issuperset(tokens) and (side == 1 or draw.random() < 0.5):
                found.append((index, tokens))
                free -= set(tokens)
    return found


def pack(case: dict) -> Packing:
    draw = random.Random(case["seed"])
    grid, sides = case["grid"], case["sides"]
    tokens = grid[0] * grid[1]
    slots = [
        (image * tokens, patch)
        for image in range(case["images"])
        for patch in partition(grid, sides, draw)
    ]
    if case["order"] == "segments":
        slots.sort(key=lambda slot: -len(slot[1][1]))
    elif case["order"] == "shuffled":
        draw.shuffle(slots)
    for _ in range(case["idle"]):
        slots.insert(draw.randint(0, len(slots)), (0, (-1, [])))
    row = torch.full((case["images"] * tokens,), -1)
    for query, (base, (_, own)) in enumerate(slots):
        row[[base + token for token in own]] = query
    lists = [own for *_, own in all_patches(grid, sides)]
    lengths = torch.tensor([0] + [len(own) for own in lists])
    flat = torch.tensor([token for own in lists for token in own])
    members = Members(lengths.cumsum(0), flat, int(lengths.max()))
    patch = torch.tensor([index for _, (index, _) in slots])
    return Packing(patch, torch.tensor([base for base, _ in slots]), row, members)


def expected(hidden: Tensor, weight: Tensor, packing: Packing, grid: Grid, images: int) -> Tensor:
    """The definition in float64, query by query; idle slots zero."""
    tokens = grid[0] * grid[1]
    dense = torch.stack([hidden[int(query)] for query in packing.row])
    maps = dense.view(images, *grid, -1).permute(0, 3, 1, 2)
    out = F.conv2d(maps, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    flat = out.permute(0, 2, 3, 1).reshape(images * tokens, -1)
    means = []
    for query, patch in enumerate(packing.patch.tolist()):
        own = (packing.row == query).nonzero().flatten()
        means.append(flat[own].mean(0) if patch >= 0 else 0 * hidden[query].detach())
    return torch.stack(means)


def draw_values(case: dict, queries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (Q, C), weight (C, 1, k, k) and gradient of the result (Q, C), as `dtype` has them."""
    generator = torch.Generator().manual_seed(case["seed"])
    channels, kernel = case["channels"], case["kernel"]
    shapes = (queries, channels), (channels, 1, kernel, kernel), (queries, channels)
    hidden, weight, grad = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return hidden, weight, grad


def gradients(
    hidden: Tensor, weight: Tensor, grad: Tensor, packing: Packing, case: dict
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, gradient of `hidden` and of the taps (k * k, C) by the definition, in float64."""
    idle = packing.patch < 0
    wide = hidden.double().masked_fill(idle.unsqueeze(-1), 0.0).requires_grad_()
    wide_weight = weight.double().requires_grad_()
    out = expected(wide, wide_weight, packing, case["grid"], case["images"])
    kept = grad.double().masked_fill(idle.unsqueeze(-1), 0.0)
    grad_hidden, grad_weight = torch.autograd.grad(out, (wide, wide_weight), kept)
    return out.detach(), grad_hidden, grad_weight.flatten(1).t()
