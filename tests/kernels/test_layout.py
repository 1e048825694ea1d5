"""Streams as tokens and back: strides of one image too, which PyTorch's batch norm looks at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dgefx.kernels.layout import from_tokens, to_tokens


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("order", ["BHWC", "BCHW", "BNC", "BCN", "NBC"])
def test_there_and_back(order: str, images: int) -> None:
    tokens = torch.randn(images, 12, 5)
    stream = from_tokens(tokens, order, (3, 4))
    assert torch.equal(to_tokens(stream, order), tokens)


def test_a_plane_of_one_image_has_the_strides_of_several() -> None:
    one, two = (from_tokens(torch.randn(n, 12, 5), "BCHW", (3, 4)).stride() for n in (1, 2))
    assert one == two


@pytest.mark.parametrize("images", [1, 2])
def test_gradients_through_a_convolution_and_a_batch_norm(images: int) -> None:
    """Of one image transposed before it was cut into rows, PyTorch 2.14 gave others on the CPU."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)).double()
    layers.eval()[1].running_var.uniform_(0.5, 2.0)
    tokens = torch.randn(images, 49, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(images, 49, 8, dtype=torch.float64)
    found = to_tokens(layers(from_tokens(tokens, "BCHW", (7, 7))), "BCHW")
    (gradient,) = torch.autograd.grad((found * weights).sum(), tokens)
    # several images at once, of which the others have no part
    more = torch.cat([tokens, torch.randn(3, 49, 8, dtype=torch.float64)])
    found = to_tokens(layers(from_tokens(more, "BCHW", (7, 7))), "BCHW")[:images]
    (wanted,) = torch.autograd.grad((found * weights).sum(), tokens)
    assert torch.allclose(gradient, wanted, rtol=1e-10, atol=1e-12)
