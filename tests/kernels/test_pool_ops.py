"""`dgefx::pool`, `dgefx::unpool_add` and the two primitives of their gradients.

The Triton kernels run on the GPU where there is one, else in Triton's interpreter. What they are
compared with is a float64 membership matrix, filled by a loop over the patches of every image.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if not torch.cuda.is_available():
    # Triton reads it at its own import, which the next ones here are
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from torch.utils.flop_counter import FlopCounterMode

from dgefx.kernels.gpu.collect import launch_collect
from dgefx.kernels.gpu.spread import launch_spread
from dgefx.kernels.packing import Packing
from dgefx.kernels.pool_op import pool_rows_op
from dgefx.kernels.transfer_op import collect, spread
from dgefx.kernels.unpool_op import unpool_add_op
from tests.helpers import COMPILERS
from tests.kernels.packed_cases import (
    CASES,
    DEVICE,
    DTYPES,
    FIXED,
    INTERPRETED,
    ROUNDING,
    SMALLEST,
    check,
    draw,
    fixed_inputs,
    poisoned,
    values,
)


@settings(max_examples=80, deadline=None)
@given(CASES, DTYPES, st.booleans(), st.booleans())
def test_collect_kernel(case: dict, dtype: torch.dtype, mean: bool, zero_idle: bool) -> None:
    drawn = draw(case)
    patch, base, _, members = drawn.packing
    source = values(case["seed"], drawn.matrix.shape[1], case["channels"], dtype=dtype)
    matrix = drawn.matrix.clone()
    if not zero_idle:
        matrix[drawn.idle] = drawn.filler
    if mean:
        matrix /= matrix.sum(1, keepdim=True).clamp(min=1)
    options: dict[str, Any] = {"mean": mean, "zero_idle": zero_idle}
    found = launch_collect(
        source, patch, base, members.start, members.token, **options, empty=poisoned
    )
    assert found.dtype == dtype
    wide = source.double()
    check(found, matrix @ wide, matrix @ wide.abs(), members.longest, INTERPRETED)
    operator = collect(source, *drawn.fields, mean, zero_idle)
    check(operator, matrix @ wide, matrix @ wide.abs(), members.longest)
    assert torch.equal(operator, collect(source, *drawn.fields, mean, zero_idle))


@settings(max_examples=80, deadline=None)
@given(CASES, DTYPES, st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_spread_kernel(
    case: dict, dtype: torch.dtype, mean: bool, minus: bool, scale: bool, residual: bool
) -> None:
    drawn = draw(case)
    patch, _, row, members = drawn.packing
    queries, rows = drawn.matrix.shape
    shape = (queries, case["channels"])
    plus, less = (values(case["seed"] + k, *shape, dtype=dtype) for k in range(2))
    gate = values(case["seed"] + 2, queries)
    tokens = values(case["seed"] + 3, rows, case["channels"], dtype=dtype)
    # no token reads an idle query
    plus[drawn.idle], less[drawn.idle] = float("nan"), float("inf")
    found = launch_spread(
        plus,
        row,
        patch,
        members.start,
        mean=mean,
        minus=less if minus else None,
        scale=gate.float() if scale else None,
        residual=tokens if residual else None,
        empty=poisoned,
    )
    factor = gate.float().double()[:, None] if scale else torch.ones_like(gate)[:, None]
    factor = factor / drawn.counts if mean else factor
    idle = drawn.idle[:, None]
    parts = [part.double().masked_fill(idle, 0) for part in (plus, less)]
    parts[1] *= minus
    base = tokens.double() * residual
    back = drawn.matrix.T
    size = base.abs() + back @ (factor.abs() * (parts[0].abs() + parts[1].abs()))
    check(found, base + back @ (factor * (parts[0] - parts[1])), size, 4, INTERPRETED)


@settings(max_examples=80, deadline=None)
@given(CASES, DTYPES)
def test_pool_and_its_gradient(case: dict, dtype: torch.dtype) -> None:
    drawn = draw(case)
    tokens = values(case["seed"], drawn.matrix.shape[1], case["channels"], dtype=dtype)
    tokens.requires_grad_()
    queries = pool_rows_op(tokens, drawn.packing)
    mean = drawn.matrix / drawn.counts
    filled = mean.clone()
    filled[drawn.idle] = drawn.filler / drawn.filler.sum().clamp(min=1)
    wide = tokens.detach().double()
    longest = drawn.packing.members.longest
    check(queries.detach(), filled @ wide, filled @ wide.abs(), longest)
    grad = values(case["seed"] + 1, *queries.shape, dtype=dtype)
    grad[drawn.idle] = float("nan")  # dropped
    (found,) = torch.autograd.grad(queries, tokens, grad)
    back = mean.T @ grad.double().masked_fill(drawn.idle[:, None], 0)
    check(found, back, back.abs(), 1)


@settings(max_examples=80, deadline=None)
@given(CASES, DTYPES, st.sampled_from([None, "same", torch.float32]))
def test_unpool_add_and_its_gradients(
    case: dict, dtype: torch.dtype, gate_dtype: torch.dtype | str | None
) -> None:
    drawn = draw(case)
    queries, rows = drawn.matrix.shape
    channels, seed, idle = case["channels"], case["seed"], drawn.idle[:, None]
    tokens = values(seed, rows, channels, dtype=dtype)
    before, after = (values(seed + k, queries, channels, dtype=dtype) for k in (1, 2))
    # the contract is "any finite values"; the kernels do not even need that
    before, after = before.masked_fill(idle, float("inf")), after.masked_fill(idle, float("nan"))
    inputs = [tokens, before, after]
    if gate_dtype is not None:
        kind = dtype if gate_dtype == "same" else torch.float32
        inputs.append(values(seed + 3, queries, dtype=kind))
    inputs = [tensor.requires_grad_() for tensor in inputs]
    gate = inputs[3] if len(inputs) == 4 else None
    output = unpool_add_op(tokens, inputs[1], inputs[2], gate, drawn.packing)
    x, q, y = (tensor.detach().double() for tensor in inputs[:3])
    q, y = q.masked_fill(idle, 0), y.masked_fill(idle, 0)
    g = torch.ones(queries, 1, device=DEVICE) if gate is None else gate.detach().double()[:, None]
    back = drawn.matrix.T
    size = x.abs() + back @ (g.abs() * (q.abs() + y.abs()))
    check(output.detach(), x + back @ (g * (y - q)), size, 4)
    grad = values(seed + 4, rows, channels, dtype=dtype)
    found = torch.autograd.grad(output, inputs, grad)
    assert torch.equal(found[0], grad)
    wide = grad.double()
    total, size = drawn.matrix @ wide, drawn.matrix @ wide.abs()
    longest = drawn.packing.members.longest
    # sums of a patch go through the gradient's dtype, and once more behind the gate
    for gradient, wanted in zip(found[1:3], (-g * total, g * total), strict=True):
        check(gradient, wanted, g.abs() * size, longest, 2)
        assert not gradient[drawn.idle].any()
    if gate is not None:
        # the sums' own rounding counts once for every channel
        along = (size * (y - q).abs()).sum(1)
        lost = ROUNDING[dtype] * (total * (y - q)).abs().sum(1) + SMALLEST * (y - q).abs().sum(1)
        error = (found[3].double() - (total * (y - q)).sum(1)).abs()
        allowed = lost + (longest + channels + 4) * ROUNDING[torch.float32] * along
        allowed += ROUNDING[gate.dtype] * (total * (y - q)).sum(1).abs() + SMALLEST
        assert bool((error <= 1.01 * allowed).all())
        assert not found[3][drawn.idle].any()


@pytest.mark.parametrize("name", ["collect", "spread", "pool", "unpool_add", "unpool_add_no_gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    drawn, (tokens, queries, updated, gate) = fixed_inputs(dtype)
    args: dict[str, tuple[Any, ...]] = {
        "collect": (tokens, *drawn.fields, True, True),
        "spread": (queries, *drawn.fields, False),
        "pool": (tokens, *drawn.fields),
        "unpool_add": (tokens, queries, updated, gate, *drawn.fields),
        "unpool_add_no_gate": (tokens, queries, updated, None, *drawn.fields),
    }
    overload = getattr(torch.ops.dgefx, name.removesuffix("_no_gate")).default
    torch.library.opcheck(overload, args[name])


def test_gradients_of_both_orders() -> None:
    drawn, (tokens, queries, updated, gate) = fixed_inputs(torch.float64)
    used = (~drawn.idle)[:, None]

    def pooled(x: Tensor) -> Tensor:
        # what idle queries hold has no gradient by contract, which differences do not know
        return torch.where(used, pool_rows_op(x, drawn.packing), 0)

    def unpooled(*inputs: Tensor) -> Tensor:
        x, q, y, g = inputs if len(inputs) == 4 else (*inputs, None)
        return unpool_add_op(x, q, y, g, drawn.packing)

    runs: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (pooled, (tokens,)),
        (unpooled, (tokens, queries, updated)),
        (unpooled, (tokens, queries, updated, gate)),
        (lambda x: collect(x, *drawn.fields, True, True), (tokens,)),
        (lambda q: spread(q, *drawn.fields, False), (queries,)),
    ]
    for run, inputs in runs:
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


def test_only_what_is_needed_is_differentiated() -> None:
    drawn, (tokens, queries, updated, gate) = fixed_inputs(torch.float32)
    output = unpool_add_op(tokens, queries.detach(), updated, gate.detach(), drawn.packing)
    output.sum().backward()  # also: a gradient whose rows are all the same memory
    assert torch.equal(tokens.grad, torch.ones_like(tokens))
    members = drawn.matrix.sum(1)[:, None] * gate.detach()[:, None]
    check(updated.grad, members.expand_as(updated), members.abs(), 16, 2)
    assert queries.grad is None and gate.grad is None


@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_equals_eager(backend: str) -> None:
    """One graph, forward and backward, for any number of queries."""
    drawn, inputs = fixed_inputs(torch.float32)

    def run(*inputs: Tensor, packing: Packing) -> Tensor:
        tokens, _, updated, gate = inputs
        queries = pool_rows_op(tokens, packing)
        return unpool_add_op(tokens, queries, updated * queries, gate, packing)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for case in (drawn, draw({**FIXED, "seed": 4}), draw({**FIXED, "count": 3, "prefix": 0})):
        queries, rows = case.matrix.shape
        shapes = ((rows, 3), (queries, 3), (queries, 3), (queries,))
        inputs = tuple(values(k, *s, dtype=torch.float32) for k, s in enumerate(shapes))
        for tensor in inputs:
            tensor.requires_grad_()
        wanted, found = run(*inputs, packing=case.packing), compiled(*inputs, packing=case.packing)
        used = (inputs[0], inputs[2], inputs[3])
        # the same float32 operations in another order: sums of 16 tokens or 3 channels
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        for a, b in zip(
            torch.autograd.grad(found.square().sum(), used),
            torch.autograd.grad(wanted.square().sum(), used),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_no_multiply_accumulates_are_counted() -> None:
    drawn, (tokens, queries, updated, gate) = fixed_inputs(torch.float32)
    with FlopCounterMode(display=False) as counter:
        pool_rows_op(tokens, drawn.packing).sum().backward()
        unpool_add_op(tokens, queries, updated, gate, drawn.packing).sum().backward()
    assert counter.get_total_flops() == 0
