"""What a probe changed, and what it leaves of a block's values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgefx
from dgefx.passes.sides.find_axes import _OWN_TOLERANCE, _TOLERANCE, _keep_changes
from tests.helpers import Attention, images

DIM = 16


def changed(base: Tensor, moved: Tensor) -> Tensor:
    """By the definition, in a mask."""
    if not base.is_floating_point():
        return base != moved
    scale = torch.nan_to_num(base.abs().amax(), nan=0.0, posinf=0.0)
    allowed = _OWN_TOLERANCE * base.abs() + _TOLERANCE * scale
    return (moved - base).abs() > torch.finfo(base.dtype).eps * allowed


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_changes_are_those_of_the_mask(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(40):
        base = (3 * torch.randn(shape, generator=generator)).to(dtype)
        step = torch.randn(shape, generator=generator) * 10.0 ** -(trial % 10)
        some = torch.rand(shape, generator=generator) < 0.5
        moved = torch.where(some, base + step.to(dtype), base)
        if dtype.is_floating_point and trial % 4 == 0:
            base = torch.where(torch.rand(shape, generator=generator) < 0.2, torch.inf, base)
            moved = torch.where(torch.rand(shape, generator=generator) < 0.2, torch.nan, moved)
        mask = changed(base, moved)
        kept, places = _keep_changes(base, moved)
        wanted = torch.where(mask, moved, base)
        same = kept.to(torch.float64).nan_to_num(1e9) == wanted.to(torch.float64).nan_to_num(1e9)
        if not bool(base.isnan().any() | moved.isnan().any()):
            assert bool(same.all())
        assert torch.equal(places, mask.nonzero())


class Normalised(nn.Module):
    """Divided by a number that is the same whatever the tokens are, but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(DIM), Attention(DIM, 2)
        self.mlp = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(self.attn(self.norm(x)), (DIM,), eps=1e-12)
        x = x + y / y.square().mean()
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Conv2d(3, DIM, 4, 4), Normalised()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.embed(x).flatten(2).transpose(1, 2))


def test_a_number_that_only_rounding_changes() -> None:
    torch.manual_seed(0)
    report = dgefx.explain(Model(), example_inputs=(images(2, 32),))
    assert [block.status for block in report.blocks] == ["converted"]
