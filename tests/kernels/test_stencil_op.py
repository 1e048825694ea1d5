"""`dgefx::stencil`: kernels and reference against un-pool, `conv2d` in float64, pool, written out.

Without a GPU the kernels run in Triton's interpreter, which has to be chosen before Triton is
imported.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dgefx.kernels.packing import Packing
from dgefx.kernels.stencil_op import (
    stencil,
    stencil_hidden_grad,
    stencil_op,
    stencil_taps_grad,
)
from dgefx.kernels.stencil_tables import StencilTables, stencil_tables
from tests.helpers import COMPILERS
from tests.kernels.stencil_cases import CASES, Grid, draw_values, gradients, pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_near(found: Tensor, wanted: Tensor, terms: int) -> None:
    """Inputs are the same numbers in both, so what differs is float32 sums of `terms` products of
    normal draws (at most ~10 each; a half-precision result adds one rounding of the result)."""
    rounding = torch.finfo(found.dtype).eps
    torch.testing.assert_close(
        found.double().cpu(),
        wanted,
        rtol=rounding,
        atol=10 * terms * torch.finfo(torch.float32).eps,
    )


def poisoned(*args: object, **kwargs: object) -> Tensor:
    return torch.empty(*args, **kwargs).fill_(float("nan"))


def on_device(packing: Packing, tables: StencilTables) -> tuple[list[Tensor], StencilTables]:
    flat = [packing.patch, packing.base, packing.row]
    return [t.to(DEVICE) for t in flat], StencilTables(*(t.to(DEVICE) for t in tables))


@settings(max_examples=8, deadline=None)
@given(CASES, st.sampled_from([torch.float32, torch.bfloat16]))
def test_kernels_equal_the_definition(case: dict, dtype: torch.dtype) -> None:
    from dgefx.kernels.gpu.stencil import run_coefficients, run_stencil

    packing = pack(case)
    grid: Grid = case["grid"]
    hidden, weight, grad = draw_values(case, packing.patch.shape[0], dtype)
    wanted, wanted_hidden, wanted_taps = gradients(hidden, weight, grad, packing, case)
    idle = (packing.patch < 0).unsqueeze(-1)
    poison = float("nan")  # nothing reads idle slots
    hidden, grad = (t.masked_fill(idle, poison).to(DEVICE) for t in (hidden, grad))
    slots, tables = on_device(packing, stencil_tables(grid, case["sides"], case["kernel"]))
    taps = weight.flatten(1).t().float().to(DEVICE)
    fixed = (*slots, tables.place, tables.start, tables.reads, *grid)
    terms = case["kernel"] ** 2
    found = run_stencil(hidden, tables.shares @ taps, *fixed, adjoint=False, empty=poisoned)
    assert found.dtype == dtype
    assert_near(found, wanted, terms)
    found = run_stencil(grad, tables.shares @ taps.flip(0), *fixed, adjoint=True, empty=poisoned)
    assert found.dtype == dtype
    assert_near(found, wanted_hidden, terms * max(case["sides"]) ** 2)
    sums = run_coefficients(
        grad, hidden, *slots, tables.place, tables.reads, *grid, splits=2, empty=poisoned
    )
    assert_near(tables.shares.t() @ sums, wanted_taps, packing.row.shape[0])


@settings(max_examples=30, deadline=None)
@given(CASES, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_reference_equals_the_definition(case: dict, dtype: torch.dtype) -> None:
    packing = pack(case)
    hidden, weight, grad = draw_values(case, packing.patch.shape[0], dtype)
    wanted, wanted_hidden, wanted_taps = gradients(hidden, weight, grad, packing, case)
    idle = (packing.patch < 0).unsqueeze(-1)
    hidden = hidden.masked_fill(idle, float("nan")).requires_grad_()
    weight.requires_grad_()
    tables = stencil_tables(case["grid"], case["sides"], case["kernel"])
    found = stencil(hidden, weight, None, packing, tables, case["grid"])
    found.backward(grad.masked_fill(idle, float("nan")))
    terms = case["kernel"] ** 2
    assert found.dtype == dtype
    assert hidden.grad is not None and weight.grad is not None
    assert_near(found.detach(), wanted, terms)
    assert_near(hidden.grad, wanted_hidden, terms * max(case["sides"]) ** 2)
    assert_near(weight.grad.flatten(1).t(), wanted_taps, packing.row.shape[0])


def test_many_splits_and_blocks() -> None:
    """More queries than one block, more channels than one block, more splits than blocks."""
    from dgefx.kernels.gpu.stencil import run_coefficients, run_stencil

    case = {"grid": (5, 6), "sides": (1, 2), "kernel": 3, "images": 2, "order": "packed"}
    case |= {"idle": 2, "channels": 130, "seed": 0}
    packing = pack(case)
    hidden, weight, grad = draw_values(case, packing.patch.shape[0], torch.float32)
    wanted, _, wanted_taps = gradients(hidden, weight, grad, packing, case)
    slots, tables = on_device(packing, stencil_tables((5, 6), (1, 2), 3))
    coefficients = tables.shares @ weight.flatten(1).t().to(DEVICE)
    found = run_stencil(
        hidden.to(DEVICE),
        coefficients,
        *slots,
        *tables[:3],
        5,
        6,
        adjoint=False,
        empty=poisoned,
    )
    assert_near(found, wanted, 9)
    for splits in (1, 3, 5):
        sums = run_coefficients(
            grad.to(DEVICE),
            hidden.to(DEVICE),
            *slots,
            tables.place,
            tables.reads,
            5,
            6,
            splits=splits,
            empty=poisoned,
        )
        assert_near(tables.shares.t() @ sums, wanted_taps, 60)


SMALL = {"grid": (5, 6), "sides": (1, 2, 4), "kernel": 3, "images": 2, "order": "packed"}
SMALL |= {"idle": 2, "channels": 3, "seed": 1}


def small(dtype: torch.dtype) -> tuple[Tensor, Tensor, Packing, StencilTables]:
    packing = pack(SMALL)
    hidden, weight, _ = draw_values(SMALL, packing.patch.shape[0], dtype)
    tables = stencil_tables((5, 6), (1, 2, 4), 3)
    return hidden.requires_grad_(), weight.requires_grad_(), packing, tables


def test_operators_pass_opcheck() -> None:
    hidden, weight, packing, tables = small(torch.float32)
    slots, tables = on_device(packing, tables)
    rows, taps = hidden.detach().to(DEVICE), weight.detach().flatten(1).t().to(DEVICE)
    own = rows.clone().requires_grad_(), taps.clone().requires_grad_()
    torch.library.opcheck(stencil_op, (*own, *slots, *tables, 5, 6), rtol=1e-4, atol=1e-4)
    torch.library.opcheck(stencil_hidden_grad, (rows, taps, *slots, *tables, 5, 6))
    fixed = (*slots, tables.place, tables.reads, tables.shares, 5, 6)
    torch.library.opcheck(stencil_taps_grad, (rows, rows, taps, *fixed))


def test_gradcheck() -> None:
    hidden, weight, packing, tables = small(torch.float64)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # nothing reads the idle slots, so that they give the bias no gradient either
        out = stencil(hidden, weight, bias, packing, tables, (5, 6))
        return out[packing.patch >= 0]

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


@pytest.mark.parametrize("backend", COMPILERS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(dynamic: bool, backend: str) -> None:
    torch.compiler.reset()
    hidden, weight, packing, tables = small(torch.float32)
    bias = torch.randn(3)

    def run(hidden: Tensor, weight: Tensor, packing: Packing) -> Tensor:
        return stencil(hidden.sin(), weight, bias, packing, tables, (5, 6)).cos()

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    eager = run(hidden, weight, packing)
    if dynamic:  # what differs between batches of one model
        for rows in (hidden, packing.patch, packing.base, packing.row):
            torch._dynamo.mark_dynamic(rows, 0)
    found = compiled(hidden, weight, packing)
    assert_near(found.detach(), eager.detach().double(), 9)
    wanted = torch.autograd.grad(eager.sum(), (hidden, weight))
    for one, other in zip(torch.autograd.grad(found.sum(), (hidden, weight)), wanted, strict=True):
        assert_near(one, other.double(), 60)


def test_flops_are_those_of_a_depthwise_convolution_on_queries() -> None:
    hidden, weight, packing, tables = small(torch.float32)
    with FlopCounterMode(display=False) as counter:
        out = stencil(hidden, weight, None, packing, tables, (5, 6))
    assert counter.get_total_flops() == 2 * hidden.shape[0] * 9 * 3
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * hidden.shape[0] * 9 * 3


def test_tables_of_one_patch() -> None:
    """A patch of one token reads its neighbours with one tap each, the patch itself first."""
    tables = stencil_tables((3, 3), (1,), 3)
    offsets = tables.reads[:, 1:].tolist()
    assert offsets[0] == [0, 0] and tables.start.tolist() == [0, 9]
    for (down, right), share in zip(offsets, tables.shares, strict=True):
        assert share.nonzero().tolist() == [[(down + 1) * 3 + right + 1]]


def test_prefix_tokens_and_other_kernel_sizes_are_refused() -> None:
    hidden, weight, packing, tables = small(torch.float32)
    with pytest.raises(ValueError, match="not odd"):
        stencil_tables((4, 4), (1, 2), 2)
    with pytest.raises(ValueError, match="taps"):
        stencil(hidden, weight, None, packing, stencil_tables((5, 6), (1, 2, 4), 5), (5, 6))
    start = torch.cat([packing.members.start, packing.members.start[-1:] + 1])
    packing = packing._replace(members=packing.members._replace(start=start))
    with pytest.raises(ValueError, match="prefix"):
        stencil(hidden, weight, None, packing, tables, (5, 6))
