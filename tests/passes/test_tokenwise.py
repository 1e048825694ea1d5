"""Which modules of a block stay calls: those that give every token what it is alone."""

from __future__ import annotations

import pytest
import torch
from timm.layers import DropPath, LayerNorm2d, Mlp
from torch import Tensor, nn
from torchvision.models.maxvit import SwapAxes

from dgefx.passes.trace.token_wise import is_token_wise


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, 1)


class Mirrored(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x + x.flip(1)


class First(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x + x[:, :1]


class Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x + x[:, -1:]


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[1]]


class OverImages(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x - x.mean(0, keepdim=True)


class Counted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.shape[1]


APART = {
    "mlp": (Mlp(8, 16), (2, 9, 8)),
    "with dropout": (Mlp(8, 16, drop=0.5), (2, 9, 8)),
    "norm": (nn.LayerNorm(8), (2, 9, 8)),
    "norm of planes": (LayerNorm2d(8), (2, 8, 3, 3)),
    "of a plane of tokens": (Mlp(8, 16), (2, 3, 3, 8)),
}
TOGETHER = {
    "order": (Shifted(), (2, 9, 8)),
    "mirrored": (Mirrored(), (2, 9, 8)),
    "first": (First(), (2, 9, 8)),
    "last": (Last(), (2, 9, 8)),
    "position": (Positions(), (2, 9, 8)),
    "number of tokens": (Counted(), (2, 9, 8)),
    "axes of a grid": (SwapAxes(-2, -3), (2, 4, 4, 8)),
    "images": (OverImages(), (2, 9, 8)),
    "number of features": (nn.Linear(8, 24), (2, 9, 8)),
    # draws once for an image, and drops so rarely that two images do not show it
    "rare drop path": (DropPath(1e-3), (2, 9, 8)),
    "drop path": (DropPath(0.5), (2, 9, 8)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", APART)
def test_apart(name: str, training: bool) -> None:
    module, size = APART[name]
    assert is_token_wise(module.train(training), torch.randn(size))


@pytest.mark.parametrize("name", TOGETHER)
def test_together(name: str) -> None:
    module, size = TOGETHER[name]
    assert not is_token_wise(module.train(), torch.randn(size))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="torch seeds a device that is there")
def test_seeds_queue_nothing_for_devices_that_are_not_there() -> None:
    before = len(torch.cuda._queued_calls)
    is_token_wise(DropPath(0.5).train(), torch.randn(2, 9, 8))
    assert len(torch.cuda._queued_calls) == before
