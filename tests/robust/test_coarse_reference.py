"""Coarse levels are compared at conversion with un-pool, dense operation, pool.

Families of blocks of which no identity holds below the finest granularity: the comparison runs and
passes on the library as it is, and refuses the block where a kernel is wrong for coarse patches
only (at the finest, and for fine tokens beside coarse ones, nothing is).
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgefx
from dgefx.config import DGEConfig
from dgefx.kernels import constants, full_resolution, pool, stencil, window
from dgefx.kernels.routing import Routing
from dgefx.passes.pipeline import analyse
from tests.helpers import error, images, randomise
from tests.windowed import TinySwin, WindowBlock

SIDE, DIM, HEADS = 8, 24, 2


class Block(nn.Module):
    """Pre-norm on (B, N, C); with what a family adds to it.

    Args:
        mixes: a convolution, on the hidden layer of the MLP or on the main path (`on_path`).
    """

    def __init__(
        self,
        mixes: nn.Module | None = None,
        on_path: bool = False,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention,
    ) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM)
        self.proj, self.up, self.down = (nn.Linear(DIM, DIM) for _ in range(3))
        self.mixes, self.on_path, self.attend = mixes, on_path, attend

    def _mixed(self, x: Tensor) -> Tensor:
        if self.mixes is None:
            return x
        return self.mixes(x.transpose(1, 2).unflatten(2, (SIDE, SIDE))).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))
        if self.on_path:
            x = self._mixed(x)
        hidden = self.up(x)
        return x + self.down(F.gelu(hidden if self.on_path else self._mixed(hidden)))


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embed, self.block = nn.Conv2d(3, DIM, 4, 4), block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.embed(x).flatten(2).transpose(1, 2))


def _timm(name: str, **options: object) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, depth=1, img_size=64, embed_dim=48, num_heads=2, **options)
    return randomise(model).eval(), images(2, 64)


def _own(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Model(make()).eval(), images(2, 4 * SIDE)


def _swin(shift: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return TinySwin(WindowBlock(shift=(shift, shift))).eval(), images(2, 48)


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "relative position bias": lambda: _timm("beit_base_patch16_224", patch_size=8),
    "decomposed position bias": lambda: _timm(
        "samvit_base_patch16_224", patch_size=8, window_size=0, global_attn_indexes=(0,)
    ),
    "rotary positions": lambda: _timm("eva02_tiny_patch14_224", patch_size=8),
    "rotary positions, registers": lambda: _timm("vit_small_patch16_dinov3", patch_size=8),
    "windows": lambda: _swin(0),
    "shifted windows": lambda: _swin(2),
    "depthwise MLP": lambda: _own(lambda: Block(nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM))),
    "full resolution": lambda: _own(lambda: Block(nn.Conv2d(DIM, DIM, 3, padding=1))),
    "strided convolution": lambda: _own(
        lambda: Block(nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2)))
    ),
    "convolution on the main path": lambda: _own(
        lambda: Block(nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM), on_path=True)
    ),
}


def _reasons(family: str, config: DGEConfig | None = None) -> list[str | None]:
    model, x = FAMILIES[family]()
    found = analyse(model, (x,), config or DGEConfig(), None, must_convert=False)
    reasons = [found.reasons.get(block) for block in found.blocks]
    return [None if reason is None else reason.text for reason in reasons]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_runs_and_passes(family: str) -> None:
    from dgefx.passes.emit.coarse_reference import CoarseReference

    run = CoarseReference.run
    with mock.patch.object(CoarseReference, "run", autospec=True, side_effect=run) as spied:
        assert _reasons(family) == [None]
    # timm's EVA blocks take a mask: that form is compared as well
    assert spied.call_count == 1 + family.startswith("rotary positions")


def test_the_comparison_covers_packed_queries() -> None:
    from dgefx.passes.emit.coarse_reference import CoarseReference

    run = CoarseReference.run
    with mock.patch.object(CoarseReference, "run", autospec=True, side_effect=run) as spied:
        for family in ("rotary positions", "depthwise MLP"):
            assert _reasons(family, DGEConfig(budget="average")) == [None]
    assert spied.call_count == 3  # as above


# -- kernels that are wrong for coarse patches only ------------------------------------------


def _first_rows(table: Tensor, routing: Routing) -> Tensor:
    """Of a table, the entries of a patch's first token instead of their mean."""
    count = table.shape[1]
    parts = [table]
    for patch, tokens in zip(routing.token_patch[1:], routing.patch_tokens[1:], strict=True):
        first = torch.full((len(tokens),), count - 1)
        first = first.scatter_reduce(0, patch, torch.arange(count), "amin")
        parts.append(table[:, first])
    return torch.cat(parts, 1)


def _sums_of_one(*args: object) -> list[Tensor]:
    """Of a window's table, four times the patch's first child instead of the sum of four."""
    sums = pool.patch_sums(*args)  # type: ignore[arg-type]
    for level in range(1, len(sums)):
        sums[level] = (
            4
            * F.pad(sums[level - 1], (0, 0, 0, 1, 0, 1))[:, ::2, ::2][
                :, : sums[level].shape[1], : sums[level].shape[2]
            ]
        )
    return sums


def _own_tap_alone(hidden: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
    """A coarse patch does not read its neighbours."""
    centre = torch.zeros_like(weight)
    middle = weight.shape[-1] // 2
    centre[..., middle, middle] = weight[..., middle, middle]
    right, wrong = (_DENSE_CONV(hidden, w, bias, routing) for w in (weight, centre))
    coarse = torch.arange(right.shape[2]) >= routing.capacities[0]
    return torch.where(coarse[:, None], wrong, right)


_DENSE_CONV = stencil.full_resolution_conv


def _wrong_count(sums: Tensor, tokens: Tensor | int, dtype: torch.dtype) -> Tensor:
    return _PATCH_MEANS(sums, tokens, dtype) * 0.9


_PATCH_MEANS = pool.patch_means

MUTATIONS = {
    "relative position bias": (constants, "_hierarchy_rows", _first_rows),
    "rotary positions": (constants, "_hierarchy_rows", _first_rows),
    "rotary positions, registers": (constants, "_hierarchy_rows", _first_rows),
    "decomposed position bias": (window, "patch_sums", _sums_of_one),
    "windows": (window, "patch_sums", _sums_of_one),
    "shifted windows": (window, "patch_sums", _sums_of_one),
    "depthwise MLP": (stencil, "full_resolution_conv", _own_tap_alone),
    "full resolution": (full_resolution, "patch_means", _wrong_count),
    "strided convolution": (full_resolution, "patch_means", _wrong_count),
    "convolution on the main path": (pool, "patch_means", _wrong_count),
}


@pytest.mark.parametrize("family", MUTATIONS)
def test_a_kernel_that_is_wrong_for_coarse_patches_is_found(family: str) -> None:
    owner, name, wrong = MUTATIONS[family]
    with mock.patch.object(owner, name, wrong):
        (reason,) = _reasons(family)
    assert "mixed granularities differ from un-pool, operation, pool by" in (reason or "converted")


def test_blocks_of_one_structure_are_compared_once() -> None:
    from dgefx.passes.emit.coarse_reference import CoarseReference

    torch.manual_seed(0)
    model = timm.create_model(
        "eva02_tiny_patch14_224", depth=3, img_size=64, patch_size=8, embed_dim=48, num_heads=2
    )
    run = CoarseReference.run
    with mock.patch.object(CoarseReference, "run", autospec=True, side_effect=run) as spied:
        converted = dgefx.convert(randomise(model).eval(), 1.0, example_inputs=images(2, 64))
    assert len(dgefx.report(converted).blocks) == 3
    assert spied.call_count == 2  # as they are called, and with a mask


def test_blocks_of_a_structure_that_was_refused_are_not_taken_on_trust() -> None:
    """Their graphs are those of the first block, whose coarse levels were found wrong."""
    torch.manual_seed(0)
    model = timm.create_model(
        "eva02_tiny_patch14_224", depth=3, img_size=64, patch_size=8, embed_dim=48, num_heads=2
    )
    with mock.patch.object(constants, "_hierarchy_rows", _first_rows):
        x = images(2, 64)
        found = analyse(randomise(model).eval(), (x,), DGEConfig(), None, must_convert=False)
    assert ["un-pool" in reason.text for reason in found.reasons.values()] == [True] * 3


# -- masks: a query sees the keys that all its tokens see ------------------------------------


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _spellings(mask: Tensor) -> dict[str, tuple[Attend, Attend]]:
    """(with a boolean mask, with the same mask added) of the same price."""
    hidden = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)

    def fused(mask: Tensor) -> Attend:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask)

    def written(hide: Callable[[Tensor], Tensor]) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return hide(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v

        return attend

    infinite, added = torch.tensor(-torch.inf), written(lambda s: s + hidden)
    return {
        "fused": (fused(mask), fused(hidden)),
        "masked_fill": (written(lambda s: s.masked_fill(~mask, -torch.inf)), added),
        "where": (written(lambda s: torch.where(mask, s, infinite)), added),
        "where not": (written(lambda s: torch.where(~mask, infinite, s)), added),
        "method": (written(lambda s: s.where(mask, infinite)), added),
    }


@pytest.mark.parametrize("spelling", ["fused", "masked_fill", "where", "where not", "method"])
def test_masks_mean_the_same_however_they_are_written(spelling: str) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(SIDE**2, SIDE**2, generator=generator) < 0.8
    mask[:, :6] = True  # what all tokens see
    found = []
    x = images(2, 4 * SIDE, seed=3)
    for attend in _spellings(mask)[spelling]:
        torch.manual_seed(0)
        dense = Model(Block(attend=attend)).eval()
        converted = dgefx.convert(dense, 0.6, example_inputs=x)
        with torch.no_grad():
            found.append(converted(x))
            assert error(found[-1], dense(x)) > 1e-3
    assert error(*found) < 1e-6
