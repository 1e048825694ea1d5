"""Acceptance 4: coarse levels, checked independently of the finest.

On a stream that is constant within every coarsest patch, pooled queries equal their tokens'
queries, so ANY routing must reproduce the dense block. Nothing of the library's verification is
used here: routing is imposed through a forward hook on the router.
"""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dgefx
from dgefx.nn.hierarchy import nested_levels
from tests.helpers import TinyViT, error, images, randomise, slow


def constant_within_patches(
    shape: tuple[int, int], side: int, channels: int, count: int, generator: torch.Generator
) -> Tensor:
    """(count, H, W, channels), one random value per patch of `side`."""
    height, width = shape
    rows, columns = -(-height // side), -(-width // side)
    values = torch.randn(count, rows, columns, channels, generator=generator)
    return values.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :height, :width]


def impose(block: nn.Module, levels: Tensor) -> None:
    block.dge_router.register_forward_hook(
        lambda router, inputs, _output: router.routing_for(inputs[0], levels, inputs[1])
    )


@settings(max_examples=12, deadline=None)
@given(
    height=st.integers(4, 13),
    width=st.integers(4, 13),
    prefix=st.integers(0, 3),
    order=st.sampled_from(["BNC", "BHWC", "BCHW"]),
    sides=st.sampled_from([(1, 2), (1, 2, 4), (1, 3), (1, 4), (1, 2, 6)]),
    factor=st.sampled_from([None, 1, 2]),  # None: nested routing
    count=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_routing_is_exact_on_patch_constant_input(
    height: int,
    width: int,
    prefix: int,
    order: str,
    sides: tuple[int, ...],
    factor: int | None,
    count: int,
    seed: int,
) -> None:
    prefix = prefix if order == "BNC" else 0
    dense = randomise(TinyViT(prefix=prefix, order=order, depth=1)).eval()
    region = None if factor is None else sides[-1] * factor
    config = dgefx.DGEConfig(granularities=sides, region=region)
    assert config.routing_mode == ("region" if factor else "nested")
    model = dgefx.convert(
        dense, 1.0, example_inputs=images(2, (4 * height, 4 * width)), config=config
    )
    generator = torch.Generator().manual_seed(seed)
    grid = constant_within_patches((height, width), sides[-1], 16, count, generator)
    x = grid
    if order == "BCHW":
        x = grid.permute(0, 3, 1, 2).contiguous()
    elif order == "BNC":
        head = torch.randn(count, prefix, 16, generator=generator)
        x = torch.cat([head, grid.flatten(1, 2)], 1)
    region = config.region_side
    regions = -(-height // region) * -(-width // region)
    levels = torch.randint(0, len(sides), (count, regions), generator=generator)
    if config.routing_mode == "nested":
        levels = nested_levels(levels, (height, width), sides)
    impose(model.blocks[0], levels)
    with torch.no_grad():
        found, wanted = model.blocks[0](x), dense.blocks[0](x)
    assert error(found - x, wanted - x) <= 1e-5


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "pvt_v2_b0", slow("eva02_tiny_patch14_224")]
)
def test_real_blocks_on_patch_constant_input(name: str) -> None:
    """With in-block positional terms zeroed: RoPE of angle 0, depthwise taps at the centre only."""
    torch.manual_seed(0)
    dense = randomise(timm.create_model(name)).eval()
    for module in dense.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            centre = torch.zeros_like(module.weight)
            centre[:, :, 1, 1] = module.weight.detach()[:, :, 1, 1]
            module.weight.data.copy_(centre)
    converted = dgefx.convert(dense, 1.0, filter_fn=lambda _m, n: n.endswith("blocks.0"))
    block = next(m for m in converted.modules() if isinstance(m, dgefx.nn.DGEBlock))
    fqn = next(n for n, m in converted.named_modules() if m is block)
    router = block.dge_router
    generator = torch.Generator().manual_seed(1)
    height, width = router.grid
    channels = dense.get_submodule(fqn).norm1.weight.shape[0]
    grid = constant_within_patches((height, width), 4, channels, 2, generator).flatten(1, 2)
    head = torch.randn(2, router.prefix, channels, generator=generator)
    x = torch.cat([head, grid], 1)
    extra: tuple[object, ...] = ()
    if name.startswith("pvt"):
        extra = ((height, width),)
    if name.startswith("eva"):
        angle = torch.zeros(height * width, channels // 3)  # 3 heads: sin and cos per head channel
        extra = (torch.cat([angle.sin(), angle.cos()], -1),)
    levels = torch.randint(0, 3, (2, router.region_cost_0.shape[0]), generator=generator)
    levels = nested_levels(levels, router.grid, (1, 2, 4))
    assert levels.unique().numel() == 3
    impose(block, levels)
    with torch.no_grad():
        found, wanted = block(x, *extra), dense.get_submodule(fqn)(x, *extra)
    assert error(found - x, wanted - x) <= 1e-5
