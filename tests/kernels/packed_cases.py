"""Random packings for the tests of `dgefx::pool` and `dgefx::unpool_add`, and the error to allow.

Imported after `TRITON_INTERPRET` is set. What results are compared with is a float64 membership
matrix, filled by a loop over the patches of every image.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from dgefx.kernels.packing import Members, Packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.bfloat16, torch.float16)
DTYPES = st.sampled_from([torch.float32, *HALF])

#: Relative error of one rounding to the result's dtype: half a unit in the last place.
ROUNDING = {
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float64: 2.0**-53,
}
#: float16 has no normal numbers below 2**-14; there a rounding is off by up to 2**-25.
SMALLEST = 2.0**-25

#: Triton's interpreter cuts bfloat16 off instead of rounding it: twice the error, until on a GPU.
INTERPRETED = 2 if DEVICE == "cpu" else 1

CASES = st.fixed_dictionaries(
    {
        "height": st.integers(1, 9),
        "width": st.integers(1, 9),
        "prefix": st.integers(0, 2),
        "sides": st.sampled_from([(1,), (1, 2), (1, 2, 4), (1, 3), (2, 4), (1, 2, 4, 8)]),
        "count": st.integers(1, 3),
        "idle": st.integers(0, 2),  # most idle slots in front of an image's level, and behind all
        "hollow": st.booleans(),  # patch 0 holds no tokens, as with windows
        "channels": st.sampled_from([1, 3, 33, 96, 160]),
        "seed": st.integers(0, 999),
    }
)


class Case(NamedTuple):
    packing: Packing
    matrix: Tensor  # (Q, R) float64, 1 where a token is in a query
    filler: Tensor  # (R,) float64, 1 for the tokens of the first image's patch 0

    @property
    def counts(self) -> Tensor:
        return self.matrix.sum(1, keepdim=True).clamp(min=1)

    @property
    def idle(self) -> Tensor:
        return self.packing.patch < 0

    @property
    def fields(self) -> tuple[Any, ...]:
        patch, base, row, members = self.packing
        return patch, base, row, *members


def draw(case: dict) -> Case:
    """Every region takes a random level; idle slots are strewn in."""
    rng = random.Random(case["seed"])
    height, width, prefix, sides = (case[k] for k in ("height", "width", "prefix", "sides"))
    tokens = prefix + height * width
    region = sides[-1]
    patches: list[tuple[int, int, list[int]]] = []  # level, region, tokens
    if case["hollow"]:
        patches.append((-2, -1, []))
    patches += [(-1, -1, [t]) for t in range(prefix)]
    for level, side in enumerate(sides):
        for top in range(0, height, side):
            for left in range(0, width, side):
                inside = [
                    prefix + y * width + x
                    for y in range(top, min(top + side, height))
                    for x in range(left, min(left + side, width))
                ]
                patches.append((level, top // region * width + left // region, inside))
    patch, base, lists = [], [], []
    for image in range(case["count"]):
        chosen = {index: rng.randrange(len(sides)) for _, index, _ in patches}
        for level in range(-1, len(sides)):
            for _ in range(rng.randint(0, case["idle"])):
                patch.append(-1)
                base.append(0)
                lists.append([])
            for index, (own, where, inside) in enumerate(patches):
                if own == level and (level < 0 or chosen[where] == level):
                    patch.append(index)
                    base.append(image * tokens)
                    lists.append([image * tokens + t for t in inside])
    patch += [-1] * case["idle"]
    base += [0] * case["idle"]
    lists += [[] for _ in range(case["idle"])]
    matrix = torch.zeros(len(patch), case["count"] * tokens, dtype=torch.float64)
    row = torch.full((case["count"] * tokens,), -1)
    for query, inside in enumerate(lists):
        matrix[query, inside] = 1
        row[inside] = query
    assert (row >= 0).all()
    filler = torch.zeros(len(row), dtype=torch.float64)
    filler[patches[0][2]] = 1
    sizes = [0] + [len(inside) for _, _, inside in patches]
    members = Members(
        torch.tensor(sizes).cumsum(0).to(DEVICE),
        torch.tensor([t for _, _, inside in patches for t in inside]).to(DEVICE),
        max(sizes),
    )
    at = [torch.tensor(values).to(DEVICE) for values in (patch, base)]
    packing = Packing(at[0], at[1], row.to(DEVICE), members)
    return Case(packing, matrix.to(DEVICE), filler.to(DEVICE))


def values(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def poisoned(*args: Any, **kwargs: Any) -> Tensor:
    """What the kernel does not write shows."""
    return torch.full(*args, float("nan"), **kwargs)


def check(found: Tensor, wanted: Tensor, size: Tensor, steps: int, roundings: int = 1) -> None:
    """Within the error that the format of the result and of the sums must leave.

    Args:
        found: in its own dtype. wanted: float64.
        size: sum of the absolute values that each result was summed from.
        steps: float32 operations that a value goes through; each may be off by 2**-24 of `size`,
            a division by 2**-22 (Triton's is within two units).
        roundings: how often a result went through its dtype.
    """
    unit = ROUNDING[found.dtype]
    allowed = roundings * (unit * wanted.abs() + SMALLEST)
    # 1.01: products of two such errors
    allowed = 1.01 * (allowed + (steps + 4) * ROUNDING[torch.float32] * size)
    assert found.shape == wanted.shape
    assert not found.isnan().any()
    assert bool(((found.double() - wanted).abs() <= allowed).all())


FIXED = {
    "height": 5,
    "width": 7,
    "prefix": 1,
    "sides": (1, 2, 4),
    "count": 2,
    "idle": 2,
    "hollow": False,
    "channels": 3,
    "seed": 3,
}


def fixed_inputs(dtype: torch.dtype) -> tuple[Case, tuple[Tensor, ...]]:
    """(tokens, queries, updated, gate)."""
    drawn = draw(FIXED)
    queries, rows = drawn.matrix.shape
    shapes = ((rows, 3), (queries, 3), (queries, 3), (queries,))
    inputs = [values(k, *shape, dtype=dtype) for k, shape in enumerate(shapes)]
    return drawn, tuple(tensor.requires_grad_() for tensor in inputs)
