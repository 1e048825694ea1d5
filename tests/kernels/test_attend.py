"""`attend`: Triton under its interpreter, and the operator, against a float64 loop over queries."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # read once, when Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from typing import Any, NamedTuple

import pytest
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

from dgefx.kernels.attend import attend
from dgefx.kernels.dispatch import has_triton
from tests.helpers import COMPILERS

needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton has no wheel here")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    offsets: Tensor
    bias: Tensor | None
    bias_row: Tensor | None
    scale: float


class Answer(NamedTuple):
    out: Tensor
    lse: Tensor
    grads: tuple[Tensor, ...]  # of q, k, v and, where there is one, bias


CASES = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(0, 40), min_size=1, max_size=4),
        "idle": st.tuples(st.integers(0, 18), st.integers(0, 18)),
        "heads": st.integers(1, 2),
        "keys": st.sampled_from([1, 7, 16, 33, 49]),
        "head": st.sampled_from([8, 16, 24, 40]),
        "value": st.sampled_from([8, 16, 24, 48]),
        "bias": st.sampled_from([None, 1, "heads"]),
        "packed": st.booleans(),
        "seed": st.integers(0, 999),
    }
)


def draw(case: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> tuple[Case, Tensor]:
    """Arguments of `attend` and a gradient of its result."""
    generator = torch.Generator().manual_seed(case["seed"])

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    groups, heads = len(case["lengths"]), case["heads"]
    front, behind = case["idle"]
    bounds = torch.tensor([front, *case["lengths"]]).cumsum(0)
    rows = int(bounds[-1]) + behind
    sizes = case["head"], case["head"], case["value"]
    if case["packed"]:  # as models make them: one projection, sliced and transposed
        q = random(1, rows, heads, sizes[0] + 3)[..., : sizes[0]].transpose(1, 2)
        q = q.squeeze(0).transpose(0, 1)
        both = random(groups, case["keys"], heads, sizes[1] + sizes[2]).transpose(1, 2)
        k, v = both.split(sizes[1:], 3)
    else:
        q = random(heads, rows, sizes[0]).transpose(0, 1)
        k, v = (random(groups, heads, case["keys"], size) for size in sizes[1:])
    bias = bias_row = None
    if case["bias"] is not None:
        patterns = 5
        bias = random(patterns, heads if case["bias"] == "heads" else 1, case["keys"])
        bias[0] = -torch.inf  # every key ruled out
        bias[1, :, : case["keys"] // 2] = -torch.inf
        bias_row = torch.randint(patterns, (rows,), generator=generator).to(device)
    grad = random(rows, heads, sizes[2])
    # what an idle row holds, and the gradient that it gets, must not matter
    idle = torch.ones(rows, dtype=torch.bool)
    idle[int(bounds[0]) : int(bounds[-1])] = False
    q[idle.to(device)], grad[idle.to(device)] = 1e4, 1e4
    arguments = Case(q, k, v, bounds.to(device), bias, bias_row, case["head"] ** -0.5)
    return arguments, grad


def naive(case: Case, grad: Tensor) -> Answer:
    """Query after query and head after head in float64."""
    q, k, v = (t.detach().double().cpu().requires_grad_() for t in (case.q, case.k, case.v))
    bias = None if case.bias is None else case.bias.detach().double().cpu().requires_grad_()
    heads, rows = q.shape[1], q.shape[0]
    bounds = case.offsets.tolist()
    nothing = torch.zeros(v.shape[3], dtype=torch.float64)
    out, lse = [], torch.zeros(rows, heads, dtype=torch.float64)
    for row in range(rows):
        group = sum(bound <= row for bound in bounds) - 1
        while 0 <= group < len(bounds) - 1 and bounds[group + 1] == bounds[group]:
            group += 1
        for head in range(heads):
            if not 0 <= group < len(bounds) - 1:
                out.append(nothing)
                continue
            score = k[group, head] @ q[row, head] * case.scale
            if bias is not None and case.bias_row is not None:
                score = score + bias[case.bias_row[row], head % bias.shape[1]]
            if bool((score == -torch.inf).all()):
                out.append(nothing)
                continue
            out.append(score.softmax(0) @ v[group, head])
            lse[row, head] = score.detach().logsumexp(0)
    made = torch.stack(out).view(rows, heads, -1) if out else grad.double().cpu()
    inputs = [q, k, v] if bias is None else [q, k, v, bias]
    if made.requires_grad:
        (made * grad.double().cpu()).sum().backward()
    grads = tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in inputs)
    return Answer(made.detach(), lse, grads)


def poisoned(shape: tuple[int, ...], **options: Any) -> Tensor:
    return torch.full(shape, torch.nan, **options)


def by_triton(case: Case, grad: Tensor, small: bool = True) -> Answer:
    from dgefx.kernels.attend import _sum_rows
    from dgefx.kernels.gpu.attend_backward import launch_attend_backward
    from dgefx.kernels.gpu.attend_forward import launch_attend_forward
    from dgefx.kernels.gpu.attend_tiles import Tiles

    # the smallest blocks: small inputs then have several
    tiles = Tiles(16, 16, 4, 1) if small else None
    out, lse = launch_attend_forward(*case, tiles=tiles, empty=poisoned)
    *grads, scores = launch_attend_backward(
        grad, *case[:3], out, lse, *case[3:], case.bias is not None, tiles=tiles, empty=poisoned
    )
    if case.bias is not None:
        grads.append(_sum_rows(scores, case.bias, case.bias_row, case.q))
    return Answer(out, lse, tuple(grads))


def by_operator(case: Case, grad: Tensor) -> Answer:
    inputs = [t.detach().requires_grad_() for t in case[:3]]
    bias = None if case.bias is None else case.bias.detach().requires_grad_()
    out = attend(*inputs, case.offsets, bias, case.bias_row, case.scale)
    grads = torch.autograd.grad(out, inputs if bias is None else [*inputs, bias], grad)
    lse = torch.ops.dgefx.attend(*inputs, case.offsets, bias, *case[5:])[1]
    return Answer(out.detach(), lse.detach(), grads)


def check(found: Answer, exact: Answer, tolerance: float) -> None:
    """Every result within `tolerance` of the largest value there is, and never NaN.

    Gradients of scores are differences of two sums over a value's components, which may cancel
    (with one key to attend to they are zero): as many terms of size one, at random signs.
    """
    names = ("out", "lse", "q", "k", "v", "bias")
    results = (*found[:2], *found.grads), (*exact[:2], *exact.grads)
    for name, a, b in zip(names, *results, strict=False):
        assert a.shape == b.shape, name
        if b.numel() == 0:
            continue
        size = max(1.0, b.abs().max().item())
        if name in ("q", "k", "bias"):
            size = max(size, exact.out.shape[2] ** 0.5)
        error = (a.double().cpu() - b).abs().max().item()
        assert error <= tolerance * size, (name, error)


# float32 rounds by 6e-8; sums here have up to 49 keys or 40 queries, whose errors, at random
# signs, make some ten roundings; 4e-6 leaves a factor of five
FLOAT = 4e-6
# float16 rounds by 5e-4: inputs are exact in float64 too, so what remains is P and dS rounded
# once each before their product, the result, and `delta` of the rounded result; a factor of four
HALF = 4e-3
# bfloat16 rounds by 4e-3; as above
BRAIN = 3e-2


@needs_triton
@settings(max_examples=10, deadline=None)
@given(CASES)
def test_triton_is_exact(case: dict[str, Any]) -> None:
    arguments, grad = draw(case, torch.float32, DEVICE)
    check(by_triton(arguments, grad), naive(arguments, grad), FLOAT)


# in the interpreter bfloat16 is loaded and stored as such, but multiplied as float32
@needs_triton
@settings(max_examples=6, deadline=None)
@given(CASES, st.sampled_from([(torch.bfloat16, BRAIN), (torch.float16, HALF)]))
def test_triton_in_half_precision(case: dict[str, Any], kind: tuple[torch.dtype, Any]) -> None:
    dtype, tolerance = kind
    arguments, grad = draw(case, dtype, DEVICE)
    check(by_triton(arguments, grad), naive(arguments, grad), tolerance)


PLAIN: dict[str, Any] = {
    "lengths": [30, 0, 70],
    "idle": (3, 9),
    "heads": 2,
    "keys": 49,
    "head": 40,
    "value": 40,
    "bias": "heads",
    "packed": True,
    "seed": 0,
}


TILES: list[dict[str, Any]] = [
    {},
    {"bias": None, "head": 80, "value": 128},
    {"lengths": [300], "idle": (0, 0), "keys": 64, "heads": 1, "bias": 1},
    {"lengths": [0, 0], "idle": (0, 5)},
    {"lengths": [0], "idle": (0, 0)},
]
MANY_GROUPS = {"lengths": [1] * 130, "keys": 3, "heads": 1}  # more than are compared at once


@needs_triton
@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        *((change, dtype) for change in TILES for dtype in (torch.float32, torch.float16)),
        (MANY_GROUPS, torch.float32),
        pytest.param(MANY_GROUPS, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_chosen_tiles(change: dict[str, Any], dtype: torch.dtype) -> None:
    arguments, grad = draw(PLAIN | change, dtype, DEVICE)
    tolerance = FLOAT if dtype == torch.float32 else HALF
    check(by_triton(arguments, grad, small=False), naive(arguments, grad), tolerance)


@needs_triton
def test_triton_repeats() -> None:
    arguments, grad = draw(PLAIN, torch.float32, DEVICE)
    first, second = by_triton(arguments, grad), by_triton(arguments, grad)
    for a, b in zip((*first[:2], *first.grads), (*second[:2], *second.grads), strict=True):
        assert torch.equal(a, b)


def test_operator_repeats() -> None:
    arguments, grad = draw(PLAIN, torch.float32, DEVICE)
    first, second = by_operator(arguments, grad), by_operator(arguments, grad)
    for a, b in zip((*first[:2], *first.grads), (*second[:2], *second.grads), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=15, deadline=None)
@given(CASES, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_operator(case: dict[str, Any], dtype: torch.dtype) -> None:
    arguments, grad = draw(case, dtype, DEVICE)
    # in float64 both round by 1e-16
    tolerance = {torch.float64: 1e-13, torch.float32: FLOAT, torch.bfloat16: BRAIN}[dtype]
    found = by_operator(arguments, grad)
    assert found.out.is_contiguous() and found.out.dtype == dtype
    check(found, naive(arguments, grad), tolerance)


@pytest.mark.parametrize("bias", [None, 1])
@pytest.mark.parametrize("value", [8, 16])
def test_registration(bias: int | None, value: int) -> None:
    """Schema, fakes and autograd of both operators; and the gradient by finite differences."""
    small = {"lengths": [3, 0, 2], "idle": (1, 2), "keys": 5, "head": 8, "value": value}
    case, grad = draw(PLAIN | small | {"bias": bias}, torch.float64)
    # finite differences need finite biases
    shift = None if case.bias is None else case.bias.clamp(min=-2.0).requires_grad_()
    q, k, v = (t.detach().clone().requires_grad_() for t in case[:3])
    arguments = (q, k, v, case.offsets, shift, case.bias_row, 0.3)
    torch.library.opcheck(torch.ops.dgefx.attend.default, arguments)
    out, lse = (t.detach() for t in torch.ops.dgefx.attend(*arguments))
    fixed = tuple(t.detach() if isinstance(t, Tensor) else t for t in arguments)
    torch.library.opcheck(
        torch.ops.dgefx.attend_backward.default,
        (grad, *fixed[:3], out, lse, *fixed[3:], bias is not None),
        # no derivative of its own, and none registered
        test_utils=("test_schema", "test_faketensor"),
    )
    with torch.no_grad():
        # outputs of idle rows do not depend on them, but 1e4 would lose the differences' digits
        q.clamp_(-2.0, 2.0)
    inputs = [t for t in (q, k, v, shift) if t is not None]

    def function(q: Tensor, k: Tensor, v: Tensor, shift: Tensor | None = None) -> Tensor:
        return attend(q, k, v, case.offsets, shift, case.bias_row, 0.3)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("backend", COMPILERS)
def test_compiles_without_a_break(backend: str) -> None:
    arguments, grad = draw(PLAIN, torch.float32)

    def function(
        q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bias: Tensor, bias_row: Tensor
    ) -> Tensor:
        return attend(q * 2, k, v, offsets, bias, bias_row) + 1

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend=backend)):
        inputs = [t.detach().clone().requires_grad_() for t in (*arguments[:3], arguments.bias)]
        q, k, v, bias = inputs
        out = call(q, k, v, arguments.offsets, bias, arguments.bias_row)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    for eager, compiled in zip(*results, strict=True):
        # the same operator on the same bits; only the product and the sum around it are Inductor's
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


def test_counted_like_dense_attention() -> None:
    q, k, v = (torch.randn(3, 2, 20, 16) for _ in range(3))
    packed = q.transpose(1, 2).flatten(0, 1).requires_grad_()
    offsets = torch.arange(0, 61, 20)
    # on one device torch counts both or neither
    with FlopCounterMode(display=False) as fused:
        F.scaled_dot_product_attention(q, k, v)
    with FlopCounterMode(display=False) as ragged:
        attend(packed, k, v, offsets)
    assert ragged.get_total_flops() == fused.get_total_flops()
    # its formulas, on a device without a fused attention
    q, k, v, offsets = (t.detach().to("meta") for t in (q, k, v, offsets))
    packed = packed.detach().to("meta").requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as dense:
        F.scaled_dot_product_attention(q, k, v)
    with FlopCounterMode(display=False) as forward:
        out = attend(packed, k, v, offsets)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    product = 2 * 60 * 2 * 20 * 16
    assert forward.get_total_flops() == dense.get_total_flops() == 2 * product
    # as fused attention's: scores are computed again
    shapes = [q.shape] * 4
    assert backward.get_total_flops() == sdpa_backward_flop_count(*shapes) == 5 * product


def test_autocast_takes_mixed_dtypes() -> None:
    """As `scaled_dot_product_attention`: a normalised query is float32 beside a bfloat16 value."""
    case, _ = draw(PLAIN | {"bias": None}, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(case.q, case.k, case.v.bfloat16(), case.offsets)
    expected = attend(*(t.bfloat16() for t in case[:3]), case.offsets)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", lambda c: c._replace(q=c.q[0])),
        ("k", lambda c: c._replace(k=c.k[..., 1:])),
        ("k", lambda c: c._replace(k=c.k[:, :, :0], v=c.v[:, :, :0])),
        ("k", lambda c: c._replace(k=c.k.double())),
        ("v", lambda c: c._replace(v=c.v[:, :, 1:])),
        ("v", lambda c: c._replace(v=c.v.bfloat16())),
        ("offsets", lambda c: c._replace(offsets=c.offsets[1:])),
        ("offsets", lambda c: c._replace(offsets=c.offsets.int())),
        ("bias must", lambda c: c._replace(bias=c.bias[..., 1:])),
        ("bias must", lambda c: c._replace(bias=c.bias.repeat(1, 2, 1))),
        ("bias_row is needed", lambda c: c._replace(bias_row=None)),
        ("bias_row without", lambda c: c._replace(bias=None)),
        ("bias_row must", lambda c: c._replace(bias_row=c.bias_row[1:])),
    ],
)
def test_wrong_arguments_are_named(name: str, change: Any) -> None:
    case, _ = draw(PLAIN, torch.float32)
    with pytest.raises(ValueError, match=f"^{name}"):
        attend(*change(case))
