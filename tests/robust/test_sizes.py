"""Numbers that forwards make of a tensor's shape, in every way of writing it: those of the running
call, whatever the example's were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgefx
from dgefx import DGEConfig
from tests.helpers import error

DIM, HEADS = 32, 4
Heads = Callable[[Tensor, Tensor, Tensor], Tensor]


def _heads(x: Tensor) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)."""
    return x.view(x.shape[0], -1, HEADS, DIM // HEADS).transpose(1, 2)


def _joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, heads, N, D), as (B, N, C)."""
    mixed = F.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).reshape(mixed.shape[0], -1, DIM)


def size_by_keyword(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(q.size(dim=0), q.size(dim=1), HEADS, DIM // HEADS).transpose(1, 2)
    k = k.view(q.size(dim=0), -1, HEADS, DIM // HEADS).transpose(1, 2)
    v = v.view(q.size(dim=0), q.size(dim=2), HEADS, DIM // HEADS).transpose(1, 2)
    return _joined(q, k, v)


def elements_of_leading_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.reshape(q.shape[:-1].numel() // q.shape[1], -1, DIM)
    return _joined(_heads(q), _heads(k), _heads(v))


def elements_by_any_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[1]
    k = k.reshape(q.nelement() // (n * DIM), n, DIM) * (n * DIM / torch.numel(q))
    return _joined(_heads(q), _heads(k), _heads(v))


def unflatten_by_keyword(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(dim=-1, sizes=(HEADS, DIM // HEADS)).transpose(1, 2)
    return _joined(q, _heads(k), _heads(v))


def unflatten_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = torch.unflatten(q, dim=-1, sizes=(HEADS, DIM // HEADS)).transpose(1, 2)
    return _joined(q, _heads(k), _heads(v))


def reshape_by_keyword(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, n, _ = q.shape
    q = torch.reshape(input=q, shape=(b, n, HEADS, DIM // HEADS)).transpose(1, 2)
    return _joined(q, _heads(k), _heads(v))


def heads_before_images(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads and images on one axis, heads first: no axis is that of the images."""
    q, k, v = (torch.cat(t.split(DIM // HEADS, -1), 0) for t in (q, k, v))
    k = k.view(q.shape[0], -1, DIM // HEADS)
    mixed = ((q @ k.transpose(1, 2)) * (DIM // HEADS) ** -0.5).softmax(-1) @ v
    mixed = mixed.reshape(q.shape[0], q.shape[1], DIM // HEADS)
    return torch.cat(mixed.split(mixed.shape[0] // HEADS, 0), -1)


def whole_shape_of_another(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (torch.cat(t.split(DIM // HEADS, -1), 0) for t in (q, k, v))
    mixed = ((q @ k.transpose(1, 2)) * (DIM // HEADS) ** -0.5).softmax(-1) @ v
    mixed = mixed.reshape(shape=k.shape)
    return torch.cat(mixed.chunk(HEADS, 0), -1)


class Attention(nn.Module):
    def __init__(self, mix: Heads) -> None:
        super().__init__()
        self.mix = mix
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(self.mix(q, k, v))


class Block(nn.Module):
    """`results` is what it returns beside the stream, of the values of its last line."""

    def __init__(self, attention: nn.Module, results: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.attention, self.results = attention, results
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Any:
        y = self.norm1(x)
        if self.results is None:
            x = x + self.attention(y)
            return x + self.mlp(self.norm2(x))
        mixed, weights = self.attention(y, y, y, need_weights=False)
        x = x + mixed
        x = x + self.mlp(self.norm2(x))
        return self.results(x, mixed, weights)


class Model(nn.Module):
    """Also returns what its block returns beside the stream."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, DIM, 4, 4), nn.ModuleList([block])
        self.head = nn.Linear(DIM, 5)

    def forward(self, image: Tensor) -> Any:
        x, more = self.patches(image).flatten(2).transpose(1, 2), None
        for block in self.blocks:
            found = block(x)
            found = tuple(found.values()) if isinstance(found, dict) else found
            x, *more = found if isinstance(found, tuple) else (found,)
        return self.head(x.mean(1)), more


EXAMPLE = (2, 3, 32, 32)
CALLS = (EXAMPLE, (3, 3, 32, 32), (1, 3, 32, 32), (3, 3, 48, 40))


@pytest.mark.parametrize(
    "mix",
    [
        size_by_keyword,
        elements_of_leading_axes,
        elements_by_any_name,
        unflatten_by_keyword,
        unflatten_function,
        reshape_by_keyword,
        heads_before_images,
        whole_shape_of_another,
    ],
)
def test_sizes_are_those_of_the_running_call(mix: Heads) -> None:
    model = Model(Block(Attention(mix))).eval()
    converted = dgefx.convert(model, 1.0, example_inputs=torch.randn(EXAMPLE)).eval()
    for shape in CALLS:
        x = torch.randn(shape)
        assert error(converted(x)[0], model(x)[0]) < 1e-5, shape


def without_weights(x: Tensor, mixed: Tensor, weights: Tensor | None) -> Any:
    return x, weights


def in_a_dict(x: Tensor, mixed: Tensor, weights: Tensor | None) -> Any:
    return {"x": x, "weights": weights}


def type_and_rank(x: Tensor, mixed: Tensor, weights: Tensor | None) -> Any:
    return x, mixed.dtype, mixed.dim(), mixed.is_floating_point()


def shape(x: Tensor, mixed: Tensor, weights: Tensor | None) -> Any:
    return x, mixed.shape, mixed.size(), mixed.shape[1:]


def numbers(x: Tensor, mixed: Tensor, weights: Tensor | None) -> Any:
    return x, mixed.shape[1], mixed.size(dim=1), mixed.numel(), mixed.shape[:2].numel()


@pytest.mark.parametrize("budget", ["per_image", "average"])
@pytest.mark.parametrize("results", [without_weights, in_a_dict, type_and_rank, shape, numbers])
def test_results_that_are_no_tensors_are_those_of_the_dense_block(
    results: Callable[..., Any], budget: Any
) -> None:
    attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    model = Model(Block(attention, results)).eval()
    given, config = torch.randn(EXAMPLE), DGEConfig(budget=budget)
    converted = dgefx.convert(model, 0.8, example_inputs=given, config=config).eval()
    for size in CALLS:
        x = torch.randn(size)
        found, wanted = converted(x)[1], model(x)[1]
        assert found == wanted
        assert [type(value) for value in found] == [type(value) for value in wanted]


def test_strides_of_queries_are_not_those_of_the_example() -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = torch.as_strided(q, q.size(), q.stride())
        return _joined(_heads(q), _heads(k), _heads(v))

    (block,) = dgefx.explain(
        Model(Block(Attention(mix))), example_inputs=torch.randn(EXAMPLE)
    ).blocks
    assert "reads a number off what is not computed" in block.reason


class CroppingAttention(nn.Module):
    """As in LowFormer: what is made larger than the grid may be is cut to it by the sizes of its
    input."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Conv2d(DIM, 3 * DIM, 1), nn.Conv2d(DIM, DIM, 1)
        self.local = nn.ConvTranspose2d(DIM, DIM, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        b, _, h, w = (qkv := self.qkv(x)).shape
        q, k, v = qkv.reshape(b, HEADS, -1, h * w).transpose(2, 3).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, -1, h, w)
        return self.local(self.proj(mixed))[..., :height, :width]


class PlaneBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.GroupNorm(1, DIM), CroppingAttention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


class PlaneModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, DIM, 4, 4), PlaneBlock()

    def forward(self, image: Tensor) -> Tensor:
        return self.block(self.patches(image)).mean((2, 3))


def test_a_crop_to_the_grid_is_none_for_queries() -> None:
    model = PlaneModel().eval()
    converted = dgefx.convert(model, 1.0, example_inputs=torch.randn(EXAMPLE)).eval()
    for shape in CALLS:
        x = torch.randn(shape)
        assert error(converted(x), model(x)) < 1e-5, shape
