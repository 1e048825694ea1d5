"""The traced graph computes what the block computes, whatever the block does to its tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dgefx.nn.callspec import CallSpec
from dgefx.passes.errors import TraceError
from dgefx.passes.ops import run_node
from dgefx.passes.trace.block_trace import Trace, trace


class UnfusedAttention(nn.Module):
    """A block whose forward is a given function of (itself, input)."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.linear = nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.soft_drop = nn.Dropout(0.5, inplace=True)
        self.bias = nn.Parameter(torch.randn(6))
        self.register_buffer("count", torch.zeros(6))
        self.table = torch.randn(6)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def interpret(traced: Trace, *inputs: Any) -> Any:
    values: dict[fx.Node, Any] = {}
    remaining = list(inputs)
    for node in traced.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "output":
            return args[0]
        is_input = node.op == "placeholder"
        values[node] = remaining.pop(0) if is_input else run_node(node, traced.root, args, kwargs)
    raise AssertionError("no output")


def traced_as(block: nn.Module, training: bool = False) -> Trace:
    return trace(block, CallSpec.of(block, (torch.randn(2, 4, 6),), {}), training)


@torch.no_grad()
def require_same(function: Callable[[Any, Tensor], Tensor]) -> list[Trace]:
    """Trace in both modes; compare on other input, and on another number of images."""
    found = []
    for training in (False, True):
        block = UnfusedAttention(function)
        traced = traced_as(block, training)
        block.train(training)
        for images in (2, 3):
            x = torch.randn(images, 4, 6)
            torch.manual_seed(1)
            wanted = block(x.clone())
            torch.manual_seed(1)
            kept = x.clone()
            assert torch.allclose(interpret(traced, x), wanted, atol=1e-6)
            assert torch.equal(x, kept), "the graph changes its input"
        found.append(traced)
    return found


def operations(traced: Trace) -> set[str]:
    return {getattr(n.target, "__name__", str(n.target)) for n in traced.graph.nodes}


def augmented(_: Any, x: Tensor) -> Tensor:
    y = x * 2
    same = y
    y += 1
    y *= x
    return y + same


def number(_: Any, x: Tensor) -> Tensor:
    rows = x.shape[1]
    more = rows
    more += 2
    return x.reshape(-1, rows, 6) * more


def item(_: Any, x: Tensor) -> Tensor:
    y = x * 1
    y[:, 1:3] = 7
    y[:, 0, 2] = x[:, 3, 4]
    return y + x


def augmented_item(_: Any, x: Tensor) -> Tensor:
    y = x * 1
    y[:, 0] += x[:, 1]
    y[:, 1:][:, :2] *= 3
    return y


def zeroed_part(block: Any, x: Tensor) -> Tensor:
    bias = block.bias.clone()
    size = bias.numel() // 3
    bias[size : 2 * size].zero_()
    return x + bias


def earlier_view(_: Any, x: Tensor) -> Tensor:
    y = x * 1
    first, flat = y[:, :2], y.view(-1, 6)
    y.add_(5)
    first.mul_(2)
    return y + flat.view(y.shape) + first.sum()


def written_twice(_: Any, x: Tensor) -> Tensor:
    y = x * 1
    part = y[:, :2]
    part.zero_()
    part += 1
    y[:, 0] = 9
    part[..., 3].sub_(4)
    return y * part.mean()


def through_reshape(_: Any, x: Tensor) -> Tensor:
    y = x * 1
    y.view(x.shape[0], 2, 2, 6)[:, 1] = 0
    return y + 1


def parts(block: Any, x: Tensor) -> Tensor:
    q, k, v = block.linear(x).view(*x.shape[:2], 3, 2).permute(2, 0, 1, 3).unbind(0)
    q *= 0.5
    k[:, 1:] = k[:, 1:] + 3
    return torch.cat([q, k, v], -1)


def shared_activation(block: Any, x: Tensor) -> Tensor:
    y = block.linear(x)
    before = y + 0
    z = block.relu(y)
    return before + y * z


def activation_of_the_input(block: Any, x: Tensor) -> Tensor:
    return block.relu(x) + 1


def functional_activation(block: Any, x: Tensor) -> Tensor:
    y = block.linear(x)
    F.relu(y, inplace=True)
    torch.sigmoid_(y)
    return y


def dropped(block: Any, x: Tensor) -> Tensor:
    """In eval mode dropout hands its argument on: one tensor, not two."""
    y = x * 2
    z = block.drop(y)
    z += 1
    return y + block.soft_drop(z)


def drop_path(block: Any, x: Tensor) -> Tensor:
    if not block.training:
        return x
    noise = torch.empty([x.shape[0]] + [1] * (x.ndim - 1), dtype=x.dtype, device=x.device)
    noise.bernoulli_(0.5)
    noise.div_(0.5)
    return x * noise


def own_noise(_: Any, x: Tensor) -> Tensor:
    return x + torch.rand(4, 1)


def fill_after_reading(_: Any, x: Tensor) -> Tensor:
    y = x * 2
    total = y.sum()
    y.fill_(3)
    y[:, 1:].copy_(x[:, 1:])
    return y + total


def mask_to_size(_: Any, x: Tensor) -> Tensor:
    n = x.shape[1]
    mask = x.new_zeros((n, n))
    for count, part in enumerate((slice(0, -2), slice(-2, None))):
        mask[part, 1:] = count
    mask = mask.masked_fill_(mask != 0, -100.0)
    return (mask.softmax(-1) @ x) / math.sqrt(n)


def unsqueezed(_: Any, x: Tensor) -> Tensor:
    y = x.mean(1)
    y.unsqueeze_(1)
    y += 1
    return x + y


def cached(block: Any, x: Tensor) -> Tensor:
    if block.training:
        return x + block.bias * 2
    key = str(x.device)
    if "bias" not in block.cache:
        block.cache["bias"] = block.bias * 2
    return x + block.cache["bias"] + (0 if key else 1)


def other_constants(block: Any, x: Tensor) -> Tensor:
    mask = torch.zeros(4, 6)
    mask[1] = 2
    mask += x[0]
    return x + mask + block.table


@pytest.mark.parametrize(
    "function",
    [
        augmented,
        number,
        item,
        augmented_item,
        zeroed_part,
        earlier_view,
        written_twice,
        through_reshape,
        parts,
        shared_activation,
        functional_activation,
        dropped,
        drop_path,
        own_noise,
        fill_after_reading,
        mask_to_size,
        unsqueezed,
        cached,
        other_constants,
    ],
    ids=lambda f: f.__name__,
)
def test_same_as_the_block(function: Callable[[Any, Tensor], Tensor]) -> None:
    require_same(function)


def test_an_activation_in_place_does_not_reach_the_input() -> None:
    x = torch.randn(2, 4, 6)
    traced = traced_as(UnfusedAttention(activation_of_the_input))
    block = UnfusedAttention(activation_of_the_input)
    # the block's own modules work in place, those of the traced copy do not
    traced.root = block
    kept = x.clone()
    assert torch.equal(interpret(traced, x), block.relu(x.clone()) + 1)
    assert torch.equal(x, kept)


def test_an_item_is_written_once() -> None:
    def function(_: Any, x: Tensor) -> Tensor:
        y = x * 1
        y[:, 0] += 1
        return y

    for traced in require_same(function):
        assert (
            sum(n.target.__name__ == "set_item" for n in traced.graph.nodes if callable(n.target))
            == 1
        )


def base_after_part(block: Any, x: Tensor) -> Tensor:
    y = block.linear(x)
    first, _ = y.chunk(2, -1)
    first += 1
    return y


def through_transpose(_: Any, x: Tensor) -> Tensor:
    y = x * 1
    y.transpose(1, 2)[:, 0] = 0
    return y


def parameter(block: Any, x: Tensor) -> Tensor:
    block.bias.data.add_(1)
    return x + block.bias


def buffer(block: Any, x: Tensor) -> Tensor:
    block.count[0] = x.sum()
    return x + block.count


def constant_item(_: Any, x: Tensor) -> Tensor:
    mask = torch.zeros(4, 6)
    mask[0] = x[0, 0]
    return x + mask


def constant_alias(_: Any, x: Tensor) -> Tensor:
    mask = torch.zeros(4, 6)
    alias = mask[:2]
    mask += x[0]
    return x[:, :2] + alias


def out_argument(_: Any, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.add(x, 1, out=y)
    return y


def widened(_: Any, x: Tensor) -> Tensor:
    y = (x > 0).to(torch.int64)
    y.clamp_(0.5, 1.5)
    return x * y


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (base_after_part, "through a view"),
        (through_transpose, "through a view"),
        (parameter, "parameter, buffer or constant in place"),
        (buffer, "parameter, buffer or constant in place"),
        (constant_item, "constant tensor"),
        (constant_alias, "constant tensor"),
        (out_argument, "out="),
        (widened, "another shape or type"),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_what_cannot_be_followed_is_refused(
    function: Callable[[Any, Tensor], Tensor], message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        traced_as(UnfusedAttention(function))


@fx.wrap
def wrapped_pair(x: Tensor, factor: Tensor) -> tuple[Tensor, int]:
    x = x * factor
    return x, x.shape[1]


def test_wrapped_functions_are_traced_through() -> None:
    def function(block: Any, x: Tensor) -> Tensor:
        y, rows = wrapped_pair(x, block.bias)
        return y.view(-1, rows, 6) + 1

    for traced in require_same(function):
        assert "wrapped_pair" not in operations(traced)


@fx.wrap
def wrapped_listing(x: Tensor) -> Tensor:
    return x + torch.tensor(x.tolist()).sum() if isinstance(x, Tensor) else 1 / 0


def test_a_wrapped_function_that_cannot_be_traced_stays_a_call() -> None:
    def function(_: Any, x: Tensor) -> Tensor:
        return wrapped_listing(x)

    for traced in require_same(function):
        assert "wrapped_listing" in operations(traced)


def test_noise_is_drawn_anew() -> None:
    traced = traced_as(UnfusedAttention(own_noise))
    x = torch.zeros(2, 4, 6)
    assert not torch.equal(interpret(traced, x), interpret(traced, x))


def test_a_cache_stays_a_function_of_its_parameter() -> None:
    block = UnfusedAttention(cached).eval().requires_grad_(False)
    x = torch.randn(2, 4, 6)
    block(x)
    held = dict(block.cache)
    traced = traced_as(block)
    assert not traced.constants
    assert block.cache.keys() == held.keys() and block.cache["bias"] is held["bias"]
    with torch.no_grad():
        traced.root.bias.add_(1)
    assert torch.allclose(interpret(traced, x), x + (block.bias + 1) * 2)


def test_a_dictionary_that_the_block_needs_is_kept() -> None:
    def function(block: Any, x: Tensor) -> Tensor:
        for shift in block.cache.values():
            x = x + shift
        return x

    block = UnfusedAttention(function).eval()
    block.cache["shift"] = torch.randn(6)
    x = torch.randn(2, 4, 6)
    assert torch.allclose(interpret(traced_as(block), x), block(x))


def test_a_parameter_that_is_read_without_gradients_learns_elsewhere() -> None:
    def function(block: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            size = block.bias.abs().amax()
        return x * block.bias / size

    block = UnfusedAttention(function)
    traced = traced_as(block)
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        block.bias.copy_(torch.randn(6))
        traced.root.bias.copy_(block.bias)
    block(x).square().sum().backward()
    with torch.enable_grad():
        interpret(traced, x).square().sum().backward()
    assert torch.allclose(traced.root.bias.grad, block.bias.grad, rtol=1e-5)


def test_sizes_stay_symbolic() -> None:
    """A mask made to the size of the input follows it."""
    block = UnfusedAttention(mask_to_size)
    x = torch.randn(2, 9, 6)
    assert torch.allclose(interpret(traced_as(block), x), block(x), atol=1e-6)


def test_a_tensor_of_the_same_type_is_not_made_of_data() -> None:
    (trained, _) = require_same(mask_to_size)
    (made,) = [n for n in trained.graph.nodes if n.target is torch.zeros]
    assert all(n.target in (getattr, operator.getitem) for n in made.all_input_nodes)
