"""Grids are read off what the model does to its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgefx.passes.capture import capture
from dgefx.passes.layout import Layout
from dgefx.passes.locate.grid import GridFinder
from dgefx.passes.locate.refusal import Cause
from tests.helpers import images

WIDTH = 6


class Model(nn.Module):
    """A patch embedding of 8 x 8 pixels, then a given function of (model, (B, H, W, C))."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.embed = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.norm, self.merge = nn.LayerNorm(4 * WIDTH), nn.Linear(4 * WIDTH, 2 * WIDTH)
        self.wide = nn.Linear(2 * WIDTH, 2 * WIDTH)
        self.same = nn.Linear(WIDTH, WIDTH)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.embed(x).permute(0, 2, 3, 1))


def layout_of(
    function: Callable[[Any, Tensor], Tensor], size: int | tuple[int, int] = 32
) -> Layout | Cause:
    captured = capture(Model(function).eval(), (images(2, size),), {})
    (result,) = next(n for n in captured.graph.nodes if n.op == "output").all_input_nodes
    return GridFinder().layout(result)


def padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))


def quarters(x: Tensor) -> list[Tensor]:
    return [x[:, row::2, column::2] for column in range(2) for row in range(2)]


def by_reshape(model: Any, x: Tensor) -> Tensor:
    x = padded(x)
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
    return model.merge(model.norm(x))


def by_slices(model: Any, x: Tensor) -> Tensor:
    """The linear layer first, as in Swin v2."""
    return model.wide(model.merge(torch.cat(quarters(padded(x)), -1)))


def to_sequence(model: Any, x: Tensor) -> Tensor:
    x = torch.cat(quarters(padded(x)), -1)
    return model.merge(model.norm(x.view(x.shape[0], -1, 4 * WIDTH)))


def from_sequence(model: Any, x: Tensor) -> Tensor:
    b, h, w, c = x.shape
    x = x.reshape(b, h * w, c)
    return to_sequence(model, x.view(b, h, w, c))


@pytest.mark.parametrize("size", [32, (24, 40), (28, 20)])
@pytest.mark.parametrize("merge", [by_reshape, by_slices, to_sequence, from_sequence])
def test_patch_merging_lays_out_a_new_grid(
    merge: Callable[[Any, Tensor], Tensor], size: int | tuple[int, int]
) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    grid = ((height // 4 + 1) // 2, (width // 4 + 1) // 2)
    order = "BNC" if merge in (to_sequence, from_sequence) else "BHWC"
    # no module's output shows the new grid's size
    assert layout_of(merge, size) == Layout(order, grid, 0, None)


def test_merging_twice() -> None:
    def function(model: Any, x: Tensor) -> Tensor:
        x = model.wide(by_reshape(model, x))[..., :WIDTH]
        return by_reshape(model, x)

    assert layout_of(function) == Layout("BHWC", (2, 2), 0, None)


def test_merging_rows_alone() -> None:
    def function(model: Any, x: Tensor) -> Tensor:
        x = torch.cat([x[:, i::4] for i in range(4)], -1)
        return model.merge(x)

    assert layout_of(function) == Layout("BHWC", (2, 8), 0, None)


@pytest.mark.parametrize("kernel, stride, padding", [(3, 2, 0), (3, 2, 1), (3, 1, 1), (2, 2, 1)])
def test_patches_that_overlap_or_start_in_the_padding(
    kernel: int, stride: int, padding: int
) -> None:
    """The soft split of T2T-ViT."""
    project = nn.Linear(WIDTH * kernel**2, WIDTH)

    def function(_: Any, x: Tensor) -> Tensor:
        x = F.unfold(x.permute(0, 3, 1, 2), kernel, padding=padding, stride=stride)
        return project(x.transpose(1, 2))

    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (8, 10))
    assert layout_of(function, (32, 40)) == Layout("BNC", (height, width), 0)


def test_patches_of_unlike_shapes_have_no_grid() -> None:
    def function(model: Any, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        square, line = x[:, [0, 1, 8, 9]].flatten(1), x[:, 2:6].flatten(1)
        return model.merge(torch.stack([square, line], 1))

    assert isinstance(layout_of(function), Cause)


def test_irregular_merging_has_no_grid() -> None:
    def function(model: Any, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        first, second = x[:, :32], x[:, 32:].flip(1)
        return model.merge(torch.cat([first, second, first, second], -1))

    assert isinstance(layout_of(function), Cause)


def test_token_mixing_is_no_merging() -> None:
    mixer = nn.Linear(64, 64)

    def function(_: Any, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        return x + mixer(x.transpose(1, 2)).transpose(1, 2)

    assert layout_of(function) == Layout("BNC", (8, 8), 0, "embed")


def windows(x: Tensor, shift: int) -> Tensor:
    b, h, w, c = x.shape
    x = torch.roll(x, (-shift, -shift), (1, 2))
    x = x.view(b, h // 4, 4, w // 4, 4, c).transpose(2, 3)
    return x.reshape(-1, 16, c)


def unwindowed(x: Tensor, like: Tensor, shift: int) -> Tensor:
    b, h, w, c = like.shape
    x = x.view(b, h // 4, w // 4, 4, 4, c).transpose(2, 3).reshape(like.shape)
    return torch.roll(x, (shift, shift), (1, 2))


@pytest.mark.parametrize("shift", [0, 2])
def test_windows_and_back(shift: int) -> None:
    def function(model: Any, x: Tensor) -> Tensor:
        return unwindowed(model.same(windows(x, shift)), x, shift)

    assert layout_of(function) == Layout("BHWC", (8, 8), 0, "embed")


def test_padded_windows_and_back() -> None:
    def function(model: Any, x: Tensor) -> Tensor:
        wide = F.pad(x, (0, 0, 0, 3, 0, 1))
        return x + unwindowed(model.same(windows(wide, 0)), wide, 0)[:, :7, :5]

    assert layout_of(function, (28, 20)) == Layout("BHWC", (7, 5), 0, "embed")


def test_streams_in_parts_of_an_image() -> None:
    # a line of a window is a part of its own
    found = layout_of(lambda _, x: windows(x, 0).view(x.shape[0], -1, 4, WIDTH))
    assert isinstance(found, Layout)
    assert (found.order, found.grid) == ("B16NC", (1, 4))
    # one part holds the image
    whole = layout_of(lambda _, x: x.reshape(x.shape[0], 1, -1, WIDTH))
    assert isinstance(whole, Layout)
    assert (whole.order, whole.grid) == ("B1NC", (8, 8))


def test_a_convolution_that_keeps_the_plane_keeps_the_tokens() -> None:
    def function(model: Any, x: Tensor) -> Tensor:
        return model.depthwise(x.permute(0, 3, 1, 2))

    assert layout_of(function) == Layout("BCHW", (8, 8), 0, "embed")

    def in_windows(model: Any, x: Tensor) -> Tensor:
        y = windows(x, 0).view(-1, 4, 4, WIDTH).permute(0, 3, 1, 2)
        return unwindowed(model.depthwise(y).permute(0, 2, 3, 1), x, 0)

    assert layout_of(in_windows) == Layout("BHWC", (8, 8), 0, "embed")


@pytest.mark.parametrize("way", ["cat", "pad"])
def test_tokens_without_a_place_are_the_prefix(way: str) -> None:
    def function(model: Any, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        if way == "pad":
            return F.pad(x, (0, 0, 1, 0)) + model.class_token
        return torch.cat([model.class_token.expand(x.shape[0], -1, -1), x], 1)

    assert layout_of(function) == Layout("BNC", (8, 8), 1, "embed")


@pytest.mark.parametrize("channels", [8, WIDTH])
def test_samples_lie_where_their_places_do(channels: int) -> None:
    """Deformable attention on a grid with as many rows and columns as channels, and with more."""
    places, weigh, value = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 1), nn.Linear(WIDTH, channels)

    def function(_: Any, x: Tensor) -> Tensor:
        plane = value(x).permute(0, 3, 1, 2)
        sampled = F.grid_sample(plane, places(x).tanh(), align_corners=False)
        return sampled * weigh(x).softmax(-1).permute(0, 3, 1, 2)

    assert layout_of(function) == Layout("BCHW", (8, 8), 0, "embed")
